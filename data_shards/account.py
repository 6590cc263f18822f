"""What became of what was read: numbers that add up, and for every reason some places where to look."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Self

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
        samples: documents written; a document longer than a sequence becomes several.
        examples: reason → the first places where it was found.
    """

    documents_read: int = 0
    documents_kept: int = 0
    documents_dropped: Counter[str] = field(default_factory=Counter)
    images_read: int = 0
    images_kept: int = 0
    images_dropped: Counter[str] = field(default_factory=Counter)
    samples: int = 0
    examples: dict[str, list[str]] = field(default_factory=dict)

    def keep(self, images: int = 0) -> None:
        """A document was read and kept, with so many images (those that it lost are told by `drop_image`)."""
        self.documents_read += 1
        self.documents_kept += 1
        self.images_read += images
        self.images_kept += images

    def drop(self, place: str, reason: str, images: int = 0) -> None:
        """A document was read and dropped, with so many images that were not dropped before."""
        self.documents_read += 1
        self.documents_dropped[reason] += 1
        self.images_read += images
        if images:
            self.images_dropped["of a dropped document"] += images
        self._example(place, reason)

    def drop_image(self, place: str, reason: str) -> None:
        """An image was read and dropped."""
        self.images_read += 1
        self.images_dropped[reason] += 1
        self._example(place, reason)

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
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` reads it back."""
        return asdict(self) | {
            "documents_dropped": dict(self.documents_dropped),
            "images_dropped": dict(self.images_dropped),
        }

    @staticmethod
    def from_dict(content: dict[str, Any]) -> Account:
        """The inverse of `as_dict`."""
        counters = {name: Counter(content[name]) for name in ("documents_dropped", "images_dropped")}
        return Account(**{**content, **counters})
