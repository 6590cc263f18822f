"""Does the quickstart reach its bars for every seed? `python benchmarks/quickstart.py [--quick] [--json FILE]`.

Runs `flamingo-quickstart` for seeds 0, 1 and 2 (eight to nine minutes each on two cores; --quick: seed 0, in small) and
prints the accuracies of each seed, their means, and the seconds; of held-out instructions those of both models. Exit
code 1 where a bar is missed (not with --quick).
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
FORGOTTEN = 0.03
"""of 5-way accuracy at 4 shots, the most that tuning may cost"""
SMALL = ["--steps", "20", "--episodes", "20", "--data.glyphs.naming", "500", "--data.glyphs.episodes", "500"]
SMALL += ["--tuning_steps", "20", "--instructions", "10"]


def instructions(seed: int, summary: dict, figures: dict[str, float | str]) -> list[str]:
    """Enter the figures of tuning, and return the bars that are missed."""
    scores = summary["instructions"]
    for name, by_shots in scores.items():
        figures.update({f"seed {seed} instructions {name} {shots} examples": v for shots, v in by_shots.items()})
    for task, by_shots in summary["tasks_tuned"].items():
        figures.update({f"seed {seed} tuned {task} {shots}-shot": v for shots, v in by_shots.items()})
    no_better = [shots for shots, value in scores["tuned"].items() if value <= scores["untuned"][shots]]
    cost = summary["tasks"]["glyphs_5way"]["4"] - summary["tasks_tuned"]["glyphs_5way"]["4"]
    return [f"seed {seed}: tuned no better at {shots} examples" for shots in no_better] + (
        [f"seed {seed}: tuning costs {cost:.3f} of glyphs_5way at 4 shots"] if cost > FORGOTTEN else []
    )


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
        missed += instructions(seed, summary, figures)
    figures["bars missed"] = "; ".join(missed) or "none"
    publish(figures, options.json, summaries=summaries)
    if missed and not options.quick:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
