"""Media of one batch that differ in their numbers of frames: images beside videos, long ones beside short ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flamingo import Document, FlamingoError, FlamingoForConditionalGeneration, FlamingoProcessor, Image, Text, Video
from flamingo.images import Crop, View, frames_of, media_pixels
from flamingo.resampler import PerceiverResampler
from tests.tiny import document, picture, tiny_flamingo

Tiny = tuple[FlamingoForConditionalGeneration, FlamingoProcessor]
FRAMES = (1, 4, 2, 1, 7)
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def film(seed: int, frames: int) -> Video | Image:
    """A video of so many pictures; of one, the picture."""
    pictures = tuple(picture(100 * seed + n) for n in range(frames))
    return Video(pictures) if frames > 1 else pictures[0]


def mixed() -> list[Document]:
    """Samples with an image and two videos, with nothing, with an image, and with a long video."""
    first = (Text("see"), film(1, 1), Text("cat"), film(2, 4), Text("dogs run"), film(3, 2), Text("sea"))
    return [
        Document(first, key="first"),
        document(2, 0),
        Document((film(4, 1), Text("red")), key="third"),
        Document((film(5, 7), Text("a longer text")), key="fourth"),
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """With embeddings of three frames, fewer than the longer videos have."""
    return tiny_flamingo(tmp_path_factory.mktemp("tiny"), resampler_max_frames=3)


def without_labels(processor: FlamingoProcessor, documents: Any, **options: Any) -> dict[str, Tensor]:
    """A batch as `generate` takes it."""
    return {name: value for name, value in processor(documents=documents, **options).items() if name != "labels"}


# -- pixels ------------------------------------------------------------------------------------------------------------


def test_frames_are_flat_and_in_order(tiny: Tiny) -> None:
    """Catches padding frames, frames in another order or medium, and views that move on within a video."""
    _, processor = tiny
    media = [film(n, frames) for n, frames in enumerate(FRAMES)]
    views = [View(flip=bool(n % 2), crop=Crop(0.5, 1.0, 0.3, 0.1 * n)) for n in range(len(media))]
    found = media_pixels(media, processor.pixel_settings, views)
    seen = [(frame, view) for medium, view in zip(media, views, strict=True) for frame in frames_of(medium)]
    alone = [media_pixels([frame], processor.pixel_settings, [view]) for frame, view in seen]
    assert found.shape == (sum(FRAMES), 1, 3, 16, 16)
    assert torch.equal(found[:, 0], torch.cat([each[0] for each in alone]))
    frames = processor.media_frames(media)
    assert frames is not None and frames.tolist() == list(FRAMES)
    assert processor.media_frames(media[:1] + media[3:4]) is None is processor.media_frames([])
    assert torch.equal(processor.pixels(media, views), processor.pixel_settings.normalise(found))


def test_a_batch_says_how_many_frames_only_where_they_differ(tiny: Tiny) -> None:
    """Catches a uniform batch that loses its form, and rows, ready pixels or packing that mix media up."""
    _, processor = tiny
    batch = processor(documents=mixed())
    assert batch["media_frames"].tolist() == [1, 4, 2, 1, 7] and batch["media_per_sample"].tolist() == [3, 0, 1, 1]
    expected = torch.cat([processor.pixels([medium])[0] for each in mixed() for medium in each.media])[:, None]
    assert torch.equal(batch["pixel_values"], expected)
    encodings = [processor.encode(each) for each in mixed()]
    ready = [processor.pixels(each.media) for each in encodings]
    packed = processor.collate_packed([encodings[:2], encodings[2:]], pixels=ready)
    for other in (processor.collate(encodings, pixels=ready), packed):
        assert torch.equal(other["pixel_values"], expected)
        assert torch.equal(other["media_frames"], batch["media_frames"])
    texts = ["see<image>cat<video>dogs<video>", "<image>"]
    images, videos = [[film(1, 1)], [film(4, 1)]], [[film(2, 4), film(3, 2)], []]
    by_text = processor(text=texts, images=images, videos=videos)
    assert torch.equal(by_text["pixel_values"], expected[:8]) and by_text["media_frames"].tolist() == [1, 4, 2, 1]
    for uniform in ([document(1, 2)], [document(2, 0)], [Document((film(5, 2), Text("a"), film(6, 2)))]):
        assert "media_frames" not in processor(documents=uniform)


# -- resampler ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("max_frames", [0, 1, 3])
def test_each_medium_is_resampled_as_alone(dtype: torch.dtype, max_frames: int) -> None:
    """Catches padding that latents see, frames that meet another's embedding or share them by the batch's longest
    medium, and gradients that leak between media.
    """
    torch.manual_seed(0)
    resampler = PerceiverResampler(24, depth=2, latents=4, heads=2, head_dim=8, max_frames=max_frames).to(dtype)
    media = torch.randn(sum(FRAMES), 1, 5, 24, dtype=dtype, requires_grad=True)
    weights = torch.randn(len(FRAMES), 4, 24, dtype=dtype)

    def gradients(latents: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((latents * weights).sum(), [media, *resampler.parameters()]))

    together = resampler(media, torch.tensor(FRAMES))
    alone = torch.cat([resampler(each.transpose(0, 1)) for each in media.split(FRAMES)])
    torch.testing.assert_close(together, alone, rtol=0, atol=TOLERANCE[dtype])
    for found, expected in zip(gradients(together), gradients(alone), strict=True):
        torch.testing.assert_close(
            found, expected, rtol=0, atol=TOLERANCE[dtype] * max(1.0, float(expected.abs().max()))
        )


def test_media_of_one_length_keep_their_path(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches images that pay for the rows and masks of videos that are not there."""
    model, processor = tiny
    seen: list[Any] = []
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "flamingo.resampler.scaled_dot_product_attention",
        lambda query, key, value, mask=None: (seen.append(mask), attend(query, key, value, mask))[1],
    )
    for batch in (processor(documents=document(1, 3)), processor(documents=document(1, 0))):
        model.encode_media(batch["pixel_values"])
    assert seen == [None, None]
    ragged = processor(documents=mixed())
    model.encode_media(ragged["pixel_values"], ragged["media_frames"])
    assert [mask.shape for mask in seen[2:]] == [(5, 1, 1, 7 * 4 + 4)], "once, and no longer than the longest medium"


