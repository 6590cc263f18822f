"""Tuning on instructions: where it begins, what trains, resuming, several processes, and what it leaves."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from data_shards.shards import write_shards
from flamingo import Document, FlamingoError, FlamingoForConditionalGeneration, FlamingoProcessor, Video, from_backbones
from flamingo.convert import convert, parse
from flamingo.instructions import ANSWER, Turn, instruction_document
from flamingo.interop import open_flamingo, otter
from tests.tiny import document, picture, save_backbones
from tests.train.runs import at_step, forked, losses, recipe_of, rows, saved, stop
from train import lora
from train.card import model_card
from train.checkpoint import read_record
from train.export import Export, export
from train.parallel import Processes
from train.plan import plan
from train.pretrain import ADAPTERS, pretrain
from train.recipe import (
    DataRecipe,
    InitRecipe,
    LoraRecipe,
    OptimizerRecipe,
    ParallelRecipe,
    SourceRecipe,
    TrackingRecipe,
    TuneRecipe,
)
from train.tune import Tuning, load_init, main, make_ready, tune

pytest.importorskip("peft")

STEPS = 6
SOURCES = {"images": 17, "videos": 9, "text": 6}
"""of the mixture, with their numbers of documents"""
SHAPE: dict[str, Any] = {
    "cross_attention_head_dim": 2, "resampler_depth": 1, "resampler_latents": 4, "resampler_head_dim": 2,
}  # fmt: skip
"""Eight heads each, as OpenFlamingo and Otter have, and cannot say."""


def instructions(source: str, number: int) -> Document:
    """One or three pictures (examples before the query), a video of two frames, or no medium."""
    media: list[tuple[Any, ...]] = {
        "images": [(picture(number),)] * (1 + 2 * (number % 2)),
        "videos": [(Video((picture(number), picture(number + 50))),)],
        "text": [(), ()],
    }[source]
    colour = "red" if number % 2 else "blue"
    turns = [Turn(f"which colour, {n}?", colour, shown) for n, shown in enumerate(media)]
    return instruction_document(turns, key=f"{source}{number}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny backbones, a model over them that was never tuned, and three sources of instructions."""
    folder = tmp_path_factory.mktemp("tune")
    vision, language = save_backbones(folder)
    torch.manual_seed(0)
    model, processor = from_backbones(vision, language, **SHAPE)
    open_gates(model)
    model.save_pretrained(folder / "pretrained")
    processor.save_pretrained(folder / "pretrained")
    for source, number in SOURCES.items():
        write_shards((instructions(source, n) for n in range(number)), folder / source, max_samples=4)
    return folder


def open_gates(model: FlamingoForConditionalGeneration) -> None:
    with torch.no_grad():
        for block in model.cross_attention:
            block.attn_gate.fill_(0.8)
            block.ff_gate.fill_(0.5)


def recipe_for(folder: Path, out: Path, **fields: Any) -> TuneRecipe:
    """A run of a second or two; every step is logged."""
    settings: dict[str, Any] = dict(
        steps=STEPS,
        batch=8,
        micro_batch=2,
        save_every=2,
        init=InitRecipe(str(folder / "pretrained")),
        train_language="lora",
        lora=LoraRecipe(rank=4, dropout=0.1),
        data=DataRecipe({name: SourceRecipe(str(folder / name)) for name in SOURCES}, workers=0, shares_of="documents"),
        optimizer=OptimizerRecipe(learning_rate=3e-3, warmup_share=0.3, schedule="cosine"),
        parallel=ParallelRecipe(timeout=30),
        tracking=TrackingRecipe("disabled", log_every=1),
    )
    return TuneRecipe(out=str(out), **{**settings, **fields})


