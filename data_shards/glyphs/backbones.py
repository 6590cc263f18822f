"""Make the two small backbones of the embedded world: a vision tower and a language model, as Hugging Face folders.

    python -m data_shards.glyphs.backbones --out DIR --seed 0        about 5 minutes on 2 idle cores, no download

The tower is a `ResNetModel` trained to tell the train classes apart (cosine softmax with a margin), with two auxiliary
heads for drawing style and position, dropped afterwards, so that its frozen features keep what instruction tuning will
ask for. The language model is an `Lfm2ForCausalLM`: at this size, short convolutions are what brings induction (copying
what followed the last time) within minutes. Induction is what in-context learning stands on, so it is checked, loudly.

Both folders load with transformers alone: `AutoModel.from_pretrained`, `AutoModelForCausalLM.from_pretrained`. Beside
them lie RECIPE.json (recipe, seed, versions, figures), log.txt and SHA256SUMS.

Legend: B pictures or sequences, T tokens, C classes, D features.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from data_shards.glyphs.pictures import POSITIONS, STYLES, PictureKey, digits, load_world, read_png
from data_shards.glyphs.words import TextWorld, build_tokenizer, fresh_names
from flamingo.errors import FlamingoError, command_line
from flamingo.files import sha256
from flamingo.processing import END_OF_CHUNK

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INDUCTION_BAR = 0.9
TOWER_INPUT = 64  # pixels: the 32×32 picture is enlarged, since ResNet's stem reduces by four
PIXEL_MEAN, PIXEL_STD = 0.2, 0.3
CHECKSUMS = "SHA256SUMS"


@dataclass(frozen=True)
class TowerRecipe:
    """How the vision tower is made."""

    hidden_sizes: tuple[int, ...] = (32, 64, 128)  # channels of the stages; the last is the width of the features
    depths: tuple[int, ...] = (1, 1, 1)  # residual blocks of the stages
    variants: int = 64  # pictures drawn of a class
    steps: int = 700
    batch: int = 256  # pictures a step
    learning_rate: float = 2e-3  # peak
    weight_decay: float = 0.05
    warmup: float = 0.15  # share of the steps
    scale: float = 16.0  # of the cosine logits
    margin: float = 0.1  # taken off the cosine of the right class
    auxiliary: float = 0.5  # weight of the losses of style and position


@dataclass(frozen=True)
class LanguageRecipe:
    """How the language model is made."""

    width: int = 128
    feed_forward: int = 256
    heads: int = 4
    layers: tuple[str, ...] = ("conv", "full_attention", "conv", "full_attention")
    kernel: int = 5  # taps of the short convolutions
    steps: int = 900
    copying_steps: int = 400  # of them, on repeated segments nearly alone
    tokens: int = 2048  # a step
    short: int = 64  # tokens of a sequence
    long: int = 320  # tokens of a sequence in every third step of the second half: prompts of many shots
    learning_rate: float = 3e-3  # peak
    weight_decay: float = 0.01
    warmup: float = 0.1  # share of the steps
    first_tokens: int = 90  # tokens of which the segments are made at first; copying appears soon in a small vocabulary
    first_steps: int = 80  # before more are added
    tokens_a_step: float = 2.0  # added then
    # Shares of the kinds of text after the copying steps
    shares: dict[str, float] = field(
        default_factory=lambda: {"repeats": 0.15, "few_shot": 0.5, "instructions": 0.25, "facts": 0.1}
    )


# ----------------------------------------------------------------------------------------------------------- tower


def build_tower(recipe: TowerRecipe) -> PreTrainedModel:
    """A `ResNetModel` of one grey channel: (B, 1, 64, 64) → last_hidden_state (B, D, 4, 4)."""
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(
        num_channels=1,
        embedding_size=recipe.hidden_sizes[0],
        hidden_sizes=list(recipe.hidden_sizes),
        depths=list(recipe.depths),
        layer_type="basic",
    )
    return ResNetModel(config)


def tower_input(levels: np.ndarray | Tensor) -> Tensor:
    """Grey levels 0..15 (B, 32, 32) → what the image processor would give: (B, 1, 64, 64), normalised."""
    pixels = (torch.as_tensor(levels).float() / 15 - PIXEL_MEAN) / PIXEL_STD
    enlarged = F.interpolate(
        rearrange(pixels, "b h w -> b 1 h w"), size=(TOWER_INPUT, TOWER_INPUT), mode="bilinear", align_corners=False
    )
    return enlarged.contiguous(memory_format=torch.channels_last)


def image_processor() -> dict[str, Any]:
    """The preprocessor_config.json of the tower."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": TOWER_INPUT, "width": TOWER_INPUT},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [PIXEL_MEAN],
        "image_std": [PIXEL_STD],
    }


