"""Karpathy's files as published, and real photographs with their captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flamingo.document import Image
from flamingo.errors import FlamingoError
from icl_eval.datasets import Example, load_dataset
from icl_eval.datasets.checking import problems
from tests.icl_eval.datasets.published import picture, write_json


def sentences(*texts: str) -> list[dict[str, Any]]:
    return [{"tokens": text.lower().split(), "raw": text, "imgid": 0, "sentid": n} for n, text in enumerate(texts)]


def coco_image(number: int, split: str, *texts: str) -> dict[str, Any]:
    folder = "train2014" if split == "train" else "val2014"
    name = f"COCO_{folder}_{number:012d}.jpg"
    return {
        "filepath": folder, "sentids": [0], "filename": name, "imgid": 0, "split": split,
        "sentences": sentences(*texts), "cocoid": number,
    }  # fmt: skip


def test_coco_by_karpathys_split(tmp_path: Path) -> None:
    """Images of another split, an order of its own, spaces of the file in captions, the wrong year's folder."""
    images = [
        coco_image(42, "test", "A cat. ", "A cat on a mat.\n"),
        coco_image(9, "train", "A dog."),
        coco_image(7, "test", "A bird."),
        coco_image(8, "restval", "A cow."),
    ]
    write_json(tmp_path / "coco" / "dataset_coco.json", {"images": images, "dataset": "coco"})
    dataset = load_dataset("coco", tmp_path)
    assert dataset.examples("test") == (
        Example("42", ("val2014/COCO_val2014_000000000042.jpg",), answers=("A cat.", "A cat on a mat.")),
        Example("7", ("val2014/COCO_val2014_000000000007.jpg",), answers=("A bird.",)),
    )
    assert [example.media for example in dataset.examples("train")] == [("train2014/COCO_train2014_000000000009.jpg",)]
    with pytest.raises(FlamingoError, match="no examples in split 'val'"):
        dataset.examples("val")


def test_flickr30k_by_karpathys_split(tmp_path: Path) -> None:
    """Flickr's entries, which have neither filepath nor cocoid, read as COCO's; one of its folders not found."""
    entry = {"sentids": [0], "imgid": 0, "sentences": sentences("Two men."), "split": "test", "filename": "100.jpg"}
    write_json(tmp_path / "flickr30k" / "dataset_flickr30k.json", {"images": [entry], "dataset": "flickr30k"})
    dataset = load_dataset("flickr30k", tmp_path)
    assert dataset.examples("test") == (Example("100", ("100.jpg",), answers=("Two men.",)),)
    with pytest.raises(FlamingoError, match=r"flickr30k-images/100\.jpg or .*/flickr30k_images/100\.jpg or .*/images/"):
        dataset.medium("100.jpg")
    data = picture(tmp_path / "flickr30k" / "flickr30k_images" / "100.jpg")
    assert dataset.medium("100.jpg") == Image(data, "100.jpg")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cocoid": None}, r"images\[1\]: cocoid: None, expected a text"),
        ({"sentences": []}, r"images\[1\]: sentences: \[\], expected at least one"),
        ({"sentences": [{"tokens": []}]}, r"images\[1\]: sentences\[0\]: raw: no such key, expected a text"),
        ({"filename": 3}, r"images\[1\]: filename: 3, expected a text"),
        ({"cocoid": 42}, "two examples '42'"),
    ],
)
def test_a_malformed_entry_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    """An entry that is passed over, or an error that does not say which it is."""
    images = [coco_image(42, "test", "A cat."), {**coco_image(7, "test", "A bird."), **change}]
    write_json(tmp_path / "coco" / "dataset_coco.json", {"images": images})
    with pytest.raises(FlamingoError, match=message):
        load_dataset("coco", tmp_path).examples("test")


def test_real_photographs(real_data: Path) -> None:
    """Captions of another image, or images that are not there."""
    dataset = load_dataset("coco_photos", real_data)
    examples = dataset.examples("all")
    assert len(examples) == 39 and sum(len(example.answers) for example in examples) == 195
    first = examples[0]
    assert first.id == "522418" and first.answers[0] == "A woman wearing a net on her head cutting a cake."
    assert first.media == ("000000522418.jpg",)
    assert problems("coco_photos", real_data) == []


@pytest.mark.parametrize(
    "annotations, message",
    [
        ([{"image_id": 1, "caption": "A cat."}], r"images\[1\]: id: 2, expected an image that annotations name"),
        ([{"image_id": n, "caption": "A cat."} for n in (1, 2, 3)], "annotations of image 3, expected one of its"),
    ],
)
def test_captions_and_images_belong_together(annotations: list[Any], message: str, tmp_path: Path) -> None:
    """Images without captions, or captions without an image, that are left out."""
    images = [{"id": n, "file_name": f"{n}.jpg"} for n in (1, 2)]
    write_json(tmp_path / "coco_photos" / "captions_and_boxes.json", {"images": images, "annotations": annotations})
    with pytest.raises(FlamingoError, match=message):
        load_dataset("coco_photos", tmp_path).examples("all")
