"""What a data set consists of: documents, their images, lengths of texts, formats and sizes; as a table and a plot."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from rich import get_console
from rich.console import Console
from rich.table import Table
from rich.text import Text as Line

from data_shards.faults import CRASHED, NO_IMAGE, SampleError
from data_shards.indexing import SamplesForm, scan, tars, unreadable
from data_shards.parallel import over_files
from data_shards.report import counted, printable
from data_shards.shards import make_document
from data_shards.sources.reading import image_header
from data_shards.splitting import token_counter
from data_shards.validate import form_of
from flamingo.document import Document, Text
from flamingo.errors import FlamingoError
from flamingo.files import whole
from flamingo.processing import END_OF_CHUNK, IMAGE_TOKEN, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_BARS = 20
"""numbers of images that get a bar of their own; documents with more share the last one"""
BLUE, GREY = "#2e6fb0", "#6b6862"


@dataclass(frozen=True)
class Summary:
    """Of a distribution of whole numbers: how many, their sum, and where they lie."""

    count: int
    total: int
    mean: float
    least: int
    median: int
    percentile_95: int
    most: int


@dataclass
class Statistics:
    """Counts of a set of shards, exact, and as small as the number of different values.

    Attributes:
        folder: as it was given.
        samples_form: how the members of a sample become a document: `documents`, `mmc4` or `pairs`.
        shards: tar files.
        bytes: of the tar files.
        unread: reason → samples, or tars from some place on, that could not be read (`validate` says which).
        images: images of a document, frames of videos among them → documents.
        characters: characters of a document's texts → documents.
        tokens: tokens of a document with its marks, one for each medium and each end of a chunk → documents; None
            where no tokenizer was given.
        formats: Pillow's name of an image's format, by its header → images; `NO_IMAGE` where that is of none.
        shorter_edges, longer_edges: pixels → images.
        image_bytes: of the image files.
    """

    folder: str
    samples_form: str
    shards: int = 0
    bytes: int = 0
    unread: Counter[str] = field(default_factory=Counter)
    images: Counter[int] = field(default_factory=Counter)
    characters: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] | None = None
    formats: Counter[str] = field(default_factory=Counter)
    shorter_edges: Counter[int] = field(default_factory=Counter)
    longer_edges: Counter[int] = field(default_factory=Counter)
    image_bytes: int = 0

    @property
    def documents(self) -> int:
        """Samples that could be read."""
        return self.images.total()

    def add(self, document: Document, tokens: int | None) -> None:
        """Count one document."""
        self.images[len(document.images)] += 1
        self.characters[sum(len(each.text) for each in document.segments if isinstance(each, Text))] += 1
        if tokens is not None:
            self.tokens = self.tokens if self.tokens is not None else Counter()
            self.tokens[tokens] += 1
        for image in document.images:
            self.image_bytes += len(image.data)
            header = image_header(image.data)
            self.formats[header.format if header else NO_IMAGE] += 1
            if header:
                self.shorter_edges[min(header.width, header.height)] += 1
                self.longer_edges[max(header.width, header.height)] += 1

    def __iadd__(self, other: Statistics) -> Self:
        for name in ("shards", "bytes", "image_bytes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("unread", "images", "characters", "formats", "shorter_edges", "longer_edges"):
            getattr(self, name).update(getattr(other, name))
        if other.tokens is not None:
            self.tokens = (self.tokens if self.tokens is not None else Counter()) + other.tokens
        return self

    def as_dict(self) -> dict[str, Any]:
        """Plain data: counts, the whole histogram of images, and a summary of every distribution."""
        return {
            "folder": self.folder,
            "samples_form": self.samples_form,
            "shards": self.shards,
            "bytes": self.bytes,
            "documents": self.documents,
            "unread": dict(self.unread.most_common()),
            "text_only": self.images[0],
            "image_bytes": self.image_bytes,
            "formats": dict(self.formats.most_common()),
            "images_per_document": {str(number): self.images[number] for number in sorted(self.images)},
            **{
                name.partition(",")[0].replace(" ", "_"): asdict(summary)
                for name, counts in self._distributions()
                if (summary := summarise(counts))
            },
        }

    def print(self, console: Console | None = None) -> None:
        """A table of the distributions, then the counts."""
        console = console or get_console()
        table = Table("", *("total mean least median 95_% most".replace("_", "\u00a0").split(" ")))
        title = f"{printable(self.folder)}: {counted(self.documents, 'document')} ({self.samples_form})"
        table.title = Line(title)
        for column in table.columns[1:]:
            column.justify = "right"
        for name, counts in self._distributions():
            if summary := summarise(counts):
                total = "" if "edge" in name else f"{summary.total:,}"
                shown = (summary.least, summary.median, summary.percentile_95, summary.most)
                table.add_row(name, total, f"{summary.mean:,.1f}", *(f"{value:,}" for value in shown))
        console.print(table)
        for line in self._lines():
            console.print(Line(line))

    def plot(self, path: str | Path) -> Path:
        """Three histograms: images of a document, its length, and the shorter edge of an image; PNG or SVG by suffix.

        Raises:
            FlamingoError: for another suffix.
        """
        path = Path(path)
        if path.suffix.lower() not in (".png", ".svg"):
            raise FlamingoError(f"{path}: expected a file name that ends in .png or .svg")
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        # The same numbers give the same file: no date, and ids that do not change.
        style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "flamingo"}
        with rc_context(style):
            figure = Figure(figsize=(11, 3.2), dpi=150, layout="constrained")
            left, middle, right = figure.subplots(1, 3)
            _draw_images(left, self.images)
            lengths = self.characters if self.tokens is None else self.tokens
            unit = "characters" if self.tokens is None else "tokens"
            _draw_sizes(middle, lengths, f"{unit} per document", "documents")
            _draw_sizes(right, self.shorter_edges, "shorter edge of an image (pixels)", "images")
            with whole(path) as unfinished:
                kind = path.suffix.lower()[1:]
                figure.savefig(
                    unfinished, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None}
                )
        return path

    def _distributions(self) -> list[tuple[str, Counter[int]]]:
        return [
            ("images", self.images),
            ("characters", self.characters),
            *([("tokens", self.tokens)] if self.tokens is not None else []),
            ("shorter edge, pixels", self.shorter_edges),
            ("longer edge, pixels", self.longer_edges),
        ]

    def _lines(self) -> list[str]:
        lines = [f"{counted(self.shards, 'shard')} of {self.bytes:,} bytes, {self.image_bytes:,} of them images"]
        if self.formats:
            lines.append("formats: " + ", ".join(f"{name} {count:,}" for name, count in self.formats.most_common()))
        lines.append(f"{counted(self.images[0], 'document')} without images")
        if self.unread:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.unread.most_common())
            lines.append(f"not read: {reasons}")
        return lines


def statistics(
    folder: str | Path,
    tokenizer: str | None = None,
    *,
    samples: SamplesForm | None = None,
    processes: int | None = None,
) -> Statistics:
    """Count what is in a folder of shards, ours or anybody's. Images are not decoded; faults are `validate`'s matter.

    Args:
        folder: of `*.tar`.
        tokenizer: folder or hub id of one; without it texts are counted in characters alone.
        samples: form of the samples; None: as the index says, or told from the first samples.
        processes: None: one for each core, where there are enough data.

    Raises:
        FlamingoError: where there is no tar, no such tokenizer, or the form of the samples cannot be told.
    """
    folder = Path(folder)
    paths = tars(folder)
    form = samples or form_of(folder, paths)
    if tokenizer is not None:
        _counter(str(tokenizer))
    found = Statistics(str(folder), form, tokens=None if tokenizer is None else Counter())
    of_shard = partial(_of_shard, form=form, tokenizer=tokenizer and str(tokenizer))
    for part in over_files(of_shard, paths, processes=processes, title="counting"):
        found += part or Statistics("", form, shards=1, unread=Counter({CRASHED: 1}))
    return found


_counter = lru_cache(maxsize=1)(token_counter)


def _of_shard(path: Path, *, form: str, tokenizer: str | None) -> Statistics:
    found = Statistics("", form, shards=1)
    try:
        found.bytes = path.stat().st_size
        contents = scan(path)
        found.unread.update(fault.reason for fault in contents.faults)
        with path.open("rb") if contents.spans else io.BytesIO() as file:
            for span in contents.spans:
                if span.faulty:
                    continue  # its fault is counted already
                try:
                    document = make_document(form, span.key, span.read(file))
                except SampleError as error:  # `validate` names it
                    found.unread[error.reason] += 1
                else:
                    found.add(document, _tokens(document, tokenizer))
    except OSError as error:
        found.unread[unreadable(path, error).reason] += 1
    return found


def _tokens(document: Document, tokenizer: str | None) -> int | None:
    """Tokens of a document as the processor renders it; a mark is one, whether or not the tokenizer knows it."""
    if tokenizer is None:
        return None
    text, spans = render(document)
    parts = (text[start:end] for start, end, _ in spans)
    return sum(1 if part in (IMAGE_TOKEN, END_OF_CHUNK) else _counter(tokenizer)(part) for part in parts)


def summarise(counts: Counter[int]) -> Summary | None:
    """The summary of value → how often; None where there is nothing. Percentiles are values that occur."""
    if not counts.total():
        return None
    values = sorted(counts)
    below = np.cumsum([counts[value] for value in values])
    count, total = int(below[-1]), sum(value * counts[value] for value in values)

    def percentile(share: float) -> int:
        return values[int(np.searchsorted(below, share * count))]

    return Summary(count, total, total / count, values[0], percentile(0.5), percentile(0.95), values[-1])


# -- plot --------------------------------------------------------------------------------------------------------------


def _draw_images(axes: Axes, counts: Counter[int]) -> None:
    """A bar for each number of images; the last one takes the rest."""
    _label(axes, "images per document", "documents")
    if not counts:
        return
    last = min(max(counts), MOST_BARS)
    heights = [counts[number] for number in range(last)]
    heights.append(sum(count for number, count in counts.items() if number >= last))
    axes.bar(range(last + 1), heights, width=0.85, color=BLUE)
    step = max(1, last // 6)
    places = [*range(0, last - step + 1, step), last]
    axes.set_xticks(places, [f"{n}+" if n == last < max(counts) else str(n) for n in places])
    _mark_median(axes, counts)


def _draw_sizes(axes: Axes, counts: Counter[int], x: str, y: str) -> None:
    """A histogram over a logarithmic axis, because lengths and sizes spread over orders of magnitude."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    zeros = counts[0]
    _label(axes, f"{x}; {zeros:,} with none" if zeros else x, y)
    positive = Counter({value: count for value, count in counts.items() if value > 0})
    if not positive:
        return
    low, high = min(positive), max(positive)
    edges = np.geomspace(low - 0.5, high + 0.5, 31).tolist()
    axes.hist(list(positive), bins=edges, weights=list(positive.values()), color=BLUE, rwidth=0.92)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    _mark_median(axes, positive)


def _label(axes: Axes, x: str, y: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlabel(x)
    axes.set_ylabel(f"number of {y}")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(axis="y", color="#e4e1da", linewidth=0.8)
    axes.set_axisbelow(True)


def _mark_median(axes: Axes, counts: Counter[int]) -> None:
    summary = summarise(counts)
    assert summary is not None
    axes.axvline(summary.median, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_title(f"median {summary.median:,}", fontsize=9, color=GREY, loc="right")