def logits(model: FlamingoForConditionalGeneration, processor: FlamingoProcessor, *, answer: bool = True) -> Tensor:
    """Of instructions with and without media, for ids that tokens have."""
    documents = [instructions("images", 3), instructions("text", 2)] if answer else [document(3, 2), document(4, 0)]
    batch = processor(documents=documents, padding_side="right")
    batch.pop("labels")
    with torch.no_grad():
        made = model.eval()(**batch.to(model.dtype)).logits
    return made[batch["attention_mask"].bool()]


def load(model: Path) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    return FlamingoForConditionalGeneration.from_pretrained(model), FlamingoProcessor.from_pretrained(model)


@pytest.fixture(scope="module")
def tuned(folder: Path) -> Path:
    """A finished run with adapters."""
    out = folder / "tuned"
    tune(recipe_for(folder, out), Processes())
    return out


# -- what a run does ---------------------------------------------------------------------------------------------------


def test_a_run_learns_and_changes_only_what_trains(folder: Path, tuned: Path) -> None:
    """Catches a frozen LM or tower that changes, adapters that are lost or not kept, and a mixture not logged."""
    curve = [float(loss) for loss in losses(tuned)]
    assert len(curve) == STEPS and curve[-1] < curve[0] - 0.2
    before, _ = load(folder / "pretrained")
    after, _ = load(tuned / "model")
    own = before.state_dict()
    changed = {
        name for name, tensor in after.state_dict().items() if name in own and not torch.equal(own[name], tensor)
    }
    adapted = set(after.config.replaced)
    assert len(adapted) == 14 and all("_proj.weight" in name for name in adapted)
    assert {name for name in changed if name.startswith(("language_model.", "vision_tower."))} == adapted
    parts = {name.partition(".")[0] for name in changed - adapted}
    assert parts == {"resampler", "cross_attention", "new_input_rows", "new_output_rows"}
    assert after.state_dict().keys() == own.keys(), "names are those of a model without adapters"
    assert len(after.new_input_rows) == len(before.new_input_rows) + 1
    assert (tuned / "model" / ADAPTERS / "adapter_model.safetensors").is_file()

    last = rows(tuned)[-1]
    samples = {name: last[f"samples/{name}"] for name in SOURCES}
    assert sum(samples.values()) == STEPS * 8
    assert {name: last[f"epoch/{name}"] for name in SOURCES} == pytest.approx(
        {name: samples[name] / number for name, number in SOURCES.items()}
    )
    assert samples["images"] > samples["videos"] > samples["text"] > 0
    assert {"gradient_norm/adapters", "learning_rate/adapters"} <= last.keys()


def test_frozen_and_full(folder: Path, tmp_path: Path) -> None:
    """Catches an LM that trains where it must not, or does not where it must, a full tuning that is not saved, and
    embeddings of frames that do not train.
    """
    before, _ = load(folder / "pretrained")
    for kind in ("frozen", "full"):
        recipe = recipe_for(folder, tmp_path / kind, steps=2, train_language=kind, frames=2)
        after, processor = load(tune(recipe, Processes()))
        parts = zip(before.language_model.state_dict().items(), after.language_model.state_dict().values(), strict=True)
        changed = [name for (name, old), new in parts if not torch.equal(old, new)]
        assert bool(changed) == (kind == "full")
        assert not (tmp_path / kind / "model" / ADAPTERS).exists()
        assert after.config.resampler_max_frames == 2 and after.resampler.frame_embeddings.abs().min() > 0
        after.save_trained(tmp_path / kind / "small")
        again = FlamingoForConditionalGeneration.from_trained(tmp_path / kind / "small")
        assert torch.equal(logits(again, processor), logits(after, processor))


