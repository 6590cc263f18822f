"""Where a task's pictures come from: a small registry of item sources. Each makes the pool of one task."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from flamingo.document import Image
from flamingo.errors import FlamingoError
from icl_eval.tasks import HELD_OUT, Task

# Training draws the variants below; so no picture of an evaluation was ever trained on, whatever the seeds.
FIRST_VARIANT = 10_000
PICTURE_SEED = 0
VARIANTS = 16


@dataclass(frozen=True)
class Item:
    """One picture of a pool: its id in results, its class, and the class's fixed name where it has one."""

    id: str
    kind: str
    label: str | None = None


@dataclass(frozen=True)
class Pool:
    """The items of a task, in a fixed order.

    Attributes:
        items: ids are unique over all sources, so that tasks can share encoded pictures.
        images: the pictures at some indices, drawn or read when they are needed.
        by_kind: indices of the items of each class.
    """

    items: tuple[Item, ...]
    images: Callable[[Sequence[int]], list[Image]]
    by_kind: dict[str, tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        by_kind = defaultdict(list)
        for index, item in enumerate(self.items):
            by_kind[item.kind].append(index)
        object.__setattr__(self, "by_kind", {kind: tuple(indices) for kind, indices in by_kind.items()})

    def name(self, index: int) -> str:
        """Id of the picture at an index (`icl_eval.engine.Library`)."""
        return self.items[index].id

    def media(self, indices: Sequence[int]) -> list[Image]:
        """The pictures at some indices (`icl_eval.engine.Library`)."""
        return self.images(indices)

    def label(self, kind: str) -> str | None:
        """The fixed name of a class, None where it has none."""
        return self.items[self.by_kind[kind][0]].label


def glyphs(task: Task) -> Pool:
    """Pictures of the embedded world's classes; split "known" holds the classes whose names were taught."""
    from data_shards.glyphs.pictures import PictureKey, load_world
    from data_shards.glyphs.words import fixed_names

    world = load_world()
    labels: dict[int, str] = {}
    if task.split == "known":
        classes, labels = world.known, fixed_names()
    elif task.split in ("train", *HELD_OUT):
        classes = world.split(task.split)
    else:
        raise _unknown_split(task, ("known", "train", *HELD_OUT))
    variants = range(FIRST_VARIANT, FIRST_VARIANT + (task.variants or VARIANTS))
    keys = [PictureKey(kind, variant, PICTURE_SEED) for kind in classes for variant in variants]

    def images(indices: Sequence[int]) -> list[Image]:
        chosen = [keys[index] for index in indices]
        pictures = world.pngs(chosen)
        return [Image(png, f"{key.class_id}-{key.variant}.png") for key, png in zip(chosen, pictures, strict=True)]

    items = (Item(f"glyphs/{key.class_id}/{key.variant}", str(key.class_id), labels.get(key.class_id)) for key in keys)
    return Pool(tuple(items), images)


def digits(task: Task) -> Pool:
    """scikit-learn's 1,797 handwritten digits: every fourth is "validation", the others are "test"."""
    from data_shards.glyphs.pictures import digits as load_digits

    if task.split not in ("test", "validation"):
        raise _unknown_split(task, ("test", "validation"))
    pictures = load_digits()
    numbers = [n for n in range(len(pictures)) if (n % 4 == 0) == (task.split == "validation")]
    return Pool(
        tuple(Item(f"digits/{n}", str(pictures[n][0])) for n in numbers),
        lambda indices: [Image(pictures[n][1], f"digit-{n}.png") for n in (numbers[index] for index in indices)],
    )


SOURCES: dict[str, Callable[[Task], Pool]] = {"glyphs": glyphs, "digits": digits}


def load_pool(task: Task) -> Pool:
    """The pool of `task`.

    Raises:
        FlamingoError: unknown source or split; fewer classes than ways; fixed names asked of items without labels.
    """
    if task.source not in SOURCES:
        raise FlamingoError(f"{task.file}: source: {task.source!r}, expected one of {', '.join(SOURCES)}")
    pool = SOURCES[task.source](task)
    if len(pool.by_kind) < task.ways:
        raise FlamingoError(
            f"{task.file}: ways: {task.ways}, but split {task.split!r} of {task.source} has {len(pool.by_kind)} classes"
        )
    unlabelled = [kind for kind in pool.by_kind if pool.label(kind) is None]
    if task.names == "fixed" and unlabelled:
        raise FlamingoError(
            f"{task.file}: names: fixed, but {len(unlabelled)} classes in split {task.split!r} of {task.source} have "
            f"no labels (first: class {unlabelled[0]}), and without labels there is nothing to ask at 0 shots"
        )
    return pool


def _unknown_split(task: Task, splits: tuple[str, ...]) -> FlamingoError:
    return FlamingoError(f"{task.file}: split: {task.split!r}, {task.source} has {', '.join(splits)}")
