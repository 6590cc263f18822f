"""Captions: COCO and Flickr30k in Karpathy's splits, and photographs with COCO's own annotation file.

Karpathy's `dataset_NAME.json` (cs.stanford.edu/people/karpathy/deepimagesent): `images`, each with `filename`, COCO's
also with `filepath` and `cocoid`, its `split`, and `sentences` whose `raw` is the caption.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import ClassVar

from flamingo.errors import FlamingoError
from icl_eval.datasets import Example
from icl_eval.datasets.reading import Entry, LocalDataSet, json_entries


class Karpathy(LocalDataSet):
    """A data set in Karpathy's splits."""

    annotations: ClassVar[str]
    """name of its file"""

    def picture(self, entry: Entry) -> str:
        """Path of an image."""
        raise NotImplementedError

    def identifier(self, entry: Entry) -> str:
        """Id of an image."""
        raise NotImplementedError

    def read(self, split: str) -> Iterator[Example]:
        """An example for each image, its captions in their order."""
        for entry in json_entries(self.folder / self.annotations, "images"):
            if entry.text("split") == split:
                captions = tuple(sentence.text("raw").strip() for sentence in entry.entries("sentences"))
                if not captions:
                    raise entry.error("sentences", "at least one")
                yield Example(self.identifier(entry), (self.picture(entry),), answers=captions)


class Coco(Karpathy):
    """COCO captions (Chen et al. 2015, arXiv 1504.00325): 113,287 images for training (restval among them), 5,000 each
    for validation and test; five captions an image.
    """

    annotations = "dataset_coco.json"
    files: ClassVar = {
        "dataset_coco.json": "Karpathy's splits and captions",
        "train2014/COCO_train2014_*.jpg": "images of train",
        "val2014/COCO_val2014_*.jpg": "images of restval, val and test",
    }
    splits = ("train", "restval", "val", "test")

    def picture(self, entry: Entry) -> str:
        """Path of an image."""
        return f"{entry.text('filepath')}/{entry.text('filename')}"

    def identifier(self, entry: Entry) -> str:
        """COCO's number of an image."""
        return entry.name("cocoid")


class Flickr30k(Karpathy):
    """Flickr30k (Young et al. 2014): 29,000 images for training, 1,014 for validation, 1,000 for test."""

    annotations = "dataset_flickr30k.json"
    roots = ("flickr30k-images", "flickr30k_images", "images")
    files: ClassVar = {
        "dataset_flickr30k.json": "Karpathy's splits and captions",
        "flickr30k-images/*.jpg": "images; or in flickr30k_images/ or images/",
    }
    splits = ("train", "val", "test")

    def picture(self, entry: Entry) -> str:
        """Path of an image."""
        return entry.text("filename")

    def identifier(self, entry: Entry) -> str:
        """Flickr's number of an image."""
        return PurePosixPath(entry.text("filename")).stem


class CocoPhotos(LocalDataSet):
    """Photographs with `captions_and_boxes.json`, whose `images` and `annotations` are as in COCO's own files."""

    annotations: ClassVar[str] = "captions_and_boxes.json"
    roots = ("images",)
    files: ClassVar = {
        "captions_and_boxes.json": "images and captions, as COCO writes them",
        "images/*.jpg": "photographs",
    }
    splits = ("all",)

    def read(self, split: str) -> Iterator[Example]:
        """An example for each image, its captions in their order."""
        path = self.folder / self.annotations
        captions: dict[int, list[str]] = defaultdict(list)
        for entry in json_entries(path, "annotations"):
            captions[entry.number("image_id")].append(entry.text("caption").strip())
        for entry in json_entries(path, "images"):
            found = captions.pop(entry.number("id"), None)
            if found is None:
                raise entry.error("id", "an image that annotations name")
            yield Example(entry.name("id"), (entry.text("file_name"),), answers=tuple(found))
        if captions:
            raise FlamingoError(f"{path}: annotations of image {min(captions)}, expected one of its images")
