"""Documents to tokens, labels and pixels."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PilImage
from transformers import AutoProcessor

from flamingo import Document, FlamingoError, FlamingoProcessor, Image, Text, Video
from flamingo.images import PixelSettings, decode
from flamingo.media import visible_media
from flamingo.processing import IGNORED, render
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


def pil(image: Image) -> PilImage.Image:
    """The same picture, decoded."""
    return PilImage.open(io.BytesIO(image.data))


def test_text_and_images_are_the_same_as_the_document(processor: FlamingoProcessor) -> None:
    """Catches a second path from text to tokens that drifts from the documents' one."""
    by_text = processor(text=[f"<image>cat{END}<image>"], images=[[pil(A), pil(B)]])
    by_document = processor(documents=Document((A, Text("cat"), B), complete=False))
    assert set(by_text) == set(by_document) - {"labels"} == set(processor.model_input_names) - {"media_frames"}
    for key, value in by_text.items():
        assert torch.equal(value, by_document[key])


@pytest.mark.parametrize(
    ("text", "images", "expected"),
    [
        ("<image>", A, [1]),
        ("<image><image>", [A, B], [2]),
        ("<image><image>", [[A, B]], [2]),
        (["<image><image>"], [A, B], [2]),
        (["<image>", "<image>"], [A, B], [1, 1]),
        (["<image><image>", "none"], [[A, B], None], [2, 0]),
        (["none", "<image><image>"], [[], (A, B)], [0, 2]),
        (["none", "none"], [], [0, 0]),
        ("none", [None], [0]),
    ],
)
def test_every_nesting_of_images(processor: FlamingoProcessor, text: Any, images: Any, expected: list[int]) -> None:
    """Catches flat and nested lists that are read as one another, and texts without images that take another's."""
    batch = processor(text=text, images=images)
    assert batch["media_per_sample"].tolist() == expected
    assert torch.equal(batch["pixel_values"], processor.pixels([A, B][: sum(expected)]))


def test_every_form_of_an_image_gives_the_same_pixels(processor: FlamingoProcessor, tmp_path: Path) -> None:
    """Catches a photograph that is upright from a file and on its side from PIL, and modes that PNG does not keep."""
    photograph = pil(picture(3, 40)).crop((0, 0, 40, 24))
    exif = photograph.getexif()
    exif[0x0112] = 6  # rotate by 90°
    path = tmp_path / "photograph.jpg"
    photograph.save(path, exif=exif)
    forms: list[Any] = [path, str(path), path.read_bytes(), Image(path.read_bytes()), PilImage.open(path)]
    pixels = [processor(text="<image>", images=[form])["pixel_values"] for form in forms]
    assert all(torch.equal(each, pixels[0]) for each in pixels)
    assert processor(text="<image>", images=photograph.convert("CMYK"))["pixel_values"].shape == (1, 1, 3, 16, 16)
    deep = PilImage.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40)
    clear = photograph.convert("RGBA")
    clear.putalpha(100)
    for given in (deep, clear):
        given.save(tmp_path / "x.png")
        from_file, from_pil = (processor(text="<image>", images=[each]) for each in (tmp_path / "x.png", given))
        assert torch.equal(from_file["pixel_values"], from_pil["pixel_values"])


