"""The batches of one rank: a pure function from the number of a micro-batch to its tensors, behind a DataLoader.

A step uses `batch` positions of the global order, cut into micro-batches of `micro_batch` samples; micro-batch m of a
step is computed by rank m mod world. So the same micro-batches exist for any number of ranks, and workers only fetch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import BatchFeature

from data_shards.order import MixtureOrder, ShuffledOrder
from data_shards.sequences import Sequences
from data_shards.shards import ShardSet
from flamingo.errors import FlamingoError


@dataclass(frozen=True)
class Source:
    """One shard set of a mixture: its share of the samples from the sample `start` on."""

    name: str
    shards: ShardSet
    share: float = 1.0
    start: int = 0


class MicroBatches(Dataset[BatchFeature]):
    """Micro-batch number → its tensors, with `sources` (B,) the number of each sample's source, and `keys`."""

    def __init__(self, sources: Sequence[Source], sequences: Sequences, *, micro_batch: int, seed: int):
        if not sources:
            raise FlamingoError("data: expected at least one source")
        self.sources, self.sequences = list(sources), sequences
        self.micro_batch, self.seed = micro_batch, seed
        self.mixture = MixtureOrder([source.share for source in sources], seed, [source.start for source in sources])
        self.orders = [ShuffledOrder(source.shards.sizes, seed + number) for number, source in enumerate(sources)]

    def __getitem__(self, number: int) -> BatchFeature:
        positions = range(number * self.micro_batch, (number + 1) * self.micro_batch)
        encodings, sources, keys = [], [], []
        for position in positions:
            source, within = self.mixture(position)
            place = self.orders[source](within)
            document = self.sources[source].shards.shards[place.shard].read(place.index)
            encodings.append(self.sequences(document, np.random.default_rng([self.seed, position])))
            sources.append(source)
            keys.append(document.key)
        batch = self.sequences.collate(encodings)
        batch["sources"], batch["keys"] = torch.tensor(sources), keys
        return batch


def rank_batches(
    data: MicroBatches, *, batch: int, start_step: int, steps: int, rank: int = 0, world: int = 1, workers: int = 0
) -> Iterator[BatchFeature]:
    """Micro-batches of one rank, for the steps `start_step` … `start_step + steps − 1`, step by step.

    Args:
        batch: samples of a step over all ranks; a multiple of `micro_batch · world`.
        workers: processes that read ahead; 0 reads in this one.

    Raises:
        FlamingoError: where the batch cannot be shared evenly.
    """
    if batch % (data.micro_batch * world):
        raise FlamingoError(
            f"batch={batch}: expected a multiple of micro_batch · processes = {data.micro_batch} · {world}"
        )
    per_step = batch // data.micro_batch
    mine = [
        step * per_step + number
        for step in range(start_step, start_step + steps)
        for number in range(rank, per_step, world)
    ]
    loader = DataLoader(
        data,
        batch_size=None,
        sampler=mine,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_one_thread,
    )
    return _with_plain_errors(loader)


def _with_plain_errors(loader: DataLoader[BatchFeature]) -> Iterator[BatchFeature]:
    """The loader's batches; an error of a worker comes as it was raised, not wrapped into its traceback."""
    try:
        yield from loader
    except FlamingoError as error:
        raise FlamingoError(str(error).rpartition("FlamingoError: ")[2]) from None


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
