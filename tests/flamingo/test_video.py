"""Frames of videos: which are picked, from which kinds of files, and what broken ones say."""

from __future__ import annotations

import io
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PilImage

from flamingo import FlamingoError, Image, Video
from flamingo import video as reading
from flamingo.video import evenly, is_video, read_video

av = pytest.importorskip("av")
SHADES = 5  # grey levels from one frame to the next, more than any codec here is off by


def grey(number: int, size: int = 64) -> PilImage.Image:
    """Frame `number` of every video here."""
    return PilImage.new("RGB", (size, size), (SHADES * number,) * 3)


def numbers(video: Video) -> list[int]:
    """Which frames a video consists of."""
    means = [np.asarray(PilImage.open(io.BytesIO(frame.data)).convert("L")).mean() for frame in video.frames]
    return [round(float(mean) / SHADES) for mean in means]


def film(path: Path, count: int, codec: str, gop: int) -> Path:
    """A video file of `count` frames, one in `gop` of them a key frame."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt, stream.gop_size, stream.bit_rate = "yuv420p", gop, 4_000_000
        for number in range(count):
            for packet in stream.encode(av.VideoFrame.from_image(grey(number))):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


@pytest.mark.parametrize(
    ("count", "frames", "places"),
    [
        (10, 4, [0, 3, 6, 9]),
        (5, 4, [0, 1, 2, 4]),
        (5, 1, [0]),
        (5, 5, [0, 1, 2, 3, 4]),
        (2, 5, [0, 1]),
        (3, None, [0, 1, 2]),
        (0, 2, []),
    ],
)
def test_frames_are_picked_evenly(count: int, frames: int | None, places: list[int]) -> None:
    """Catches a last frame that is left out, rounding to the nearest, and frames that stand twice."""
    assert evenly(count, frames) == places


def test_frames_between_are_those_of_otters_arithmetic() -> None:
    """Catches whole-number arithmetic: in floating point frame 23 of 47 among 397 is 197, as in Otter's batches."""
    assert evenly(397, 47)[23] == 197
    with pytest.raises(FlamingoError, match="0 frames of a video: expected at least one"):
        evenly(3, 0)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animations(tmp_path: Path, suffix: str) -> None:
    """Catches frames of an animation taken in another order, or the first one alone."""
    path = tmp_path / f"a.{suffix}"
    grey(0).save(path, save_all=True, append_images=[grey(n) for n in range(1, 9)], lossless=True)
    video = read_video(path, 4)
    assert numbers(video) == [0, 2, 5, 8]
    assert video.frames[1].name == f"{path} frame 2"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(FlamingoError, match=f"a.{suffix}"):
        read_video(path, 4)


def test_a_folder_is_read_in_natural_order(tmp_path: Path) -> None:
    """Catches frame 10 before frame 2, hidden files taken for frames, and other files skipped without a word."""
    for number in range(12):
        grey(number).save(tmp_path / f"frame{number}.png")
    (tmp_path / ".DS_Store").write_bytes(b"\0")
    assert numbers(read_video(tmp_path, 3)) == [0, 5, 11]
    assert read_video(tmp_path, 3).frames[2].name == str(tmp_path / "frame11.png")
    (tmp_path / "times.txt").write_text("0 1 2")
    with pytest.raises(FlamingoError, match=r"nothing but frames, image files; found times.txt"):
        read_video(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FlamingoError, match="found none"):
        read_video(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "codec", "gop"),
    [
        ("a.mp4", "libx264", 12),
        ("a.mp4", "libx264", 1),
        ("a.mkv", "libx264", 300),
        ("a.webm", "libvpx-vp9", 12),
        ("a.ts", "mpeg2video", 12),
        ("a.avi", "mpeg4", 12),
    ],
)
def test_video_files(tmp_path: Path, name: str, codec: str, gop: int) -> None:
    """Catches a seek that lands on another frame, which depends on the container and on the order of decoding."""
    path = film(tmp_path / name, 50, codec, gop)
    assert numbers(read_video(path, 7)) == evenly(50, 7)
    assert numbers(read_video(path, 60)) == list(range(50))


def test_only_what_a_picked_frame_needs_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a film that is decoded from end to end for a few frames of it."""
    decoded = 0
    following = reading._Film._next

    def counted(self: Any) -> Any:
        nonlocal decoded
        decoded += 1
        return following(self)

    monkeypatch.setattr(reading._Film, "_next", counted)
    path = film(tmp_path / "a.mp4", 50, "libx264", 5)
    assert numbers(read_video(path, 3)) == [0, 24, 49]
    assert decoded <= 3 * 5
    decoded = 0
    assert numbers(read_video(film(tmp_path / "b.mp4", 50, "libx264", 300), 25)) == evenly(50, 25)
    assert decoded == 50  # once, from its only key frame


def test_a_container_that_lands_behind_is_read_from_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a frame taken for another where seeking goes too far, as with a faulty index."""
    seek = reading._Film._seek

    def too_far(self: Any, start: int, time: int) -> bool:
        behind = [shown for shown, _ in self.keys if shown > start]
        return seek(self, behind[-1] if behind else start, time)

    monkeypatch.setattr(reading._Film, "_seek", too_far)
    assert numbers(read_video(film(tmp_path / "a.mp4", 50, "libx264", 5), 4)) == evenly(50, 4)