def test_videos_fill_their_own_marks_in_the_order_of_the_text(processor: FlamingoProcessor) -> None:
    """Catches frames that are counted as media, and videos put before or after all images."""
    clip = Video((A, B))
    for videos in (clip, [A, B], [clip], [[A, pil(B)]], [[clip]], [[[A, B]]]):
        batch = processor(text="<video>cat", videos=videos)
        assert torch.equal(batch["pixel_values"], processor.pixels([clip]))
        assert batch["input_ids"].eq(processor.image_token_id).sum() == 1
    batch = processor(text=["<video>a<image>b<video>", "c"], images=[[A], None], videos=[[[B], Video((A,))], None])
    assert torch.equal(batch["pixel_values"], processor.pixels([B, A, A]))
    assert batch["media_per_sample"].tolist() == [3, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(text="<image>", images=[A, B]), r"found 1 image tokens but received 2 images \(sample 0\)"),
        (dict(text=["x", "<image>"], images=[[], []]), r"found 1 image tokens but received 0 images \(sample 1\)"),
        (dict(text=["x", "<image>"], images=[[A], []]), r"found 0 image tokens but received 1 images \(sample 0\)"),
        (dict(text="<image>", videos=[A, B]), r"found 1 image tokens but received 0 images \(sample 0\)"),
        (dict(text="<video>"), r"found 1 video tokens but received 0 videos \(sample 0\)"),
        (dict(text=["a", "b"], images=[[A], [B], []]), "images: expected a list for each of 2 texts"),
        (dict(text="<image>", images=["missing.png"]), "image 0 of sample 0: missing.png: expected the path"),
        (dict(text="<image>", images=[[3]]), "image 0 of sample 0: expected a PIL image, a path, bytes"),
        (dict(text="<image>", images=3), "images: expected a list for each of 1 texts"),
        (dict(text="<image>", images=[b"GIF"]), "image 0 of sample 0: expected an image file"),
        (dict(text="<video>", videos=[[3]]), r"video 0 of sample 0: expected flamingo.Video or a list of frames"),
        (dict(text="<video>", videos=[[Video(())]]), "a video without frames: expected at least one"),
        (dict(text="a", documents=Document((A,))), "expected either documents, or text"),
        (dict(images=[A], documents=Document((A,))), "expected either documents, or text"),
        (dict(documents=[]), "expected at least one encoding"),
        (dict(text="a", return_tensors="np"), "return_tensors='np': expected 'pt'"),
        (dict(text="a", truncation=True), "truncation=True: expected False"),
        (dict(text="a", padding="max_length"), "padding='max_length': expected True or False or 'longest'"),
        (dict(text=["a", "bcd"], padding=False), r"padding=False: expected rows of one length, got \[2, 4\] tokens"),
        (dict(text="a", max_length=3), "unexpected argument 'max_length'"),
        (dict(text="a", audio=[[0.0]]), "unexpected argument 'audio'"),
    ],
)
def test_what_does_not_fit_is_named(processor: FlamingoProcessor, arguments: dict, message: str) -> None:
    """Catches media shifted between samples, and arguments that are ignored."""
    with pytest.raises(FlamingoError, match=message):
        processor(**arguments)


def test_a_chat_is_the_document_that_tuning_sees(processor: FlamingoProcessor, tmp_path: Path) -> None:
    """Catches a chat template whose turns differ from the interleaved document in tokens or in the order of images."""
    turn = [dict(type="text", text="and?"), dict(type="image", image=pil(B))]
    chat = [
        dict(role="system", content="Be brief."),
        dict(role="user", content=[dict(type="image", path=str(tmp_path / "a.png")), dict(type="text", text="what?")]),
        dict(role="assistant", content="cat"),
        dict(role="user", content=turn),
    ]
    (tmp_path / "a.png").write_bytes(A.data)
    prompt = Document(
        (Text("Be brief."), A, Text("User:what? GPT:"), Text("cat"), B, Text("User:and? GPT:")), complete=False
    )
    options: dict = dict(add_generation_prompt=True, tokenize=True, return_dict=True)
    expected = {key: value for key, value in processor(documents=prompt).items() if key != "labels"}
    processor.save_pretrained(tmp_path / "saved")
    for each in (processor, AutoProcessor.from_pretrained(tmp_path / "saved")):
        batch = each.apply_chat_template(chat, **options)
        assert set(batch) == set(expected)
        assert all(torch.equal(batch[key], value) for key, value in expected.items())
    assert processor.apply_chat_template(chat[1:3]) == f"<image>User:what? GPT:cat{END}"
    assert processor.apply_chat_template(chat[1:2]) == "<image>User:what?"
    assert processor.apply_chat_template(chat[1:3], continue_final_message=True) == "<image>User:what? GPT:cat"
    both = processor.apply_chat_template([chat[1:2], chat[3:]], **options)
    assert torch.equal(both["pixel_values"], processor.pixels([A, B]))
    clip = [dict(role="user", content=[dict(type="video", video=[A, B]), dict(type="text", text="when?")])]
    assert torch.equal(
        processor.apply_chat_template(clip, **options)["pixel_values"], processor.pixels([Video((A, B))])
    )


