"""The command line: `flamingo-shards`, or `python -m data_shards`.

What a command needs is imported when it is asked for: help is quick, though the rooms stand on torch.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

if TYPE_CHECKING:
    from rich.table import Table

    from data_shards.account import Account
    from data_shards.convert import Watcher
    from data_shards.shards import ShardSet
    from flamingo import FlamingoProcessor

PROGRAM = "flamingo-shards"
SOURCES = {
    "mmc4": ("data_shards.sources.mmc4", "Mmc4Reader"),
    "obelics": ("data_shards.sources.obelics", "ObelicsReader"),
    "pairs": ("data_shards.sources.pairs", "PairsReader"),
    "folder": ("data_shards.sources.folder", "FolderReader"),
    "mimic_it": ("data_shards.sources.mimic_it", "MimicItReader"),
    "llava": ("data_shards.sources.llava", "LlavaReader"),
    "m3it": ("data_shards.sources.m3it", "M3itReader"),
}
"""name on the command line → module and class of the reader"""
WITH_URLS = ("mmc4", "obelics")
"""sources that name their images by URLs"""
INSTRUCTIONS = ("mimic_it", "llava", "m3it")
"""sources of instructions, whose documents are longer, and of which a whole source can be validated"""
MIMIC_IT = (".yaml", ".yml", "_instructions.json")
"""endings of inputs that can only be of mimic_it"""
PLAIN_SECONDS = 60.0
"""between two lines of progress where the display cannot redraw itself"""
ROW_GROUP = 50_000
"""URLs that are held before they are written"""

O = TypeVar("O")  # noqa: E741


# -- options -----------------------------------------------------------------------------------------------------------


@dataclass
class ConvertOptions:
    """Where shards are written, and who works on them."""

    out: str
    """folder of the shards; a conversion that was stopped goes on in it"""
    processes: int | None = None
    """processes that work; the shards are the same for any number. Default: one for each core"""
    skip_unreadable: bool = False
    """count files of the source that cannot be read as dropped, instead of stopping at the first"""
    strict: bool = False
    """stop at the first record with a fault, and name it; default: faulty records are left out and counted"""


@dataclass
class UrlsOptions:
    """The list of images to download."""

    input: str
    """file, folder or glob of the source's files"""
    out: str
    """parquet file to write, with columns url and name, which img2dataset takes"""


@dataclass
class ValidateOptions:
    """Open everything in a folder of shards, ours or anybody's, and report each fault; exit code 1 if there is any.

    Of sources of instructions too: `validate mimic_it|llava|m3it INPUT`, or a mixture or XX_instructions.json alone.
    """

    folder: str
    """folder of *.tar files, with or without an index"""
    json: str | None = None
    """file for the report as JSON, with every fault by shard, key and reason"""
    samples: Literal["documents", "mmc4", "pairs"] | None = None
    """form of the samples; default: as the index says, or told from the first samples"""
    model: str | None = None
    """folder of a saved Flamingo or of its processor, for the channels and the limits of its images"""
    processes: int | None = None
    """processes that work; default: one for each core, where there are enough data"""


@dataclass
class ValidateSourceOptions:
    """Read a source of instructions as a conversion would, and count what is wrong; exit code 1 if anything is."""

    json: str | None = None
    """file for the accounts as JSON, by the names of the datasets"""


@dataclass
class StatsOptions:
    """Count documents, images, texts and sizes."""

    folder: str
    """folder of *.tar files, with or without an index"""
    tokenizer: str | None = None
    """folder or hub id of a tokenizer; default: characters are counted alone"""
    plot: str | None = None
    """PNG or SVG file for the histograms"""
    json: str | None = None
    """file for the figures as JSON"""
    samples: Literal["documents", "mmc4", "pairs"] | None = None
    """form of the samples; default: as the index says, or told from the first samples"""
    processes: int | None = None
    """processes that work; default: one for each core, where there are enough data"""


