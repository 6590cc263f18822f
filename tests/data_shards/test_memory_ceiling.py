"""`flamingo-shards convert mimic_it` holds no more memory for a large file of images than for a small one."""

from __future__ import annotations

import base64
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_shards.convert import InstructionOptions, convert
from data_shards.shards import open_shards
from data_shards.sources.mimic_it import MimicItReader
from tests.data_shards.sources.mimic import instruction, write_instructions
from tests.data_shards.test_convert import SPAWN
from tests.tiny import picture

IMAGE_BYTES = 75_000


def write_large(folder: Path, images: int) -> tuple[str, str]:
    """Instructions, and their images in a parquet file of one row group, as pandas writes it; 100 kB each."""
    small, rng = picture(0).data, np.random.default_rng(0)
    ids = [f"LADD_IMG_{number:07d}" for number in range(images)]
    encoded = (base64.b64encode(small + rng.bytes(IMAGE_BYTES)) for _ in ids)
    chunks = [pa.array([image.decode()]) for image in encoded]
    path = folder / "LADD_images.parquet"
    table = pa.table({"base64": pa.chunked_array(chunks), "__index_level_0__": ids})
    pq.write_table(table, path, row_group_size=images)
    assert pq.read_metadata(path).num_row_groups == 1
    data = {key: instruction("What is it?", "A picture.", [key]) for key in ids}
    return str(write_instructions(folder, "LADD", data)), str(path)


def anonymous_bytes(process: int) -> int:
    """Anonymous memory of a process and of all that it has started."""
    total = 0
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                total = int(line.split()[1]) * 1024
    except OSError:
        return 0
    return total + sum(anonymous_bytes(int(child)) for child in children)


class Peak:
    """The most anonymous memory that a process and its children had while it ran, looked at every few milliseconds."""

    def __init__(self, process: int, alive: Callable[[], bool]):
        self.bytes = 0
        while alive():
            self.bytes = max(self.bytes, anonymous_bytes(process))
            time.sleep(0.005)


def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    """Catches a file of images, or a row group of it, that is held as a whole."""
    peaks = []
    for images in (50, 1500):  # 5 MB and 150 MB
        folder = tmp_path / str(images)
        folder.mkdir()
        instructions, pictures = write_large(folder, images)
        reader = MimicItReader(instructions, images=pictures)
        process = SPAWN.Process(target=convert, args=(reader, folder / "out", InstructionOptions()))
        process.start()
        peaks.append(Peak(process.pid or 0, process.is_alive).bytes)
        assert process.exitcode == 0 and len(open_shards(folder / "out")) == images
    assert 0 < peaks[1] - peaks[0] < 80 << 20, peaks


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_three_gigabytes_take_three_hundred_megabytes_more_than_thirty(tmp_path: Path) -> None:
    """Catches the same through the command line, with several processes that each hold something."""
    peaks = []
    for images in (300, 30_000):
        folder = tmp_path / str(images)
        folder.mkdir()
        writer = SPAWN.Process(target=write_large, args=(folder, images))  # so that this process lets go of it
        writer.start()
        writer.join()
        instructions, pictures = (str(folder / f"LADD_{name}") for name in ("instructions.json", "images.parquet"))
        words = ["convert", "mimic_it", instructions, "--images", pictures, "--out", str(folder / "out")]
        command = [sys.executable, "-m", "data_shards", *words, "--processes", "2", "--stripes", "4"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            peaks.append(Peak(process.pid, lambda process=process: process.poll() is None).bytes)  # type: ignore[misc]
        assert process.returncode == 0 and len(open_shards(folder / "out")) == images
        shutil.rmtree(folder)  # of which pytest would keep three
    print(f"peaks: {peaks[0] / 1e6:.0f} MB of 30 MB, {peaks[1] / 1e6:.0f} MB of 3 GB")
    assert peaks[1] - peaks[0] <= 300 << 20, peaks