def test_the_chat_template_is_that_of_the_shards(folder: Path, tuned: Path) -> None:
    """Catches a chat that speaks to the model in another form than it was tuned on."""
    _, processor = load(tuned / "model")
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which colour, 0?"}]},
        {"role": "assistant", "content": "blue"},
    ]
    text = processor.encode(instructions("images", 0)).text
    assert processor.apply_chat_template(chat) == text == "<image>User:which colour, 0? GPT:<answer>blue<|endofchunk|>"
    for spaced, token, expected in ((True, True, "User: q GPT:<answer>"), (False, False, "User:q GPT:")):
        recipe = recipe_for(folder, Path(), spaced=spaced, answer_token=token, train_language="frozen")
        model, processor = load_init(recipe)
        make_ready(model, processor, recipe)
        question = [{"role": "user", "content": "q"}]
        assert processor.apply_chat_template(question, add_generation_prompt=True) == expected
        assert (ANSWER in processor.tokenizer.get_vocab()) == token
    recipe = recipe_for(folder, Path(), init=InitRecipe(str(tuned / "model")), answer_token=False)
    _, processor = Tuning(recipe).outline()
    assert processor.apply_chat_template(question, add_generation_prompt=True) == "User:q GPT:<answer>", "known before"


def test_steps_of_epochs_and_shares_of_documents(folder: Path, tmp_path: Path) -> None:
    """Catches epochs that are not those of the documents, a source that is read more often than others of its share,
    and a warm-up that does not follow.
    """
    recipe = recipe_for(folder, tmp_path, steps=0, epochs=2.0, train_language="frozen")
    assert recipe.settled(SOURCES).steps == 8  # 2 · 32 / 8
    assert recipe.optimizer.warmup(8) == 3
    tune(recipe, Processes())
    last = rows(tmp_path)[-1]
    assert last["step"] == 8
    assert all(last[f"epoch/{name}"] == pytest.approx(2.0, abs=0.7) for name in SOURCES)  # of equal shares 3.6 and 1.3
    assert "8 of 8 steps" in (tmp_path / "model" / "README.md").read_text()


