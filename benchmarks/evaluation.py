"""How fast is a few-shot evaluation, beside open_flamingo's model driven as its own evaluation drives it?

    python benchmarks/evaluation.py [--quick] [--json FILE]
    python benchmarks/evaluation.py --plot FILE

Both rank the same candidates after the same prompts, with equal weights (OPT-125M, ViT-B/32), in turn, each in a
process of its own; first their scores must be equal. open_flamingo (`icl_eval.peers.open_flamingo`) encodes all images
of each query, reads its prompt in one pass and each candidate in one more over the cached prompt, for a batch of up
to 8 queries at once. All prompts of a case have one length, so that it pads nothing. Costs are seconds a query, with
all that a run begins with (ours encodes each image once a run).

- demonstrations of each query's own, drawn from 32 pictures, and shared ones; ten candidates;
- the 1000 class names of ImageNet, after 2 shared demonstrations: all scores, and the exact five best. For this the
  upper LM is tuned here to say class names, a few of them most often, since with random weights every token is about as
  likely as another and hardly anything can be left out: both shares of label tokens are printed.

Beside FILE.json comes FILE.svg, the cost of a query against demonstrations; --plot draws it of a file that is there.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from _models import Place, Shape, Worker, backbones, open_flamingo_over, ours_with
from _record import publish
from PIL import Image as PilImage
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from flamingo import Document, Image, Text
from icl_eval.charts import Series, line_chart
from icl_eval.engine import Chunk, Engine, Ladder, Query
from icl_eval.peers.open_flamingo import OpenFlamingo
from icl_eval.ranking import best_only

MERGED = 2000
"""tokens that are trained: so many that class names have about as many as by GPT-2's tokenizer"""
CANDIDATES = 10
POOL = 32
"""pictures that demonstrations of a query's own are drawn from"""
PEER_BATCH = 8
"""open_flamingo's default"""
LIKELY = -2.9
"""nats: mean log-likelihood of label tokens from which on labels count as peaked"""
BATCH, LAST_STEPS = 25, 20
"""names of a step of tuning, and steps over which it is looked at"""
FREQUENT = 16
"""class names that make four fifths of those: as of a picture, few names come into question"""
QUIET = 0.1
"""gates, and what the tuned LM's layers add at first as a share of what random ones do"""
EQUAL = 2e-3
"""nats, of sums of up to a dozen tokens, in float32"""


@cache
def class_names() -> tuple[str, ...]:
    """ImageNet's, as open_flamingo asks for them."""
    spec = find_spec("open_flamingo")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit("open_flamingo is not installed; make install")
    file = Path(spec.submodule_search_locations[0]) / "eval" / "classification_utils.py"
    return tuple(runpy.run_path(str(file))["IMAGENET_CLASSNAMES"])


def tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """A byte-level BPE of class names, filled up to the tokens of the LM."""
    bpe = ByteLevelBPETokenizer()
    texts = [f"Output:{name}" for name in class_names()]
    bpe.train_from_iterator(texts, vocab_size=min(MERGED, shape.words), min_frequency=1, show_progress=False)
    bpe.add_tokens([f"<unused{n}>" for n in range(shape.words - bpe.get_vocab_size())])
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="!", eos_token="!", pad_token='"')


class Pictures:
    """JPEGs of coarse noise (`icl_eval.engine.Library`)."""

    def __init__(self, size: int):
        self.size = size
        self.drawn: dict[int, Image] = {}

    def name(self, index: int) -> str:
        """Of a picture: its number."""
        return str(index)

    def media(self, indices: Sequence[int]) -> list[Image]:
        """Pictures, each drawn once."""
        for index in indices:
            if index not in self.drawn:
                coarse = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
                buffer = io.BytesIO()
                PilImage.fromarray(coarse).resize((self.size, self.size)).save(buffer, "JPEG")
                self.drawn[index] = Image(buffer.getvalue(), f"{index}.jpg")
        return [self.drawn[index] for index in indices]


@dataclass(frozen=True)
class Case:
    """What is ranked: `queries`, each after `shots` demonstrations, with the first `candidates` class names."""

    queries: int
    shots: int
    shared: bool
    candidates: int
    top_k: int | None = None

    def ladders(self, words: PreTrainedTokenizerFast) -> list[Ladder]:
        """Prompts of one length."""
        names = class_names()
        shown = [name for name in names if len(words.tokenize(name)) == 3]
        made = []
        for number in range(self.queries):
            rng = np.random.default_rng(0 if self.shared else number)
            pool = self.shots if self.shared else POOL
            demonstrations = tuple(
                Chunk((int(image), f"Output:{shown[image % len(shown)]}"))
                for image in rng.choice(pool, self.shots, replace=False)
            )
            query = Query(self.shots, Chunk((10_000 + number, "Output:")), names[: self.candidates])
            made.append(Ladder(demonstrations, (query,), str(number)))
        return made