def test_a_chat_template_of_ones_own_is_kept(processor: FlamingoProcessor, tmp_path: Path) -> None:
    """Catches a default that overrides the template that a checkpoint comes with."""
    own = FlamingoProcessor(processor.image_processor, processor.tokenizer, chat_template="{{ messages[0].content }}!")
    own.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.apply_chat_template([dict(role="user", content="hi")]) == "hi!"


def test_packed_rows_hold_encodings_one_after_the_other(processor: FlamingoProcessor) -> None:
    """Catches tokens, labels or media of a packed row that come in different orders."""
    first, second, third = (processor.encode(document(seed, media)) for seed, media in ((1, 2), (2, 0), (3, 1)))
    packed = processor.collate_packed([[first, second], [third]])
    assert "attention_mask" not in packed
    ids = first.input_ids + second.input_ids
    length = len(ids)
    assert packed["input_ids"][0].tolist() == ids
    assert packed["documents"][0].tolist() == [1] * len(first.input_ids) + [2] * len(second.input_ids)
    assert packed["labels"][0].tolist() == first.labels + second.labels
    padding = length - len(third.input_ids)
    assert packed["documents"][1].tolist() == [1] * len(third.input_ids) + [0] * padding
    assert packed["labels"][1, length - padding :].tolist() == [IGNORED] * padding
    assert packed["media_per_sample"].tolist() == [2, 1]
    assert torch.equal(packed["pixel_values"], processor.pixels(first.media + third.media))
    with pytest.raises(FlamingoError, match="expected at least one encoding in each row"):
        processor.collate_packed([[first], []])


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_texts_of_the_next_medium_are_marked_document_by_document(
    processor: FlamingoProcessor, padding_side: str
) -> None:
    """Catches augmented documents that change their neighbours' visibility, and padding that sees media."""
    usual, ahead = processor.encode(document(1, 2, lead=True)), processor.encode(document(2, 2, lead=True))
    ahead = replace(ahead, next_media=True)
    assert "media_first" not in processor.collate([usual])
    expected = {}
    for encoding, attention in ((usual, "all"), (ahead, "next")):
        alone = processor.collate([encoding])["input_ids"]
        expected[attention] = visible_media(alone, processor.image_token_id, media_attention=attention)
    batch = processor.collate([usual, ahead], padding_side, media_attention="all")
    packed = processor.collate_packed([[usual, ahead]], media_attention="all")
    for n, name in enumerate(("media_first", "media_last")):
        for row, attention in enumerate(("all", "next")):
            here = batch["attention_mask"][row].bool()
            assert torch.equal(batch[name][row][here], expected[attention][n][0])
            assert not batch[name][row][~here].any()
        later = expected["next"][n][0]
        later = torch.where(later > 0, later + len(usual.media), 0)
        assert torch.equal(packed[name][0], torch.cat((expected["all"][n][0], later)))


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


def test_pixels_that_are_ready_are_joined_as_they_are(processor: FlamingoProcessor) -> None:
    """Catches ready pixels that are decoded again, land in another order, or belong to other encodings."""
    encodings = [processor.encode(document(seed, media)) for seed, media in ((1, 2), (2, 0), (3, 1))]
    ready = [processor.pixels(encoding.media) + place for place, encoding in enumerate(encodings)]
    packed = processor.collate_packed([encodings[:2], encodings[2:]], pixels=ready)
    for batch in (processor.collate(encodings, pixels=ready), packed):
        assert torch.equal(batch["pixel_values"], torch.cat([ready[0], ready[2]]))
    text = encodings[1]
    assert processor.collate([text], pixels=[ready[1]])["pixel_values"].shape == (0, 1, 3, 16, 16)
    film = processor.encode(Document((Video((A, B)), Text("x"))))
    with_film = processor.collate([text, film], pixels=[ready[1], processor.pixels(film.media)])
    assert with_film["pixel_values"].shape == (1, 2, 3, 16, 16), "no media have no number of frames"
    with pytest.raises(FlamingoError, match=r"pixels of \[\(2, 1\), \(1, 1\)\] media and frames a sequence: expected"):
        processor.collate(encodings[:2], pixels=[ready[0], ready[2]])