def test_instructions_longer_than_a_sequence_are_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a recipe for shorter sequences than the shards were made for, which loses pictures and answers silently,
    and a warning about sources that fit, or about web pages, which are cut at random.
    """
    recipe = recipe_for(folder, tmp_path / "run", steps=1, train_language="frozen")
    write_shards((document(n, 4) for n in range(6)), tmp_path / "pages")
    recipe.data.sources["pages"] = SourceRecipe(str(tmp_path / "pages"))
    assert plan(Tuning(recipe)).faults == []
    fewer = replace(recipe, data=replace(recipe.data, max_media=2))
    (fault,) = plan(Tuning(fewer)).faults
    assert "data.sources.images: 8 of 17 documents are longer than a sequence (max_tokens=256, max_media=2)" in fault
    tune(fewer, Processes())
    said = capsys.readouterr().out
    assert said.count("warning: ") == 1 and f"warning: {fault}\n" in said
    shorter = replace(recipe, data=replace(recipe.data, max_tokens=40))
    told = {fault.partition(": ")[0]: fault for fault in plan(Tuning(shorter)).faults}
    assert set(told) == {"data.sources.images", "data.sources.text"}, "two turns of text are longer than 40"
    assert "8 of 17" in told["data.sources.images"] and "6 of 6" in told["data.sources.text"]


# -- resuming ----------------------------------------------------------------------------------------------------------


def test_a_resumed_run_equals_an_uninterrupted_one(folder: Path, tuned: Path) -> None:
    """Catches adapters, their moments, their dropout or new rows that are not those of the checkpoint, and a run that
    goes on with other adapters or from another model.
    """
    out = folder / "resumed"

    def interrupted(processes: Processes) -> None:
        at_step(5, stop)
        tune(recipe_for(folder, out), processes)

    ((_, said),) = forked(interrupted)
    assert said == "PurposeError: enough" and saved(out)[-1] == 4
    tune(recipe_for(folder, out), Processes())
    assert losses(out) == losses(tuned)
    first, second = (load(path / "model")[0].state_dict() for path in (out, tuned))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    with pytest.raises(FlamingoError, match="lora was .*'rank': 4.* now .*'rank': 8"):
        tune(recipe_for(folder, out, lora=LoraRecipe(rank=8)), Processes())
    with pytest.raises(FlamingoError, match="train_language was lora, now frozen|lora was"):
        tune(recipe_for(folder, out, train_language="frozen"), Processes())
    with pytest.raises(FlamingoError, match="init was"):
        tune(recipe_for(folder, out, init=InitRecipe(str(tuned / "model"))), Processes())


@pytest.mark.parametrize("quantised", [False, True])
def test_a_checkpoint_is_exported(folder: Path, tuned: Path, tmp_path: Path, quantised: bool) -> None:
    """Catches an export without adapters, over another model, or other than the model that the run left."""
    run = tuned
    if quantised:
        pytest.importorskip("bitsandbytes")
        run = tmp_path / "run"
        tune(recipe_for(folder, run, steps=2, lora=LoraRecipe(rank=4, quantised=True)), Processes())
    export(run, Export(str(tmp_path / "model")))
    left, made = (load(path)[0].state_dict() for path in (run / "model", tmp_path / "model"))
    assert left.keys() == made.keys() and all(torch.equal(tensor, made[name]) for name, tensor in left.items())
    shutil.copytree(folder / "pretrained", tmp_path / "moved")
    export(run, Export(str(tmp_path / "again"), init=str(tmp_path / "moved")))
    with pytest.raises(FlamingoError, match="tuned from .* give its place as --init"):
        export(run, Export(str(tmp_path / "wrong"), init=str(tuned / "model")))
    assert not (tmp_path / "wrong").exists()


def test_the_card_says_what_it_was_tuned_from(folder: Path, tuned: Path) -> None:
    """Catches a tuned model that passes for one that was made over backbones, or hides its mixture."""
    card = (tuned / "model" / "README.md").read_text()
    assert f"# A Flamingo tuned on instructions from {folder / 'pretrained'}" in card
    assert "| tuned from |" in card and "| language |" in card
    used = {name: int(rows(tuned)[-1][f"samples/{name}"]) for name in SOURCES}
    for name, number in SOURCES.items():
        assert f"| {number} | {used[name]} | {used[name] / number:.2f} | 1 |" in card
    record = read_record(tuned / "checkpoints" / f"step-{STEPS:06d}")
    record["recipe"]["init"]["path"] = record["identity"]["init"] = "org/flamingo"
    assert "base_model:\n- org/flamingo\n" in model_card(record)


# -- where it begins ---------------------------------------------------------------------------------------------------


def test_every_kind_of_beginning(folder: Path, tmp_path: Path) -> None:
    """Catches a folder, checkpoint or import that is taken for another kind, loses tensors, or stays as it was where
    its model was tuned on.
    """
    model, processor = load(folder / "pretrained")
    model.save_trained(tmp_path / "trained")
    processor.save_pretrained(tmp_path / "trained")
    open_flamingo.save(model, tmp_path / "checkpoint.pt")
    otter.save(model, tmp_path / "otter")
    three, _ = from_backbones(folder / "vision", folder / "language", **{**SHAPE, "cross_attention_heads": 3})
    otter.save(three, tmp_path / "three_heads")
    run = tmp_path / "run"
    left, _ = load(pretrain(short_pretraining(folder, run), Processes()))
    backbones = {"vision": str(folder / "vision"), "language": str(folder / "language")}
    imported = {**backbones, "new_output_rows": "mean"}
    cases: dict[str, tuple[InitRecipe, Any]] = {
        "folder": (InitRecipe(str(folder / "pretrained")), model),
        "trained": (InitRecipe(str(tmp_path / "trained")), model),
        "run": (InitRecipe(str(run)), left),
        "checkpoint": (InitRecipe(str(run / "checkpoints" / "step-000002")), left),
        "otter": (InitRecipe(str(tmp_path / "otter"), **imported), model),
        "three heads": (InitRecipe(str(tmp_path / "three_heads"), **imported), three),
        "open_flamingo": (InitRecipe(str(tmp_path / "checkpoint.pt"), **imported), model),
    }
    for name, (init, source) in cases.items():
        recipe = recipe_for(folder, tmp_path, init=init)
        begun, its = load_init(recipe)
        found, expected = (logits(each, used, answer=False) for each, used in ((begun, its), (source, processor)))
        shared = source.row_of.shape[0]  # Otter's has a row for `<answer>` in any case
        torch.testing.assert_close(found[:, :shared], expected[:, :shared], msg=name)
        made_ready, _ = Tuning(recipe).outline()
        built, _ = Tuning(recipe).build()
        shapes = {each: (p.shape, p.requires_grad) for each, p in made_ready.named_parameters()}
        assert shapes == {each: (p.shape, p.requires_grad) for each, p in built.named_parameters()}, name


def short_pretraining(folder: Path, out: Path) -> Any:
    """A recipe over the folder's backbones, for two steps."""
    sources = {"images": SourceRecipe(str(folder / "images"))}
    return replace(recipe_of(folder, out), steps=2, data=DataRecipe(sources, workers=0), save_every=2)


