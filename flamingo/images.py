"""From encoded image files to the vision tower's pixels, on the fast path: simplejpeg or Pillow, then torch.

The same crops, sizes and normalisation as the Hugging Face image processor whose settings are given, without needing
torchvision. Legend: N media, F frames, C channels, H height, W width.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
import torch
from einops import rearrange
from PIL import Image as PilImage
from PIL import ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from flamingo.document import Image, Medium, Video
from flamingo.errors import FlamingoError


@dataclass(frozen=True)
class PixelSettings:
    """What an image processor does: `height`, `width` of its output, whether it scales the shortest edge and crops."""

    channels: int
    height: int
    width: int
    shortest_edge: int | None
    mode: str
    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

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


def decode(image: Image, channels: int) -> Tensor:
    """An encoded image → (C, H, W) uint8, upright (EXIF), grey or RGB.

    Raises:
        FlamingoError: where the bytes are no image; it names the image.
    """
    try:
        if channels == 3 and simplejpeg.is_jpeg(image.data) and b"Exif" not in image.data[:64]:
            return torch.from_numpy(rearrange(simplejpeg.decode_jpeg(image.data), "h w c -> c h w").copy())
        picture = ImageOps.exif_transpose(PilImage.open(io.BytesIO(image.data))).convert(
            "L" if channels == 1 else "RGB"
        )
    except Exception as error:  # Pillow and simplejpeg raise many kinds
        raise FlamingoError(f"{image.name or 'image'}: expected an image file ({error})") from error
    pixels = torch.from_numpy(np.array(picture))
    return pixels[None] if channels == 1 else rearrange(pixels, "h w c -> c h w")


def resize(pixels: Tensor, settings: PixelSettings) -> Tensor:
    """(N, C, H, W) uint8 of any size → (N, C, settings.height, settings.width) uint8."""
    height, width = settings.height, settings.width
    if settings.shortest_edge is not None:
        scale = settings.shortest_edge / min(pixels.shape[2:])
        height, width = (max(1, int(edge * scale + 1e-6)) for edge in pixels.shape[2:])  # as transformers truncates
    if pixels.shape[2:] != (height, width):
        pixels = interpolate(pixels, (height, width), mode=settings.mode, antialias=settings.mode != "nearest")
    top, left = (height - settings.height) // 2, (width - settings.width) // 2
    if top < 0 or left < 0:
        raise FlamingoError(f"image processor: crop of {settings.height}×{settings.width} is larger than its images")
    return pixels[..., top : top + settings.height, left : left + settings.width]


def media_pixels(media: list[Medium] | tuple[Medium, ...], settings: PixelSettings) -> Tensor:
    """Images and videos → (N, F, C, H, W) float32, normalised; N may be 0.

    Raises:
        FlamingoError: where the media have different numbers of frames, or one cannot be decoded.
    """
    frames = [medium.frames if isinstance(medium, Video) else (medium,) for medium in media]
    if len({len(each) for each in frames}) > 1:
        raise FlamingoError(
            f"media of {sorted({len(each) for each in frames})} frames in one batch: expected one number"
        )
    shape = (settings.channels, settings.height, settings.width)
    if not frames:
        return torch.empty(0, 1, *shape)
    decoded = [decode(frame, settings.channels) for each in frames for frame in each]
    pixels = torch.empty(len(decoded), *shape, dtype=torch.uint8)
    for size in {image.shape for image in decoded}:  # images of one size are resized together
        alike = [i for i, image in enumerate(decoded) if image.shape == size]
        pixels[alike] = resize(torch.stack([decoded[i] for i in alike]), settings)
    mean, std = (torch.tensor(values)[:, None, None] for values in (settings.mean, settings.std))
    # (x · rescale − mean) / std, as one multiplication and one addition
    pixels = pixels.float().mul_(settings.rescale / std).sub_(mean / std)
    return rearrange(pixels, "(n f) c h w -> n f c h w", n=len(frames))
