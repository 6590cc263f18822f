"""The classes and pictures of the embedded world."""

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data_shards.glyphs.pictures import (
    POSITIONS,
    SIZE,
    SPLITS,
    STYLES,
    UNSEEN_SCRIPTS,
    PictureKey,
    choose_classes,
    digits,
    encode_png,
    load_world,
    read_png,
)
from flamingo.errors import FlamingoError


def test_splits_are_disjoint_and_large_enough():
    """A test class that was trained on would make every held-out score a lie."""
    world = load_world()
    splits = {name: world.split(name) for name in SPLITS}
    times = Counter(class_id for ids in splits.values() for class_id in ids)
    assert set(times.values()) == {1}
    assert len({c.character for c in world.classes}) == len(world.classes) == len(times)
    assert [c.id for c in world.classes] == list(range(len(world.classes)))
    assert len(splits["train"]) == 700
    assert len(splits["validation"]) >= 60
    assert len(splits["test"]) == 200
    assert len(splits["scripts"]) >= 60
    assert len(world.known) == len(set(world.known)) == 60
    assert set(world.known) <= set(splits["train"])


def test_unseen_scripts_are_unseen():
    """A Georgian letter among the train classes would spoil the transfer test on whole scripts."""
    world = load_world()
    for glyph in world.classes:
        assert (glyph.script in UNSEEN_SCRIPTS) == (glyph.split == "scripts"), glyph


def test_no_class_is_a_numeral():
    """A printed digit among the classes would mean that the digits of the transfer test had been trained on."""
    assert not [c for c in load_world().classes if c.character.isnumeric()]


def test_class_list_is_the_one_chosen_from_the_fonts():
    """A hand-edited or stale classes.tsv would no longer be reproducible from the fonts.

    Another version of FreeType may draw a little differently and so keep or drop a near-duplicate: hence the margin.
    """
    chosen = {(c.character, c.script) for c in choose_classes()}
    shipped = {(c.character, c.script) for c in load_world().classes}
    assert len(chosen & shipped) >= 0.97 * max(len(chosen), len(shipped))


def test_picture_is_a_pure_function_of_its_key():
    """A picture that depended on its batch or on what was drawn before would make shards irreproducible."""
    world = load_world()
    ids = world.split("train")[:6]
    keys = [PictureKey(c, v, 3, style) for c in ids for v in range(5) for style in (None, *STYLES)]
    keys += [PictureKey(c, 0, 3, None, position) for c in ids for position in POSITIONS]
    together = world.pngs(keys)
    assert [world.png(*key) for key in reversed(keys)] == together[::-1]
    assert len(set(together)) == len(keys)  # and every argument counts
    assert world.png(ids[0], 0, 3) != world.png(ids[0], 0, 4)


def test_png_holds_the_levels_it_was_given():
    """A wrong nibble order or checksum in the 4-bit encoder would swap neighbouring pixels, or not open at all."""
    levels = np.random.default_rng(0).integers(0, 16, (32, 32)).astype(np.uint8)
    data = encode_png(levels)
    with Image.open(io.BytesIO(data)) as picture:
        picture.verify()
    with Image.open(io.BytesIO(data)) as picture:
        assert (picture.mode, picture.size) == ("L", (32, 32))
        assert (np.asarray(picture) == levels * 17).all()
    assert (read_png(data) == levels).all()


def test_pictures_are_small_files():
    """A picture of many kilobytes would make the shards of the quickstart slow to write and read."""
    world = load_world()
    sizes = [len(png) for png in world.pngs([PictureKey(c, 0) for c in world.split("validation")])]
    assert np.mean(sizes) < 400
    assert max(sizes) < 640


def _centre(levels: np.ndarray) -> tuple[float, float]:
    ink = np.where(levels > levels.max() / 2, levels, 0).astype(float)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    return (columns * ink).sum() / ink.sum(), (rows * ink).sum() / ink.sum()


@pytest.mark.parametrize(
    ("position", "axis", "sign"), [("left", 0, -1), ("right", 0, 1), ("top", 1, -1), ("bottom", 1, 1)]
)
def test_position_is_where_it_says(position, axis, sign):
    """Swapped axes or signs would teach that left is right."""
    world = load_world()
    pictures = world.pictures([PictureKey(c, 0, 0, None, position) for c in world.split("validation")[:40]])
    offsets = np.array([_centre(picture) for picture in pictures]) - (SIZE - 1) / 2
    assert (sign * offsets[:, axis] > 2).mean() > 0.95
    assert np.abs(offsets[:, 1 - axis]).mean() < 2.5


def test_styles_can_be_seen():
    """A style that does nothing to the picture could never be answered about."""
    world = load_world()
    ids = world.split("validation")[:40]
    ink = {s: world.pictures([PictureKey(c, 0, 0, s) for c in ids]).mean() for s in (None, *STYLES)}
    assert ink["bold"] > 1.3 * ink[None]
    assert ink["inverted"] > 7.5 > ink[None]  # light ink on a dark ground, but for this style
    assert ink["striped"] < 0.8 * ink[None]
    edges = {s: np.abs(np.diff(world.pictures([PictureKey(c, 0, 0, s) for c in ids]).astype(int))).mean() for s in ink}
    assert edges["coarse"] < 0.8 * edges[None]
    assert edges["outlined"] > edges[None]


def test_digits_have_the_polarity_of_the_glyphs():
    """Dark digits on a light ground would measure inversion, not transfer."""
    items = digits()
    assert len(items) == 1797
    assert Counter(label for label, _ in items).keys() == set(range(10))
    levels = np.stack([read_png(png) for _, png in items[:200]])
    assert levels.shape[1:] == (SIZE, SIZE)
    assert levels.mean() < 7
    assert levels[:, 0].max() == 0  # a dark rim


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((0, 0, 0, "italic"), "italic"), ((0, 0, 0, None, "middle"), "middle"), ((99_999, 0), "99999")],
)
def test_bad_arguments_are_named(arguments, named):
    """A KeyError from the depths would not say which argument was wrong."""
    with pytest.raises(FlamingoError, match=named):
        load_world().png(*arguments)


def test_unknown_split_is_named():
    """A misspelt split must not come back as an empty list."""
    with pytest.raises(FlamingoError, match="'valid'.*validation"):
        load_world().split("valid")
