"""What became of what was read: numbers that add up, and for every reason some places where to look."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from data_shards.faults import LEFT_OUT, OF_DROPPED, OF_TURN

EXAMPLES = 5
"""places that are kept for each reason"""


@dataclass
class Account:
    """Counts of a conversion, or of a part of one: what is read is kept, or dropped for a reason.

    Attributes:
        documents_read, documents_kept: records of the source.
        documents_dropped: reason → number.
        images_read, images_kept: images that the records name or hold.
        images_dropped: reason → number; those of dropped documents too.
        turns_read, turns_kept: questions with their answers, of sources that have such: a document of instructions
            holds several, which are kept or left out one by one.
        turns_dropped: reason → number; those of dropped documents too.
        samples: documents written; a document longer than a sequence becomes several.
        examples: reason → the first places where it was found.
    """

    documents_read: int = 0
    documents_kept: int = 0
    documents_dropped: Counter[str] = field(default_factory=Counter)
    images_read: int = 0
    images_kept: int = 0
    images_dropped: Counter[str] = field(default_factory=Counter)
    turns_read: int = 0
    turns_kept: int = 0
    turns_dropped: Counter[str] = field(default_factory=Counter)
    samples: int = 0
    examples: dict[str, list[str]] = field(default_factory=dict)

    def keep(self, images: int = 0, turns: int = 0) -> None:
        """A document was read and kept, with so many images and turns.

        Those that it lost are told by `drop_image` and `drop_turn`.
        """
        self.documents_read += 1
        self.documents_kept += 1
        self.images_read += images
        self.images_kept += images
        self.turns_read += turns
        self.turns_kept += turns

    def drop(self, place: str, reason: str, images: int = 0, turns: int = 0) -> None:
        """A document was read and dropped, with so many images and turns that were not dropped before."""
        self.documents_read += 1
        self.documents_dropped[reason] += 1
        self.images_read += images
        if images:
            self.images_dropped[OF_DROPPED] += images
        self.turns_read += turns
        if turns:
            self.turns_dropped[OF_DROPPED] += turns
        self._example(place, reason)

    def drop_image(self, place: str, reason: str) -> None:
        """An image was read and dropped."""
        self.images_read += 1
        self.images_dropped[reason] += 1
        self._example(place, reason)

    def drop_turn(self, place: str, reason: str) -> None:
        """A turn was read and left out of its document."""
        self.turns_read += 1
        self.turns_dropped[reason] += 1
        self._example(place, reason)

    def drop_after_all(self, place: str, reason: str) -> None:
        """The document that was kept last is dropped, and all turns that are kept; its images are told one by one.

        Of an account of one record.
        """
        turns = self.turns_kept
        self.documents_read -= 1
        self.documents_kept -= 1
        self.turns_read -= turns
        self.turns_kept = 0
        self.drop(place, reason, turns=turns)

    def leave_out_turns(self, place: str, reasons: Iterable[str]) -> None:
        """Turns that were kept are left out after all, each for a reason."""
        for reason in reasons:
            self.turns_read -= 1
            self.turns_kept -= 1
            self.drop_turn(place, reason)

    def _example(self, place: str, reason: str) -> None:
        places = self.examples.setdefault(reason, [])
        if len(places) < EXAMPLES:
            places.append(place)

    def __iadd__(self, other: Account) -> Self:
        self.documents_read += other.documents_read
        self.documents_kept += other.documents_kept
        self.documents_dropped += other.documents_dropped
        self.images_read += other.images_read
        self.images_kept += other.images_kept
        self.images_dropped += other.images_dropped
        self.turns_read += other.turns_read
        self.turns_kept += other.turns_kept
        self.turns_dropped += other.turns_dropped
        self.samples += other.samples
        for reason, places in other.examples.items():
            for place in places:
                self._example(place, reason)
        return self

    @property
    def adds_up(self) -> bool:
        """Whether nothing was lost without a reason."""
        return (
            self.documents_read == self.documents_kept + self.documents_dropped.total()
            and self.images_read == self.images_kept + self.images_dropped.total()
            and self.turns_read == self.turns_kept + self.turns_dropped.total()
        )

    @property
    def dropped(self) -> Counter[str]:
        """Reason → number of documents, images and turns together."""
        return self.documents_dropped + self.images_dropped + self.turns_dropped

    @property
    def faults(self) -> Counter[str]:
        """`dropped` without what options leave out, and without what went with something else that was dropped."""
        excused = LEFT_OUT | {OF_DROPPED, OF_TURN}
        return Counter({reason: number for reason, number in self.dropped.items() if reason not in excused})

    def as_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` reads it back."""
        return asdict(self) | {name: dict(getattr(self, name)) for name in _COUNTERS}

    @staticmethod
    def from_dict(content: dict[str, Any]) -> Account:
        """The inverse of `as_dict`."""
        return Account(**{**content, **{name: Counter(content.get(name, {})) for name in _COUNTERS}})


_COUNTERS = ("documents_dropped", "images_dropped", "turns_dropped")
