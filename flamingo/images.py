"""From encoded image files to the vision tower's pixels, on the fast path: simplejpeg or Pillow, then torch.

The same crops, sizes and normalisation as the Hugging Face image processor whose settings are given, without needing
torchvision. Legend: N media, F frames, M frames of all media, C channels, H height, W width.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from einops import rearrange
from PIL import Image as PilImage
from torch import Tensor
from torch.nn.functional import interpolate

from flamingo.document import Image, Medium, Video
from flamingo.errors import FlamingoError

NO_IMAGE = "no image file"
TOO_LARGE = "image too large"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "JPEG2000", "PPM")
"""What is read, by Pillow's names; a file's content says which it is, never its name."""
LONGEST = 8
"""An image longer than this many times its shorter edge loses its ends before it is scaled by that edge."""
EXIF = b"Exif\0\0"
"""What stands before EXIF in a file, beginning with its byte order."""


class ImageError(FlamingoError):
    """An image file that is not usable: `reason` is `NO_IMAGE` or `TOO_LARGE`, `detail` names it and what was found."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)  # both, so that the error survives the way out of a worker
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return self.detail


@dataclass(frozen=True)
class Limits:
    """How large an image file may be, checked by its length and by its header, before memory is taken for pixels."""

    file_bytes: int = 64 << 20
    """length of the file"""
    pixels: int = 100_000_000
    """width · height"""

    def check_bytes(self, data: bytes, name: str) -> None:
        """Raises `ImageError` where a file is longer."""
        if len(data) > self.file_bytes:
            raise ImageError(
                TOO_LARGE, f"{name}: expected an image of at most {self.file_bytes:,} bytes, got {len(data):,}"
            )

    def check_pixels(self, width: int, height: int, name: str) -> None:
        """Raises `ImageError` where an image has more."""
        if width * height > self.pixels:
            raise ImageError(
                TOO_LARGE, f"{name}: expected an image of at most {self.pixels:,} pixels, got {width} × {height}"
            )


class Crop(NamedTuple):
    """A region of an image of any size, as random resized crops are drawn (Inception; torchvision's transform).

    `area`: share of the image's area; `aspect`: width ÷ height in pixels; `top`, `left`: where it lies, 0 at one edge,
    1 at the other. A side that would be longer than the image's is as long as the image's.
    """

    area: float
    aspect: float
    top: float
    left: float

    def cut(self, pixels: Tensor) -> Tensor:
        """The region of (…, H, W), a view."""
        height, width = pixels.shape[-2:]
        area = self.area * height * width
        rows = min(height, max(1, round(math.sqrt(area / self.aspect))))
        columns = min(width, max(1, round(math.sqrt(area * self.aspect))))
        top, left = round(self.top * (height - rows)), round(self.left * (width - columns))
        return pixels[..., top : top + rows, left : left + columns]


@dataclass(frozen=True)
class View:
    """How training looks at a medium: what it crops of every frame, and whether left and right are exchanged."""

    flip: bool = False
    crop: Crop | None = None


