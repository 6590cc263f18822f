"""What can be wrong with one sample: a small vocabulary of reasons, the error that carries one, and its record.

A sample with a fault is never fatal and never silent: `validate` lists it, and training replaces it, counts it by
reason, and notes where it is.
"""

from __future__ import annotations

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
    """One sample is not usable: `reason` is one of this module's constants, `detail` says what was found where."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)  # both, so that the error survives the way out of a worker
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.detail} ({self.reason})" if self.detail else self.reason


@dataclass(frozen=True)
class Fault:
    """One sample that was not usable: where it is and why. `key` is "" where it could not even be read."""

    shard: str
    key: str
    reason: str
    detail: str = ""

    @staticmethod
    def of(error: FlamingoError, shard: str, key: str) -> Fault:
        """The record of an error; errors of other modules may carry a `reason` and a `detail` as `SampleError` does."""
        reason, detail = getattr(error, "reason", UNUSABLE), getattr(error, "detail", None)
        return Fault(shard, key, reason, str(error) if detail is None else detail)
