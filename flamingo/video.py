"""The frames of a video by path: an animation, a folder of frames, or a video file; picked evenly, as Otter picks them.

Only the picked frames are kept, encoded as PNG: a video may be of any length.
"""

from __future__ import annotations

import io
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
from PIL import Image as PilImage
from PIL import UnidentifiedImageError

from flamingo.document import Image, Video
from flamingo.errors import FlamingoError
from flamingo.images import FORMATS, Limits, plain

ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")
"""Formats whose several pictures are frames; those of others are pages (TIFF) or previews (JPEG)."""
DEFAULT_FRAMES = 8
"""Frames of a video for a model without frame embeddings (Flamingo, section 3.2)."""


def evenly(count: int, frames: int | None) -> list[int]:
    """Places of `frames` frames among `count`, from the first to the last; all, where there are no more than that.

    Those between are rounded down; of one frame it is the first: as Otter's data set picks them (`resample_frames_fn`),
    but that one repeats frames where there are fewer. Here videos may differ in their numbers of frames.

    Args:
        count: of frames that there are.
        frames: of frames wanted; None: all.

    Raises:
        FlamingoError: where none are wanted.
    """
    if frames is None or (frames >= 1 and count <= frames):
        return list(range(count))
    if frames < 1:
        raise FlamingoError(f"{frames} frames of a video: expected at least one")
    return np.linspace(0, count - 1, frames, dtype=int).tolist()


def is_video(path: str | Path) -> bool:
    """Whether a path is read as a video: a folder, an animation, or a file that holds no picture.

    Raises:
        FlamingoError: where there is nothing, or nothing that may be read.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return True
    with _file(path) as file:
        picture = _picture(file, path)
        return picture is None or (picture.format in ANIMATED and getattr(picture, "n_frames", 1) > 1)


def read_video(path: str | Path, frames: int = DEFAULT_FRAMES) -> Video:
    """Frames of a video, picked by `evenly`.

    Args:
        path: an animated GIF, WebP, PNG or AVIF; a folder that holds nothing but frames, in the natural order of their
            names ("2.png" before "10.png"; hidden files do not count); or any other file, as a video file, which needs
            PyAV (the extra `video`). Of a video file all packets are read, and decoded what stands between a picked
            frame and the key frame before it; each frame stands upright.
        frames: how many at most.

    Raises:
        FlamingoError: where there is no video, it is broken at a frame that is needed, or PyAV is missing; it names
            the path. Frames of a folder are not decoded here.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        files = _frame_files(path)
        return _pick(len(files), frames, lambda place: Image(_bytes(files[place]), str(files[place])))
    with _file(path) as file:
        picture = _picture(file, path)
        if picture is None:
            file.seek(0)
            return _read_file(file, path, frames)
        return _read_animation(picture, path, frames)


def _pick(count: int, frames: int, read: Callable[[int], Image]) -> Video:
    """A video of the frames that `evenly` picks, read in order."""
    return Video(tuple(read(place) for place in evenly(count, frames)))


def _encoded(picture: PilImage.Image, name: str) -> Image:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return Image(buffer.getvalue(), name)


@contextmanager
def _file(path: Path) -> Iterator[BinaryIO]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise FlamingoError(
            f"{path}: expected a video file, an animation or a folder of frames ({error.strerror})"
        ) from error
    with file:
        yield file


def _bytes(path: Path) -> bytes:
    with _file(path) as file:
        return file.read()


# -- folders and animations --------------------------------------------------------------------------------------------


def _frame_files(folder: Path) -> list[Path]:
    """The frames of a folder, in natural order."""
    known = PilImage.registered_extensions()
    files = [path for path in folder.iterdir() if not path.name.startswith(".")]
    others = sorted(path.name for path in files if path.is_dir() or known.get(path.suffix.lower()) not in FORMATS)
    if others or not files:
        raise FlamingoError(
            f"{folder}: expected nothing but frames, image files; found {others[0] if others else 'none'}"
        )
    return sorted(files, key=_natural)


def _natural(path: Path) -> tuple[list[str | int], str]:
    """Numbers within a name count as numbers; the name itself tells "01" from "1"."""
    parts = re.split(r"([0-9]+)", path.name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], path.name