# -- model -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("media_attention", ["previous", "all"])
def test_a_batch_is_its_samples_alone(tmp_path: Path, media_attention: str) -> None:
    """Catches media that go to another sample's marks, in the loss and in its gradients."""
    model, processor = tiny_flamingo(tmp_path, resampler_max_frames=3, media_attention=media_attention)
    model.double()
    together = model(**processor(documents=mixed(), padding_side="right"))
    alone = [model(**processor(documents=each)) for each in mixed()]
    torch.testing.assert_close(together.sample_losses, torch.cat([each.sample_losses for each in alone]))
    trained = [each for each in model.parameters() if each.requires_grad]
    found = torch.autograd.grad(together.sample_losses.sum(), trained)
    expected = torch.autograd.grad(sum(each.sample_losses.sum() for each in alone), trained)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_packed_documents_are_those_alone(tmp_path: Path) -> None:
    """Catches media of a packed row that are counted by frames."""
    model, processor = tiny_flamingo(tmp_path, packing=True, resampler_max_frames=3)
    encodings = [processor.encode(each) for each in mixed()]
    packed = model(**processor.collate_packed([encodings[:3], encodings[3:]]))
    alone = [model(**processor(documents=each)).sample_losses.sum() for each in mixed()]
    torch.testing.assert_close(packed.sample_losses, torch.stack([sum(alone[:3]), alone[3]]))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
@pytest.mark.parametrize("media_attention", ["previous", "all"])
def test_generation_is_that_of_each_sample_alone(tmp_path: Path, media_attention: str, options: dict[str, Any]) -> None:
    """Catches beams that repeat frames for media, and media that are lost after the prompt."""
    model, processor = tiny_flamingo(tmp_path, resampler_max_frames=3, media_attention=media_attention)
    options = dict(options, max_new_tokens=6, do_sample=False)
    batch = without_labels(processor, mixed())
    start, several = batch["input_ids"].shape[1], options.get("num_return_sequences", 1)
    together = model.generate(**batch, **options)[:, start:]
    assert torch.equal(together, model.generate(**batch, **options, use_cache=False)[:, start:])
    for sample, each in enumerate(mixed()):
        alone = without_labels(processor, each)
        expected = model.generate(**alone, **options)[:, alone["input_ids"].shape[1] :]
        found = together[sample * several : (sample + 1) * several, : expected.shape[1]]
        assert torch.equal(found, expected)


