"""Image files of every kind become the right pixels; what is no image, or too large, is refused by name."""

from __future__ import annotations

import io
import pickle
import resource
import struct
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image as PilImage

from flamingo import FlamingoError, Image, Video
from flamingo.images import (
    NO_IMAGE,
    TOO_LARGE,
    Crop,
    ImageError,
    Limits,
    PixelSettings,
    View,
    decode,
    media_pixels,
    resize,
)

Array = np.ndarray
RANDOM = np.random.default_rng(0)
RGB = RANDOM.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RANDOM.integers(0, 256, (5, 7), dtype=np.uint8)
ALPHA = RANDOM.integers(0, 256, (5, 7), dtype=np.uint8)
DEEP = RANDOM.integers(0, 1 << 16, (5, 7), dtype=np.uint16)
DEEP_RGB = RANDOM.integers(0, 1 << 16, (5, 7, 3), dtype=np.uint16)
INDEX = RANDOM.integers(0, 4, (5, 7), dtype=np.uint8)
PALETTE = RANDOM.integers(0, 256, (4, 3), dtype=np.uint8)
PALETTE_ALPHA = np.array([0, 100, 200, 255], np.uint8)
BLOCKS = np.array([[[250, 20, 30], [20, 240, 40], [30, 40, 230]], [[240, 230, 30], [20, 20, 20], [230, 230, 230]]])
COLOURS = np.uint8(BLOCKS.repeat(16, 0).repeat(16, 1))  # (32, 48, 3): what JPEG can show
FOUR = [[[0, 200, 30, 0], [255, 0, 0, 90], [10, 20, 250, 20]], [[0, 0, 0, 0], [0, 0, 0, 255], [90, 90, 0, 60]]]
INKS = np.uint8(FOUR).repeat(16, 0).repeat(16, 1)  # (32, 48, 4)


