"""Does the quickstart reach its bars for every seed? `python benchmarks/quickstart.py [--quick] [--json FILE]`.

Runs `flamingo-quickstart` for seeds 0, 1 and 2 (about six minutes each on two cores; --quick: seed 0, in small) and
prints the accuracies of each seed, their means, and the seconds. Exit code 1 where a bar is missed (not with --quick).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from _record import publish

BARS = {("glyphs_5way", "1"): 0.90, ("glyphs_5way", "4"): 0.94, ("digits_5way", "4"): 0.75, ("naming", "0"): 0.95}
SPREAD = 0.02
"""how far below its bar a single seed may be, and how far the mean may not"""
CHANCE_MARGIN = 0.05
SMALL = ["--steps", "20", "--episodes", "20", "--data.glyphs.naming", "500", "--data.glyphs.episodes", "500"]


def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seed 0 alone, a few steps: shows that it runs")
    parser.add_argument("--json", help="where to keep the results")
    parser.add_argument("--out", default="runs/seeds", help="folder of the runs; must not hold any")
    options = parser.parse_args()
    summaries = {}
    for seed in (0,) if options.quick else (0, 1, 2):
        out = Path(options.out, "quick" if options.quick else str(seed))
        if (out / "summary.json").exists():
            parser.error(f"--out: {out} holds an earlier run, whose figures may be another commit's")
        command = [sys.executable, "-m", "train.quickstart", "--seed", str(seed), "--out", str(out)]
        subprocess.run([*command, *(SMALL if options.quick else [])], check=True)
        summaries[seed] = json.loads((out / "summary.json").read_text())
    figures: dict[str, float | str] = {}
    missed = []
    for seed, summary in summaries.items():
        figures[f"seed {seed} seconds"] = float(sum(summary["seconds"].values()))
    for task, cells in summaries[0]["tasks"].items():
        for shots in cells:
            values = [summary["tasks"][task][shots] for summary in summaries.values()]
            figures.update({f"seed {s} {task} {shots}-shot": v for s, v in zip(summaries, values, strict=True)})
            mean = figures[f"mean {task} {shots}-shot"] = statistics.fmean(values)
            bar = BARS.get((task, shots))
            if bar is not None and (mean < bar or min(values) < bar - SPREAD):
                missed.append(f"{task} {shots}-shot: mean {mean:.3f}, lowest {min(values):.3f}, bar {bar}")
    for seed, summary in summaries.items():
        for control, tasks in summary["controls"].items():
            for task, value in tasks.items():
                figures[f"seed {seed} {control} {task}"] = value
                if abs(value - summary["chance"][task]) > CHANCE_MARGIN:
                    missed.append(f"seed {seed} {control} {task}: {value:.3f}, chance {summary['chance'][task]}")
    figures["bars missed"] = "; ".join(missed) or "none"
    publish(figures, options.json, summaries=summaries)
    if missed and not options.quick:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