def test_tuning_goes_on_from_a_tuned_checkpoint(folder: Path, tuned: Path, tmp_path: Path) -> None:
    """Catches adapters of the run before that are dropped, trained on, or put beside new ones."""
    recipe = recipe_for(folder, tmp_path, init=InitRecipe(str(tuned)), steps=1)
    model, processor = load_init(recipe)
    assert not lora.adapters(model)
    expected, _ = load(tuned / "model")
    assert torch.equal(logits(model, processor), logits(expected, processor))
    after, _ = load(tune(recipe, Processes()))
    assert len(after.config.replaced) == 14
    assert not torch.equal(logits(after, processor), logits(expected, processor))


def test_an_otter_checkpoint_made_by_hand_is_tuned(folder: Path, tmp_path: Path) -> None:
    """Catches an Otter folder that is loaded and cannot be tuned, and a tuned model that changes on its way to Otter's
    layout and back.
    """
    torch.manual_seed(1)
    model, processor = from_backbones(folder / "vision", folder / "language", extra_tokens=(ANSWER,), **SHAPE)
    open_gates(model)
    handmade = tmp_path / "handmade"
    handmade.mkdir()
    torch.save(otter_tensors(model), handmade / "pytorch_model.bin")
    (handmade / "config.json").write_text(json.dumps({"model_type": "otter"}))
    init = InitRecipe(str(handmade), vision=str(folder / "vision"), language=str(folder / "language"))
    recipe = recipe_for(folder, tmp_path / "run", init=init, steps=2)
    begun, its = load_init(recipe)
    assert torch.equal(logits(begun, its), logits(model, processor))
    after, processor = load(tune(recipe, Processes()))
    assert not torch.equal(logits(after, processor), logits(model, processor))
    check_round_trip(tmp_path / "run" / "model", folder, tmp_path)


def otter_tensors(model: FlamingoForConditionalGeneration) -> dict[str, Tensor]:
    """A model's tensors by Otter's names, as its repository spells them: written out here, not by `interop`."""
    own, made = model.state_dict(), {}
    for name, tensor in own.items():
        part, _, rest = name.partition(".")
        if part == "vision_tower":
            made[f"vision_encoder.vision_model.{rest}"] = tensor
        elif part == "language_model":
            layer = rest.removeprefix("model.layers.")
            number, _, inner = layer.partition(".")
            within = f"model.layers.{number}.decoder_layer.{inner}" if layer != rest else rest
            made[f"lang_encoder.{within}"] = tensor
        elif part == "resampler":
            rest = rest.replace(".0.norm", ".norm").replace(".0.to_", ".to_")
            made[f"perceiver.{rest.replace('layers.0.1.', 'layers.0.feed_forward.')}"] = tensor
        elif part == "cross_attention":
            block, _, inner = rest.partition(".")
            inner = "feed_forward." + inner.removeprefix("ff.") if inner.startswith("ff.") else inner
            made[f"lang_encoder.model.layers.{block}.gated_cross_attn_layer.{inner}"] = tensor
    for name, new in (("model.embed_tokens", model.new_input_rows), ("lm_head", model.new_output_rows)):
        table = made[f"lang_encoder.{name}.weight"].clone()
        table[model.config.new_token_ids] = new.detach()
        made[f"lang_encoder.{name}.weight"] = table
    return made