def _tower_keys(class_id: int, recipe: TowerRecipe, seed: int) -> list[PictureKey]:
    """The pictures of a class: two thirds plain, the others in a style, at a position, or both."""
    rng = random.Random(f"tower/{seed}/{class_id}")
    keys = []
    for variant in range(recipe.variants):
        kind = rng.random()
        # Coarse ones are drawn twice: scikit-learn's digits were scanned at 8×8.
        style = rng.choice((*STYLES, "coarse")) if kind < 0.33 else None
        position = rng.choice(POSITIONS) if 0.27 < kind < 0.45 else None
        keys.append(PictureKey(class_id, variant, seed, style, position))
    return keys


@torch.no_grad()
def tower_features(tower: PreTrainedModel, levels: np.ndarray | Tensor) -> Tensor:
    """Flattened features (B, 16 D) of grey levels (B, 32, 32), in evaluation mode."""
    tower.eval()
    batches = torch.as_tensor(levels).split(512)
    return torch.cat([tower(tower_input(batch)).last_hidden_state.flatten(1) for batch in batches])


def nearest_prototype(features: Tensor, labels: Tensor, ways: int, shots: int, episodes: int = 2000) -> float:
    """Accuracy of the nearest mean of `shots` examples among `ways` classes: what a frozen tower's features allow.

    features (B, F), labels (B,) from 0 without gaps. Cosine similarity after the common mean is taken off.
    """
    rng = np.random.default_rng(0)
    centred = F.normalize(features - features.mean(0), dim=1)
    of_class = [centred[labels == label] for label in range(int(labels.max()) + 1)]
    right = 0
    for _ in range(episodes):
        chosen = rng.choice(len(of_class), ways, replace=False)
        picks = [rng.choice(len(of_class[c]), shots + 1, replace=False) for c in chosen]
        prototypes = torch.stack([of_class[c][p[:shots]].mean(0) for c, p in zip(chosen, picks, strict=True)])
        query = of_class[chosen[0]][picks[0][-1]]
        right += int((prototypes @ query).argmax() == 0)
    return right / episodes


def tower_figures(tower: PreTrainedModel) -> dict[str, float]:
    """Nearest-prototype accuracy, 5-way, on the validation classes and on scikit-learn's digits."""
    world = load_world()
    validation = world.split("validation")
    levels = world.draw_many([PictureKey(c, variant, 1) for c in validation for variant in range(20)])
    glyphs, glyph_labels = tower_features(tower, levels), torch.arange(len(validation)).repeat_interleave(20)
    digit_levels = np.stack([read_png(png) for _, png in digits()])
    digit_labels = torch.tensor([label for label, _ in digits()])
    digit_features = tower_features(tower, digit_levels)
    return {
        f"{name}_5way_{shots}shot": nearest_prototype(features, labels, 5, shots)
        for name, features, labels in (("validation", glyphs, glyph_labels), ("digits", digit_features, digit_labels))
        for shots in (1, 4)
    }