@dataclass(frozen=True)
class PixelSettings:
    """What an image processor does: `height`, `width` of its output, whether it scales the shortest edge and crops.

    `limits` are our own: files beyond them are refused before anything is decoded.
    """

    channels: int
    height: int
    width: int
    shortest_edge: int | None
    mode: str
    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    limits: Limits = Limits()

    def normalise(self, pixels: Tensor) -> Tensor:
        """(…, C, H, W) uint8 → float32, (x · rescale − mean) / std, on the device where they are."""
        mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (self.mean, self.std))
        return pixels.float().mul_(self.rescale / std).sub_(mean / std)

    @staticmethod
    def of(image_processor: Any, channels: int) -> PixelSettings:
        """Read the settings of a Hugging Face image processor; `channels` are those of the vision tower."""

        def setting(name: str) -> Any:
            value = getattr(image_processor, name, None)
            return dict(value) if isinstance(value, Mapping) else value

        size, crop = setting("size") or {}, setting("crop_size") if setting("do_center_crop") else None
        patches = setting("max_num_patches")
        if not size and patches:  # SigLIP 2 of any shape: here the largest square
            size = dict.fromkeys(("height", "width"), math.isqrt(patches) * int(setting("patch_size")))
        shortest = size.get("shortest_edge")
        target = crop or size
        if "height" not in target and shortest is not None:
            target = {"height": shortest, "width": shortest}
        if setting("do_resize") is False:
            raise FlamingoError("image processor with do_resize=False: expected one that brings images to one size")
        if "height" not in target:
            raise FlamingoError(f"image processor with size={size}: expected height and width, or shortest_edge")
        if channels not in (1, 3):
            raise FlamingoError(f"vision tower of {channels} channels: expected 1 (grey) or 3 (RGB)")
        resample = 3 if setting("resample") is None else int(setting("resample"))
        modes = {0: "nearest", 2: "bilinear", 3: "bicubic"}
        if resample not in modes:
            raise FlamingoError(f"image processor with resample={resample}: expected nearest, bilinear or bicubic")
        normalise = setting("do_normalize") is not False
        return PixelSettings(
            channels=channels,
            height=target["height"],
            width=target["width"],
            shortest_edge=shortest,
            mode=modes[resample],
            rescale=float(setting("rescale_factor") or 1 / 255) if setting("do_rescale") is not False else 1.0,
            mean=_per_channel(setting("image_mean"), channels, 0.0) if normalise else (0.0,) * channels,
            std=_per_channel(setting("image_std"), channels, 1.0) if normalise else (1.0,) * channels,
        )


def _per_channel(value: Any, channels: int, default: float) -> tuple[float, ...]:
    values = (default,) if value is None else tuple(value) if isinstance(value, (list, tuple)) else (float(value),)
    return values if len(values) == channels else (values[0],) * channels


# -- decoding ----------------------------------------------------------------------------------------------------------


def decode(image: Image, channels: int, limits: Limits = Limits()) -> Tensor:
    """An encoded image → (C, H, W) uint8, grey or RGB, in memory that is channels last.

    It stands upright as EXIF says. What is transparent is laid over white; 16-bit samples keep their high byte; CMYK
    becomes RGB as Pillow does it; of an animation it is the first frame. Colour profiles are not applied.

    Raises:
        ImageError: where the bytes are no image of one of `FORMATS`, or not a whole one, or larger than `limits`.
    """
    name, data = image.name or "image", image.data
    limits.check_bytes(data, name)
    pixels = _decode_jpeg(data, name, channels, limits)
    if pixels is None:
        pixels = _decode_with_pillow(data, name, channels, limits)
    return rearrange(torch.from_numpy(pixels), "h w c -> c h w")


def _decode_jpeg(data: bytes, name: str, channels: int, limits: Limits) -> np.ndarray | None:
    """Bytes → upright (H, W, C); None where that is left to Pillow: what is no JPEG, CMYK, slight damage."""
    header = _read_jpeg_header(data)
    if header is None or header.components not in (1, 3):
        return None
    limits.check_pixels(header.width, header.height, name)
    try:
        pixels = simplejpeg.decode_jpeg(data, "GRAY" if channels == header.components == 1 else "RGB")
    except ValueError as error:
        # The end of the file, or of a scan: Pillow may take the latter for an image, and leave its rest grey.
        if "remature end" in str(error):
            raise ImageError(NO_IMAGE, f"{name}: expected a whole image file (JPEG: {error})") from error
        return None
    if pixels.shape[2] > channels:
        pixels = np.array(PilImage.fromarray(pixels).convert("L"))[..., None]
    return _upright(pixels, header.orientation)


class _JpegHeader(NamedTuple):
    width: int
    height: int
    components: int
    orientation: int