def _picture(file: BinaryIO, path: Path) -> PilImage.Image | None:
    """The file as Pillow sees it; None where it is no image."""
    try:
        return PilImage.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        return None
    except Exception as error:  # Pillow raises many kinds
        raise FlamingoError(f"{path}: expected a whole image file ({error})") from error


def _read_animation(picture: PilImage.Image, path: Path, frames: int) -> Video:
    Limits().check_pixels(*picture.size, str(path))

    def read(place: int) -> Image:
        picture.seek(place)
        return _encoded(plain(picture, "RGB"), f"{path} frame {place}")

    try:
        return _pick(getattr(picture, "n_frames", 1), frames, read)
    except FlamingoError:
        raise
    except Exception as error:  # Pillow raises many kinds
        raise FlamingoError(f"{path}: expected a whole animation ({picture.format}: {error})") from error


# -- video files -------------------------------------------------------------------------------------------------------


def _read_file(file: BinaryIO, path: Path, frames: int) -> Video:
    av = _pyav(path)
    try:
        # Playlists may not open what they name: files, addresses.
        with av.open(file, options={"protocol_whitelist": "pipe"}) as container:
            if not container.streams.video or container.format.name == "tty":  # text would be a film of its letters
                raise FlamingoError(f"{path}: expected a video file, found one without pictures")
            film = _Film(container, path)
            return _pick(
                len(film.times), frames, lambda place: _encoded(film.at(film.times[place]), f"{path} frame {place}")
            )
    except av.FFmpegError as error:
        raise FlamingoError(f"{path}: expected a whole video file ({error.strerror})") from error


def _pyav(path: Path) -> ModuleType:
    try:
        import av
    except ImportError:
        raise FlamingoError(
            f"{path}: expected PyAV for a video file (pip install 'flamingo-icl[video]'); animations and folders of "
            "frames do without"
        ) from None
    return av


class _Film:
    """The pictures of an open video file, asked for in order of time.

    Attributes:
        times: of all frames, in order, in the stream's own unit.
    """

    def __init__(self, container: Any, path: Path):
        self.container, self.path = container, path
        self.stream = container.streams.video[0]
        self.stream.thread_type = "AUTO"
        Limits().check_pixels(self.stream.width, self.stream.height, str(path))
        packets = [
            (packet.pts, packet.pts if packet.dts is None else packet.dts, packet.is_keyframe)
            for packet in container.demux(self.stream)
            if packet.size and not packet.is_discard
        ]
        if not packets or any(shown is None for shown, _, _ in packets):
            found = "none with a time" if packets else "no frames"
            raise FlamingoError(f"{path}: expected a video file that says when each frame is shown, found {found}")
        packets.sort()
        self.times = [shown for shown, _, _ in packets]
        self.keys = [(shown, decoded) for shown, decoded, is_key in packets if is_key or shown == self.times[0]]
        self.frame: Any = None

    def at(self, time: int) -> PilImage.Image:
        """The picture shown at a time, upright; times may not fall."""
        shown, decoded = self.keys[bisect_right(self.keys, time, key=lambda key: key[0]) - 1]
        ahead = self.frame is not None and shown <= self.frame.pts
        # Some containers are indexed by the order of showing, others by that of decoding.
        if not (ahead or self._seek(shown, time) or self._seek(decoded, time)):
            self.keys = self.keys[:1]  # the index cannot be relied on: once more from the start, and on from there
            self._seek(self.keys[0][1], time)
        while self.frame is not None and self.frame.pts < time:
            self.frame = self._next()
        if self.frame is None:
            raise FlamingoError(f"{self.path}: expected a whole video file, it ends before its last frame")
        return self.frame.to_image().rotate(self.frame.rotation, expand=True)

    def _seek(self, start: int, time: int) -> bool:
        """Go to a key frame; whether that is not behind the frame of `time`."""
        self.container.seek(start, stream=self.stream)
        self.decoded = self.container.decode(self.stream)
        self.frame = self._next()
        return self.frame is not None and self.frame.pts <= time

    def _next(self) -> Any:
        """The next frame; None at the end."""
        return next((frame for frame in self.decoded if frame.pts is not None), None)
