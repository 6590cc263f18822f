"""Interleaved documents of the embedded world: pictures of glyphs, and text that names them.

Two kinds. `naming` documents speak of the known classes by the names they keep for good, as web pages do. `episodes`
are bursty: a few classes come again and again under names drawn anew for that document, so that only the context can
tell what the last picture is called. Both use `train` classes and names of the "train" split alone.

Pictures come from a pool of variants, drawn and encoded once: a class has `VARIANTS` pictures, whatever the number of
documents. Every document is a pure function of (seed, its number).
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from data_shards.glyphs.pictures import POSITIONS, STYLES, PictureKey, load_world, process_map
from data_shards.glyphs.words import NAMING_TEMPLATES, fixed_names, fresh_names
from data_shards.shards import ShardAccount, ShardWriter, write_index
from flamingo.document import Document, Image, Segment, Text
from flamingo.errors import FlamingoError

VARIANTS = 48  # pictures of a class in the pool
PLAIN_NAME_SHARE = 0.95  # share of episodes that use the evaluation's own template: the name and nothing else
WAYS = (3, 9)  # classes of an episode, at least and at most
PICTURES = (12, 18)  # pictures of an episode, at least and at most
TOKENS = 60  # of a document with much text, about
PART = 2000  # documents of a shard

OPENINGS = ("here are some pictures.", "some signs and their names.", "look at these.", "a list of glyphs.")


class PicturePool:
    """PNG bytes of every (class, variant), drawn when first asked for or all at once by `fill`."""

    def __init__(self, seed: int, variants: int = VARIANTS) -> None:
        self.seed, self.variants = seed, variants
        self._pictures: dict[tuple[int, int], bytes] = {}

    def __getitem__(self, key: tuple[int, int]) -> bytes:
        if key not in self._pictures:
            picture = pool_key(*key, self.seed)
            self._pictures[key] = load_world().pngs([picture])[0]
        return self._pictures[key]

    def fill(self, class_ids: Sequence[int], processes: int, in_processes: Callable[..., list[Any]]) -> None:
        """Draw all variants of the classes, in parallel. About 250 µs a picture and core."""
        work = functools.partial(_draw_classes, variants=self.variants, seed=self.seed)
        for part in in_processes(work, [class_ids[start::processes] for start in range(processes)]):
            self._pictures.update(part)


def pool_key(class_id: int, variant: int, seed: int) -> PictureKey:
    """Which picture is a variant of a class: two of three are plain, the third has a style, a position, or both.

    The tower knows the train classes; the stranger pictures make them about as hard to tell apart as unknown classes.
    """
    rng = random.Random(f"pool/{seed}/{class_id}/{variant}")
    kind = rng.random() if variant % 3 == 2 else 1.0
    style = rng.choice((*STYLES, "coarse")) if kind < 0.8 else None
    position = rng.choice(POSITIONS) if 0.7 < kind < 1.0 else None
    return PictureKey(class_id, variant, seed, style, position)


def _draw_classes(class_ids: Sequence[int], variants: int, seed: int) -> dict[tuple[int, int], bytes]:
    keys = [pool_key(class_id, variant, seed) for class_id in class_ids for variant in range(variants)]
    return {(key.class_id, key.variant): png for key, png in zip(keys, load_world().pngs(keys), strict=True)}


def _picture(pool: PicturePool, class_id: int, rng: random.Random) -> tuple[Image, int]:
    variant = rng.randrange(pool.variants)
    return Image(pool[class_id, variant], f"glyph-{class_id}-{variant}.png"), variant


def _document(
    source: str,
    number: int,
    chunks: Sequence[tuple[int | None, str]],
    names: dict[int, str],
    pool: PicturePool,
    rng: random.Random,
    *,
    names_are_known: bool,
) -> Document:
    """A document of (class id, text after its picture) chunks; without a class it is text alone.

    Where names are not known beforehand, a chunk counts in the loss only when its class has occurred before: nothing
    tells a first name, so that its loss is noise.
    """
    segments: list[Segment] = []
    classes: list[int] = []
    variants: list[int] = []
    for class_id, text in chunks:
        if class_id is not None:
            image, variant = _picture(pool, class_id, rng)
            segments.append(image)
            classes.append(class_id)
            variants.append(variant)
        supervised = names_are_known or class_id in classes[:-1]
        segments.append(Text(text, supervised))
    metadata = {"classes": classes, "variants": variants, "names": [names[class_id] for class_id in classes]}
    return Document(tuple(segments), f"{source}-{number:07d}", source, metadata)


def _pictures_with(template: str) -> int:
    """Pictures that fit beside this text into about `TOKENS` tokens: a batch is as long as its longest document."""
    return max(1, TOKENS // (len(template.split()) + template.count(".") + template.count(":") + 3))


def naming_documents(count: int, seed: int, start: int = 0, pool: PicturePool | None = None) -> Iterator[Document]:
    """Documents number `start` to `start + count − 1` of one to twelve pictures of known classes, named by sentences.

    Each class goes by its fixed name. Their source is "naming"; metadata: classes, variants, names (one a picture).
    """
    pool = pool or PicturePool(seed)
    names = fixed_names()
    known = sorted(names)
    for number in range(start, start + count):
        rng = random.Random(f"naming/{seed}/{number}")
        chunks: list[tuple[int | None, str]] = []
        if rng.random() < 0.15:
            chunks.append((None, rng.choice(OPENINGS)))
        template = NAMING_TEMPLATES[0] if rng.random() < 0.5 else rng.choice(NAMING_TEMPLATES)
        for class_id in rng.choices(known, k=min(rng.randint(1, 12), _pictures_with(template))):
            chunks.append((class_id, template.format(name=names[class_id])))
        yield _document("naming", number, chunks, names, pool, rng, names_are_known=True)


def episode_documents(count: int, seed: int, start: int = 0, pool: PicturePool | None = None) -> Iterator[Document]:
    """Documents number `start` to `start + count − 1` of up to 18 pictures of three to nine train classes.

    The names are drawn anew for each document, one template is kept throughout it, and the last picture's class has
    occurred before. Their source is "episodes"; metadata: classes, variants, names (one a picture).
    """
    pool = pool or PicturePool(seed)
    train = load_world().split("train")
    for number in range(start, start + count):
        rng = random.Random(f"episodes/{seed}/{number}")
        template = NAMING_TEMPLATES[0] if rng.random() < PLAIN_NAME_SHARE else rng.choice(NAMING_TEMPLATES)
        most = min(PICTURES[1], max(_pictures_with(template), WAYS[0] + 1))
        length = rng.randint(min(PICTURES[0], most), most)
        ways = rng.randint(WAYS[0], min(WAYS[1], length - 1))
        ids = rng.sample(train, ways)
        names = dict(zip(ids, fresh_names(rng, ways), strict=True))
        shown = ids + rng.choices(ids, k=length - ways - 1)
        rng.shuffle(shown)
        shown.append(rng.choice(shown))
        chunks = [(class_id, template.format(name=names[class_id])) for class_id in shown]
        yield _document("episodes", number, chunks, names, pool, rng, names_are_known=False)


def write_world_shards(
    folder: str | Path, *, naming: int, episodes: int, seed: int = 0, processes: int = 1, variants: int = VARIANTS
) -> dict[str, Any]:
    """Write `folder`/naming and `folder`/episodes as tar shards.

    naming, episodes: numbers of documents. variants: pictures of a class. The shards do not depend on `processes`.
    Returns the account of `write_shards` for each of the two; for the episodes also how many (class, name) pairs there
    are, and how many of them came in more than one document.

    Raises:
        FlamingoError: where a number is not positive.
    """
    for label, number in (("naming", naming), ("episodes", episodes), ("processes", processes), ("variants", variants)):
        if number < 1:
            raise FlamingoError(f"{label}={number}: expected a positive number")
    pool = PicturePool(seed, variants)
    train = load_world().split("train")
    parts = [
        Part(source, start, min(PART, count - start))
        for source, count in (("episodes", episodes), ("naming", naming))
        for start in range(0, count, PART)
    ]
    with process_map(processes) as in_processes:
        if naming + episodes > len(train):  # fewer documents draw the few pictures they show
            pool.fill(train, processes, in_processes)
        work = functools.partial(_write_parts, folder=Path(folder), pool=pool)
        shares = in_processes(work, [parts[i::processes] for i in range(processes)])
    written = [part for share in shares for part in share]
    account: dict[str, Any] = {}
    for source in ("naming", "episodes"):
        mine = [part for part in written if part.source == source]
        write_index(Path(folder) / source, [entry for part in mine for entry in part.entries])
        account[source] = {
            field.name: sum(getattr(part.account, field.name) for part in mine) for field in fields(ShardAccount)
        }
    pairs: Counter[tuple[int, str]] = Counter()
    for part in written:
        pairs.update(part.pairs if part.source == "episodes" else {})
    account["episodes"]["pairs"] = len(pairs)
    account["episodes"]["pairs_in_several_documents"] = sum(times > 1 for times in pairs.values())
    account["episodes"]["most_documents_of_a_pair"] = max(pairs.values())
    return account


@dataclass(frozen=True)
class Part:
    """Documents that one process writes as one shard."""

    source: str
    start: int
    count: int


@dataclass(frozen=True)
class WrittenPart:
    """What is known of a part's shard when it is written; `pairs`: documents of each (class, name)."""

    source: str
    entries: list[dict[str, Any]]
    account: ShardAccount
    pairs: Counter[tuple[int, str]]


def _write_parts(parts: Sequence[Part], folder: Path, pool: PicturePool) -> list[WrittenPart]:
    written = []
    for part in parts:
        shards = ShardWriter(folder / part.source, f"{part.source}-from-{part.start:07d}", max_samples=part.count)
        pairs: Counter[tuple[int, str]] = Counter()
        generate = naming_documents if part.source == "naming" else episode_documents
        try:
            for document in generate(part.count, pool.seed, part.start, pool):
                pairs.update(set(zip(document.metadata["classes"], document.metadata["names"], strict=True)))
                shards.write(document)
            shards.close()
        except BaseException:
            shards.abandon()
            raise
        written.append(WrittenPart(part.source, shards.entries, shards.account, pairs))
    return written
