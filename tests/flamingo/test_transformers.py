"""The model in transformers: Auto classes, generation, precisions, kernels, compilation, devices, pipelines, DDP."""

from __future__ import annotations

import copy
import io
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image as PilImage
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    CompileConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)

from flamingo import Document, FlamingoConfig, FlamingoError, FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo.modeling import decoder_layers, trainable_names
from tests.tiny import document, language_configs, picture, tiny_flamingo

FEW = ["llama", "opt", "gpt_neox"]
# Falcon's own forward with alibi fails on the mask that transformers makes for a static cache.
STATIC = sorted(set(language_configs()) - {"falcon_alibi"})
Tiny = tuple[FlamingoForConditionalGeneration, FlamingoProcessor]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A random Flamingo with open gates over llama; tests that change it copy it first."""
    return tiny_flamingo(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def saved(llama: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of its model, in several shards, and of its processor."""
    folder = tmp_path_factory.mktemp("saved")
    llama[0].save_pretrained(folder, max_shard_size="50KB")
    llama[1].save_pretrained(folder)
    return folder


def ragged() -> list[Document]:
    """Samples with 3, 0 and 1 media, the first with text before them."""
    return [document(1, 3, lead=True), document(2, 0), document(3, 1)]


def prompts(processor: FlamingoProcessor, documents: Any = None) -> dict[str, Tensor]:
    """A left-padded batch without labels, by default of the ragged samples."""
    batch = processor(documents=documents or ragged())
    return {name: batch[name] for name in processor.model_input_names if name in batch}