def train_tower(recipe: TowerRecipe, seed: int, journal: Journal) -> tuple[PreTrainedModel, dict[str, float]]:
    """Train the tower on all train classes; returns it frozen in evaluation mode, with its figures."""
    world = load_world()
    classes = world.split("train")
    keys = [key for class_id in classes for key in _tower_keys(class_id, recipe, seed)]
    with journal.stage("drawing the tower's pictures"):
        levels = torch.from_numpy(world.draw_many(keys, processes=min(2, os.cpu_count() or 1)))
    labels = torch.arange(len(classes)).repeat_interleave(recipe.variants)
    styles = torch.tensor([0 if key.style is None else STYLES.index(key.style) + 1 for key in keys])
    positions = torch.tensor([0 if key.position is None else POSITIONS.index(key.position) + 1 for key in keys])

    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    tower = build_tower(recipe).to(memory_format=torch.channels_last)
    width = recipe.hidden_sizes[-1]
    class_vectors = nn.Parameter(torch.randn(len(classes), width) * 0.05)
    style_head, position_head = nn.Linear(16 * width, len(STYLES) + 1), nn.Linear(16 * width, len(POSITIONS) + 1)
    parameters = [*tower.parameters(), class_vectors, *style_head.parameters(), *position_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=recipe.warmup
    )
    tower.train()
    with journal.steps("vision tower", recipe.steps) as report:
        for step in range(1, recipe.steps + 1):
            rows = torch.randint(len(levels), (recipe.batch,), generator=draw)
            with torch.autocast("cpu", torch.bfloat16, enabled=_fast_bfloat16()):
                grid = tower(tower_input(levels[rows])).last_hidden_state
            grid = grid.float()
            cosine = F.normalize(grid.mean((2, 3)), dim=1) @ F.normalize(class_vectors, dim=1).T  # (B, C)
            target = labels[rows]
            logits = recipe.scale * (cosine - recipe.margin * F.one_hot(target, len(classes)))
            flat = grid.flatten(1)
            auxiliary = F.cross_entropy(style_head(flat), styles[rows])
            auxiliary = auxiliary + F.cross_entropy(position_head(flat), positions[rows])
            loss = F.cross_entropy(logits, target)
            _update(loss + recipe.auxiliary * auxiliary, parameters, 5.0, optimizer, schedule)
            right = (cosine.argmax(1) == target).float().mean()
            report(step, loss=loss.item(), auxiliary=auxiliary.item(), accuracy=right.item())
    tower.eval().requires_grad_(False)
    return tower, tower_figures(tower)


def _fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AMX); elsewhere the tower is trained in float32."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def _update(
    loss: Tensor,
    parameters: Sequence[Tensor],
    clip: float,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()


# -------------------------------------------------------------------------------------------------- language model