@dataclass
class ShowOptions:
    """Write one document as an HTML page to look at."""

    folder: str
    """folder of indexed shards"""
    sample: str = "0"
    """number of the document, from 0, or its key"""
    out: str | None = None
    """HTML file to write; default: the key with .html, here"""
    model: str | None = None
    """folder of a saved Flamingo or of its processor: the page then has the tokens, and which media each sees"""


@dataclass
class IndexOptions:
    """Index the tars that others wrote, so that they can be trained on; the tars stay as they are."""

    folder: str
    """folder of *.tar files"""
    samples: Literal["documents", "mmc4", "pairs"] | None = None
    """form of the samples: pairs of image and caption, mmc4 documents with images inside, documents of this project;
    default: told from the first samples"""


def parse(name: str, words: Sequence[str], first: str, *kinds: type[Any]) -> list[Any]:
    """The options of one command, an instance of each of `kinds`; the word that stands first may go without its name.

    Raises:
        FlamingoError: an argument that is unknown, missing or malformed.
    """
    import jsonargparse

    from flamingo.errors import FlamingoError, plain_options

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=f"{PROGRAM} {name}",
        usage=f"{PROGRAM} {name} {first.upper()} [options]",
        description=(kinds[0].__doc__ or "").partition("\n\n")[0],
        exit_on_error=False,
        allow_abbrev=False,
    )
    for kind in kinds:
        parser.add_class_arguments(kind)
    if words and not words[0].startswith("-"):
        words = [f"--{first}={words[0]}", *words[1:]]
    try:
        parsed = parser.parse_args(plain_options(words))
    except (jsonargparse.ArgumentError, TypeError) as error:
        raise FlamingoError(f"{name}: {error}") from None
    return [kind(**{each.name: parsed[each.name] for each in fields(kind)}) for kind in kinds]


def _source(name: str, words: Sequence[str], known: Sequence[str]) -> tuple[type[Any], Sequence[str]]:
    """The reader class that the first word names, and the other words."""
    from importlib import import_module

    from flamingo.errors import FlamingoError

    if not words or words[0] not in known:
        if words and words[0] in ("-h", "--help"):
            print(f"usage: {PROGRAM} {name} {'|'.join(known)} INPUT [options]; each source has a --help of its own")
            raise SystemExit(0)
        found = f", found {words[0]}" if words else ""
        raise FlamingoError(f"{name}: expected a source, one of {', '.join(known)}{found}")
    module, kind = SOURCES[words[0]]
    return getattr(import_module(module), kind), words[1:]


# -- commands ----------------------------------------------------------------------------------------------------------


def convert(words: Sequence[str]) -> None:
    """Write the documents of a public source, or one's own, as shards."""
    import os

    from data_shards import convert as conversion

    kind, rest = _source("convert", words, tuple(SOURCES))
    limits = conversion.InstructionOptions if words[0] in INSTRUCTIONS else conversion.Options
    reader, options, where = parse(f"convert {words[0]}", rest, "input", kind, limits, ConvertOptions)
    settings = {"processes": where.processes or os.cpu_count() or 1, "strict": where.strict}
    settings["skip_unreadable"] = where.skip_unreadable
    with progress() as watch:
        if getattr(reader, "is_mixture", False):
            accounts = conversion.convert_each(reader.datasets(), where.out, options, **settings, watch=watch)
        else:
            accounts = {"": conversion.convert(reader, where.out, options, **settings, watch=watch)}
    for name, account in accounts.items():
        _print(account_table(account, str(Path(where.out, name))))
    if "" not in accounts:
        print("for a recipe:\n\ndata:\n  sources:")
        print("\n".join(f"    {name}: {{shards: {Path(where.out, name)}}}" for name in accounts))


def urls(words: Sequence[str]) -> None:
    """List the images that have to be downloaded for a source."""
    kind, rest = _source("urls", words, WITH_URLS)
    (options,) = parse(f"urls {words[0]}", rest, "input", UrlsOptions)
    named, distinct = write_urls(kind(input=options.input).urls(), Path(options.out))
    print(f"{options.out}: {distinct:,} distinct URLs of {named:,} images")