class Side:
    """Ours or open_flamingo, in evaluation."""

    def __init__(self, name: str, place: Place):
        self.name, self.place = name, place
        self.words = tokenizer(place.shape)
        self.ours, self.processor = ours_with(place, self.words)
        self.ours.eval()
        self.peer: Any = None
        if name == "open_flamingo":
            self.peer = open_flamingo_over(place, *backbones(place.shape)).eval()
            del self.ours
        self.pictures = Pictures(place.shape.image)

    def rank(self, case: Case) -> tuple[float, np.ndarray, float]:
        """Seconds a query, scores (queries, candidates), and the share of label tokens that was computed."""
        ladders, scores, share = case.ladders(self.words), [], 1.0
        self.pictures.media([index for ladder in ladders for index in ladder.media])

        def work() -> None:
            nonlocal share
            if self.peer is not None:
                peer = OpenFlamingo(self.peer, self.processor, batch_size=PEER_BATCH)
                scores.extend(peer.rank(self.pictures, ladders, top_k=case.top_k))
                return
            engine = Engine(self.ours, self.processor)
            scores.extend(engine.rank(self.pictures, ladders, top_k=case.top_k))
            share = engine.label_tokens_read / engine.label_tokens

        seconds = self.place.seconds(work)
        return seconds / case.queries, np.array([row for (row,) in scores]), share

    def tokens_a_name(self) -> float:
        """Of the class names, `<|endofchunk|>` included."""
        return float(np.mean([len(self.words.tokenize(name)) + 1 for name in class_names()]))

    def tune(self, file: str, count: int, steps: int) -> tuple[float, int]:
        """Tune the LM's two last layers and its embedding, which is its head too, to say some class names.

        Args:
            file: gets the weights.
            count: class names; `FREQUENT` of them are seen most.
            steps: at most.

        Returns:
            Mean log-likelihood of label tokens in the last `LAST_STEPS` steps, and the number of steps.
        """
        model, lm = self.ours, self.ours.language_model
        model.requires_grad_(False)
        decoder = lm.model.decoder
        with torch.no_grad():  # as in trained models, and unlike in random ones, tokens are not drowned by the layers
            for layer in decoder.layers:
                layer.fc2.weight.mul_(QUIET)
                layer.self_attn.out_proj.weight.mul_(QUIET)
        quieten(model.cross_attention)
        trained = [lm.get_input_embeddings().weight, model.new_input_rows, *decoder.final_layer_norm.parameters()]
        trained += [parameter for layer in decoder.layers[-2:] for parameter in layer.parameters()]
        for parameter in trained:
            parameter.requires_grad_(True)
        # The embedding is tuned as the head alone: so nothing goes back through the lower layers.
        cut = decoder.layers[-2].register_forward_pre_hook(lambda layer, given: (given[0].detach(), *given[1:]))
        optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=8)
        names, rng = class_names()[:count], np.random.default_rng(0)
        (picture,) = self.pictures.media([0])
        with torch.no_grad():
            latents = model.encode_media(self.processor.pixels([picture])).expand(BATCH, -1, -1)
        likely: list[float] = []
        while len(likely) < steps and (len(likely) < LAST_STEPS or np.mean(likely[-LAST_STEPS:]) < LIKELY):
            numbers = np.where(
                rng.random(BATCH) < 0.8, rng.integers(FREQUENT, size=BATCH), rng.integers(count, size=BATCH)
            )
            prompt = (picture, Text("Output:", supervised=False))
            encoded = [self.processor.encode(Document((*prompt, Text(names[number])))) for number in numbers]
            batch = self.processor.collate(encoded)
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
            loss = model(**inputs, media_latents=latents).loss
            loss.backward()
            optimizer.step()
            warmup.step()
            optimizer.zero_grad()
            likely.append(-float(loss.detach()))
        cut.remove()
        model.requires_grad_(False)
        torch.save({"lm": lm.state_dict(), "rows": model.new_input_rows.detach()}, file)
        return float(np.mean(likely[-LAST_STEPS:])), len(likely)

    def load(self, file: str) -> None:
        """Take the weights of `tune`."""
        tuned = torch.load(file)
        tower, lm = backbones(self.place.shape)
        lm.load_state_dict(tuned["lm"])
        self.peer = open_flamingo_over(self.place, tower, lm).eval()
        quieten(self.peer.lang_encoder.gated_cross_attn_layers)
        with torch.no_grad():
            self.peer.lang_encoder.get_input_embeddings().weight[self.place.shape.end_of_chunk :] = tuned["rows"]


