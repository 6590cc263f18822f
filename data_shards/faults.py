"""What can be wrong with one sample: a small vocabulary of reasons, the error that carries one, and its record.

A sample with a fault is never fatal and never silent: `validate` lists it, and training replaces it, counts it by
reason, and notes where it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from flamingo.errors import FlamingoError

TRUNCATED = "truncated shard"
NOT_A_TAR = "not a tar file"
BAD_JSON = "bad JSON"
NO_DOCUMENT = "no document"
MISSING_IMAGE = "missing image"
NO_IMAGE = "no image file"
TOO_LARGE = "image too large"
NOTHING_SUPERVISED = "no supervised token"
DUPLICATE_KEY = "duplicate key"
BAD_MATRIX = "bad similarity matrix"
UNSAFE_NAME = "unsafe member name"
LINK = "link in a tar"
UNUSABLE = "unusable sample"
"""of an error that gives no reason of its own"""


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
    def of(error: FlamingoError, key: str = "", shard: str = "") -> SampleError:
        """The error of a sample at a known place; errors of other modules may carry a `reason` and a `detail` too."""
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
    def of(error: FlamingoError, key: str = "", shard: str = "", source: str = "") -> Fault:
        """The record of a sample's error."""
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
