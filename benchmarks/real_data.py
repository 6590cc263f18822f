"""What does a model score on real pictures that it was never trained on, and under the controls?

    python benchmarks/real_data.py --model runs/quickstart/model --data ../shared/data [--quick] [--json FILE]

Omniglot's handwriting and photographs of clothes under invented names, the clothes under their own, sentences about
drawings (NLVR) and captions of photographs. Of the quickstart's model the last three ask for words that it does not
have: what they show is that everything from the files to the report works.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from tempfile import TemporaryDirectory

from _record import publish

from icl_eval.diagnostics import CONTROLS
from icl_eval.evaluation import evaluate
from icl_eval.run import identity, load

TASKS: dict[str, tuple[int, ...]] = {
    "omniglot_5way": (1, 4, 5),
    "omniglot_20way": (1, 4, 5),
    "fashion_5way": (1, 4, 5),
    "fashion": (0, 1, 4),
    "nlvr": (0, 4),
    "coco_photos": (0, 4),
}
"""task → its shots; the controls are run at 4"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="runs/quickstart/model", help="folder of a saved Flamingo")
    parser.add_argument("--data", default=os.environ.get("FLAMINGO_TEST_DATA", "../shared/data"))
    parser.add_argument(
        "--quick", action="store_true", help="20 queries of each cell, instead of 1000 or all there are"
    )
    parser.add_argument("--json", help="where to keep the results")
    options = parser.parse_args()
    if not Path(options.model).is_dir():
        print(f"--model {options.model}: no such folder; make quickstart, or give another model")
        raise SystemExit(0 if options.quick else 2)  # `make bench` is for fresh clones too
    model, processor = load(options.model, "cpu")
    figures: dict[str, float | str] = {}
    for task, shots in TASKS.items():
        with TemporaryDirectory() as out:
            results = evaluate(
                model,
                processor,
                [task],
                shots=shots,
                controls=CONTROLS,
                queries=20 if options.quick else None,
                data=options.data,
                out=out,
            )
        for cell in results.cells:
            about = f"{task}, {cell.shots} shots" + (f", {cell.control}" if cell.control else "")
            name, figure = next(iter(cell.score.figures.items()))
            figures[f"{about}: {name}"] = figure.value
            figures[f"{about}: {name}, 95 %"] = " to ".join(f"{end:.3f}" for end in figure.interval or ())
    publish(figures, options.json, model=identity(options.model)["sha256"])


if __name__ == "__main__":
    main()