def test_one_graph_holds_media_of_any_frames(tiny: Tiny) -> None:
    """Catches a graph that asks for the longest medium, which it may not."""
    model, processor = tiny
    compiled: Callable[..., Tensor] = torch.compile(model.encode_media, fullgraph=True, backend="aot_eager")
    for documents in (mixed(), mixed()[::-1]):
        batch = processor(documents=documents)
        given = batch["pixel_values"], batch["media_frames"]
        found, expected = compiled(*given), model.encode_media(*given)
        torch.testing.assert_close(found, expected)
        parameters = list(model.resampler.parameters())
        gradients = [torch.autograd.grad(each.square().sum(), parameters) for each in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_activations_computed_again_give_the_same_gradients(tiny: Tiny) -> None:
    """Catches gated blocks that are computed again over other media."""
    model, processor = copy.deepcopy(tiny[0]).train(), tiny[1]
    batch = processor(documents=mixed(), padding_side="right")
    trained = [each for each in model.parameters() if each.requires_grad]
    expected = torch.autograd.grad(model(**batch).loss, trained)
    model.activation_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(torch.autograd.grad(model(**batch).loss, trained), expected)


def test_every_module_is_called_as_often_as_for_images(tiny: Tiny) -> None:
    """Catches a process with videos that calls a module once more than one with images: FSDP2 would wait for ever."""
    model, processor = tiny
    counts = []
    parts = [*model.resampler.modules(), *model.cross_attention.modules()]
    for documents in ([document(1, 2)], mixed(), [document(1, 0)]):
        calls: dict[nn.Module, int] = {}
        hooks = [
            each.register_forward_hook(lambda module, *_, calls=calls: calls.update({module: calls.get(module, 0) + 1}))
            for each in parts
        ]
        model(**processor(documents=documents, padding_side="right"))
        for hook in hooks:
            hook.remove()
        counts.append(calls)
    assert counts[0] == counts[1] == counts[2] and counts[0]


def test_every_trained_parameter_gets_a_gradient(tmp_path: Path) -> None:
    """Catches frame embeddings, or a tower that trains, that a ragged batch leaves out of the graph."""
    model, processor = tiny_flamingo(tmp_path, resampler_max_frames=3, freeze_vision=False)
    model.train()(**processor(documents=mixed(), padding_side="right")).loss.backward()
    assert not [name for name, each in model.named_parameters() if each.requires_grad and each.grad is None]


def test_numbers_that_do_not_fit_are_named(tiny: Tiny) -> None:
    """Catches frames that are shared out wrongly, or broadcast."""
    model, processor = tiny
    batch = processor(documents=mixed())
    pixels, frames, ids = batch["pixel_values"], batch["media_frames"], batch["input_ids"]
    for wrong, message in (
        (torch.tensor([1, 4, 2, 1, 6]), r"add up to 15 rows of pixel_values, got \[1, 4, 2, 1, 6\]"),
        (torch.tensor([0, 5, 2, 1, 7]), r"numbers from 1 .* got \[0, 5, 2, 1, 7\]"),
        (frames.float(), r"media_frames of shape \(5,\) and torch.float32: expected a whole number for each medium"),
        (frames[None], r"media_frames of shape \(1, 5\)"),
    ):
        with pytest.raises(FlamingoError, match=message):
            model.encode_media(pixels, wrong)
    with pytest.raises(FlamingoError, match=r"shape \(5, 3, 3, 16, 16\): expected \(frames of all media, 1, "):
        model.encode_media(pixels.view(5, 3, 3, 16, 16), frames)
    with pytest.raises(FlamingoError, match="expected numbers that add up to 15 media"):
        model(ids, pixel_values=pixels, media_per_sample=batch["media_per_sample"])
    with pytest.raises(FlamingoError, match="expected numbers that add up to 4 media"):
        model.generate(ids, pixel_values=pixels, media_frames=frames[1:], media_per_sample=batch["media_per_sample"])
    latents = model.encode_media(pixels, frames)
    for call in (model, model.generate):
        with pytest.raises(FlamingoError, match="media_frames: expected with pixel_values alone"):
            call(ids, media_latents=latents, media_frames=frames)
