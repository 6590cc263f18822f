"""Fashion-MNIST's sprite (Xiao et al. 2017, arXiv 1708.07747): 900 clothes in one picture, three rows a class."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import cached_property
from typing import ClassVar

import numpy as np
from PIL import Image as PilImage

from flamingo.document import Image
from flamingo.errors import FlamingoError
from icl_eval.datasets import Example
from icl_eval.datasets.reading import LocalDataSet, png


class Sprite(LocalDataSet):
    """Small pictures side by side in one large picture, class by class from its top.

    Attributes:
        picture: the large picture's file.
        cell: edge of a small one, in pixels.
        classes: their names.
        rows: rows of each class.
    """

    picture: ClassVar[str]
    cell: ClassVar[int]
    classes: ClassVar[tuple[str, ...]]
    rows: ClassVar[int]
    splits = ("all",)

    def read(self, split: str) -> Iterator[Example]:
        """An example for each small picture, in reading order; "3-14" is in row 3 and column 14, from 0."""
        for row in range(len(self.classes) * self.rows):
            label = self.classes[row // self.rows]
            for column in range(self._levels.shape[1] // self.cell):
                name = f"{row}-{column}"
                yield Example(name, (name,), answers=(label,), label=label)

    def candidates(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.classes

    def medium(self, name: str) -> Image:
        """A small picture as a PNG."""
        try:
            row, column = (int(part) * self.cell for part in name.split("-"))
        except ValueError:
            raise FlamingoError(f"{self.folder / self.picture}: {name!r}, expected ROW-COLUMN") from None
        cell = self._levels[row : row + self.cell, column : column + self.cell]
        if cell.shape != (self.cell, self.cell):
            raise FlamingoError(f"{self.folder / self.picture}: no picture {name!r}, its size is {self._levels.shape}")
        return Image(png(cell), f"{name}.png")

    @cached_property
    def _levels(self) -> np.ndarray:
        """uint8 (H, W), grey."""
        path = self.folder / self.picture
        try:
            levels = np.asarray(PilImage.open(io.BytesIO(path.read_bytes())).convert("L"))
        except OSError as error:
            raise FlamingoError(f"{path}: expected a picture ({error})") from error
        if levels.shape[0] != len(self.classes) * self.rows * self.cell or levels.shape[1] % self.cell:
            rows = f"{len(self.classes)} × {self.rows} rows"
            raise FlamingoError(f"{path}: {levels.shape}, expected {rows} of pictures of {self.cell} × {self.cell}")
        return levels


class FashionSprite(Sprite):
    """doc/img/fashion-mnist-sprite.png of zalandoresearch/fashion-mnist: 90 pictures of each class."""

    picture = "fashion-mnist-sprite.png"
    cell = 28
    classes = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )
    rows = 3
    files: ClassVar = {"fashion-mnist-sprite.png": "the sprite, 840 × 840"}