@torch.no_grad()
def quieten(blocks: torch.nn.ModuleList) -> None:
    """Gates that are little open."""
    for block in blocks:
        block.attn_gate.fill_(QUIET)
        block.ff_gate.fill_(QUIET)


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest, where both are known; a case that asks for the best alone leaves the others out."""
    known = np.isfinite(found) & np.isfinite(expected)
    if not known.any() or (np.isfinite(found) != np.isfinite(expected)).any():
        raise SystemExit("the sides do not find the same best candidates")
    worst = float(np.abs(found[known] - expected[known]).max())
    if worst > EQUAL:
        raise SystemExit(f"the sides do not do the same: scores differ by {worst} nats")
    return worst


def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    Place.add_options(parser)
    parser.add_argument("--rounds", type=int, help="of each side and case (default 3; --quick: 1)")
    parser.add_argument("--plot", metavar="FILE", help="draw the results in FILE, a .json, and run nothing")
    options = parser.parse_args()
    if options.plot:
        print(plot(Path(options.plot)))
        return
    place, quick = Place.of(options), options.quick
    sides = {name: Worker(Side, name=name, place=place) for name in ("ours", "open_flamingo")}
    figures: dict[str, float | str] = {}
    demonstrations(sides, figures, quick, options.rounds or (1 if quick else 3))
    ranking(sides, figures, quick)
    for side in sides.values():
        side.close()
    publish(figures, options.json)
    if options.json:
        print(plot(Path(options.json)))


def demonstrations(sides: dict[str, Worker], figures: dict[str, float | str], quick: bool, rounds: int) -> None:
    """Few candidates after demonstrations."""
    for shots, shared in product((0, 2, 4) if quick else (0, 8, 32), (False, True)):
        if shared and not shots:
            continue
        # What open_flamingo does for a query does not depend on how many there are, but for the rows of its passes; of
        # ours, what demonstrations cost once is shared out, and real evaluations have thousands of queries.
        asked = {"ours": 128 if shared else 16, "open_flamingo": 2 if shots > 8 else 4}
        cases = {name: Case(2 if quick else queries, shots, shared, CANDIDATES) for name, queries in asked.items()}
        runs: dict[str, list[Any]] = {name: [] for name in sides}
        for _ in range(1 if shots > 8 else rounds):
            for name, side in sides.items():
                runs[name].append(side("rank", cases[name]))
        title = f"{shots} {'shared' if shared else 'own'} demonstrations"
        ours, theirs = (each[0][1] for each in runs.values())
        figures[f"{title}: largest difference of scores"] = difference(ours[: len(theirs)], theirs)
        seconds = {name: median(run[0] for run in each) for name, each in runs.items()}
        for name in sides:
            figures[f"{title}: seconds a query {name}"] = seconds[name]
        measure = f"evaluation_{shots}_{'shared' if shared else 'own'}"
        figures[f"ratio {measure} vs open_flamingo"] = seconds["open_flamingo"] / seconds["ours"]


def ranking(sides: dict[str, Worker], figures: dict[str, float | str], quick: bool) -> None:
    """All class names, with random weights and with a tuned LM."""
    ours, peer = sides.values()
    names = 100 if quick else len(class_names())
    queries = 2 if quick else PEER_BATCH
    figures["label tokens a class name"] = ours("tokens_a_name")
    random = ours("rank", Case(1, 2, True, names, 5))
    figures["share of label tokens computed, best 5, random weights"] = random[2]
    with TemporaryDirectory() as folder:
        file = str(Path(folder) / "tuned.pt")
        likely, steps = ours("tune", file, names, 200)
        peer("load", file)
    if likely < LIKELY:
        raise SystemExit(f"labels are not peaked after {steps} steps: {likely:.2f} nats a token")
    figures["tuned: mean log-likelihood of a label token"] = likely
    figures["tuned: steps"] = str(steps)
    theirs = peer("rank", Case(queries, 2, True, names))
    figures[f"{names} class names: seconds a query open_flamingo"] = theirs[0]
    for title, top_k, asked in ((f"all {names} scores", None, 2), ("exact best 5", 5, 2 if quick else 16)):
        runs = [ours("rank", Case(asked, 2, True, names, top_k)) for _ in range(1 if quick else 3)]
        both = min(asked, queries)
        expected = np.array([best_only(row, top_k) for row in theirs[1][:both]])
        figures[f"{title}: largest difference of scores"] = difference(runs[0][1][:both], expected)
        figures[f"{title}: share of label tokens computed"] = runs[0][2]
        seconds = figures[f"{title}: seconds a query ours"] = median(run[0] for run in runs)
        figures[f"ratio ranking_{'all' if top_k is None else 'best_5'} vs open_flamingo"] = theirs[0] / seconds


# -- the plot ----------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT = 640, 360
"""of the chart, in SVG units; around it `EDGE`, above it `HEAD`, and a `ROW` a line below it"""
EDGE, HEAD, ROW = 20, 82, 20
LIGHT = "--page:#fff;--ink:#1d1c1a;--soft:#6b6862;--rule:#e4e1da;--c0:#d1495b;--c1:#b5761a;--c2:#2e6fb0;--c3:#1f8a99"
DARK = "--page:#161514;--ink:#ece9e3;--soft:#a19c93;--rule:#35332f;--c0:#f07f8d;--c1:#e3ab55;--c2:#6aa9e6;--c3:#5cc3d1"
STYLE = f"""
svg {{ {LIGHT}; font: 12px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }}
@media (prefers-color-scheme: dark) {{ svg {{ {DARK} }} }}
.page {{ fill: var(--page); }} text {{ fill: var(--ink); }} .title {{ font-size: 16px; font-weight: 600; }}
.tick, .axis, .soft {{ fill: var(--soft); }} .grid {{ stroke: var(--rule); }}
.line {{ fill: none; stroke-width: 2; stroke-linejoin: round; }}
"""


def plot(file: Path) -> Path:
    """Draw results against demonstrations, as an SVG beside their file; returns its path."""
    record = json.loads(file.read_text())
    costs = seconds_by_shots(record.get("figures", {}))
    if not costs:
        raise SystemExit(f"{file}: no seconds a query, expected the results of benchmarks/evaluation.py")
    shots = sorted({count for cost in costs.values() for count in cost})
    lines = [
        Series(name, [float(shots.index(count)) for count in cost], list(cost.values()), colour, dots=True)
        for colour, (name, cost) in enumerate(costs.items())
    ]
    chart = line_chart(
        lines,
        title="seconds a query against demonstrations",
        x_label="demonstrations before the query",
        y_label="seconds a query (logarithmic)",
        log=True,
        x_names=[str(count) for count in shots],
        size=(WIDTH, HEIGHT),
    )
    machine = record["machine"]
    where = machine["gpus"] if machine["gpus"] != "none" else f"{machine['cores']} cores of {machine['processor']}"
    below = [
        f'<circle class="f{colour}" cx="{EDGE + 5}" cy="{HEAD + HEIGHT + ROW * (colour + 1) - 4}" r="5"/>'
        + _line(
            f"{name}: {', '.join(f'{each:#.3g}' for each in cost.values())} s",
            EDGE + 18,
            HEAD + HEIGHT + ROW * (colour + 1),
        )
        for colour, (name, cost) in enumerate(costs.items())
    ]
    paint = " ".join(f".s{n} {{ stroke: var(--c{n}); }} .f{n} {{ fill: var(--c{n}); }}" for n in range(len(costs)))
    width, height = WIDTH + 2 * EDGE, HEAD + HEIGHT + ROW * (len(costs) + 1)
    path = file.with_suffix(".svg")
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'<style>{STYLE}{paint}</style><rect class="page" width="{width}" height="{height}"/>'
        + _line("The cost of a query against demonstrations", EDGE, 28, "title")
        + _line(f"{CANDIDATES} candidates are ranked for each query, with equal weights and scores", EDGE, 48, "soft")
        + _line(f"{record['command']}, on {where}", EDGE, 66, "soft")
        + chart.replace("<svg", f'<svg x="{EDGE}" y="{HEAD}" width="{WIDTH}" height="{HEIGHT}"', 1)
        + "".join(below)
        + "</svg>\n",
        encoding="utf-8",
    )
    return path


def seconds_by_shots(figures: Mapping[str, float | str]) -> dict[str, dict[int, float]]:
    """Line → demonstrations → seconds a query. Without any there is nothing to share: lines of a side meet there."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for name, value in figures.items():
        match = re.fullmatch(r"(\d+) (own|shared) demonstrations: seconds a query (\w+)", name)
        if match:
            shots, kind, side = int(match[1]), match[2], match[3]
            for each in (kind,) if shots else ("own", "shared"):
                found.setdefault((side, each), {})[shots] = float(value)
    return {f"{side}, {kind} demonstrations": dict(sorted(found[side, kind].items())) for side, kind in sorted(found)}


def _line(text: str, x: int, y: int, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x}" y="{y}">{escape(text)}</text>'


if __name__ == "__main__":
    main()
