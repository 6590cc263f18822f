"""The batches of one rank: a pure function from the number of a micro-batch to its tensors, behind a DataLoader.

A step uses `batch` positions of the global order, cut into micro-batches of `micro_batch` samples; micro-batch m of a
step is computed by rank m mod world. So the same micro-batches exist for any number of ranks, and workers only fetch.
A sample that is not usable is replaced by its neighbour and named; only where none of many is usable the run ends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import BatchFeature

from data_shards.faults import Fault, SampleError, described
from data_shards.order import MixtureOrder, ShuffledOrder
from data_shards.sequences import Sequences, asks
from data_shards.shards import ShardSet
from flamingo.errors import FlamingoError
from flamingo.images import PixelSettings
from flamingo.processing import Encoding

REPLACED_WITHIN = 64
"""Positions of a source, from a multiple of it on, among which a sample that is not usable finds its replacement; where
a shard is damaged as a whole and stands alone in a block of the order, as many others of the epoch."""
LOOKED_AT = 64
"""Documents of a source that tell what the others are like."""


@dataclass(frozen=True)
class Source:
    """One shard set of a mixture: its share of the samples from the sample `start` on."""

    name: str
    shards: ShardSet
    share: float = 1.0
    start: int = 0


@dataclass(frozen=True)
class Sample:
    """One sequence, its media as `FlamingoProcessor.pixels` gives them, uint8, and its document's key."""

    encoding: Encoding
    pixels: Tensor
    key: str


def looked_at(shards: ShardSet) -> list[int]:
    """Numbers of at most `LOOKED_AT` documents, spread evenly."""
    return np.unique(np.linspace(0, len(shards) - 1, LOOKED_AT).astype(int)).tolist()


def cut_instructions(name: str, shards: ShardSet, sequences: Sequences) -> str | None:
    """What training on a source of instructions would lose without a word; None where what is looked at fits.

    A web page is cut at random by design. An instruction that is cut lacks examples, pictures or the end of its answer.
    """
    cut, numbers = 0, looked_at(shards)
    for number in numbers:
        try:
            document = shards[number]
        except FlamingoError:  # training replaces and counts it
            continue
        cut += asks(document) and not sequences.holds(document)
    if not cut:
        return None
    limits = f"max_tokens={sequences.max_tokens}, max_media={sequences.max_media}"
    return (
        f"{name}: {cut} of {len(numbers)} documents are longer than a sequence ({limits}), and lose examples, pictures "
        "or the end of an answer; expected larger numbers, or shards converted with these (and --tokenizer), which "
        "leaves out whole examples"
    )