def check_round_trip(model: Path, folder: Path, out: Path) -> None:
    """A model folder → Otter's layout → a model folder gives identical logits, `<answer>` included."""
    run = lambda line, **paths: convert(*parse([*line.split(), *(f"--{k}={v}" for k, v in paths.items())]))  # noqa: E731
    backbones = {"vision": folder / "vision", "language": folder / "language"}
    run("--from flamingo --to otter", checkpoint=model, out=out / "as-otter")
    run("--from otter", checkpoint=out / "as-otter", out=out / "back", **backbones)
    (first, processor), (second, its) = load(model), load(out / "back")
    ids = AutoTokenizer.from_pretrained(out / "back").convert_tokens_to_ids([ANSWER])
    assert ids == processor.tokenizer.convert_tokens_to_ids([ANSWER]) and ids[0] in second.config.new_token_ids
    assert torch.equal(logits(first, processor), logits(second, its))


def test_a_tuned_model_goes_to_otters_layout_and_back(folder: Path, tuned: Path, tmp_path: Path) -> None:
    """Catches an export to Otter that loses adapters, or `<answer>` that was added after pretraining."""
    check_round_trip(tuned / "model", folder, tmp_path)


# -- several processes -------------------------------------------------------------------------------------------------


def shared_out(kind: str, folder: Path, out: Path) -> TuneRecipe:
    """A recipe without dropout, whose draws are each process's own."""
    sharded = kind in ("fsdp", "full")
    parallel = ParallelRecipe("fsdp" if sharded else "ddp", timeout=30, activation_checkpointing=sharded)
    adapted = LoraRecipe(rank=4, dropout=0.0, quantised=kind == "quantised")
    trained = "full" if kind == "full" else "lora"
    return recipe_for(folder, out / kind, parallel=parallel, lora=adapted, train_language=trained, steps=3)


def check_equal(found: Path, alone: Path) -> None:
    """Two runs have the same losses, and leave the same model and adapters, but for rounding."""
    expected = [float(loss) for loss in losses(alone)]
    assert [float(loss) for loss in losses(found)] == pytest.approx(expected, abs=1e-6)
    first, second = (load(path / "model")[0].state_dict() for path in (found, alone))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=2e-4, rtol=1e-3, msg=name)
    files = [path / "model" / ADAPTERS / "adapter_model.safetensors" for path in (found, alone)]
    if files[1].exists():
        kept, wanted = ({name: each.shape for name, each in load_file(file).items()} for file in files)
        assert kept == wanted


def test_two_processes_equal_one(folder: Path, tmp_path: Path) -> None:
    """Catches adapters that FSDP2 or DDP average wrongly, a model that is merged from one process's shards, and media
    of several kinds, or none, that one process waits for.
    """

    def run(processes: Processes) -> None:
        for kind in ("ddp", "fsdp"):
            tune(shared_out(kind, folder, tmp_path), processes)

    assert forked(run, world=2) == [(0, None)] * 2
    tune(shared_out("alone", folder, tmp_path), Processes())
    for kind in ("ddp", "fsdp"):
        check_equal(tmp_path / kind, tmp_path / "alone")
    assert read_record(tmp_path / "fsdp" / "checkpoints" / "step-000003")["processes"] == 2
    export(tmp_path / "fsdp", Export(str(tmp_path / "exported")))
    left, made = (load(path)[0].state_dict() for path in (tmp_path / "fsdp" / "model", tmp_path / "exported"))
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, made[name], atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["quantised", "full"])
def test_two_processes_over_other_lms_equal_one(folder: Path, tmp_path: Path, kind: str) -> None:
    """Catches quantised weights that DDP sends around wrongly, and an LM that trains in shards and is saved so."""
    pytest.importorskip("bitsandbytes")
    two, one = (shared_out(kind, folder, tmp_path / each) for each in ("two", "one"))
    assert forked(lambda processes: void(tune(two, processes)), world=2) == [(0, None)] * 2
    tune(one, Processes())
    check_equal(Path(two.out), Path(one.out))


