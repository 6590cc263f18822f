"""How far is ours from the real open_flamingo 2.0.1? `python benchmarks/parity.py [--quick] [--json FILE]`.

With equal random weights over tiny backbones, on ragged batches (tests/peer.py): max|a−b| / max|b| of the logits, the
loss and the gradient of each trained tensor, and how many of four samples get other ids, greedily and with 3 beams.
Exit code 1 where a difference is above the tolerance of its precision.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from _record import publish

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the code that the tests share

from tests.peer import FAMILIES, TOLERANCE, generations, pair_of, training_differences

COLUMNS = ("logits", "loss", "gradients", "greedy", "beams")


def compare(family: str, every: int, padded: bool, dtype: torch.dtype) -> tuple[dict[str, float], str]:
    """Figures by `COLUMNS`, and the name of the tensor whose gradient differs most."""
    pair = pair_of(family, every=every, padded=padded, dtype=dtype)
    found = training_differences(pair)
    gradients = {name.removeprefix("gradient "): v for name, v in found.items() if name.startswith("gradient ")}
    worst = max(gradients, key=gradients.__getitem__)
    figures = {"logits": found["logits"], "loss": found["loss"], "gradients": gradients[worst]}
    for name, beams in (("greedy", 1), ("beams", 3)):
        figures[name] = sum(ours != theirs for ours, theirs in zip(*generations(pair, beams), strict=True))
    return figures, worst


def main() -> None:
    """Compare, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape of each family instead of four")
    parser.add_argument("--json", help="where to keep the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shapes = [(1, True)] if options.quick else [(every, padded) for every in (1, 2) for padded in (True, False)]
    largest: dict[str, float] = {}
    missed = []
    print(f"{'LM':<9}{'every':>6}{'rows':>8}{'precision':>11}" + "".join(f"{name:>11}" for name in COLUMNS) + "  most")
    for family in FAMILIES:
        for dtype, tolerance in TOLERANCE.items():
            precision = str(dtype).removeprefix("torch.")
            for every, padded in shapes:
                figures, worst = compare(family, every, padded, dtype)
                row = f"{family:<9}{every:>6}{'padded' if padded else 'full':>8}{precision:>11}"
                print(row + "".join(f"{figures[name]:>11.2g}" for name in COLUMNS) + f"  {worst}", flush=True)
                for name, value in figures.items():
                    key = f"{family} {precision} {name}"
                    largest[key] = max(largest.get(key, 0), value)
                    if not value <= (0 if name in ("greedy", "beams") else tolerance):
                        missed.append(f"{key} {value:.2g}")
    publish({**largest, "tolerances missed": "; ".join(missed) or "none"}, options.json)
    if missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
