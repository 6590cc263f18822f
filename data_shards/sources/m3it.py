"""M3IT (Li et al. 2023, arXiv 2306.04387, huggingface.co/datasets/MMInstruction/M3IT) → documents.

A line holds `instruction`, `inputs` (perhaps empty), `outputs` and `image_base64_str`, a list of base64 or one. The
question is the instruction and, on a line of its own, the input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from data_shards.account import Account
from data_shards.faults import BAD_RECORD, EMPTY_ANSWER, NO_IMAGES, SampleError
from data_shards.sources import Record
from data_shards.sources.reading import Images, Row, decode_base64, find_files, image_file, plain, read_record
from data_shards.sources.tables import table_records
from flamingo.document import Document, Image, Medium, Video
from flamingo.instructions import Turn, instruction_document

_ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")
_IMAGES = ("image_base64_str", "image_str")
"""the second is what the files behind the loader of the Hugging Face hub have"""
_INPUTS, _OUTPUTS = ("inputs", "input"), ("outputs", "output")


@dataclass(frozen=True)
class M3itReader:
    """Rows of instruction, input, output and images in base64."""

    input: str
    """file, folder or glob of .jsonl, .jsonl.gz or .parquet"""
    video: bool = False
    """the images of a row are the frames of one video, as in M3IT's video tasks"""
    spaced: bool = False
    """a space after `User:` and before the answer, as models released through July 2023 were tuned"""
    name: str = "m3it"
    """name of the source in its documents; losses are reported by it"""

    long_turns: ClassVar[Literal["rounds"]] = "rounds"

    def parts(self) -> Sequence[str]:
        """The files, sorted."""
        return find_files(self.input, _ENDINGS)

    def records(self, part: str) -> Iterator[Record]:
        """One record a row."""
        return table_records(part)

    def documents(self, record: Record, account: Account) -> list[Document]:
        """The document of one row; none where it is dropped."""
        return read_record(record, account, lambda row, images: [self._document(row, images)])

    def _document(self, row: Row, images: Images) -> Document:
        content = row.mapping()
        named = _first(content, _IMAGES)
        encoded = named if isinstance(named, list) else [named] if named else []
        images.named, images.turns = len(encoded), 1
        parts = (content.get("instruction"), _first(content, _INPUTS))
        question = "\n".join(part.strip() for part in parts if isinstance(part, str) and part.strip())
        answer = _first(content, _OUTPUTS)
        if not question:
            raise SampleError(BAD_RECORD, "expected a text as instruction or inputs")
        if not isinstance(answer, str) or not answer.strip():
            raise SampleError(EMPTY_ANSWER, f"expected a text as outputs, found {answer!r:.40}")
        turn = Turn(plain(question), plain(answer).strip(), self._media(encoded, images))
        return instruction_document([turn], spaced=self.spaced, source=self.name)

    def _media(self, encoded: list[Any], images: Images) -> tuple[Medium, ...]:
        """The images of a row; of a video those frames that are there.

        Raises:
            SampleError: where one is not there, or no frame.
        """
        found: list[Image] = []
        for place, each in enumerate(encoded, 1):
            try:
                found.append(image_file(decode_base64(each), f"image{place}"))
            except SampleError as error:
                images.lose(error.reason, f"image {place}: {error.detail}")
        if encoded and (not found or (not self.video and len(found) < len(encoded))):
            raise SampleError(NO_IMAGES, f"expected {len(encoded)} images, found {len(found)}")
        return (Video(tuple(found)),) if self.video and found else tuple(found)


def _first(content: dict[str, Any], names: Sequence[str]) -> Any:
    """The value of the first of several names that is there and not empty."""
    return next((content[name] for name in names if content.get(name)), None)