def write_urls(found: Iterator[tuple[str, str]], path: Path) -> tuple[int, int]:
    """Write each distinct URL once, with the first name that it has: how many there were, and how many were written.

    Of each URL some 100 bytes are held, to know it again.

    Raises:
        FlamingoError: where the file is no .parquet, or there are no URLs.
    """
    from hashlib import blake2b

    import pyarrow
    from pyarrow import parquet

    from flamingo.errors import FlamingoError
    from flamingo.files import whole

    if path.suffix != ".parquet":
        raise FlamingoError(f"{path}: expected a file that ends in .parquet")
    seen: set[bytes] = set()
    rows: list[tuple[str, str]] = []
    schema = pyarrow.schema([("url", pyarrow.string()), ("name", pyarrow.string())])
    named = 0

    def flush() -> None:
        columns = [list(column) for column in zip(*rows, strict=True)] or [[], []]
        writer.write_table(pyarrow.table(columns, schema=schema))
        rows.clear()

    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as unfinished, parquet.ParquetWriter(unfinished, schema) as writer:
        for url, name in found:
            named += 1
            digest = blake2b(url.encode(), digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                rows.append((url, name))
            if len(rows) == ROW_GROUP:
                flush()
        flush()
        if not named:
            raise FlamingoError(f"{path}: expected at least one URL in the source")
    return named, len(seen)


def validate(words: Sequence[str]) -> None:
    """Open everything in a folder of shards, or of a source of instructions, and report each fault."""
    if words and words[0] in INSTRUCTIONS:
        return _validate_source(words[0], words[1:])
    if words and words[0].lower().endswith(MIMIC_IT):
        return _validate_source("mimic_it", words)
    (options,) = parse("validate", words, "folder", ValidateOptions)
    from data_shards.validate import validate as look

    report = look(
        options.folder,
        samples=options.samples,
        processor=options.model and load_processor(options.model),
        processes=options.processes,
    )
    report.print(_console())
    _write_json(options.json, report.as_dict())
    if not report.ok:
        raise SystemExit(1)
    return None


def _validate_source(name: str, words: Sequence[str]) -> None:
    kind, _ = _source("validate", [name], INSTRUCTIONS)
    reader, options = parse(f"validate {name}", words, "input", kind, ValidateSourceOptions)
    from data_shards.convert import examine

    accounts = examine(reader.datasets() if getattr(reader, "is_mixture", False) else [reader])
    for title, account in accounts.items():
        _print(account_table(account, title))
    _write_json(options.json, {title: account.as_dict() for title, account in accounts.items()})
    if any(account.faults for account in accounts.values()):
        raise SystemExit(1)


def stats(words: Sequence[str]) -> None:
    """Count documents, images, tokens and sizes; a plot."""
    (options,) = parse("stats", words, "folder", StatsOptions)
    from data_shards.statistics import statistics

    found = statistics(options.folder, options.tokenizer, samples=options.samples, processes=options.processes)
    found.print(_console())
    _write_json(options.json, found.as_dict())
    if options.plot is not None:
        print(found.plot(options.plot))


def show(words: Sequence[str]) -> None:
    """Write one document as an HTML page to look at."""
    (options,) = parse("show", words, "folder", ShowOptions)
    from data_shards.page import write_page
    from data_shards.shards import open_shards

    shards = open_shards(options.folder)
    document = shards[find_sample(shards, options.sample)]
    processor = options.model and load_processor(options.model)
    out = options.out or f"{Path(document.key).name}.html"
    print(write_page(document, out, processor=processor))


def find_sample(shards: ShardSet, sample: str) -> int:
    """The number of the sample that is meant by its number, or by its key.

    Raises:
        FlamingoError: where there is none.
    """
    from data_shards.indexing import scan
    from flamingo.errors import FlamingoError

    if sample.isdecimal() and str(int(sample)) == sample and int(sample) < len(shards):
        return int(sample)
    start = 0
    for shard in shards.shards:
        for number, span in enumerate(scan(Path(shard.place)).spans):
            if span.key == sample:
                return start + number
        start += shard.samples
    raise FlamingoError(f"sample {sample}: expected a number below {len(shards)}, or the key of a sample")


def index(words: Sequence[str]) -> None:
    """Index the tars that others wrote."""
    (options,) = parse("index", words, "folder", IndexOptions)
    from data_shards.indexing import index_folder

    index_folder(options.folder, options.samples).print(_console())


def load_processor(folder: str) -> FlamingoProcessor:
    """The processor that is saved in a folder.

    Raises:
        FlamingoError: where there is none.
    """
    from flamingo import FlamingoProcessor
    from flamingo.errors import FlamingoError

    try:
        return FlamingoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise FlamingoError(f"--model {folder}: expected the folder of a saved Flamingo ({error})") from error


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "convert": convert,
    "urls": urls,
    "validate": validate,
    "stats": stats,
    "show": show,
    "index": index,
}