def build_language_model(recipe: LanguageRecipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """An `Lfm2ForCausalLM` with random weights, head tied to the embedding."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    config = Lfm2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.feed_forward,
        block_auto_adjust_ff_dim=False,
        num_hidden_layers=len(recipe.layers),
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        layer_types=list(recipe.layers),
        conv_L_cache=recipe.kernel,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Lfm2ForCausalLM(config)


@torch.no_grad()
def repeat_copying(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, length: int = 16, gap: int = 0, count: int = 64
) -> float:
    """Share of tokens predicted right where a random segment of `length` tokens comes a second time.

    gap: random tokens between its two occurrences. Chance is one over the vocabulary.
    """
    draw = torch.Generator().manual_seed(0)
    special = set(tokenizer.all_special_ids)
    plain = torch.tensor([i for i in range(len(tokenizer)) if i not in special])
    segment = plain[torch.randint(len(plain), (count, length), generator=draw)]
    between = plain[torch.randint(len(plain), (count, gap), generator=draw)]
    was_training = model.training
    model.eval()
    logits = model(input_ids=torch.cat([segment, between, segment], 1).to(model.device)).logits
    model.train(was_training)
    predicted = logits[:, length + gap : -1].argmax(-1).cpu()
    return (predicted == segment[:, 1:]).float().mean().item()


def check_induction(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Repeat-copying accuracy of a language model, measured in seconds, before a Flamingo is built on it.

    Without induction everything else looks well (naming becomes perfect) while in-context learning stays at chance.

    Raises:
        FlamingoError: where it is below .9, naming the figure and the bar.
    """
    accuracy = repeat_copying(model, tokenizer)
    if not accuracy >= INDUCTION_BAR:
        raise FlamingoError(
            f"the language model ({type(model).__name__}) copies a repeated random segment with accuracy "
            f"{accuracy:.3f}, at least {INDUCTION_BAR} is needed: without induction a Flamingo cannot learn in "
            "context. Train it longer, or choose another one"
        )
    return accuracy


@torch.no_grad()
def text_few_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    chunks: int,
    template: str = "{name}",
    count: int = 200,
) -> float:
    """5-way in-context learning from text alone, attribute words in the place of pictures, names never trained on.

    The share of episodes of `chunks` demonstrations whose query gets the right name's first syllable among the five.
    """
    rng, world = random.Random(0), TextWorld(tokenizer, 1)
    right = 0
    for _ in range(count):
        names = fresh_names(rng, 5, "unseen")
        while len({name[:2] for name in names}) < 5:
            names = fresh_names(rng, 5, "unseen")
        looks: list[str] = []
        while len(looks) < 5:
            looks += [look] if (look := " ".join(world.looks())) not in looks else []
        shown = [index % 5 for index in range(chunks)]
        rng.shuffle(shown)
        asked = rng.choice(shown)
        text = "".join(f"{looks[i]} {template.format(name=names[i])}{END_OF_CHUNK}" for i in shown)
        text += f"{looks[asked]} {template.partition('{')[0]}".rstrip()
        ids = tokenizer(tokenizer.bos_token + text, add_special_tokens=False, return_tensors="pt").input_ids
        scores = model(input_ids=ids.to(model.device)).logits[0, -1]
        first = [tokenizer(name, add_special_tokens=False).input_ids[0] for name in names]
        right += int(scores[first].argmax()) == asked
    return right / count