def test_frames_stand_upright(tmp_path: Path) -> None:
    """Catches a telephone's video that lies on its side, or is turned the wrong way round."""
    path = tmp_path / "a.mp4"
    picture = PilImage.new("RGB", (64, 32))
    picture.paste((255, 255, 255), (0, 0, 32, 32))  # its left half
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for packet in [*stream.encode(av.VideoFrame.from_image(picture)), *stream.encode()]:
            container.mux(packet)
    upright, turned = (struct.pack(">9i", *matrix) for matrix in (
        (0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000), (0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000)
    ))  # fmt: skip
    header, track, rest = path.read_bytes().split(upright)
    path.write_bytes(header + upright + track + turned + rest)  # show it turned by 90° clockwise: left becomes top
    shown = np.asarray(PilImage.open(io.BytesIO(read_video(path, 1).frames[0].data)).convert("L"))
    assert shown.shape == (64, 32)
    assert shown[:24].mean() > 240 > 15 > shown[40:].mean()


def test_what_is_no_video_is_named(tmp_path: Path) -> None:
    """Catches another kind of error, a message without the path, and a text file shown as a film of its letters."""
    whole = film(tmp_path / "a.mp4", 20, "libx264", 5).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "notes.txt").write_text("no video\n" * 50)
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        for packet in [*stream.encode(sound), *stream.encode()]:
            container.mux(packet)
    for name, said in (
        ("cut.mp4", "whole video file"),
        ("notes.txt", "without pictures"),
        ("sound.wav", "without pictures"),
        ("none.mp4", "No such file"),
    ):
        with pytest.raises(FlamingoError, match=rf"{name}: .*{said}"):
            read_video(tmp_path / name)


def test_a_film_that_breaks_off_is_refused(tmp_path: Path) -> None:
    """Catches frames made up for what is missing: the index is whole, the pictures are not."""
    path = film(tmp_path / "a.mp4", 50, "libx264", 5)
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat")
    content[start + 800 : content.index(b"moov") - 4] = bytes(content.index(b"moov") - 4 - start - 800)
    path.write_bytes(content)
    with pytest.raises(FlamingoError, match=r"a.mp4: expected a whole video file"):
        read_video(path, 4)


def test_a_playlist_opens_nothing(tmp_path: Path) -> None:
    """Catches a file that makes the reader open other files, or addresses, that it names."""
    film(tmp_path / "a.ts", 20, "mpeg2video", 5)
    head = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n"
    (tmp_path / "list.m3u8").write_text(f"{head}file://{tmp_path}/a.ts\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.ffconcat").write_text("ffconcat version 1.0\nfile a.ts\n")
    for name in ("list.m3u8", "list.ffconcat"):
        with pytest.raises(FlamingoError, match=rf"{name}: expected a whole video file \(Invalid"):
            read_video(tmp_path / name)


def test_frames_that_are_cut_away_do_not_count(tmp_path: Path) -> None:
    """Catches frames that no player shows: those before the cut of an edit list, as telephones make them."""
    path = film(tmp_path / "a.mp4", 50, "libx264", 12)
    content = bytearray(path.read_bytes())
    start = content.index(b"elst") + 16  # what it holds: duration, and the time at which the film begins
    (begins,) = struct.unpack_from(">i", content, start)
    struct.pack_into(">i", content, start, begins + 10 * 1024)  # ten frames later
    path.write_bytes(content)
    assert numbers(read_video(path, 4)) == [10, 23, 36, 49]


def test_without_pyav_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an ImportError for a package that a plain installation has not, and an animation that needs it too."""
    path = film(tmp_path / "a.mp4", 3, "libx264", 5)
    grey(0).save(tmp_path / "a.gif", save_all=True, append_images=[grey(1)])
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(FlamingoError, match=r"a\.mp4: expected PyAV .*flamingo-icl\[video\]"):
        read_video(path)
    assert numbers(read_video(tmp_path / "a.gif", 2)) == [0, 1]


def test_which_paths_are_videos(tmp_path: Path) -> None:
    """Catches pages and previews taken for frames, and an animation taken for a picture."""
    pictures = dict(save_all=True, append_images=[grey(1)])
    for name, options in (("still.png", {}), ("still.jpg", {}), ("pages.tiff", pictures), ("moving.gif", pictures)):
        grey(0).save(tmp_path / name, **options)
    film(tmp_path / "a.mp4", 3, "libx264", 5)
    found = {path.name for path in tmp_path.iterdir() if is_video(path)}
    assert found == {"moving.gif", "a.mp4"}
    assert is_video(tmp_path)
    assert isinstance(read_video(tmp_path / "still.png", 2).frames[0], Image)
    with pytest.raises(FlamingoError, match=r"none\.gif"):
        is_video(tmp_path / "none.gif")