class MicroBatches(Dataset[BatchFeature]):
    """Micro-batch number → its tensors, with `sources` (B,), the number of each row's source, `keys` and `faults`.

    `pixel_values` are uint8 here, a quarter of what a worker would else have to send; `rank_batches` normalises them.

    A row is one sequence, or several of one source where `sequences` packs those of the micro-batch's positions.

    A position whose sample cannot be read or made a sequence gets the next one of its source that can, among
    `REPLACED_WITHIN` neighbours, or among as many that are drawn from the epoch; so its content is a function of the
    position as all others are. Its own sample is a `Fault` of the batch: each once, whatever else it was tried for.
    """

    def __init__(self, sources: Sequence[Source], sequences: Sequences, *, micro_batch: int, seed: int):
        if not sources:
            raise FlamingoError("data: expected at least one source")
        self.sources, self.sequences = list(sources), sequences
        self.micro_batch, self.seed = micro_batch, seed
        self.mixture = MixtureOrder([source.share for source in sources], seed, [source.start for source in sources])
        self.orders = [ShuffledOrder(source.shards.sizes, seed + number) for number, source in enumerate(sources)]

    def __getitem__(self, number: int) -> BatchFeature:
        positions = range(number * self.micro_batch, (number + 1) * self.micro_batch)
        sources = [self.mixture(position)[0] for position in positions]
        samples, faults = zip(*(self._used(position) for position in positions), strict=True)
        encodings = [sample.encoding for sample in samples]
        rows = self.sequences.pack(encodings, sources)
        batch = self.sequences.collate(encodings, pixels=[sample.pixels for sample in samples], rows=rows)
        batch["sources"] = torch.tensor([sources[row[0]] for row in rows])
        batch["keys"] = [samples[place].key for row in rows for place in row]
        batch["faults"] = [fault for fault in faults if fault is not None]
        return batch

    def used(self, position: int) -> dict[str, int]:
        """How many samples each source has given before a position."""
        return dict(zip((source.name for source in self.sources), self.mixture.used(position), strict=True))

    def epochs(self, position: int) -> dict[str, float]:
        """How often each source was gone through before a position."""
        sizes = {source.name: len(source.shards) for source in self.sources}
        return {name: used / sizes[name] for name, used in self.used(position).items()}

    def _used(self, position: int) -> tuple[Sample, Fault | None]:
        """What a position uses, and what was wrong with its own sample, if anything was."""
        source, within = self.mixture(position)
        own = self._make(source, within, position)
        if isinstance(own, Sample):
            return own, None
        faults = [own]
        for other in self._others(source, within):
            made = self._make(source, other, position)
            if isinstance(made, Sample):
                return made, own
            faults.append(made)
        raise FlamingoError(
            f"data: source {own.source} has no usable sample in {len(faults)} positions; "
            + described(Counter(fault.reason for fault in faults), faults)
            + f"; the first: {own.detail}"
        )

    def _others(self, source: int, within: int) -> Iterator[int]:
        """The places of a source that may replace one of it: its neighbours, then some from all over the epoch."""
        begin = within // REPLACED_WITHIN * REPLACED_WITHIN
        yield from (*range(within + 1, begin + REPLACED_WITHIN), *range(begin, within))
        samples = self.orders[source].samples
        drawn = np.random.default_rng([self.seed, source, within]).integers(samples, size=REPLACED_WITHIN)
        yield from (within // samples * samples + drawn).tolist()

    def _make(self, source: int, within: int, position: int) -> Sample | Fault:
        """The sample that stands at the place `within` of its source, made for a position of the mixture."""
        place = self.orders[source](within)
        shard = self.sources[source].shards.shards[place.shard]
        try:
            document = shard.read(place.index)
        except SampleError as error:
            return Fault.of(error, source=self.sources[source].name)
        try:
            encoding = self.sequences(document, np.random.default_rng([self.seed, position]))
            pixels = self.sequences.processor.pixels(encoding.media, encoding.views, normalised=False)
        except Exception as error:  # noqa: BLE001  whatever a sample holds, a run that stops there stops there again
            return Fault.of(error, document.key, shard.place, self.sources[source].name)
        return Sample(encoding, pixels, document.key)


def rank_batches(
    data: MicroBatches,
    *,
    batch: int,
    start_step: int,
    steps: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[BatchFeature]:
    """Micro-batches of one rank, for the steps `start_step` … `start_step + steps − 1`, step by step, on its device.

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
    loader = DataLoader(
        data,
        batch_size=None,
        sampler=range(start_step * per_step + rank, (start_step + steps) * per_step, world),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_one_thread,
    )
    return _delivered(loader, data.sequences.processor.pixel_settings, device)


def _delivered(
    loader: DataLoader[BatchFeature], settings: PixelSettings, device: torch.device | str
) -> Iterator[BatchFeature]:
    """The loader's batches, normalised; an error of a worker comes as it was raised, not wrapped into its traceback."""
    try:
        for batch in loader:
            batch = batch.to(device, non_blocking=True)
            batch["pixel_values"] = settings.normalise(batch["pixel_values"])
            yield batch
    except FlamingoError as error:
        raise FlamingoError(str(error).rpartition(f"{type(error).__name__}: ")[2]) from None


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