def language_figures(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Copying near and far, and few-shot learning from text with 5, 20 and 41 demonstrations."""
    return {
        "repeat_copying": repeat_copying(model, tokenizer),
        "repeat_copying_after_250_tokens": repeat_copying(model, tokenizer, gap=250),
        **{f"text_5way_{n}_chunks": text_few_shot(model, tokenizer, chunks=n) for n in (5, 20, 41)},
        "text_5way_41_chunks_this_is_a": text_few_shot(model, tokenizer, chunks=41, template="this is a {name}"),
    }


def train_language_model(
    recipe: LanguageRecipe, seed: int, journal: Journal
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, float]]:
    """Train the language model on the text world; returns it in evaluation mode, with tokenizer and figures.

    Raises:
        FlamingoError: where it shows no induction (`check_induction`).
    """
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    model = build_language_model(recipe, tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=recipe.warmup
    )
    world = TextWorld(tokenizer, seed)
    model.train()
    with journal.steps("language model", recipe.steps) as report:
        for step in range(1, recipe.steps + 1):
            copying = step <= recipe.copying_steps
            vocabulary = recipe.first_tokens + int(max(0, step - recipe.first_steps) * recipe.tokens_a_step)
            length = recipe.long if step > recipe.steps // 2 and step % 3 == 0 else recipe.short
            shares = {"repeats": 0.9, "few_shot": 0.1} if copying else recipe.shares
            ids, labels = world.batch(shares, recipe.tokens // length, length, vocabulary)
            logits = model(input_ids=ids).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            _update(loss, list(model.parameters()), 1.0, optimizer, schedule)
            report(step, loss=loss.item())
    model.eval().requires_grad_(False)
    check_induction(model, tokenizer)
    return model, tokenizer, language_figures(model, tokenizer)


# --------------------------------------------------------------------------------------------------------- writing


class Journal:
    """Shows progress and keeps a log of it."""

    def __init__(self, path: Path, every: int = 50) -> None:
        from rich import get_console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.every = every
        self.seconds: dict[str, float] = {}  # of the stages done
        self._file = path.open("w", encoding="utf-8")
        self._progress: Progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn(),
            TimeRemainingColumn(), console=get_console(),
        )  # fmt: skip

    def __enter__(self) -> Journal:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._file.close()

    def line(self, text: str) -> None:
        """Write a line to the log."""
        self._file.write(text + "\n")
        self._file.flush()

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[TaskID]:
        """Show and time a stage."""
        task, begun = self._progress.add_task(name, total=total, state=""), time.perf_counter()
        yield task
        self.seconds[name] = round(time.perf_counter() - begun, 1)
        self._progress.update(task, total=total or 1, completed=total or 1)
        self.line(f"{name}: {self.seconds[name]} s")

    @contextlib.contextmanager
    def steps(self, name: str, total: int) -> Iterator[Any]:
        """A stage of `total` steps; yields report(step, **figures)."""
        with self.stage(name, total) as task:

            def report(step: int, **figures: float) -> None:
                state = " ".join(f"{label} {value:.3f}" for label, value in figures.items())
                if not all(map(math.isfinite, figures.values())):
                    raise FlamingoError(f"{name}: step {step} is not finite ({state})")
                self._progress.update(task, completed=step, state=state)
                if step % self.every == 0 or step == total:
                    self.line(f"{name}: step {step} {state}")

            yield report


def write_checksums(folder: Path) -> None:
    """SHA256SUMS of every other file beneath the folder, as sha256sum -c reads it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    sums = ((sha256(path), path.relative_to(folder).as_posix()) for path in files)
    lines = [f"{digest}  {name}" for digest, name in sums]
    (folder / CHECKSUMS).write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_backbones(
    out: str | Path, seed: int = 0, tower: TowerRecipe | None = None, language: LanguageRecipe | None = None
) -> dict[str, float]:
    """Train both backbones into `out`/vision and `out`/language; returns their figures.

    Raises:
        FlamingoError: where a language model without induction comes out. Nothing is left in `out` but the log then.
    """
    tower, language = tower or TowerRecipe(), language or LanguageRecipe()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with Journal(out / "log.txt") as journal:
        model, tokenizer, language_figures_ = train_language_model(language, seed, journal)
        vision, tower_figures_ = train_tower(tower, seed, journal)
        figures = {**tower_figures_, **language_figures_}
        for name, value in figures.items():
            journal.line(f"{name}: {value:.4f}")
    write_backbones(out, vision, model, tokenizer, tower, language, seed, figures, journal.seconds)
    return figures


def write_backbones(
    out: Path,
    vision: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tower: TowerRecipe,
    language: LanguageRecipe,
    seed: int,
    figures: dict[str, float],
    seconds: dict[str, float],
) -> None:
    """Write both folders, RECIPE.json and SHA256SUMS."""
    import transformers

    vision.save_pretrained(out / "vision")
    (out / "vision" / "preprocessor_config.json").write_text(json.dumps(image_processor(), indent=2) + "\n")
    model.save_pretrained(out / "language")
    tokenizer.save_pretrained(out / "language")
    for path in out.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes for the owner alone
    recipe = {
        "command": f"python -m data_shards.glyphs.backbones --seed {seed}",
        "seed": seed,
        "tower": asdict(tower),
        "language": asdict(language),
        "figures": figures,
        "parameters": {
            "vision": sum(p.numel() for p in vision.parameters()),
            "language": sum(p.numel() for p in model.parameters()),
        },
        "seconds": seconds,
        "bfloat16": _fast_bfloat16(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
    }
    (out / "RECIPE.json").write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    write_checksums(out)


@command_line
def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Train the embedded world's vision tower and language model.")
    parser.add_argument("--out", required=True, help="folder to write vision/ and language/ into")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    figures = make_backbones(arguments.out, arguments.seed)
    for name, value in figures.items():
        print(f"{name}: {value:.4f}")


if __name__ == "__main__":
    main()
