"""What a step counts."""

from __future__ import annotations

from pathlib import Path

from flamingo import Document, Text, Video
from tests.tiny import document, picture, tiny_flamingo
from train.meter import Meter
from train.parallel import Processes


def test_images_are_the_frames_that_the_tower_reads(tmp_path: Path) -> None:
    """Catches a video counted as one image, and frames counted twice where media differ in their numbers of them."""
    _, processor = tiny_flamingo(tmp_path)
    pair, film = (Document((Video((picture(1),) * frames), Text("see"))) for frames in (2, 8))
    meter = Meter(Processes(), ("pairs",))
    for documents, images in (
        ([document(1, 3), document(2, 0)], 3),
        ([pair, pair], 4),
        ([document(1, 3), pair, film, document(2, 0)], 13),
        ([document(2, 0)], 0),
    ):
        batch = processor(documents=documents, padding_side="right")
        meter.saw([batch, batch])
        assert meter.seen.tolist() == [2 * int(batch["attention_mask"].sum()), 2 * images]
