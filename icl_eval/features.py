"""Which examples look like a query (RICES: Yang et al. 2022, arXiv 2109.05014): features of the model's own tower.

A medium's feature is the mean of its patch tokens, each normalised, over all frames, normalised again; an example's is
that of its media. Those of a support are kept on disk, under the tower's hash, the data set and the split.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import distributed, nn

from flamingo.errors import FlamingoError
from flamingo.files import whole
from flamingo.modeling import FlamingoForConditionalGeneration, patch_tokens
from flamingo.processing import FlamingoProcessor
from icl_eval.datasets import Example
from icl_eval.ledger import is_distributed, rank_and_ranks, wait
from icl_eval.sources import Pool

BLOCK = 64
"""examples that are encoded at once, always the same ones: features depend neither on batch size nor on ranks"""
DECIMALS = 5
"""of similarities: closer ones are tied, and go by id"""
FIRST = 64
"""how many of the most similar are sorted first"""


def cache_folder() -> Path:
    """`FLAMINGO_CACHE`, or `flamingo-icl` among the user's caches."""
    caches = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("FLAMINGO_CACHE", caches / "flamingo-icl"))


class Features:
    """Similarity of the examples of a pool (`icl_eval.demonstrations.Similarity`); every rank makes one.

    Args:
        model: whose vision tower is looked through; `processor`: the model's.
        pool: of whose support all media are encoded, unless an earlier run has kept their features.
        cache: folder to keep them in, which all ranks see; default: `cache_folder()`.

    Raises:
        FlamingoError: a medium cannot be read.
    """

    def __init__(
        self,
        model: FlamingoForConditionalGeneration,
        processor: FlamingoProcessor,
        pool: Pool,
        cache: str | Path | None = None,
    ):
        self.model, self.processor, self.pool = model, processor, pool
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
        examples, task = self.pool.support, self.pool.task
        about = [[example.id, example.media] for example in examples]
        digest = hashlib.sha256(json.dumps([task.dataset, task.support_split, about]).encode()).hexdigest()[:16]
        name = f"{task.dataset.replace(os.sep, '_')}-{task.support_split}-{digest}.npy"
        path = cache / "features" / tower_hash(self.model.vision_tower, self.processor) / name
        if not path.is_file():
            found = self._made(examples)
            wait()
            if rank_and_ranks()[0] == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                with whole(path) as unfinished, unfinished.open("wb") as file:
                    np.save(file, found)
        wait()
        found = np.load(path)
        if found.shape != (len(examples), self.model.config.vision_width):
            raise FlamingoError(f"{path}: features {found.shape}, expected {len(examples)} rows; remove the file")
        return found

    def _made(self, examples: Sequence[Example]) -> np.ndarray:
        """Encoded, the blocks shared among the ranks."""
        rank, ranks = rank_and_ranks()
        blocks = [examples[start : start + BLOCK] for start in range(0, len(examples), BLOCK)]
        own = {number: self._encoded(blocks[number]) for number in range(rank, len(blocks), ranks)}
        shares = [own]
        if is_distributed():
            shares = [{} for _ in range(ranks)]
            distributed.all_gather_object(shares, own)
        found = {number: block for share in shares for number, block in share.items()}
        return np.concatenate([found[number] for number in range(len(blocks))])

    @torch.inference_mode()
    def _encoded(self, examples: Sequence[Example]) -> np.ndarray:
        """(examples, D) float32; zeros for those without media."""
        owners, frames = [], []
        for place, example in enumerate(examples):
            for medium in self.pool.media(self.pool.indices(example)):
                pixels = self.processor.pixels([medium])[0]
                owners.append((place, len(pixels)))
                frames.append(pixels)
        found = np.zeros((len(examples), self.model.config.vision_width), np.float32)
        if not frames:
            return found
        pixels = torch.cat(frames).to(self.model.device, self.model.vision_tower.dtype)
        tokens = nn.functional.normalize(patch_tokens(self.model.vision_tower, pixels).float(), dim=-1)
        of_frames = tokens.mean(dim=1).split([count for _, count in owners])
        for (place, _), own in zip(owners, of_frames, strict=True):
            found[place] += nn.functional.normalize(own.mean(dim=0), dim=-1).cpu().numpy()
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)


def tower_hash(tower: nn.Module, processor: FlamingoProcessor) -> str:
    """SHA-256 of a tower's weights and of how its pictures are prepared, 16 hexadecimal digits."""
    hashed = hashlib.sha256(processor.image_processor.to_json_string().encode())
    for name, value in sorted(tower.state_dict().items()):
        hashed.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        hashed.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:16]