def gradients(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """Of the loss of one batch, by name of the parameter."""
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@torch.no_grad()
def assert_same_logits(model: nn.Module, expected: nn.Module, processor: FlamingoProcessor, tolerance: float) -> None:
    """Of every token, to `tolerance` of the largest; the impossible ids are the same."""
    batch = prompts(processor)
    here = batch["attention_mask"].bool()
    ours, theirs = (each(**batch).logits[here].float() for each in (model, expected))
    finite = theirs.isfinite()
    assert torch.equal(ours.isfinite(), finite)
    assert (ours - theirs)[finite].abs().max() <= tolerance * theirs[finite].abs().max()


def test_auto_classes_load_what_was_saved_in_shards(llama: Tiny, saved: Path) -> None:
    """Catches classes that are not registered, and shards that lose or invent tensors."""
    assert len(list(saved.glob("model-*-of-*.safetensors"))) > 1
    model, processor = AutoModelForImageTextToText.from_pretrained(saved).eval(), AutoProcessor.from_pretrained(saved)
    assert isinstance(AutoConfig.from_pretrained(saved), FlamingoConfig)
    assert isinstance(model, FlamingoForConditionalGeneration) and isinstance(processor, FlamingoProcessor)
    assert trainable_names(model) == trainable_names(llama[0])
    assert_same_logits(model, llama[0], processor, 0.0)


def test_sampling_repeats_with_its_seed(llama: Tiny) -> None:
    """Catches sampling that depends on the cache, or ignores the seed."""
    model, processor = llama
    drawn = []
    for seed, cache in ((0, True), (0, False), (1, True)):
        torch.manual_seed(seed)
        drawn.append(model.generate(**prompts(processor), do_sample=True, max_new_tokens=8, use_cache=cache))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert processor.image_token_id not in torch.cat(drawn)[:, prompts(processor)["input_ids"].shape[1] :]


@pytest.mark.parametrize("family", FEW)
def test_several_sequences_of_ragged_samples_are_those_of_each_alone(family: str, tmp_path: Path) -> None:
    """Catches beams and returned sequences that see the media of another sample or beam, and padding that is read."""
    model, processor = tiny_flamingo(tmp_path, family)
    options: dict[str, Any] = dict(max_new_tokens=6, do_sample=False, num_beams=4, num_return_sequences=3)
    options |= dict(length_penalty=0.0, output_scores=True, return_dict_in_generate=True)
    batch = prompts(processor)
    together = model.generate(**batch, **options).sequences[:, batch["input_ids"].shape[1] :]
    for sample, each in enumerate(ragged()):
        single = prompts(processor, each)
        start = single["input_ids"].shape[1]
        alone = model.generate(**single, **options)
        new = alone.sequences[:, start:]
        assert torch.equal(new, together[3 * sample : 3 * sample + 3, : new.shape[1]])
        # The likelihood of each sequence, by a pass over all of it.
        with torch.no_grad():
            logits = model(alone.sequences, pixel_values=single["pixel_values"].repeat(3, 1, 1, 1, 1)).logits
        likelihoods = logits[:, start - 1 : -1].log_softmax(-1).gather(2, new[..., None]).squeeze(2)
        ends = torch.isin(new, torch.tensor(model.generation_config.eos_token_id)).long()
        until_end = ends.cumsum(1) - ends == 0
        torch.testing.assert_close(alone.sequences_scores, (likelihoods * until_end).sum(1))


@pytest.mark.parametrize(
    "options", [{}, dict(num_beams=3, num_return_sequences=2), dict(cache_implementation="static")]
)
def test_all_previous_media_stay_in_sight(options: dict[str, Any], tmp_path: Path) -> None:
    """Catches media that are cut to each sample's last after the prompt, or mixed up among samples and beams."""
    model, processor = tiny_flamingo(tmp_path, media_attention="all")
    asked: dict[str, Any] = dict(max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)

    def generated(documents: Any, **options: Any) -> tuple[Tensor, Tensor]:
        batch = prompts(processor, documents)
        output = model.generate(**batch, **asked, **options)
        return output.sequences[:, batch["input_ids"].shape[1] :], output.logits[-1]

    sequences, logits = generated(ragged(), **options)
    uncached = {name: value for name, value in options.items() if name != "cache_implementation"}
    expected_sequences, expected_logits = generated(ragged(), **uncached, use_cache=False)
    assert torch.equal(sequences, expected_sequences)
    torch.testing.assert_close(logits, expected_logits)
    for each, together in zip(ragged(), sequences.chunk(3), strict=True):
        alone, _ = generated(each, **options)
        assert torch.equal(alone, together[:, : alone.shape[1]])
    model.config.media_attention = "previous"
    assert not torch.allclose(generated(ragged(), **options)[1], logits), "nothing to compare: as with the last medium"


@pytest.mark.parametrize("media_attention", ["previous", "all"])
def test_generation_goes_on_from_a_cache(media_attention: str, tmp_path: Path) -> None:
    """Catches a conversation whose next turn sees other media, or none, because its marks are in the cache."""
    model, processor = tiny_flamingo(tmp_path, media_attention=media_attention)
    options: dict[str, Any] = dict(do_sample=False, return_dict_in_generate=True, output_logits=True)
    batch = prompts(processor)
    whole = model.generate(**batch, **options, min_new_tokens=8, max_new_tokens=8)
    begun = model.generate(**batch, **options, min_new_tokens=5, max_new_tokens=5)
    media = dict(pixel_values=batch["pixel_values"], past_key_values=begun.past_key_values)
    with pytest.raises(FlamingoError, match="input_ids: expected all ids, those of the .* in past_key_values too"):
        model.generate(begun.sequences[:, -1:], **media, **options)
    mask = torch.cat((batch["attention_mask"], torch.ones(3, 5, dtype=torch.long)), dim=1)
    options |= dict(min_new_tokens=3, max_new_tokens=3)
    rest = model.generate(begun.sequences, attention_mask=mask, **media, **options)
    assert torch.equal(rest.sequences, whole.sequences)
    torch.testing.assert_close(rest.logits, whole.logits[-3:])


def test_generation_refuses_what_it_would_get_wrong(llama: Tiny) -> None:
    """Catches prompts read in pieces, each of which counts its marks from the start, and media of another sample."""
    model, processor = llama
    batch = prompts(processor)
    pieces = copy.deepcopy(model.generation_config)
    pieces.prefill_chunk_size = 4
    for options in (dict(prefill_chunk_size=4), dict(generation_config=pieces), dict(assistant_model=model)):
        with pytest.raises(FlamingoError, match="prefill_chunk_size"):
            model.generate(**batch, **options, max_new_tokens=2)
    with pytest.raises(FlamingoError, match=r"found 0 image tokens but received 1 media \(sample 1\)"):
        model.generate(**batch | dict(media_per_sample=torch.tensor([3, 1, 0])), max_new_tokens=2)


@torch.no_grad()
@pytest.mark.parametrize("where", ["argument", "configuration", "model"])
def test_tokens_that_were_suppressed_stay_so(llama: Tiny, where: str) -> None:
    """Catches the suppression of `<image>` that replaces the caller's own, and an `<image>` that is generated."""
    model, processor = copy.deepcopy(llama[0]), llama[1]
    batch = prompts(processor, document(1, 1))
    first = model.generate(**batch, do_sample=False, max_new_tokens=1)[0, -1]
    image = model.row_of[processor.image_token_id]
    model.new_output_rows[image] = 2 * model.get_output_embeddings().weight[first]  # `<image>` is the likeliest now
    assert model(**batch).logits[0, -1].argmax() == processor.image_token_id
    settings = copy.deepcopy(model.generation_config)
    settings.suppress_tokens = [int(first)]
    options: dict[str, Any] = {}
    if where == "argument":
        options["suppress_tokens"] = [int(first)]
    elif where == "configuration":
        options["generation_config"] = settings
    else:
        model.generation_config = settings
    drawn = model.generate(**batch, **options, do_sample=False, max_new_tokens=4)[0, batch["input_ids"].shape[1] :]
    assert not torch.isin(drawn, torch.tensor([int(first), processor.image_token_id])).any()


@torch.no_grad()
def test_hidden_states_are_returned(llama: Tiny) -> None:
    """Catches an `output_hidden_states` that is swallowed."""
    model, processor = llama
    batch = prompts(processor)
    output = model(**batch, output_hidden_states=True)
    assert len(output.hidden_states) == 1 + len(decoder_layers(model.language_model))
    known = model.get_output_embeddings()(output.hidden_states[-1])[..., : min(model.config.new_token_ids)]
    assert torch.equal(output.logits[..., : known.shape[-1]], known)
    options: dict[str, Any] = dict(output_hidden_states=True, return_dict_in_generate=True, min_new_tokens=3)
    steps = model.generate(**batch, **options, do_sample=False, max_new_tokens=3).hidden_states
    assert [len(step) for step in steps] == [len(output.hidden_states)] * 3
    torch.testing.assert_close(steps[0][-1], output.hidden_states[-1])


@pytest.mark.parametrize("family", STATIC)
def test_a_static_cache_gives_the_same_tokens(family: str, tmp_path: Path) -> None:
    """Catches masks and media that are laid out for a cache that grows."""
    model, processor = tiny_flamingo(tmp_path, family)
    options: dict[str, Any] = dict(max_new_tokens=6, do_sample=False)
    grown = model.generate(**prompts(processor), **options)
    assert torch.equal(model.generate(**prompts(processor), **options, cache_implementation="static"), grown)


def test_a_step_with_a_static_cache_compiles_into_one_graph(llama: Tiny) -> None:
    """Catches decoding that breaks its graph, or is compiled anew at each token, as it would be on a GPU."""
    model, processor = copy.deepcopy(llama[0]), llama[1]
    options: dict[str, Any] = dict(max_new_tokens=6, do_sample=False)
    everywhere = CompileConfig(fullgraph=True, backend="eager", mode=None)
    everywhere._compile_all_devices = True  # by itself `generate` compiles on accelerators alone
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = model.generate(**prompts(processor), **options, cache_implementation="static", compile_config=everywhere)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(compiled, model.generate(**prompts(processor), **options))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", FEW)
def test_gradient_checkpointing_gives_the_same_gradients(family: str, use_reentrant: bool, tmp_path: Path) -> None:
    """Catches blocks that are not recomputed, and media that are gone when they are."""
    model, processor = tiny_flamingo(tmp_path, family)
    batch = processor(documents=ragged(), padding_side="right")
    expected = gradients(model.train(), batch)
    passes = []
    model.cross_attention[0].attn.register_forward_pre_hook(lambda *_: passes.append(1))
    model.activation_checkpointing_enable(dict(use_reentrant=use_reentrant))
    found = gradients(model, batch)
    assert len(passes) == 2
    assert set(found) == set(expected) == trainable_names(model)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_the_forward_compiles_into_one_graph(llama: Tiny) -> None:
    """Catches branches on values and Python state that break the graph of a step, forward and backward."""
    model, processor = copy.deepcopy(llama[0]), llama[1]
    batch = processor(documents=ragged(), padding_side="right")
    expected, loss = gradients(model, batch), model(**batch).loss
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = {name.removeprefix("_orig_mod."): gradient for name, gradient in gradients(compiled, batch).items()}
    torch.testing.assert_close(compiled(**batch).loss, loss)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_inductor_gives_the_same_logits(llama: Tiny) -> None:
    """Catches what only the default backend of torch.compile gets wrong."""
    model, processor = llama
    torch._dynamo.reset()
    assert_same_logits(torch.compile(model, fullgraph=True), model, processor, 1e-5)


@pytest.mark.parametrize("kernel", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_every_attention_kernel_gives_the_same_logits(llama: Tiny, saved: Path, kernel: str) -> None:
    """Catches an `attn_implementation` that does not reach a backbone, and masks that a kernel reads otherwise."""
    loaded = AutoModelForImageTextToText.from_pretrained(saved, attn_implementation=kernel).eval()
    switched = copy.deepcopy(llama[0])
    switched.set_attn_implementation(kernel)
    for model in (loaded, switched):
        for part in (model.language_model, model.vision_tower):
            assert part.config._attn_implementation == kernel
        assert_same_logits(model, llama[0], llama[1], 1e-5)


@pytest.mark.parametrize("parts", ["backbones", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FEW)
def test_half_precision_is_close_to_full(family: str, dtype: torch.dtype, parts: str, tmp_path: Path) -> None:
    """Catches parts that meet in different precisions, overflow, and a loss that is summed in half precision."""
    model, processor = tiny_flamingo(tmp_path, family)
    half = copy.deepcopy(model)
    for part in (half.language_model, half.vision_tower) if parts == "backbones" else (half,):
        part.to(dtype)
    assert_same_logits(half, model, processor, 8 * torch.finfo(dtype).eps)
    batch = prompts(processor)
    if parts == "all":
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
    output = half.generate(**batch, max_new_tokens=4, output_logits=True, return_dict_in_generate=True)
    assert torch.stack(output.logits)[..., : len(processor.tokenizer)].isfinite().all()
    full = model(**processor(documents=ragged())).loss
    output = half.train()(**processor(documents=ragged()))
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert abs(output.loss - full) <= 8 * torch.finfo(dtype).eps * full
    assert all(parameter.grad.isfinite().all() for parameter in half.parameters() if parameter.requires_grad)


def placement(module: nn.Module, offloaded: str, prefix: str = "") -> dict[str, str]:
    """A device map: the submodule `offloaded` on disk, everything else on the CPU."""
    if prefix == offloaded:
        return {prefix: "disk"}
    if prefix and not offloaded.startswith(prefix + "."):
        return {prefix: "cpu"}
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    placed = {f"{prefix}.{name}".strip("."): "cpu" for name, _ in tensors}
    for name, child in module.named_children():
        placed.update(placement(child, offloaded, f"{prefix}.{name}".strip(".")))
    return placed


@pytest.mark.parametrize("offloaded", [None, "language_model.model.layers.0", "cross_attention", "resampler"])
def test_parts_may_lie_elsewhere(llama: Tiny, saved: Path, tmp_path: Path, offloaded: str | None) -> None:
    """Catches tensors that are made on the device of a part that is not there, and blocks called past its hooks."""
    model, processor = llama
    where: Any = "auto" if offloaded is None else placement(model, offloaded)
    spread = AutoModelForImageTextToText.from_pretrained(saved, device_map=where, offload_folder=tmp_path).eval()
    assert any(parameter.is_meta for parameter in spread.parameters()) == (offloaded is not None)
    assert_same_logits(spread, model, processor, 0.0)
    for documents in (ragged(), document(2, 0)):
        batch = prompts(processor, documents)
        expected = model.generate(**batch, max_new_tokens=2, do_sample=False)
        assert torch.equal(spread.generate(**batch, max_new_tokens=2, do_sample=False), expected)
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(spread(**text).logits, model(**text).logits)


def test_the_pipeline_reads_texts_with_images_and_chats(llama: Tiny, saved: Path, tmp_path: Path) -> None:
    """Catches arguments that the pipeline passes and the processor refuses, and answers that hold the prompt."""
    model, processor = llama
    answer = pipeline("image-text-to-text", model=model, processor=processor)
    options: dict[str, Any] = dict(max_new_tokens=4)  # random models do not sample by themselves

    def expected(text: Any, images: Any) -> list[str]:
        batch = processor(text=text, images=images)
        ids = model.generate(**batch, max_new_tokens=4, do_sample=False)[:, batch["input_ids"].shape[1] :]
        return processor.post_process_image_text_to_text(ids)

    pictures = [PilImage.open(io.BytesIO(picture(n).data)) for n in range(2)]
    (tmp_path / "0.png").write_bytes(picture(0).data)
    (one,) = expected("<image>cat", pictures[:1])
    for images in (pictures[0], pictures[:1], str(tmp_path / "0.png")):
        assert answer(images=images, text="<image>cat", **options)[0]["generated_text"] == "<image>cat" + one
    (two,) = expected("a<image>cat<image>", pictures)
    found = answer(images=pictures, text="a<image>cat<image>", return_full_text=False, **options)
    assert [each["generated_text"] for each in found] == [two]
    texts = ["<image>cat", "some <image> dogs"]
    found = answer(images=pictures, text=texts, return_full_text=False, **options)
    assert [each["generated_text"] for each in found] == expected(texts, [[each] for each in pictures])
    assert answer(text="sun", return_full_text=False, **options)[0]["generated_text"] == expected("sun", None)[0]

    image = dict(type="image", path=str(tmp_path / "0.png"))
    chat = [dict(role="user", content=[image, dict(type="text", text="what?")])]
    (reply,) = expected("<image>User:what? GPT:", pictures[:1])
    assert answer(text=chat, **options)[0]["generated_text"][-1] == dict(role="assistant", content=reply)
    begun = [*chat, dict(role="assistant", content=[dict(type="text", text="a")])]
    (rest,) = expected("<image>User:what? GPT:a", pictures[:1])
    loaded = pipeline("image-text-to-text", model=str(saved))
    assert loaded(text=begun, return_full_text=False, **options)[0]["generated_text"] == rest


def test_accumulated_samples_train_as_one_batch_in_the_trainer(llama: Tiny, tmp_path: Path) -> None:
    """Catches a loss that is averaged batch by batch, so that a sample with few supervised tokens counts as much."""
    samples = [*ragged(), document(4, 2)]
    encodings = [llama[1].encode(each) for each in samples]
    expected = copy.deepcopy(llama[0]).train()
    loss = expected(**llama[1].collate(encodings)).loss
    loss.backward()
    gradients = [each.grad for each in expected.parameters() if each.requires_grad]
    norm = nn.utils.get_total_norm(gradients)
    for size in (1, 4):
        model = copy.deepcopy(llama[0])
        options = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, max_steps=1,
            optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=1e9, logging_steps=1,
            remove_unused_columns=False, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = Trainer(model, options, data_collator=llama[1].collate, train_dataset=encodings)
        trainer.train()
        log = trainer.state.log_history[0]
        assert log["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert log["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        moved = [each for each in model.parameters() if each.requires_grad]
        start = [each for each in llama[0].parameters() if each.requires_grad]
        for now, before, gradient in zip(moved, start, gradients, strict=True):
            torch.testing.assert_close(now, before - 0.1 * gradient)


def _steps(rank: int, folder: Path, expected: dict[str, Tensor], batches: list[list[Any]]) -> None:
    """Steps of SGD under DDP in one of two processes, each with its own batches; then the parameters are `expected`."""
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=90))
    try:
        model = FlamingoForConditionalGeneration.from_pretrained(folder).train()
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
        for step in batches:
            optimizer.zero_grad()
            parallel(**step[rank]).loss.backward()
            optimizer.step()
        dist.barrier()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected[name])
    finally:
        dist.destroy_process_group()


def test_text_alone_and_text_with_images_train_under_ddp(llama: Tiny, saved: Path) -> None:
    """Catches parameters left unused by a batch without media, at which DDP stops, on all ranks or on one."""
    model, processor = copy.deepcopy(llama[0]).train(), llama[1]
    plans = [(document(2, 0), document(4, 0)), (document(6, 0), document(1, 3)), (document(3, 1), document(5, 2))]
    batches = [[dict(processor(documents=each, padding_side="right")) for each in plan] for plan in plans]
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    for step in batches:
        optimizer.zero_grad()
        sum(model(**batch).loss / 2 for batch in step).backward()
        optimizer.step()
    expected = {name: parameter.detach() for name, parameter in model.named_parameters()}
    other = torch.multiprocessing.spawn(_steps, (saved, expected, batches), nprocs=1, join=False)
    _steps(1, saved, expected, batches)
    while not other.join():
        pass
