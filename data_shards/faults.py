"""What can be wrong with data: one vocabulary of reasons, the error that carries one, and its record.

A sample with a fault is never fatal and never silent: `validate` lists it, and training replaces it, counts it by
reason, and notes where it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from flamingo.errors import FlamingoError
from flamingo.images import NO_IMAGE as NO_IMAGE
from flamingo.images import TOO_LARGE as TOO_LARGE

# Of a file.
UNREADABLE = "unreadable file"
TRUNCATED = "truncated shard"
NOT_A_TAR = "not a tar file"
TRAILING = "data after the end of the tar"
CRASHED = "reading it ended the process"

# Of an index, beside what it lists.
NO_INDEX = "no index"
BAD_INDEX = "bad index"
STALE_INDEX = "index of another shard"
WRONG_CHECKSUM = "wrong checksum"
MISSING_SHARD = "missing shard"
UNLISTED_SHARD = "shard not in the index"

# Of a sample's members in a tar.
UNSAFE_NAME = "unsafe member name"
LINK = "link in a tar"
"""or another member that is no plain file"""
DUPLICATE_KEY = "duplicate key"
APART = "members of a sample apart"
OVERSIZED = "sample too large"

# Of a document; `NO_IMAGE` and `TOO_LARGE` are of its images.
BAD_JSON = "bad JSON"
BAD_RECORD = "malformed record"
BAD_MATRIX = "bad similarity matrix"
BAD_BASE64 = "bad base64"
NO_DOCUMENT = "no document"
EMPTY = "empty document"
NO_TEXT = "no text beside it"
"""images alone, as a whole document or as a piece of one, teach nothing: no token would count in the loss"""
NO_CAPTION = "no caption"
NO_IMAGES = "no image left"
MISSING_IMAGE = "missing image"
IMAGE_MARK = "image mark in a text"
NOTHING_SUPERVISED = "no supervised token"
UNUSABLE = "unusable sample"
"""of an error that gives no reason of its own"""

# Of instructions, beside what is wrong with documents.
DANGLING_INSTRUCTION = "dangling instruction id"
DANGLING_IMAGE = "dangling image id"
DUPLICATE_ID = "duplicate id"
"""the first of an id counts"""
EMPTY_ANSWER = "empty answer"
OWN_CONTEXT = "query among its contexts"
"""its answer would stand before it"""
OF_DROPPED = "of a dropped document"
OF_TURN = "of a turn left out"

# Of what its source's options leave out, which is no fault.
UNPLACED = "image without a place in the text"
DISSIMILAR = "similarity below the minimum"
TOO_SMALL = "image file too small"
SURPLUS = "more images than the maximum"
UNPICKED = "frame not picked"
TOO_LONG = "longer than a sequence"
LEFT_OUT = frozenset({UNPLACED, DISSIMILAR, TOO_SMALL, SURPLUS, UNPICKED, TOO_LONG})


class SampleError(FlamingoError):
    """One sample is not usable: `reason` is one of this module's constants, `detail` says what was found.

    `key` and `shard` say where, as far as whoever raises it knows.
    """

    def __init__(self, reason: str, detail: str = "", key: str = "", shard: str = ""):
        super().__init__(reason, detail, key, shard)  # all, so that the error survives the way out of a worker
        self.reason, self.detail, self.key, self.shard = reason, detail, key, shard

    def __str__(self) -> str:
        what = f"{self.detail} ({self.reason})" if self.detail else self.reason
        return ": ".join([*filter(None, [self.shard, self.key and f"sample {self.key}"]), what])

    @staticmethod
    def of(error: Exception, key: str = "", shard: str = "") -> SampleError:
        """The error of a sample at a known place.

        Ours may carry a `reason` and a `detail`, those of other modules too; of all others the kind is told.
        """
        if not isinstance(error, FlamingoError):
            return SampleError(UNUSABLE, f"{type(error).__name__}: {error}", key, shard)
        reason, detail = getattr(error, "reason", UNUSABLE), getattr(error, "detail", str(error))
        return SampleError(reason, detail, getattr(error, "key", "") or key, getattr(error, "shard", "") or shard)


@dataclass(frozen=True)
class Fault:
    """One sample that was not usable: where it is and why.

    `key` is `#` and the number of the sample in its shard where not even a key could be read.
    """

    shard: str
    key: str
    reason: str
    detail: str = ""
    source: str = ""
    """the name of the mixture's source, where there is a mixture"""

    @staticmethod
    def of(error: Exception, key: str = "", shard: str = "", source: str = "") -> Fault:
        """The record of what went wrong with a sample."""
        found = SampleError.of(error, key, shard)
        return Fault(found.shard, found.key, found.reason, found.detail, source)


def described(counts: Counter[str], examples: Iterable[Fault]) -> str:
    """The ten most frequent reasons with their counts, each with up to three samples as examples, in one line."""
    places: dict[str, dict[str, None]] = {}
    for fault in examples:
        named = places.setdefault(fault.reason, {})
        if len(named) < 3:
            named[f"{fault.key} of {fault.shard}"] = None
    return "; ".join(
        f"{reason}: {count} ({', '.join(places.get(reason, ['?']))})" for reason, count in counts.most_common(10)
    )
