"""Documents to tokens, labels and pixels."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image as PilImage

from flamingo import Document, FlamingoError, FlamingoProcessor, Image, Text
from flamingo.images import PixelSettings, decode
from flamingo.processing import render
from tests.tiny import document, picture, tiny_flamingo


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> FlamingoProcessor:
    """Of a tiny Flamingo over llama."""
    return tiny_flamingo(tmp_path_factory.mktemp("tiny"))[1]


A, B = picture(1), picture(2)
END = "<|endofchunk|>"


@pytest.mark.parametrize(
    ("segments", "complete", "expected"),
    [
        ((A, Text("cat"), B, Text("dog")), True, f"<image>cat{END}<image>dog{END}"),
        ((A, Text("cat"), B), False, f"<image>cat{END}<image>"),
        ((A, Text("cat"), B, Text("a ")), False, f"<image>cat{END}<image>a "),
        ((Text("lead"), A, B, Text("two")), True, f"lead{END}<image><image>two{END}"),
        ((A, Text(f"x{END}"), Text(f"y{END}")), True, f"<image>x{END}y{END}"),
        ((Text("only"),), True, f"only{END}"),
    ],
)
def test_chunks_are_closed_where_media_follow(segments: tuple, complete: bool, expected: str) -> None:
    """Catches missing or doubled end-of-chunk marks, which training and prompts must share."""
    text, spans = render(Document(segments, complete=complete))
    assert text == expected
    assert "".join(text[start:end] for start, end, _ in spans) == expected


def test_labels_are_the_supervised_tokens(processor: FlamingoProcessor) -> None:
    """Catches loss on `<image>`, on prompts, or none on the end of a supervised chunk."""
    sample = Document((A, Text("Q:", supervised=False), Text("yes"), B, Text("no", supervised=False)))
    encoding = processor.encode(sample, eos=True)
    counted = [label for label in encoding.labels if label != -100]
    assert processor.tokenizer.decode(counted) == f"yes{END}</s>"
    assert encoding.input_ids[0] == processor.tokenizer.bos_token_id
    assert all(label in (-100, token) for label, token in zip(encoding.labels, encoding.input_ids, strict=True))


def test_an_image_mark_in_text_is_an_error(processor: FlamingoProcessor) -> None:
    """Catches web text that holds `<image>` and would shift every later picture by one."""
    with pytest.raises(FlamingoError, match=r"found 2 image tokens but received 1 images \(sample key=k1\)"):
        processor.encode(Document((A, Text("an <image> tag")), key="k1"))


def test_text_and_images_are_the_same_as_the_document(processor: FlamingoProcessor) -> None:
    """Catches a second path from text to tokens that drifts from the documents' one."""
    pictures = [PilImage.open(io.BytesIO(image.data)) for image in (A, B)]
    by_text = processor(text=[f"<image>cat{END}<image>"], images=[pictures])
    by_document = processor(documents=Document((A, Text("cat"), B), complete=False))
    for key in ("input_ids", "pixel_values", "media_per_sample"):
        assert torch.equal(by_text[key], by_document[key])
    with pytest.raises(FlamingoError, match="found 1 image tokens but received 2 images"):
        processor(text="<image>", images=pictures)


def test_no_image_is_padded_in(processor: FlamingoProcessor) -> None:
    """Catches padding images, which would be encoded for nothing."""
    batch = processor(documents=[document(1, 3), document(2, 0), document(3, 1)])
    assert batch["pixel_values"].shape == (4, 1, 3, 16, 16)
    assert batch["media_per_sample"].tolist() == [3, 0, 1]
    assert processor(documents=document(2, 0))["pixel_values"].shape == (0, 1, 3, 16, 16)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("size", [16, 40])
def test_pixels_are_those_of_the_image_processor(processor: FlamingoProcessor, suffix: str, size: int) -> None:
    """Catches a fast path that resizes or normalises unlike the backbone's own processor (within a grey level)."""
    smooth = PilImage.fromarray(np.uint8(np.linspace(0, 255, size * size * 3).reshape(size, size, 3)))
    buffer = io.BytesIO()
    smooth.save(buffer, {"png": "PNG", "jpg": "JPEG"}[suffix], **({"quality": 95} if suffix == "jpg" else {}))
    image = Image(buffer.getvalue(), f"x.{suffix}")
    theirs = processor.image_processor(PilImage.open(io.BytesIO(image.data)), return_tensors="pt")["pixel_values"][0]
    ours = processor.pixels([image])[0, 0]
    step = 1 / 255 / min(processor.image_processor.image_std)
    assert (ours - theirs).abs().max() <= 1.01 * step


def test_orientation_and_modes_are_honoured() -> None:
    """Catches photographs that stay on their side, and palette or grey images that crash."""
    upright = PilImage.new("RGB", (4, 2), "white")
    exif = upright.getexif()
    exif[0x0112] = 6  # rotate by 90°
    buffer = io.BytesIO()
    upright.save(buffer, "JPEG", exif=exif)
    assert decode(Image(buffer.getvalue(), "x.jpg"), 3).shape == (3, 4, 2)
    for mode in ("P", "L", "1", "RGBA", "I;16"):
        buffer = io.BytesIO()
        PilImage.new(mode, (4, 2)).save(buffer, "PNG")
        assert decode(Image(buffer.getvalue(), "x.png"), 3).shape == (3, 2, 4)
        assert decode(Image(buffer.getvalue(), "x.png"), 1).shape == (1, 2, 4)
    with pytest.raises(FlamingoError, match="broken.png: expected an image file"):
        decode(Image(b"<html>", "broken.png"), 3)


def test_a_tower_without_a_size_is_refused() -> None:
    """Catches a default size that nobody chose."""
    with pytest.raises(FlamingoError, match="expected height and width"):
        PixelSettings.of(object(), 3)