def save(pixels: Array | PilImage.Image, kind: str, mode: str | None = None, **options: object) -> bytes:
    """An image file of some pixels."""
    buffer = io.BytesIO()
    picture = pixels if isinstance(pixels, PilImage.Image) else PilImage.fromarray(pixels, mode)
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes = b"", more: bytes = b"") -> bytes:
    """A PNG written by hand, so that it can be what Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = chunk(b"IHDR", header) + more + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def deep_png() -> bytes:
    """RGB of 16 bits."""
    return png(7, 5, 16, 2, b"".join(b"\0" + row.astype(">u2").tobytes() for row in DEEP_RGB))


def palette(alpha: Array | None = None) -> PilImage.Image:
    """A picture of four colours, some of them transparent."""
    picture = PilImage.fromarray(INDEX, "P")
    picture.putpalette(PALETTE.tobytes())
    if alpha is not None:
        picture.info["transparency"] = alpha.tobytes()
    return picture


def over_white(colour: Array, alpha: Array) -> Array:
    """What one sees of (…, 3) under (…) of opacity on a white page."""
    opacity = alpha[..., None] / 255
    return colour * opacity + 255 * (1 - opacity)


def grey(pixels: Array) -> Array:
    """(H, W) → (H, W, 3)."""
    return pixels[..., None].repeat(3, -1)


def ink(cmyk: Array) -> Array:
    """The colour of (…, 4) of ink: what cyan, magenta and yellow leave of what black leaves."""
    return (255.0 - cmyk[..., :3]) * (255.0 - cmyk[..., 3:]) / 255


def ycck() -> bytes:
    """A JPEG whose inks are stored as luminance and chrominance (Adobe's transform 2): as CMYK, then renamed."""
    cyan, magenta, yellow, black = np.moveaxis(INKS.astype(float), -1, 0)
    luminance = 0.299 * cyan + 0.587 * magenta + 0.114 * yellow
    planes = [luminance, 128 + 0.564 * (yellow - luminance), 128 + 0.713 * (cyan - luminance), 255 - black]
    stored = np.stack(planes, -1).round().clip(0, 255).astype(np.uint8)
    data = save(255 - stored, "JPEG", "CMYK", quality=100, subsampling=0)  # Pillow stores inks inverted
    transform = data.index(b"Adobe") + 11
    assert data[transform] == 0
    return data[:transform] + b"\x02" + data[transform + 1 :]


def frames(kind: str, **options: object) -> bytes:
    """An animation that begins with COLOURS."""
    first, *others = (PilImage.fromarray(np.roll(COLOURS, n, 1)) for n in range(3))
    return save(first, kind, save_all=True, append_images=others, duration=40, **options)


KINDS: dict[str, tuple[Callable[[], bytes], Array, float]] = {
    "png": (lambda: save(RGB, "PNG"), RGB, 0),
    "grey": (lambda: save(GREY, "PNG"), grey(GREY), 0),
    "1 bit": (lambda: save(PilImage.fromarray(GREY > 127), "PNG"), grey(255 * (GREY > 127)), 0),
    "palette": (lambda: save(palette(), "PNG"), PALETTE[INDEX], 0),
    "palette with alpha": (
        lambda: save(palette(PALETTE_ALPHA), "PNG"),
        over_white(PALETTE[INDEX], PALETTE_ALPHA[INDEX]),
        1,
    ),
    "alpha": (lambda: save(np.dstack([RGB, ALPHA]), "PNG"), over_white(RGB, ALPHA), 1),
    "grey with alpha": (lambda: save(np.dstack([GREY, ALPHA]), "PNG", "LA"), over_white(grey(GREY), ALPHA), 1),
    "one transparent colour": (
        lambda: save(PilImage.fromarray(RGB), "PNG", transparency=tuple(map(int, RGB[2, 3]))),
        over_white(RGB, 255 * (RGB[2, 3] != RGB).any(-1)),
        0,
    ),
    "webp with alpha": (
        lambda: save(np.dstack([RGB, ALPHA | 1]), "WEBP", lossless=True, exact=True),
        over_white(RGB, ALPHA | 1),
        1,
    ),
    "16-bit grey png": (lambda: save(DEEP, "PNG"), grey(DEEP // 256), 0),
    "16-bit grey tiff": (lambda: save(DEEP, "TIFF"), grey(DEEP // 256), 0),
    "16-bit grey pgm": (lambda: b"P5 7 5 65535\n" + DEEP.astype(">u2").tobytes(), grey(DEEP // 256), 0),
    "16-bit rgb png": (deep_png, DEEP_RGB // 256, 0),
    "bmp": (lambda: save(RGB, "BMP"), RGB, 0),
    "tiff": (lambda: save(RGB, "TIFF"), RGB, 0),
    "cmyk tiff": (lambda: save(INKS, "TIFF", "CMYK"), ink(INKS), 1),
    "ppm": (lambda: save(RGB, "PPM"), RGB, 0),
    "webp": (lambda: save(RGB, "WEBP", lossless=True), RGB, 0),
    "jpeg 2000": (lambda: save(np.uint8(COLOURS), "JPEG2000"), COLOURS, 0),
    "avif": (lambda: save(COLOURS, "AVIF", quality=100, subsampling="4:4:4"), COLOURS, 6),
    "gif": (lambda: save(palette(), "GIF"), PALETTE[INDEX], 0),
    "animated gif": (lambda: frames("GIF"), COLOURS, 0),
    "animated png": (lambda: frames("PNG"), COLOURS, 0),
    "animated webp": (lambda: frames("WEBP", lossless=True), COLOURS, 0),
    "jpeg": (lambda: save(COLOURS, "JPEG", quality=100, subsampling=0), COLOURS, 3),
    "jpeg stored as rgb": (lambda: save(COLOURS, "JPEG", quality=100, keep_rgb=True), COLOURS, 3),
    "progressive jpeg": (
        lambda: save(COLOURS, "JPEG", quality=100, subsampling=0, progressive=True),
        COLOURS,
        3,
    ),
    "grey jpeg": (lambda: save(COLOURS[..., 0], "JPEG", quality=100), grey(COLOURS[..., 0]), 3),
    "cmyk jpeg": (lambda: save(INKS, "JPEG", "CMYK", quality=100, subsampling=0), ink(INKS), 4),
    "ycck jpeg": (ycck, ink(INKS), 5),
    "jpeg with bytes behind it": (lambda: save(COLOURS, "JPEG", quality=100, subsampling=0) + b"junk", COLOURS, 3),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_of_every_kind(kind: str) -> None:
    """Catches inverted inks, clipped 16-bit grey, colours hidden under transparency, a later frame, a trusted name."""
    make, expected, tolerance = KINDS[kind]
    data = make()
    for name in ("x.jpg", "x.png", "x", "x.tar.gz"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pixels = decode(Image(data, name), 3)
        assert pixels.dtype == torch.uint8 and pixels.shape == (3, *expected.shape[:2])
        assert np.abs(pixels.permute(1, 2, 0).numpy() - np.asarray(expected, float)).max() <= tolerance
    luminance = decode(Image(data, "x"), 1)
    weights = np.array([0.299, 0.587, 0.114])
    assert luminance.shape == (1, *expected.shape[:2])
    assert np.abs(luminance[0].numpy() - np.asarray(expected, float) @ weights).max() <= tolerance + 1


STORED = {  # as a camera stores what stands upright as COLOURS; EXIF says where its first row and column are to go
    1: COLOURS,
    2: np.fliplr(COLOURS),
    3: np.rot90(COLOURS, 2),
    4: np.flipud(COLOURS),
    5: COLOURS.transpose(1, 0, 2),
    6: np.rot90(COLOURS, 1),
    7: np.rot90(COLOURS.transpose(1, 0, 2), 2),
    8: np.rot90(COLOURS, -1),
}


def exif(orientation: int) -> PilImage.Exif:
    """What a camera says, beside other things."""
    said = PilImage.Exif()
    said[0x010F], said[0x0112] = "maker", orientation
    return said


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "far in JPEG", "CMYK JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_stand_upright(orientation: int, kind: str) -> None:
    """Catches photographs on their side or mirrored, by one orientation, one decoder, or EXIF behind other segments."""
    stored = PilImage.fromarray(np.ascontiguousarray(STORED[orientation]))
    if kind == "CMYK JPEG":
        stored = stored.convert("CMYK")
    options = {"WEBP": {"lossless": True}, "PNG": {}, "TIFF": {}}.get(kind, {"quality": 100, "subsampling": 0})
    data = save(stored, kind.split()[-1], exif=exif(orientation), **options)
    if kind == "far in JPEG":
        comment = b"\xff\xfe" + struct.pack(">H", 1002) + b"Exif" * 250
        data = data[:2] + comment + b"\xff" + data[2:]  # markers may have a fill byte before them
    pixels = decode(Image(data, "x.jpg"), 3).permute(1, 2, 0).numpy()
    assert pixels.shape == COLOURS.shape
    assert np.abs(pixels.astype(int) - COLOURS).max() <= (0 if options.get("lossless") or not options else 4)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_none(value: int) -> None:
    """Catches pictures that are turned or lost because their EXIF is broken."""
    whole = save(COLOURS, "JPEG", quality=100, subsampling=0, exif=exif(value))
    start = whole.index(b"Exif\0\0") + 6
    for data in (whole, whole[:start] + b"MM\0*\xff\xff\xff\xff" + whole[start + 8 :]):
        assert torch.equal(decode(Image(data), 3), decode(Image(save(COLOURS, "JPEG", quality=100, subsampling=0)), 3))


def without(data: bytes, part: bytes, by: bytes = b"") -> bytes:
    """Bytes with one part replaced."""
    assert part in data
    return data.replace(part, by, 1)


BASE = save(COLOURS, "JPEG", quality=95)
PROGRESSIVE = save(COLOURS, "JPEG", quality=95, progressive=True)
NOISE = save(RANDOM.integers(0, 256, (40, 40, 3), dtype=np.uint8), "PNG")
WEBP = b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + (16382).to_bytes(3, "little") * 2 + b"VP8L\0\0\0\0"
REFUSED: dict[str, tuple[bytes, str, str]] = {
    "empty": (b"", NO_IMAGE, r"got 0 bytes$"),
    "html": (b"\n <html><body>404</body></html>", NO_IMAGE, r"got 31 bytes that begin with '<html><body>'$"),
    "json": (b'{"error": 404}', NO_IMAGE, r"begin with '\{\"error\": 40'$"),
    "svg": (b'<?xml version="1.0"?><svg/>', NO_IMAGE, r"begin with '<\?xml versio'$"),
    "eps, which would start a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n", NO_IMAGE, r"begin with '%!PS-Adobe-3'$"),
    "magic alone": (b"GIF89a", NO_IMAGE, r"whole image file \(GIF: "),
    "jpeg cut in its header": (BASE[:100], NO_IMAGE, r"whole image file \(JPEG: "),
    "jpeg cut in its pixels": (BASE[:-40], NO_IMAGE, r"whole image file \(JPEG: [Pp]remature end"),
    "jpeg without its end": (BASE[:-2], NO_IMAGE, r"whole image file \(JPEG: [Pp]remature end"),
    "jpeg cut and closed": (BASE[:-40] + BASE[-2:], NO_IMAGE, r"JPEG: Corrupt JPEG data: premature end"),
    "progressive jpeg cut": (PROGRESSIVE[:-60], NO_IMAGE, r"whole image file \(JPEG: "),
    "cmyk jpeg cut": (save(INKS, "JPEG", "CMYK")[:-60], NO_IMAGE, r"whole image file \(JPEG: image file is truncated"),
    "png cut": (NOISE[:-800], NO_IMAGE, r"whole image file \(PNG: "),
    "png with a wrong checksum": (without(NOISE, b"IHDR\0\0\0\x28", b"IHDR\0\0\0\x29"), NO_IMAGE, r"\(PNG: .*"),
    "gif cut": (frames("GIF")[:200], NO_IMAGE, r"whole image file \(GIF: "),
    "floating point": (save(np.ones((4, 4), np.float32), "TIFF"), NO_IMAGE, r"\(TIFF: .*expected 8 or 16 bits"),
    "large png": (png(50_000, 50_000, 8, 2), TOO_LARGE, r"at most 100,000,000 pixels, got 50000 × 50000$"),
    "large png of which Pillow only warns": (png(12_000, 12_000, 8, 2), TOO_LARGE, r"got 12000 × 12000$"),
    "large jpeg": (without(BASE, b"\0\x20\0\x30\x03", b"\xff\xff\xff\xff\x03"), TOO_LARGE, r"got 65535 × 65535$"),
    "large gif": (without(save(palette(), "GIF"), b"\7\0\5\0", b"\xff" * 4), TOO_LARGE, r"got 65535 × 65535$"),
    "large webp": (WEBP, TOO_LARGE, r"268402689 pixels"),
    "large bmp": (without(save(RGB, "BMP"), struct.pack("<II", 7, 5), struct.pack("<II", 1 << 17, 1 << 17)),
                  TOO_LARGE, r"got 131072 × 131072$"),
    "long file": (bytes(65 << 20), TOO_LARGE, r"at most 67,108,864 bytes, got 68,157,440$"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("channels", [3, 1])
def test_what_is_no_image_is_refused_by_name(kind: str, channels: int) -> None:
    """Catches grey halves of cut files, bombs that fill the memory, Pillow's own warnings, and reasons that mislead."""
    data, reason, message = REFUSED[kind]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    limit, refused = PilImage.MAX_IMAGE_PIXELS, None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=rf"(?s)^sky\.jpg: .*{message}") as refused:
            decode(Image(data, "sky.jpg"), channels)
    assert refused.value.reason == reason
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, "KiB"
    assert limit == PilImage.MAX_IMAGE_PIXELS
    again = pickle.loads(pickle.dumps(refused.value))
    assert (str(again), again.reason, again.detail) == (str(refused.value), reason, refused.value.detail)


def test_limits_can_be_moved() -> None:
    """Catches limits that are not asked, are off by one, or leave Pillow's own in force."""
    data = save(RGB, "PNG")
    assert decode(Image(data), 3, Limits(file_bytes=len(data), pixels=35)).shape == (3, 5, 7)
    for limits in (Limits(file_bytes=len(data) - 1), Limits(pixels=34)):
        with pytest.raises(ImageError):
            decode(Image(data), 3, limits)
    assert decode(Image(BASE), 3, Limits(pixels=32 * 48)).shape == (3, 32, 48)
    with pytest.raises(ImageError, match="at most 1,535 pixels, got 48 × 32"):
        decode(Image(BASE), 3, Limits(pixels=32 * 48 - 1))
    with pytest.raises(ImageError, match=r"whole image file \(PNG: "):  # now its missing pixels are what is wrong
        decode(Image(png(50_000, 1_000_000, 1, 0)[:60]), 3, Limits(pixels=10**12))


def test_small_damage_is_no_loss() -> None:
    """Catches the refusal of files that every other reader takes whole: bytes between two scans."""
    scan = PROGRESSIVE.index(b"\xff\xda", PROGRESSIVE.index(b"\xff\xda") + 2)
    damaged = PROGRESSIVE[:scan] + b"\0\0\0" + PROGRESSIVE[scan:]
    assert torch.equal(decode(Image(damaged), 3), decode(Image(PROGRESSIVE), 3))


SETTINGS = PixelSettings(3, 16, 16, None, "bicubic", 1 / 255, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
CROPPING = PixelSettings(3, 16, 16, 16, "bicubic", 1 / 255, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


@pytest.mark.parametrize("settings", [SETTINGS, CROPPING])
def test_media_are_decoded_sized_and_normalised_in_their_order(settings: PixelSettings) -> None:
    """Catches media in another order, a wrong crop, wrong channels of mean and deviation."""
    arrays = [np.roll(COLOURS, n, 1)[:, : 48 - 8 * n] for n in range(4)]
    media = [Image(save(np.ascontiguousarray(array), "PNG")) for array in arrays]
    for array, pixels in zip(arrays, settings.normalise(media_pixels(media, settings)), strict=True):
        picture = PilImage.fromarray(np.ascontiguousarray(array))
        if settings is CROPPING:
            longer = [int(edge * 16 / min(picture.size)) for edge in picture.size]
            left, top = ((edge - 16) // 2 for edge in longer)
            picture = picture.resize(longer, PilImage.Resampling.BICUBIC).crop((left, top, left + 16, top + 16))
        expected = np.asarray(picture.resize((16, 16), PilImage.Resampling.BICUBIC)) / 255
        expected = (expected - settings.mean) / settings.std
        assert np.abs(pixels[0].permute(1, 2, 0).numpy() - expected).max() < 1.5 / 255 / 0.2


def test_images_together_are_as_each_alone() -> None:
    """Catches images of one batch that get the size or the view of their neighbours."""
    arrays = (RGB, RGB, RGB, RGB[:, :5], RGB[:, :5], COLOURS, COLOURS, RGB)
    media = [Image(save(array, "PNG")) for array in arrays]
    views = [None, None, View(flip=True), View(flip=True), View(crop=Crop(0.5, 1, 0, 0)), None, View(flip=True), None]
    together = media_pixels(media, SETTINGS, views)
    alone = [media_pixels([medium], SETTINGS, [view]) for medium, view in zip(media, views, strict=True)]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together[0], together[1]) and not torch.equal(together[1], together[2])


@pytest.mark.parametrize("upright", [True, False])
def test_the_longest_images_stay_small(upright: bool) -> None:
    """Catches a line of pixels that is scaled by its width and becomes thousands of times larger than it was."""
    array = RANDOM.integers(0, 256, (60_000, 1, 3), dtype=np.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = array if upright else array.transpose(1, 0, 2)
    pixels = media_pixels([Image(save(np.ascontiguousarray(line), "PNG"))], CROPPING)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, "KiB"
    middle = array[30_000 - 4 : 30_000 + 4]
    middle = middle if upright else middle.transpose(1, 0, 2)
    assert torch.equal(pixels, media_pixels([Image(save(np.ascontiguousarray(middle), "PNG"))], CROPPING))


def test_views_flip_and_crop() -> None:
    """Catches a crop of other pixels than it says, one that leaves the image, and frames that are seen differently."""
    picture = Image(save(COLOURS, "PNG"))
    plain = media_pixels([picture], CROPPING)
    assert torch.equal(media_pixels([picture], CROPPING, [View(flip=True)]), plain.flip(4))
    pixels = decode(picture, 3)
    left = View(crop=Crop(area=1 / 6, aspect=1.0, top=0.0, left=0.0))
    (corner,) = resize(pixels[None], CROPPING, left)
    assert torch.equal(corner, torch.tensor(BLOCKS[0, 0], dtype=torch.uint8)[:, None, None].expand(3, 16, 16))
    assert Crop(2 / 6, 2.0, 1.0, 1.0).cut(pixels).shape == (3, 16, 32)
    assert torch.equal(Crop(2 / 6, 2.0, 1.0, 1.0).cut(pixels), pixels[:, 16:, 16:])
    assert Crop(1.0, 4 / 3, 0.5, 0.5).cut(pixels).shape == (3, 32, 45)
    assert Crop(1.0, 3 / 4, 0.5, 0.5).cut(pixels[:, :1, :1]).shape == (3, 1, 1)
    film = media_pixels([Video((picture, picture))], SETTINGS, [View(True, Crop(0.5, 1.0, 0.2, 0.9))])
    assert torch.equal(film[0, 0], film[0, 1]) and not torch.equal(film[0, 0], media_pixels([picture], SETTINGS)[0, 0])
    with pytest.raises(FlamingoError, match="2 views of 1 media: expected one for each"):
        media_pixels([picture], SETTINGS, [None, None])
