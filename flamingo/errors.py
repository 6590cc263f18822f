"""The one error that users are meant to read, and how a command line shows it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import NoReturn


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