def _read_jpeg_header(data: bytes) -> _JpegHeader | None:
    """What the markers before the first scan say; None where it is no JPEG or none that can be followed."""
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    place, frame, orientation = 2, None, 1
    try:
        while True:
            start, marker = struct.unpack_from("BB", data, place)
            if start != 0xFF or marker == 0xFF:  # bytes between two markers
                return None
            if marker == 0xDA:  # the first scan
                return frame and _JpegHeader(*frame, orientation)
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                height, width, components = struct.unpack_from(">HHB", data, place + 5)
                frame = (width, height, components)
            length = int.from_bytes(data[place + 2 : place + 4], "big")
            if marker == 0xE1 and data[place + 4 : place + 10] == EXIF:
                orientation = _exif_orientation(data[place + 10 : place + 2 + length])
            place += 2 + length
    except (struct.error, IndexError):
        return None


def _exif_orientation(exif: bytes) -> int:
    """The orientation 1 … 8 that EXIF names in its first directory; 1 where it is silent or broken."""
    order = "<" if exif.startswith(b"II") else ">"
    try:
        (directory,) = struct.unpack_from(order + "I", exif, 4)
        (entries,) = struct.unpack_from(order + "H", exif, directory)
        for entry in range(entries):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", exif, directory + 2 + 12 * entry)
            if tag == 0x0112:  # Orientation
                return value if kind == 3 and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, C) as it is stored → as it is meant to be seen."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _decode_with_pillow(data: bytes, name: str, channels: int, limits: Limits) -> np.ndarray:
    """Bytes → upright (H, W, C)."""
    kind = _kind(data)
    if kind is None:
        begin = f" that begin with {data.lstrip()[:12]!r}".replace("b'", "'") if data else ""
        raise ImageError(NO_IMAGE, f"{name}: expected an image file, got {len(data):,} bytes{begin}")
    try:
        # Not PIL.Image.open, which warns of sizes that are for `limits` to judge.
        picture = PilImage.OPEN[kind][0](io.BytesIO(data), "")
        limits.check_pixels(*picture.size, name)
        picture.load()
        pixels = np.array(plain(picture, "L" if channels == 1 else "RGB"))
    except (ImageError, MemoryError):
        raise
    except (PilImage.DecompressionBombError, PilImage.DecompressionBombWarning) as error:  # a frame of an animation
        raise ImageError(TOO_LARGE, f"{name}: {error}") from error
    except Exception as error:  # Pillow raises many kinds
        raise ImageError(NO_IMAGE, f"{name}: expected a whole image file ({kind}: {error})") from error
    exif = picture.info.get("exif") or b""  # a TIFF stands upright already
    return _upright(pixels.reshape(*pixels.shape[:2], channels), _exif_orientation(exif.removeprefix(EXIF)))


def _kind(data: bytes) -> str | None:
    """The one of `FORMATS` that the first bytes announce."""
    PilImage.init()
    for kind in FORMATS:
        _, accepts = PilImage.OPEN.get(kind, (None, None))
        if accepts is not None and accepts(data[:16]) is True:
            return kind
    return None


def plain(picture: PilImage.Image, mode: str) -> PilImage.Image:
    """A picture of any mode as "RGB" or "L": what is transparent over white, of 16-bit samples the high byte.

    Raises:
        FlamingoError: where samples have no known range.
    """
    if picture.mode == "F":
        raise FlamingoError("a picture of floating-point samples: expected 8 or 16 bits")
    if picture.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip them
        return PilImage.fromarray((np.array(picture).clip(0, 0xFFFF) >> 8).astype(np.uint8)).convert(mode)
    if picture.has_transparency_data:
        white = PilImage.new("RGBA", picture.size, "white")
        picture = PilImage.alpha_composite(white, picture.convert("RGBA"))
    return picture.convert(mode)


# -- to the tower's size -----------------------------------------------------------------------------------------------


