"""Which examples look like a query (RICES: Yang et al. 2022, arXiv 2109.05014): features of the model's own tower.

A medium's feature is the mean of its patch tokens, each normalised, over all frames, normalised again; an example's is
that of its media. Those of a support are kept on disk, under the tower's hash, the data set, the split, and the content
of some of its media: data sets of one's own may have the same names and ids as others.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import distributed, nn
from transformers import BaseImageProcessor

from flamingo.backbones import load_vision
from flamingo.configuration import FlamingoConfig
from flamingo.errors import FlamingoError
from flamingo.files import whole
from flamingo.images import PixelSettings, media_pixels
from flamingo.modeling import FlamingoForConditionalGeneration, patch_tokens
from flamingo.processing import FlamingoProcessor
from icl_eval.datasets import Example
from icl_eval.ledger import exchanged, is_distributed, rank_and_ranks, wait
from icl_eval.sources import Pool

BLOCK = 64
"""examples that are encoded at once, always the same ones: features depend neither on batch size nor on ranks"""
DECIMALS = 5
"""of similarities: closer ones are tied, and go by id"""
FIRST = 64
"""how many of the most similar are sorted first"""
PROBES = 64
"""examples of a support, evenly spread over it, whose content tells it from another of the same names"""


def cache_folder() -> Path:
    """`FLAMINGO_CACHE`, or `flamingo-icl` among the user's caches."""
    caches = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("FLAMINGO_CACHE", caches / "flamingo-icl"))


class Features:
    """Similarity of the examples of a pool (`icl_eval.demonstrations.Similarity`); every rank makes one.

    Args:
        model: whose vision tower is looked through, unless the task names another; `processor`: the model's. None: a
            model of somebody else's is evaluated, and the task names a tower.
        pool: of whose support all media are encoded, unless an earlier run has kept their features.
        cache: folder to keep them in, which all ranks see; default: `cache_folder()`.
        device: of a tower that the task names; default: the model's.

    Raises:
        FlamingoError: no tower is named and there is no model; a medium, the other tower, or features that were kept
            cannot be read, or not be written.
    """

    def __init__(
        self,
        model: FlamingoForConditionalGeneration | None,
        processor: FlamingoProcessor | None,
        pool: Pool,
        cache: str | Path | None = None,
        device: str | torch.device | None = None,
    ):
        self.pool = pool
        if pool.task.features:
            tower, image_processor = load_vision(pool.task.features)
            self.tower = tower.eval().to(device or (model.device if model is not None else "cpu"))
        elif model is not None and processor is not None:
            self.tower, image_processor = model.vision_tower, processor.image_processor
        else:
            raise FlamingoError(
                f"{pool.task.file}: features: none, expected the vision tower that media are compared by: this model "
                "has none of its own"
            )
        self.settings = PixelSettings.of(image_processor, int(getattr(self.tower.config, "num_channels", 3)))
        # A copy: building a composite configuration clears the attention kernels of its parts.
        self.width = FlamingoConfig(copy.deepcopy(self.tower.config)).vision_width
        self.hash = tower_hash(self.tower, image_processor)
        self.support = self._kept(Path(cache) if cache else cache_folder())
        ids = [example.id for example in pool.support]
        self.by_id = np.argsort(np.argsort(np.array(ids), kind="stable"), kind="stable")
        self.places = {each: place for place, each in enumerate(ids)} if pool.same else {}

    def ranking(self, query: Example) -> Iterator[int]:
        """Places in the support, the most similar first, ties in the order of their ids."""
        own = self.support[self.places[query.id]] if query.id in self.places else self._encoded([query])[0]
        similar = np.round(self.support @ own, DECIMALS)
        total, start, count = len(similar), 0, FIRST
        while start < total:
            least = np.partition(similar, total - count)[total - count] if count < total else -np.inf
            best = np.flatnonzero(similar >= least)
            order = best[np.lexsort((self.by_id[best], -similar[best]))]
            yield from order[start:].tolist()
            start, count = len(order), 16 * count

    def _kept(self, cache: Path) -> np.ndarray:
        """Features of the support: (examples, D) float32."""
        path = cache / "features" / self.hash / self._name()
        there = [path.is_file()]
        if is_distributed():  # one answer for all: another evaluation may just be writing it
            distributed.broadcast_object_list(there)
        if not there[0]:
            found = self._made(self.pool.support)
            if rank_and_ranks()[0] == 0:
                _write(path, found)
        wait()
        try:
            found = np.load(path)
        except (OSError, ValueError, EOFError) as error:
            raise FlamingoError(f"{path}: expected features ({error}); remove the file") from error
        if found.shape != (len(self.pool.support), self.width):
            raise FlamingoError(
                f"{path}: features {found.shape}, expected {len(self.pool.support)} rows; remove the file"
            )
        return found

    def _name(self) -> str:
        """Of the file of features of this support."""
        examples, task = self.pool.support, self.pool.task
        about = [[example.id, example.media] for example in examples]
        probed = examples[:: -(-len(examples) // PROBES)]
        contents = [sorted(digest.hex() for digest in self.pool.digests(example)) for example in probed]
        told = json.dumps([task.dataset, task.support_split, about, contents])
        digest = hashlib.sha256(told.encode()).hexdigest()[:16]
        return f"{Path(task.dataset).name}-{task.support_split}-{digest}.npy"

    def _made(self, examples: Sequence[Example]) -> np.ndarray:
        """Encoded, the blocks shared among the ranks."""
        rank, ranks = rank_and_ranks()
        blocks = [examples[start : start + BLOCK] for start in range(0, len(examples), BLOCK)]
        own = {number: self._encoded(blocks[number]) for number in range(rank, len(blocks), ranks)}
        found = {number: block for share in exchanged(own) for number, block in share.items()}
        return np.concatenate([found[number] for number in range(len(blocks))])

    @torch.inference_mode()
    def _encoded(self, examples: Sequence[Example]) -> np.ndarray:
        """(examples, D) float32; zeros for those without media."""
        owners, frames = [], []
        for place, example in enumerate(examples):
            for medium in self.pool.media(self.pool.indices(example)):
                pixels = self.settings.normalise(media_pixels([medium], self.settings))[0]
                owners.append((place, len(pixels)))
                frames.append(pixels)
        found = np.zeros((len(examples), self.width), np.float32)
        if not frames:
            return found
        pixels = torch.cat(frames).to(self.tower.device, self.tower.dtype)
        tokens = nn.functional.normalize(patch_tokens(self.tower, pixels).float(), dim=-1)
        of_frames = tokens.mean(dim=1).split([count for _, count in owners])
        for (place, _), own in zip(owners, of_frames, strict=True):
            found[place] += nn.functional.normalize(own.mean(dim=0), dim=-1).cpu().numpy()
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)


def _write(path: Path, features: np.ndarray) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as unfinished, unfinished.open("wb") as file:
            np.save(file, features)
    except OSError as error:
        raise FlamingoError(f"{path}: expected a folder to keep features in ({error.strerror})") from error


def tower_hash(tower: nn.Module, image_processor: BaseImageProcessor) -> str:
    """SHA-256 of a tower's weights and of how its pictures are prepared, 16 hexadecimal digits."""
    hashed = hashlib.sha256(image_processor.to_json_string().encode())
    for name, value in sorted(tower.state_dict().items()):
        hashed.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        hashed.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:16]