def void(_: object) -> None:
    """Nothing, of whatever it was."""


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_dry_run_plans_adapters(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a plan without adapters, of float weights where they are of 4 bits, or of steps that nothing gives."""
    arguments = ["flamingo-tune", f"--init.path={folder / 'pretrained'}", f"--out={tmp_path / 'run'}", "--dry-run",
                 "--batch=8", "--micro_batch=2", "--train_language=lora", "--data.max_tokens=128"]  # fmt: skip
    for name in SOURCES:
        arguments += [f"--data.sources.{name}.shards", str(folder / name)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "no faults found" in said
    assert "12 of 8 sequences" in said and "1 steps of warm-up, then a cosine" in said
    assert re.search(rf"model +{folder / 'pretrained'}, with its LM lora", said)
    assert re.search(r"adapters [\d.]+ k \(rate 1e-05, decay 0\)", said)
    assert re.search(r"images +5\d +\d", said)
    assert not (tmp_path / "run").exists()

    recipe = recipe_for(folder, tmp_path, lora=LoraRecipe(rank=4, quantised=True))
    pytest.importorskip("bitsandbytes")
    packed = plan(Tuning(recipe)).model
    sizes = {name: each.numel() * each.element_size() for name, each in packed.language_model.named_parameters()}
    assert sizes["model.layers.0.mlp.up_proj.base_layer.weight"] == 32 * 64 / 2
    unknown = recipe_for(folder, tmp_path, steps=0)
    unknown.data.sources["images"].shards = str(tmp_path / "missing")
    assert any("data.sources.images: steps and shares depend on" in fault for fault in plan(Tuning(unknown)).faults)


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"init": InitRecipe("no/such/model")}, "init.path: no/such/model"),
        ({"init": InitRecipe("")}, "init.path: expected"),
        ({"init": InitRecipe("{folder}/language", kind="open_flamingo")}, "expected init.vision and init.language"),
        ({"init": InitRecipe("{folder}/vision")}, "holds a model of type clip_vision_model"),
        ({"init": InitRecipe("{folder}/half")}, "half/config.json: expected a JSON object"),
        ({"steps": 0, "epochs": 0.0}, "epochs=0"),
        ({"lora": LoraRecipe(rank=0)}, "lora.rank=0"),
        ({"lora": LoraRecipe(dropout=1.0)}, "lora.dropout=1"),
        ({"lora": LoraRecipe(projections=[])}, "lora.projections"),
        ({"lora": LoraRecipe(pattern="qkv")}, "no projections of qkv"),
        ({"lora": LoraRecipe(quantised=True), "parallel": ParallelRecipe("fsdp")}, "expected parallel.kind=ddp"),
        ({"frames": -1}, "frames=-1"),
    ],
)
def test_mistakes_are_one_line(folder: Path, tmp_path: Path, change: dict[str, Any], culprit: str) -> None:
    """Catches tracebacks, and messages that do not name the culprit."""
    (folder / "half").mkdir(exist_ok=True)
    (folder / "half" / "config.json").write_text("{")
    recipe = recipe_for(folder, tmp_path, **change)
    recipe = replace(recipe, init=replace(recipe.init, path=recipe.init.path.replace("{folder}", str(folder))))
    with pytest.raises(FlamingoError) as raised:
        tune(recipe, Processes())
    assert culprit in str(raised.value)
