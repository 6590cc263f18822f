"""The classes of the embedded world and their pictures: characters of many scripts as 32×32 grey PNG files.

A class is one character. Its picture is drawn from two distance maps made once from the font's outline: the signed
distance to the outline gives printed forms (thin, bold, hollow), the distance to the skeleton gives pen strokes of any
width. A random affine and elastic warp of these maps, then ink, blur, coarse scanning and noise make a variant. So
printed fonts yield pictures that come close to handwriting, which the model is later asked to read without having been
trained on any. Light ink on a dark ground throughout, as in scikit-learn's digits.

Every picture is a pure function of (class, variant, seed, style, position). Only exactly rounded arithmetic is used, so
its bytes do not depend on the batch in which it is drawn.

Western digits and every numeral made of them are left out of the classes: scikit-learn's digits are the transfer test.

Legend: B pictures, S = 32 rows and columns of a picture, M = 64 rows and columns of a distance map.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import math
import multiprocessing
import struct
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image as PillowImage
from PIL import ImageDraw, ImageFont

from flamingo.errors import FlamingoError

ASSETS = Path(__file__).parent / "assets"
CLASSES_FILE = ASSETS / "classes.tsv"

SIZE = 32  # pixels of a picture's side
GREY_LEVELS = 16  # 4-bit PNG: a picture with its tar header is about 1 kB
MAP_SIZE = 64  # cells of a distance map's side
MAP_BOX = 44  # cells of the longer side of the glyph within its map
WORLD_SEED = 20_220_429  # Flamingo's day on arXiv; fixes classes, splits and known names for good
DUPLICATE_CORRELATION = 0.85
KNOWN_CLASSES = 60
SPLITS = ("train", "validation", "test", "scripts")
SPLIT_SIZES = {"train": 700, "validation": 80, "test": 200}

STYLES = ("bold", "outlined", "inverted", "tilted", "striped", "coarse")
POSITIONS = ("left", "right", "top", "bottom")

# Scripts of which neither the tower nor the Flamingo ever sees a letter.
UNSEEN_SCRIPTS = ("Georgian", "Armenian", "Tifinagh", "Nko")
SEEN_SCRIPTS = ("Latin", "Greek", "Cyrillic", "Hebrew", "Arabic", "Canadian", "Lao", "Lisu", "Italic", "Coptic")
SYMBOL_BLOCKS = {
    "Arrows": (0x2190, 0x21FF),
    "Mathematics": (0x2200, 0x22FF),
    "Technical": (0x2300, 0x23FF),
    "Geometry": (0x25A0, 0x25FF),
    "Symbols": (0x2600, 0x26FF),
    "Dingbats": (0x2701, 0x2775),
    "Letterlike": (0x2100, 0x214F),
}
STIX_BLOCKS = {"Script": (0x1D49C, 0x1D4CF), "Fraktur": (0x1D504, 0x1D537), "Hollow": (0x1D538, 0x1D56B)}


@dataclass(frozen=True)
class GlyphClass:
    """One class: a character of one font file (matplotlib's), with the script or block it belongs to."""

    id: int
    character: str
    font: str
    script: str
    split: str


class PictureKey(NamedTuple):
    """What a picture is a function of. `style` None is plain; `position` None is large and central."""

    class_id: int
    variant: int
    seed: int = 0
    style: str | None = None
    position: str | None = None


# ---------------------------------------------------------------------------------------------------------- classes


@functools.lru_cache(maxsize=1)
def _font_folder() -> Path:
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or not spec.submodule_search_locations:
        raise FlamingoError("the glyph world draws the fonts that matplotlib ships: pip install matplotlib")
    return Path(spec.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf"


@functools.lru_cache(maxsize=8)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    # The basic layout draws the character alone: no shaping, so no difference between machines with and without raqm.
    return ImageFont.truetype(str(_font_folder() / f"{name}.ttf"), size, layout_engine=ImageFont.Layout.BASIC)


def _draw(character: str, font: str, pixels: int, box: int) -> np.ndarray:
    """The character's ink as float (pixels, pixels) in 0..1, cut to its bounding box whose longer side is `box`."""
    face = _font(font, 160)
    left, top, right, bottom = face.getbbox(character)
    width, height = int(right - left), int(bottom - top)
    if width < 8 or height < 8:  # a blank, or a hairline that would be scaled up to a block
        return np.zeros((pixels, pixels), np.float32)
    canvas = PillowImage.new("L", (width, height))
    ImageDraw.Draw(canvas).text((-left, -top), character, fill=255, font=face)
    scale = box / max(width, height)
    small = canvas.resize((max(1, round(width * scale)), max(1, round(height * scale))), PillowImage.Resampling.BOX)
    page = PillowImage.new("L", (pixels, pixels))
    page.paste(small, ((pixels - small.width) // 2, (pixels - small.height) // 2))
    return np.asarray(page, np.float32) / 255


def _candidates() -> list[tuple[str, str, str]]:
    """(character, font, script) of every character worth considering, in the order in which duplicates are resolved."""
    from fontTools.ttLib import TTFont

    found: list[tuple[str, str, str]] = []

    def coverage(font: str) -> set[int]:
        return set(TTFont(_font_folder() / f"{font}.ttf", lazy=True).getBestCmap())

    def add(code: int, font: str, script: str) -> None:
        character = chr(code)
        numeral = unicodedata.numeric(character, None) is not None
        if numeral or unicodedata.decomposition(character).startswith(("0", "1", "2")):
            return  # accented letters and other compositions would be near-copies of their base
        found.append((character, font, script))

    sans = coverage("DejaVuSans")
    by_name = {script.upper(): script for script in UNSEEN_SCRIPTS + SEEN_SCRIPTS}
    for code in sorted(sans):
        name = unicodedata.name(chr(code), "").removeprefix("OLD ").removeprefix("MODIFIER LETTER ")
        script = by_name.get(name.split(" ")[0]) if name else None
        if script and unicodedata.category(chr(code)) in ("Lu", "Ll", "Lo") and not 0xFB00 <= code <= 0xFEFF:
            add(code, "DejaVuSans", script)
    for script, (first, last) in SYMBOL_BLOCKS.items():
        for code in range(first, last + 1):
            if code in sans:
                add(code, "DejaVuSans", script)
    stix = coverage("STIXGeneral")
    for script, (first, last) in STIX_BLOCKS.items():
        for code in range(first, last + 1):
            if code in stix:
                add(code, "STIXGeneral", script)
    return found


def choose_classes() -> list[GlyphClass]:
    """Choose the classes and their splits anew from the fonts (about 10 s).

    `load_world` reads the list kept in assets/classes.tsv, which this function wrote: the tower has been trained on
    one split, so another version of the font renderer must not move a class to another split.
    """
    from scipy.ndimage import gaussian_filter

    kept: list[tuple[str, str, str]] = []
    looks: list[np.ndarray] = []
    # Unseen scripts come last, so that a shape shared with a seen script stays a seen one.
    candidates = sorted(_candidates(), key=lambda candidate: candidate[2] in UNSEEN_SCRIPTS)
    for character, font, script in candidates:
        ink = _draw(character, font, 32, 26)
        if ink.sum() < 8:
            continue
        look = gaussian_filter(ink, 1.0).ravel()
        look = (look - look.mean()) / np.linalg.norm(look - look.mean())
        if looks and float((np.stack(looks) @ look).max()) > DUPLICATE_CORRELATION:
            continue
        kept.append((character, font, script))
        looks.append(look)
    seen = [item for item in kept if item[2] not in UNSEEN_SCRIPTS]
    unseen = [item for item in kept if item[2] in UNSEEN_SCRIPTS]
    order = np.random.default_rng(WORLD_SEED).permutation(len(seen))
    if len(seen) < sum(SPLIT_SIZES.values()):
        raise FlamingoError(f"the fonts yield {len(seen)} classes, {sum(SPLIT_SIZES.values())} are needed")
    classes: list[GlyphClass] = []
    bounds = np.cumsum(list(SPLIT_SIZES.values()))
    for rank, index in enumerate(order[: bounds[-1]]):
        split = list(SPLIT_SIZES)[int(np.searchsorted(bounds, rank, side="right"))]
        character, font, script = seen[index]
        classes.append(GlyphClass(len(classes), character, font, script, split))
    for character, font, script in unseen:
        classes.append(GlyphClass(len(classes), character, font, script, "scripts"))
    return classes


def write_classes(classes: Sequence[GlyphClass], path: Path = CLASSES_FILE) -> None:
    """Write the list as tab-separated lines: id, code point, font, script, split."""
    lines = ["id\tcode\tfont\tscript\tsplit"]
    lines += [f"{c.id}\tU+{ord(c.character):04X}\t{c.font}\t{c.script}\t{c.split}" for c in classes]
    path.write_text("\n".join(lines) + "\n", encoding="ascii")


def read_classes(path: Path = CLASSES_FILE) -> list[GlyphClass]:
    """Read what `write_classes` wrote."""
    rows = [line.split("\t") for line in path.read_text(encoding="ascii").splitlines()[1:]]
    return [GlyphClass(int(i), chr(int(code[2:], 16)), font, script, split) for i, code, font, script, split in rows]


# --------------------------------------------------------------------------------------------------- distance maps


def _thin(ink: np.ndarray) -> np.ndarray:
    """The skeleton of a boolean image (Zhang & Suen 1984, A fast parallel algorithm for thinning digital patterns)."""
    ink = np.pad(ink, 1).astype(np.uint8)
    while True:
        changed = False
        for phase in (0, 1):
            north, south, west, east = ink[:-2, 1:-1], ink[2:, 1:-1], ink[1:-1, :-2], ink[1:-1, 2:]
            ring = (north, ink[:-2, 2:], east, ink[2:, 2:], south, ink[2:, :-2], west, ink[:-2, :-2])
            neighbours = sum(ring)
            transitions = sum((ring[i] < ring[(i + 1) % 8]).astype(np.uint8) for i in range(8))
            if phase == 0:
                open_side = (north * east * south == 0) & (east * south * west == 0)
            else:
                open_side = (north * east * west == 0) & (north * south * west == 0)
            centre = ink[1:-1, 1:-1]
            remove = (centre == 1) & (neighbours >= 2) & (neighbours <= 6) & (transitions == 1) & open_side
            if remove.any():
                centre[remove] = 0
                changed = True
        if not changed:
            return ink[1:-1, 1:-1].astype(bool)


def distance_maps(character: str, font: str) -> np.ndarray:
    """Two float32 maps (2, M, M): signed distance to the outline (ink negative), distance to the skeleton; in cells."""
    from scipy.ndimage import distance_transform_edt as distance

    fine = 2  # distances are measured on a finer raster: the outline lies between cells
    ink = _draw(character, font, fine * MAP_SIZE, fine * MAP_BOX) > 0.5
    outline = (distance(~ink) - distance(ink)) / fine
    # Thinning runs on the coarser raster: its pen strokes are wobbly enough already.
    coarse = ink.reshape(MAP_SIZE, fine, MAP_SIZE, fine).sum((1, 3)) >= 2
    skeleton = distance(~_thin(coarse)) if coarse.any() else np.full((MAP_SIZE, MAP_SIZE), MAP_SIZE, float)
    outline = outline.reshape(MAP_SIZE, fine, MAP_SIZE, fine).mean((1, 3))
    return np.stack([outline, skeleton]).astype(np.float32)


# ------------------------------------------------------------------------------------------------------- rendering

_CONTROL = 5  # control points a side of the elastic warp


def _warp_basis() -> np.ndarray:
    """(S, control points): smooth interpolation weights of one axis."""
    at = np.linspace(0, _CONTROL - 1, SIZE)
    gap = np.abs(at[:, None] - np.arange(_CONTROL)[None])
    weight = np.where(gap < 1, 1 - gap * gap * (3 - 2 * gap), 0.0)  # smoothstep between neighbours
    return weight.astype(np.float32)


_BASIS = _warp_basis()
_PIXEL = (np.arange(SIZE, dtype=np.float32) + 0.5) - SIZE / 2  # pixel centres, 0 = centre of the picture


class _Draws(NamedTuple):
    """The random choices of a batch of pictures, one row each."""

    skeleton: np.ndarray  # (B,) bool: pen strokes instead of the printed outline
    edge: np.ndarray  # (B,) distance, in pixels, at which the ink ends
    hollow: np.ndarray  # (B,) half width of the line of an outlined glyph, 0 otherwise
    softness: np.ndarray  # (B,) pixels over which the ink fades
    inverse: np.ndarray  # (B, 2, 3) affine from picture pixels to map cells
    cells: np.ndarray  # (B,) cells a pixel
    warp: np.ndarray  # (B, 2, control, control) displacements in pixels
    scan: np.ndarray  # (B,) block of the coarse scan: 1, 2 or 4 pixels
    paper: np.ndarray  # (B,) grey of the ground
    ink: np.ndarray  # (B,) grey of the ink
    stripe: np.ndarray  # (B,) phase of the stripes, −1 without
    noise: np.ndarray  # (B, S, S)


def _draw_choices(key: PictureKey) -> tuple:
    """The random choices of one picture, from a generator of its own."""
    style_number = 0 if key.style is None else STYLES.index(key.style) + 1
    position_number = 0 if key.position is None else POSITIONS.index(key.position) + 1
    seeds = (WORLD_SEED, key.class_id, key.variant, key.seed, style_number, position_number)
    rng = np.random.Generator(np.random.PCG64(seeds))
    u = rng.random(20)

    def between(index: int, low: float, high: float) -> float:
        return low + (high - low) * u[index]

    style = key.style
    pen = u[0] < 0.45 and style not in ("bold", "outlined")
    edge = between(1, 0.7, 1.9) if pen else between(1, -0.5, 0.7)
    hollow = 0.0
    if style == "bold":
        edge = between(1, 1.7, 2.4)
    if style == "outlined":
        edge, hollow = 0.5, between(1, 0.55, 0.85)
    angle = 0.0 if style == "tilted" else float(np.clip(rng.normal(0, 7), -16, 16))
    if style == "tilted":
        angle = between(2, 30, 42) * (1 if u[3] < 0.5 else -1)
    side = between(4, 19, 28) if key.position is None else between(4, 13, 15.5)
    stretch = math.sqrt(between(5, 0.75, 1.33))
    shear = between(6, -0.25, 0.25)
    room = 0.5 * (SIZE - side)
    shift = [between(7, -0.5, 0.5) * room, between(8, -0.5, 0.5) * room]
    if key.position is not None:
        axis, sign = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}[key.position]
        shift[axis] = sign * between(7 + axis, 6.5, 8.5)
        shift[1 - axis] *= 0.3
    # Forward: stretch, shear, turn, scale; the inverse takes a picture pixel to a cell of the map.
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    scale = side / MAP_BOX
    forward = np.array([[cos, -sin], [sin, cos]]) @ np.array([[stretch, shear], [0, 1 / stretch]]) * scale
    inverse = np.linalg.inv(forward)
    matrix = np.concatenate([inverse, -(inverse @ np.array(shift))[:, None]], 1)
    elastic = between(9, 0, 1.3) * (side / 24)
    warp = rng.standard_normal((2, _CONTROL, _CONTROL)) * elastic
    scan = 1 if u[10] < 0.85 else 2 if u[10] < 0.95 else 4
    if key.position is not None or style in ("outlined", "striped"):
        scan = 1
    if style == "coarse":
        scan = 4
    paper, ink = between(11, 0, 0.12) * (u[12] < 0.5), between(13, 0.7, 1.0)
    if style == "inverted":
        paper, ink = ink, paper
    stripe = between(14, 0, 4) if style == "striped" else -1.0
    amount = between(15, 0, 0.08) if u[16] < 0.5 else 0.0
    noise = rng.standard_normal((SIZE, SIZE), dtype=np.float32) * np.float32(amount) if amount else np.float32(0)
    return pen, edge, hollow, between(17, 0.9, 2.0), matrix, 1 / scale, warp, scan, paper, ink, stripe, noise


def _stack_choices(keys: Sequence[PictureKey]) -> _Draws:
    columns = list(zip(*(_draw_choices(key) for key in keys), strict=True))
    noise = np.zeros((len(keys), SIZE, SIZE), np.float32)
    for row, value in enumerate(columns[-1]):
        noise[row] = value
    kinds: dict[int, Any] = {0: bool, 7: int}
    stacked = [np.asarray(column, dtype=kinds.get(i, np.float32)) for i, column in enumerate(columns[:-1])]
    return _Draws._make([*stacked, noise])


def _sample(maps: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear values of maps (B, M, M) at cell coordinates x, y (B, S, S); beyond the rim the rim goes on."""
    top = np.float32(MAP_SIZE - 1.001)
    x, y = np.clip(x, 0, top), np.clip(y, 0, top)
    column, row = x.astype(np.int32), y.astype(np.int32)
    right, low = x - column, y - row
    flat = maps.reshape(-1)
    start = (np.arange(len(maps), dtype=np.int32) * (MAP_SIZE * MAP_SIZE))[:, None, None] + row * MAP_SIZE + column
    upper = flat[start] * (1 - right) + flat[start + 1] * right
    lower = flat[start + MAP_SIZE] * (1 - right) + flat[start + (MAP_SIZE + 1)] * right
    return upper * (1 - low) + lower * low


def _coarse_scan(ink: np.ndarray, block: int) -> np.ndarray:
    """Average over blocks and enlarge again bilinearly, as scikit-learn's 8×8 digits are (B, S, S)."""
    cells = SIZE // block
    parts = ink.reshape(-1, cells, block, cells, block)
    total = np.zeros((len(ink), cells, cells), np.float32)
    for row in range(block):
        for column in range(block):
            total += parts[:, :, row, :, column]  # one by one: the order of the sum must not depend on the batch
    return _enlarge(total * np.float32(1 / block**2))


def _enlarge(small: np.ndarray, size: int = SIZE) -> np.ndarray:
    """(B, s, s) → (B, size, size), bilinear between cell centres."""
    cells = small.shape[-1]
    at = np.clip((np.arange(size) + 0.5) * cells / size - 0.5, 0, cells - 1).astype(np.float32)
    first = np.minimum(at.astype(np.int64), cells - 2)
    part = at - first.astype(np.float32)
    rows = small[:, first] * (1 - part)[None, :, None] + small[:, first + 1] * part[None, :, None]
    return rows[:, :, first] * (1 - part) + rows[:, :, first + 1] * part


def render(maps: np.ndarray, keys: Sequence[PictureKey]) -> np.ndarray:
    """Draw pictures from distance maps.

    maps: float32 (B, 2, M, M) as of `distance_maps`, one pair for each key. Returns uint8 (B, S, S): grey levels
    0..15, 15 the lightest. About 50 µs a picture.
    """
    d = _stack_choices(keys)
    # Elastic warp: control points to pixels, one axis after the other.
    field = sum(d.warp[:, :, :, k, None] * _BASIS[:, k] for k in range(_CONTROL))  # (B, 2, control, S)
    field = sum(field[:, :, k, None, :] * _BASIS[:, k, None] for k in range(_CONTROL))  # (B, 2, S, S)
    x, y = _PIXEL[None, None, :] + field[:, 0], _PIXEL[None, :, None] + field[:, 1]
    a = d.inverse[:, :, :, None, None]
    centre = np.float32(MAP_SIZE / 2 - 0.5)
    cell_x = a[:, 0, 0] * x + a[:, 0, 1] * y + a[:, 0, 2] + centre
    cell_y = a[:, 1, 0] * x + a[:, 1, 1] * y + a[:, 1, 2] + centre
    chosen = np.where(d.skeleton[:, None, None], maps[:, 1], maps[:, 0])
    distance = _sample(chosen, cell_x, cell_y) / d.cells[:, None, None]
    distance = distance - d.edge[:, None, None]
    hollow = d.hollow[:, None, None]
    distance = np.where(hollow > 0, np.abs(distance) - hollow, distance)
    ink = np.clip(np.float32(0.5) - distance / d.softness[:, None, None], 0, 1)
    for block in (2, 4):
        rows = np.flatnonzero(d.scan == block)
        if len(rows):
            ink[rows] = _coarse_scan(ink[rows], block)
    striped = np.flatnonzero(d.stripe >= 0)
    if len(striped):
        phase = (_PIXEL[None, :, None] + SIZE + d.stripe[striped, None, None]) % 4
        ink[striped] *= (phase < 2).astype(np.float32)
    grey = d.paper[:, None, None] + (d.ink - d.paper)[:, None, None] * ink + d.noise
    return np.clip(np.rint(grey * np.float32(GREY_LEVELS - 1)), 0, GREY_LEVELS - 1).astype(np.uint8)


def encode_png(levels: np.ndarray) -> bytes:
    """A 4-bit grey PNG of uint8 levels 0..15 (height, even width). Pillow reads it as mode L, but writes none."""
    height, width = levels.shape
    packed = (levels[:, 0::2] << 4 | levels[:, 1::2]).astype(np.uint8)
    rows = np.zeros((height, packed.shape[1] + 1), np.uint8)  # every row opens with its filter type, 0 = none
    rows[:, 1:] = packed

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 4, 0, 0, 0, 0)
    data = zlib.compress(rows.tobytes(), 6)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def read_png(data: bytes) -> np.ndarray:
    """Grey levels 0..15, uint8 (height, width), of a PNG of this world."""
    with PillowImage.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("L")) // 17


# ----------------------------------------------------------------------------------------------------------- world


class GlyphWorld:
    """Classes, their splits and their pictures. Get it from `load_world()`."""

    def __init__(self, classes: Sequence[GlyphClass]) -> None:
        self.classes = list(classes)
        self._maps: dict[int, np.ndarray] = {}
        train = self.split("train")
        chosen = np.random.default_rng(WORLD_SEED + 1).permutation(len(train))[:KNOWN_CLASSES]
        self.known: list[int] = sorted(train[i] for i in chosen)  # the train classes that have a name for good

    def split(self, name: str) -> list[int]:
        """Class ids of "train", "validation", "test" (both of the same scripts) or "scripts" (unseen ones)."""
        if name not in SPLITS:
            raise FlamingoError(f"split {name!r}: expected one of {', '.join(SPLITS)}")
        return [c.id for c in self.classes if c.split == name]

    def maps(self, class_id: int) -> np.ndarray:
        """Distance maps (2, M, M) of a class, made once."""
        if class_id not in self._maps:
            if not 0 <= class_id < len(self.classes):
                raise FlamingoError(f"glyph class {class_id}: expected 0 to {len(self.classes) - 1}")
            glyph = self.classes[class_id]
            self._maps[class_id] = distance_maps(glyph.character, glyph.font)
        return self._maps[class_id]

    def pictures(self, keys: Sequence[PictureKey]) -> np.ndarray:
        """Grey levels uint8 (B, S, S) of many pictures at once."""
        for key in keys:
            if key.style is not None and key.style not in STYLES:
                raise FlamingoError(f"style {key.style!r}: expected None or one of {', '.join(STYLES)}")
            if key.position is not None and key.position not in POSITIONS:
                raise FlamingoError(f"position {key.position!r}: expected None or one of {', '.join(POSITIONS)}")
        if not keys:
            return np.zeros((0, SIZE, SIZE), np.uint8)
        return render(np.stack([self.maps(key.class_id) for key in keys]), keys)

    def png(
        self, class_id: int, variant: int, seed: int = 0, style: str | None = None, position: str | None = None
    ) -> bytes:
        """One picture as the bytes of a 32×32 grey PNG: a pure function of its arguments."""
        return encode_png(self.pictures([PictureKey(class_id, variant, seed, style, position)])[0])

    def draw_many(self, keys: Sequence[PictureKey], processes: int = 1) -> np.ndarray:
        """`pictures` of many keys, best sorted by class, in several processes."""
        share = -(-len(keys) // max(1, processes))
        parts = [keys[start : start + share] for start in range(0, len(keys), share)]
        with process_map(processes) as in_processes:
            return np.concatenate(in_processes(_draw_part, parts))

    def pngs(self, keys: Sequence[PictureKey]) -> list[bytes]:
        """`png` of many keys, faster."""
        batches = (keys[start : start + 256] for start in range(0, len(keys), 256))
        return [encode_png(levels) for batch in batches for levels in self.pictures(batch)]


def _draw_part(keys: Sequence[PictureKey]) -> np.ndarray:
    world = load_world()
    return np.concatenate([world.pictures(keys[start : start + 256]) for start in range(0, len(keys), 256)])


@contextmanager
def process_map(processes: int) -> Iterator[Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]]:
    """Within it, `[work(item) for item in items]` over that many processes, which start once; 1: in this one."""
    if processes <= 1:
        yield lambda work, items: [work(item) for item in items]
        return
    # "spawn": a fork of a process in which torch has started threads may hang.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield lambda work, items: list(pool.map(work, items))


@functools.lru_cache(maxsize=1)
def load_world() -> GlyphWorld:
    """The one glyph world: its classes, splits and known classes are fixed, whatever the seed of a run."""
    return GlyphWorld(read_classes())


@functools.lru_cache(maxsize=1)
def digits() -> list[tuple[int, bytes]]:
    """(label 0..9, PNG bytes) of scikit-learn's 1,797 handwritten digits, 8×8 enlarged to 28×28 with a rim of 2."""
    from sklearn.datasets import load_digits

    data = load_digits()
    enlarged = np.pad(_enlarge((data.images / 16).astype(np.float32), SIZE - 4), ((0, 0), (2, 2), (2, 2)))
    levels = np.clip(np.rint(enlarged * (GREY_LEVELS - 1)), 0, GREY_LEVELS - 1).astype(np.uint8)
    return [(int(label), encode_png(picture)) for label, picture in zip(data.target, levels, strict=True)]
