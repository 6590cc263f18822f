"""What is wrong with a set of shards: faults counted by reason, as a table for people and as JSON for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from rich import get_console
from rich.console import Console
from rich.table import Table
from rich.text import Text as Line

from data_shards.faults import Fault

LISTED = 100_000
"""faults that a report lists one by one; beyond that they are only counted, so that memory stays bounded"""
EXAMPLES = 3
"""faults of each reason that the table shows"""


@dataclass
class Report:
    """Counts of what was looked at, and every fault in it.

    Attributes:
        folder: as it was given.
        samples_form: how the members of a sample become a document: `documents`, `mmc4` or `pairs`.
        shards, faulty_shards: tar files, and those with a fault of any kind.
        samples, faulty_samples: groups of members of one key, and those with a fault of any kind.
        images, faulty_images: of the documents that could be read; None where images were not looked at.
        text_only: documents without an image, which is no fault.
        other_members: files in the tars that belong to no sample by their names, which is no fault.
        counts: reason → number of faults.
        faults: the faults themselves, in the order of shards; the first `LISTED` of them.
    """

    folder: str
    samples_form: str = "documents"
    shards: int = 0
    faulty_shards: int = 0
    samples: int = 0
    faulty_samples: int = 0
    images: int | None = None
    faulty_images: int = 0
    text_only: int = 0
    other_members: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)

    def add(self, faults: Iterable[Fault]) -> None:
        """Count faults, and list them while there is room."""
        for fault in faults:
            self.counts[fault.reason] += 1
            if len(self.faults) < LISTED:
                self.faults.append(fault)

    @property
    def ok(self) -> bool:
        """Whether there is no fault at all."""
        return not self.counts

    def as_dict(self) -> dict[str, Any]:
        """Plain data, with every fault that is listed; `faults_not_listed` says how many are not."""
        content = asdict(self)
        counts, faults = dict(self.counts.most_common()), content.pop("faults")
        listed = {"counts": counts, "faults_not_listed": self.counts.total() - len(faults), "faults": faults}
        return {"ok": self.ok, **content, **listed}

    def print(self, console: Console | None = None) -> None:
        """The faults by reason, the most frequent first, each with some places; then what was looked at."""
        console = console or get_console()
        if not self.ok:
            console.print(self._table())
        console.print(Line(self._summary(), style="red" if not self.ok else "green"))

    def _table(self) -> Table:
        table = Table("reason", "faults", "for example", title=Line(f"faults in {printable(self.folder)}"))
        table.columns[1].justify = "right"
        table.columns[2].overflow = "fold"
        for reason, count in self.counts.most_common():
            found = [fault for fault in self.faults if fault.reason == reason][:EXAMPLES]
            more = [f"… and {count - len(found):,} more"] if count > len(found) else []
            table.add_row(reason, f"{count:,}", Line("\n".join([*map(_place, found), *more])))
        return table

    def _summary(self) -> str:
        parts = [
            counted(self.shards, "shard", self.faulty_shards),
            counted(self.samples, "sample", self.faulty_samples),
        ]
        if self.images is not None:
            parts.append(counted(self.images, "image", self.faulty_images))
            parts.append(f"{self.text_only:,} without images")
        if self.other_members:
            parts.append(f"{self.other_members:,} other members")
        return f"{', '.join(parts)}: {'no fault' if self.ok else counted(self.counts.total(), 'fault')}"


def printable(text: str) -> str:
    """A name or message of foreign data without characters that could steer a terminal or not be written to one."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _place(fault: Fault) -> str:
    place = ": ".join(printable(part) for part in (fault.shard, fault.key) if part)
    return f"{place} ({printable(fault.detail)})" if fault.detail else place


def counted(number: int, noun: str, faulty: int = 0) -> str:
    """A number of things in words, with how many of them have faults."""
    return f"{number:,} {noun}{'s' * (number != 1)}" + (f" ({faulty:,} with faults)" if faulty else "")
