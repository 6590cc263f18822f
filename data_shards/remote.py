"""Shards that are elsewhere: anything fsspec opens, brought to a bounded folder on this machine when they are read.

A shard is fetched under another name, checked against the sum in the index, and renamed; so the cache holds whole
shards alone, by what they contain, and any number of processes and runs may share one. A lock a shard lets one process
fetch it while the others wait. What was opened longest ago makes room; whoever still reads it keeps it until it closes
the file, at most `SHARDS_AT_ONCE` files a process beside the bound.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from data_shards.order import SHARDS_AT_ONCE
from data_shards.shards import INDEX, Folder, OpenShard, Shard, ShardSet, load_offsets, offsets_path, read_index
from flamingo.errors import FlamingoError
from flamingo.files import sha256

Result = TypeVar("Result")

WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""seconds before each further attempt to fetch a file"""
STALLED = 60.0
"""seconds without a byte after which an HTTP server is taken to have stopped"""


def open_remote(url: str, cache: Path, cache_bytes: int, *, waits: Sequence[float] = WAITS) -> ShardSet:
    """Open an indexed folder of shards that fsspec reaches; shards are fetched when they are read.

    Args:
        url: of the folder; `https://…`, `s3://…` and so on, each with the package that fsspec asks for.
        cache: folder for shards on this machine.
        cache_bytes: how much of it they may fill.
        waits: seconds before each further attempt to fetch a file.

    Raises:
        FlamingoError: where the index cannot be fetched, or the cache has no room for the shards that the order reads
            at one time.
    """
    folder = RemoteFolder(url.rstrip("/"), cache, cache_bytes, tuple(waits))
    opened = folder.index()
    needed = sum(sorted(map(_room, opened.shards), reverse=True)[:SHARDS_AT_ONCE])
    if needed > cache_bytes:
        raise FlamingoError(
            f"{cache}: a cache of {cache_bytes:,} bytes for {url}: expected at least {needed:,}, because the samples "
            f"of {SHARDS_AT_ONCE} shards are read in turn"
        )
    return opened


class RemoteFolder(Folder):
    """A folder of shards elsewhere, and its cache here."""

    def __init__(self, name: str, cache: Path, cache_bytes: int, waits: tuple[float, ...]):
        super().__init__(name)
        self.cache, self.cache_bytes, self.waits = cache, cache_bytes, waits
        cache.mkdir(parents=True, exist_ok=True)

    def __reduce__(self) -> tuple[Any, ...]:
        """Workers open their own files and connections."""
        return type(self), (self.name, self.cache, self.cache_bytes, self.waits)

    def index(self) -> ShardSet:
        """The shards that the remote index lists."""
        return self._persist(INDEX, lambda system, path: read_index(system.cat_file(path), self))

    def open(self, shard: Shard) -> OpenShard:
        """Open a shard's files in the cache, having fetched them where they are not there.

        Raises:
            FlamingoError: where they could not be fetched; it names the URL, the number of attempts and the last cause.
        """
        tar, offsets = (self.cache / f"{shard.sha256}{suffix}" for suffix in (".tar", ".npy"))
        with _locked(self._lock(shard.sha256)):
            if not offsets.is_file() or not tar.is_file() or tar.stat().st_size != shard.size:
                self._fetch(shard, tar, offsets)
            for path in (tar, offsets):
                os.utime(path)  # used last
            return OpenShard(tar, offsets, shard)

    def _fetch(self, shard: Shard, tar: Path, offsets: Path) -> None:
        part, room = tar.with_suffix(".part"), tar.with_suffix(".room")
        for path in (tar, offsets):
            path.unlink(missing_ok=True)
        while not self._takes_room(room, _room(shard)):
            time.sleep(0.05)  # all of it is being fetched by others, and can go when they have opened it

        def fetch_offsets(system: Any, path: str) -> None:
            system.get_file(path, str(part))
            load_offsets(part, shard)

        def fetch_tar(system: Any, path: str) -> None:
            system.get_file(path, str(part))
            size = part.stat().st_size
            if size != shard.size:
                raise ValueError(f"{size:,} of {shard.size:,} bytes came")
            if (found := sha256(part)) != shard.sha256:
                raise ValueError(f"SHA-256 {found}, expected {shard.sha256}")

        try:
            self._persist(offsets_path(Path(shard.file)).as_posix(), fetch_offsets)
            os.replace(part, offsets)
            self._persist(shard.file, fetch_tar)
            os.replace(part, tar)
        finally:
            part.unlink(missing_ok=True)
            room.unlink(missing_ok=True)

    def _persist(self, file: str, attempt: Callable[[Any, str], Result]) -> Result:
        """What `attempt` makes of the file system and the path of a remote file, tried until it succeeds.

        Raises:
            FlamingoError: where it never does, or cannot.
        """
        for number, wait in enumerate((*self.waits, None), start=1):
            try:
                system, root = fsspec.core.url_to_fs(self.name, **_options(self.name))  # fsspec keeps one a process
                return attempt(system, f"{root.rstrip('/')}/{file}")
            except (FileNotFoundError, PermissionError, ImportError) as error:
                raise FlamingoError(f"{self.name}/{file}: {_cause(error)}") from error
            except Exception as error:  # every file system has errors of its own
                if wait is None:
                    raise FlamingoError(
                        f"{self.name}/{file}: not fetched in {number} attempts; the last one: {_cause(error)}"
                    ) from error
                time.sleep(wait)
        raise AssertionError("unreachable")

    # -- room ----------------------------------------------------------------------------------------------------------

    def _lock(self, digest: str) -> Path:
        return self.cache / f"{digest}.lock"

    def _takes_room(self, room: Path, size: int) -> bool:
        """Make room for a shard and take it by an empty file of its size, where that is possible now."""
        with _locked(self.cache / "room.lock"):
            held: dict[str, list[tuple[float, int, Path]]] = defaultdict(list)
            for path in self.cache.iterdir():
                if path.suffix in (".tar", ".npy", ".room", ".part"):
                    with contextlib.suppress(FileNotFoundError):  # whoever fetches a shard renames its files
                        found = path.stat()
                        held[path.stem].append((found.st_mtime, found.st_size * (path.suffix != ".part"), path))
            free = self.cache_bytes - sum(used for files in held.values() for _, used, _ in files)
            for digest in sorted(held, key=lambda digest: max(held[digest])):
                if free >= size:
                    break
                with _locked(self._lock(digest), wait=False) as unused:
                    if unused:  # a `.part` or `.room` that nobody works on is what a killed process left
                        for _, used, path in held[digest]:
                            path.unlink()
                            free += used
            if free >= size:
                with room.open("wb") as file:
                    file.truncate(size)
            return free >= size


def _room(shard: Shard) -> int:
    """Bytes that a shard takes in the cache: its tar and its offsets, which numpy aligns."""
    return shard.size + 8 * (shard.samples + 1) + 256


def _options(url: str) -> dict[str, Any]:
    """Options of the file system: for HTTP a limit on standing still instead of aiohttp's on the whole transfer."""
    if not url.startswith(("http://", "https://")):
        return {}
    import aiohttp

    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=STALLED, sock_read=STALLED)}}


def _cause(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file among all processes and threads; without waiting, yield whether it was free."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
