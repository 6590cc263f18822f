"""Omniglot (Lake et al. 2015): 1,623 handwritten characters of 50 alphabets, each drawn by 20 people."""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, ClassVar

import numpy as np

from flamingo.document import Image
from flamingo.errors import FlamingoError
from icl_eval.datasets import Example
from icl_eval.datasets.reading import BROKEN_ZIP, LocalDataSet, Tree, open_tree, png

_DRAWING = re.compile(r"(\d{4})_(\d{2})")


class Omniglot(LocalDataSet):
    """`images_{split}`: the official zip, its folder, or an npz of `images` (classes, 20, height, width), True = white.

    The classes are the official numbers of the characters ("0709") and have no names; with the official files, the
    fields `alphabet` and `character` tell which they are. Examples are in the order of character, then drawer, so that
    all three forms give the same ones.
    """

    splits = ("background", "evaluation", "background_small1", "background_small2")
    files: ClassVar = {
        "images_background.zip": "30 alphabets, 964 characters; or the folder images_background/ or an .npz",
        "images_evaluation.zip": "20 alphabets, 659 characters; likewise",
    }

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._trees: dict[str, Tree] = {}

    def read(self, split: str) -> Iterator[Example]:
        """An example for each drawing."""
        names = self._tree(split).names()
        for name in sorted(names, key=lambda name: PurePosixPath(name).stem):
            path = PurePosixPath(name)
            match = _DRAWING.fullmatch(path.stem)
            if match is None:
                raise FlamingoError(f"{self.folder}: images_{split}: {name}, expected a name like 0709_01.png")
            fields = dict(zip(("alphabet", "character"), path.parts[-3:-1], strict=False))
            yield Example(path.stem, (f"{split}/{name}",), label=match[1], fields=fields)

    def medium(self, name: str) -> Image:
        """See `DataSet`."""
        split, _, file = name.partition("/")
        return Image(self._tree(split).read(file), name)

    def _tree(self, split: str) -> Tree:
        if split not in self._trees:
            path = self.first(f"images_{split}", f"images_{split}.zip", f"images_{split}.npz")
            self._trees[split] = DrawingsArray(path) if path.suffix == ".npz" else open_tree(path)
        return self._trees[split]


class DrawingsArray:
    """The drawings of an npz as a tree of PNGs, "0001_01.png" the first drawing of the first class.

    They are kept eight pixels a byte: 27 MB for the background set, of which the array would take 213 MB.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _packed(self) -> tuple[np.ndarray, int]:
        """uint8 (classes, drawers, height, ⌈width / 8⌉), and the width."""
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("images.npy") as file:
                return _packed_array(file)
        except (*BROKEN_ZIP, ValueError) as error:
            raise FlamingoError(f"{self.path}: expected an npz file of drawings ({error})") from error

    def names(self) -> list[str]:
        """See `Tree`."""
        packed, _ = self._packed
        return [f"{kind + 1:04d}_{drawer + 1:02d}.png" for kind, drawer in np.ndindex(packed.shape[:2])]

    def read(self, name: str) -> bytes:
        """See `Tree`."""
        packed, width = self._packed
        match = _DRAWING.match(name)
        kind, drawer = (int(match[1]) - 1, int(match[2]) - 1) if match else (-1, -1)
        if not (0 <= kind < packed.shape[0] and 0 <= drawer < packed.shape[1]):
            raise FlamingoError(f"{self.path}/{name}: no such drawing, expected 0001_01.png to {self.names()[-1]}")
        white = np.unpackbits(packed[kind, drawer], axis=-1, count=width)
        return png(white * np.uint8(255))


def _packed_array(file: IO[bytes]) -> tuple[np.ndarray, int]:
    """The drawings of an npy file, packed class by class, and their width.

    Raises:
        ValueError: it holds none.
    """
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(file)
    if len(shape) != 4 or 0 in shape or fortran or dtype not in (np.bool_, np.uint8):
        raise ValueError(f"images is {dtype} {shape}, not bool (classes, 20, 105, 105)")
    one = shape[1:]
    classes = (np.frombuffer(file.read(math.prod(one)), np.uint8).reshape(one) for _ in range(shape[0]))
    return np.stack([np.packbits(drawings > 0, axis=-1) for drawings in classes]), shape[3]
