"""How fast are the matrix products of `flamingo.products` beside those of torch?

    python benchmarks/products.py [--quick] [--json FILE]

Forward, and both gradients, of layers of OPT-125M's shapes: at a training step's 2,048 rows, and forward alone at the
few rows of decoding, where the matrix must come from memory (so there are many of each). On Intel's processors and
without AVX-512 both are the same, and all ratios about 1.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from _record import publish
from torch import Tensor
from torch.nn.functional import linear

from flamingo import products

SHAPES = [(768, 768), (768, 3072), (3072, 768), (768, 50272)]
"""inputs and outputs"""


def seconds(work: Callable[[], object], rounds: int) -> float:
    """The median over rounds, after one for warming up."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return median(times[1:])


def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds: shows that it runs")
    parser.add_argument("--json", help="where to keep the results")
    options = parser.parse_args()
    rounds = 1 if options.quick else 9
    figures: dict[str, float | str] = {"oneDNN is taken here": str(products.available())}

    def compare(name: str, ours: Callable[[], object], torchs: Callable[[], object], operations: float) -> None:
        fast, plain = seconds(ours, rounds), seconds(torchs, rounds)
        figures[f"{name} GFLOP/s ours"] = operations / fast / 1e9
        figures[f"{name} GFLOP/s torch"] = operations / plain / 1e9
        figures[f"ratio {name} vs torch"] = plain / fast

    def multiply(left: Tensor, right: Tensor) -> Callable[[], Tensor]:
        return lambda: products.product(left, right)

    for inputs, outputs in SHAPES:
        copies = max(1, (1 << 25) // (inputs * outputs))
        matrices = [torch.randn(outputs, inputs) for _ in range(copies)]
        shape = f"{inputs}x{outputs}"
        for rows in (1, 3, 8):
            stream = torch.randn(rows, inputs)

            def through(stream: Tensor = stream, matrices: list[Tensor] = matrices) -> list[Tensor]:
                return [linear(stream, matrix) for matrix in matrices]

            def fast(work: Callable[[], object] = through) -> None:
                with products.fast_products(), torch.no_grad():
                    work()

            compare(f"forward_{shape}_{rows}_rows", fast, through, 2.0 * copies * rows * inputs * outputs)
        rows, matrix = 2048, matrices[0]
        stream, outer = torch.randn(rows, inputs), torch.randn(rows, outputs)
        for name, left, right in (
            ("forward", stream, matrix.T),
            ("gradient_of_stream", outer, matrix),
            ("gradient_of_matrix", outer.T, stream),
        ):
            work = 2.0 * rows * inputs * outputs
            compare(f"{name}_{shape}_{rows}_rows", multiply(left, right), lambda a=left, b=right: a @ b, work)
    publish(figures, options.json)


if __name__ == "__main__":
    main()
