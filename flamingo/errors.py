"""The one error that users are meant to read, and how command lines read their words and show it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn


def plain_options(arguments: Sequence[str]) -> list[str]:
    """Command-line words as jsonargparse wants them: `--from-scratch` is `--from_scratch`, and alone it means true."""
    plain = []
    for place, word in enumerate(arguments):
        following = arguments[place + 1] if place + 1 < len(arguments) else "--"
        if word.startswith("--") and word != "--":
            name, equals, value = word.partition("=")
            alone = (
                not equals and following.startswith("--") and name not in ("--help", "--print-config", "--print_config")
            )
            word = "--" + name[2:].replace("-", "_") + (f"={value}" if equals else "=true" if alone else "")
        plain.append(word)
    return plain


class FlamingoError(ValueError):
    """Bad input: the message names the file, key or argument, and what was expected."""


def command_line(main: Callable[[], None]) -> Callable[[], NoReturn]:
    """Turn `main` into a console entry point: a `FlamingoError` becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def run() -> NoReturn:
        try:
            main()
        except FlamingoError as error:
            print("error: " + " ".join(str(error).split()), file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None
        raise SystemExit(0)

    return run