def resize(pixels: Tensor, settings: PixelSettings, view: View = View()) -> Tensor:
    """(N, C, H, W) uint8 of any size → (N, C, settings.height, settings.width) uint8.

    A view's crop fills the whole output, as in torchvision's random resized crop; without one the image is scaled and
    cropped as the image processor does.
    """
    height, width = settings.height, settings.width
    if view.crop is not None:
        pixels = view.crop.cut(pixels)
    elif settings.shortest_edge is not None:
        pixels = _without_ends(pixels, LONGEST * min(pixels.shape[2:]))
        scale = settings.shortest_edge / min(pixels.shape[2:])
        height, width = (max(1, int(edge * scale + 1e-6)) for edge in pixels.shape[2:])  # as transformers truncates
    if pixels.shape[2:] != (height, width):
        pixels = interpolate(pixels, (height, width), mode=settings.mode, antialias=settings.mode != "nearest")
    top, left = (height - settings.height) // 2, (width - settings.width) // 2
    if top < 0 or left < 0:
        raise FlamingoError(f"image processor: crop of {settings.height}×{settings.width} is larger than its images")
    pixels = pixels[..., top : top + settings.height, left : left + settings.width]
    return pixels.flip(3) if view.flip else pixels


def _without_ends(pixels: Tensor, longest: int) -> Tensor:
    """The middle of (…, H, W), at most `longest` high and wide: a crop will not see more, and memory stays bounded."""
    top, left = (max(0, edge - longest) // 2 for edge in pixels.shape[-2:])
    return pixels[..., top : top + longest, left : left + longest]


def frames_of(medium: Medium) -> tuple[Image, ...]:
    """The frames of a video, or an image as its only one.

    Raises:
        FlamingoError: where a video has none.
    """
    if not isinstance(medium, Video):
        return (medium,)
    if not medium.frames:
        raise FlamingoError("a video without frames: expected at least one")
    return medium.frames


def media_frames(media: Sequence[Medium]) -> Tensor | None:
    """(N,) int64: the number of frames of each medium, where these differ; None where they do not."""
    counts = [len(frames_of(medium)) for medium in media]
    return torch.tensor(counts) if len(set(counts)) > 1 else None


def rows_and_frames(media: Sequence[Medium]) -> tuple[int, int]:
    """The first two numbers of the shape of `media_pixels`: (N, F), (M, 1) where media differ, (0, 1) without any."""
    counts = [len(frames_of(medium)) for medium in media]
    return (len(counts), counts[0]) if len(set(counts)) == 1 else (sum(counts), 1)


def media_pixels(
    media: Sequence[Medium], settings: PixelSettings, views: Sequence[View | None] | None = None
) -> Tensor:
    """Images and videos → (N, F, C, H, W) uint8, for `PixelSettings.normalise`; N may be 0.

    Where media differ in their numbers of frames, as `media_frames` says: (M, 1, C, H, W), all frames in order.

    Args:
        views: of each medium, the same for all frames of a video; None: as the image processor shows it.

    Raises:
        ImageError: where one cannot be decoded, or is larger than `settings.limits`.
        FlamingoError: where a video has no frames, or there are not as many views as media.
    """
    frames = [frames_of(medium) for medium in media]
    views = [None] * len(frames) if views is None else views
    if len(views) != len(frames):
        raise FlamingoError(f"{len(views)} views of {len(frames)} media: expected one for each")
    shape = (settings.channels, settings.height, settings.width)
    pixels = torch.empty(sum(map(len, frames)), *shape, dtype=torch.uint8)

    def together(image: tuple[int, View, Tensor]) -> object:
        """Small images of one size are resized at once; larger ones each alone, while they are in the cache."""
        place, view, decoded = image
        return decoded.shape, view, place if decoded.numel() > math.prod(shape) else None

    seen = [(frame, view or View()) for medium, view in zip(frames, views, strict=True) for frame in medium]
    images = ((n, view, decode(frame, settings.channels, settings.limits)) for n, (frame, view) in enumerate(seen))
    for _, group in groupby(images, together):
        places, (view, *_), decoded = zip(*group, strict=True)
        small = resize(torch.stack(decoded) if len(decoded) > 1 else decoded[0][None], settings, view)
        pixels[places[0] : places[-1] + 1] = small
    return pixels.view(*rows_and_frames(media), *shape)
