"""The embedded data sets, which need no files: the glyph world, and scikit-learn's handwritten digits.

Their ids and their order enter the draws of the embedded tasks: a change of either changes scores.
"""

from __future__ import annotations

from collections.abc import Iterator

from data_shards.glyphs.pictures import PictureKey, load_world
from data_shards.glyphs.pictures import digits as load_digits
from data_shards.glyphs.words import fixed_names
from flamingo.document import Image
from flamingo.errors import FlamingoError
from icl_eval.datasets import Example
from icl_eval.datasets.reading import LocalDataSet

# Training draws the variants below; so no picture of an evaluation was ever trained on, whatever the seeds.
FIRST_VARIANT = 10_000
PICTURE_SEED = 0
VARIANTS = 16
VARIANTS_OF_KNOWN = 20


class Glyphs(LocalDataSet):
    """Pictures of the glyph world's classes, 16 of each, and 20 of those whose names were taught (split "known").

    Only the latter have names, their answers; the others' labels are the numbers of their classes.
    """

    splits = ("known", "train", "validation", "test", "scripts")

    def read(self, split: str) -> Iterator[Example]:
        """An example for each picture: classes as the world has them, then variants."""
        world = load_world()
        known = split == "known"
        names = fixed_names() if known else {}
        last = FIRST_VARIANT + (VARIANTS_OF_KNOWN if known else VARIANTS)
        for kind in world.known if known else world.split(split):
            label = names.get(kind, str(kind))
            answers = (label,) if known else ()
            for variant in range(FIRST_VARIANT, last):
                yield Example(f"glyphs/{kind}/{variant}", (f"{kind}-{variant}.png",), answers=answers, label=label)

    def medium(self, name: str) -> Image:
        """The picture of a class and a variant, "7-10003.png"."""
        kind, _, variant = name.removesuffix(".png").partition("-")
        if not (kind.isdecimal() and variant.isdecimal()):
            raise FlamingoError(f"glyphs: picture {name!r}, expected a name like 7-{FIRST_VARIANT}.png")
        key = PictureKey(int(kind), int(variant), PICTURE_SEED)
        return Image(load_world().pngs([key])[0], name)


class Digits(LocalDataSet):
    """scikit-learn's 1,797 handwritten digits: every fourth is "validation", the others are "test"."""

    splits = ("test", "validation")

    def read(self, split: str) -> Iterator[Example]:
        """An example for each digit of the split, as scikit-learn has them."""
        for number, (digit, _) in enumerate(load_digits()):
            if (number % 4 == 0) == (split == "validation"):
                yield Example(f"digits/{number}", (f"digit-{number}.png",), answers=(str(digit),), label=str(digit))

    def candidates(self) -> tuple[str, ...]:
        """0 to 9."""
        return tuple(map(str, range(10)))

    def medium(self, name: str) -> Image:
        """The picture of a number, "digit-12.png"."""
        number, pictures = name.removeprefix("digit-").removesuffix(".png"), load_digits()
        if not number.isdecimal() or int(number) >= len(pictures):
            raise FlamingoError(f"digits: picture {name!r}, expected digit-0.png to digit-{len(pictures) - 1}.png")
        return Image(pictures[int(number)][1], name)