# -- what a person sees ------------------------------------------------------------------------------------------------


@contextmanager
def progress() -> Iterator[Watcher]:
    """A bar on standard error, with documents a second; a line now and then where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("units  {task.description}"), TimeElapsedColumn())
    began = printed = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def watch(*, units: int, of: int, documents: int, images: int) -> None:
            nonlocal printed
            now = time.monotonic()
            if not console.is_terminal and now - printed < PLAIN_SECONDS:
                return
            rate = documents / max(now - began, 1e-9)
            said = f"{documents:,} documents, {rate:,.0f}/s, {images:,} images"
            bar.update(task, total=of, completed=units, description=said)
            if not console.is_terminal:
                printed = now
                print(f"{units} of {of} units  {said}", file=sys.stderr, flush=True)

        yield watch


def account_table(account: Account, out: str) -> Table:
    """What was read, what was kept, and what was dropped for which reason, with places where to look."""
    from rich.table import Table
    from rich.text import Text as Line

    from data_shards.report import printable

    kinds = ("documents", "images", *(["turns"] if account.turns_read else []))
    table = Table("", *kinds, "for example", title=Line(f"{account.samples:,} samples in {out}"))
    for column in table.columns[1:-1]:
        column.justify = "right"
    table.columns[-1].overflow = "fold"
    for row in ("read", "kept"):
        numbers = (getattr(account, f"{kind}_{row}") for kind in kinds)
        table.add_row(row, *(f"{number:,}" for number in numbers), end_section=row == "kept")
    for reason, _ in account.dropped.most_common():
        counts = (getattr(account, f"{kind}_dropped").get(reason, 0) for kind in kinds)
        places = "\n".join(printable(place) for place in account.examples.get(reason, [])[:2])
        table.add_row(Line(reason), *(f"{count:,}" if count else "" for count in counts), Line(places))
    return table


def _console() -> Any:
    from rich import get_console

    return get_console()


def _print(shown: Any) -> None:
    _console().print(shown)


def _write_json(path: str | None, found: dict[str, Any]) -> None:
    from flamingo.files import write_text

    if path is not None:
        write_text(Path(path), json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def usage() -> str:
    """What the commands are."""
    lines = "\n".join(f"  {name:<10}{command.__doc__}" for name, command in COMMANDS.items())
    return (
        f"usage: {PROGRAM} COMMAND [options]\n\nFrom public data to shards that can be trained on.\n\n{lines}\n\n"
        f"{PROGRAM} COMMAND --help explains its options, for sources too: {PROGRAM} convert {'|'.join(SOURCES)} --help"
    )


def run(words: Sequence[str]) -> None:
    """Do what a command line says.

    Raises:
        FlamingoError: where it cannot be done, in one line.
    """
    from flamingo.errors import FlamingoError

    if words[0] not in COMMANDS:
        raise FlamingoError(f"{words[0]}: expected a command, one of {', '.join(COMMANDS)}")
    COMMANDS[words[0]](words[1:])


def main() -> NoReturn:
    """Entry point of `flamingo-shards`."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if words else sys.stderr)
        raise SystemExit(0 if words else 2)
    from flamingo.errors import command_line

    command_line(lambda: run(words))()


if __name__ == "__main__":
    main()
