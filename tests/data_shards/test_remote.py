"""Shards behind a server that fails at random: fetched whole, kept within bounds, read by several processes."""

from __future__ import annotations

import pickle
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from data_shards import remote
from data_shards.remote import open_remote
from data_shards.shards import INDEX, ShardSet, open_shards, write_shards
from flamingo import FlamingoError
from tests.tiny import document

SHARDS, EACH = 20, 3
open_quickly = partial(open_remote, waits=(0.01,) * 12)


class Server(ThreadingHTTPServer):
    """Serves a folder; `fails` says of each request how: "error", "cut", "wrong", or not."""

    daemon_threads = True

    def __init__(self, folder: Path, fails: Callable[[str], str]):
        self.fails, self.asked = fails, Counter[str]()
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(SimpleHTTPRequestHandler):
    """One request; a file is sent whole, cut off, changed, or not at all."""

    server: Server

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.server.asked[name] += 1
        path = Path(self.translate_path(self.path))
        how = self.server.fails(name) if path.is_file() else ""
        if how == "error" or not path.is_file():
            self.send_error(500 if how else 404)
            return
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if how == "cut":
            content = content[: len(content) // 2]
            self.close_connection = True
        elif how == "wrong":
            content = content.translate(bytes(range(1, 256)) + b"\0")
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Silence."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of three samples."""
    folder = tmp_path_factory.mktemp("remote")
    write_shards((document(n, n % 3, key=f"d{n}") for n in range(SHARDS * EACH)), folder, max_samples=EACH)
    return folder


@pytest.fixture
def serve(folder: Path) -> Iterator[Callable[[Callable[[str], str]], Server]]:
    """Start a server of the shards that fails as told."""
    servers: list[Server] = []

    def start(fails: Callable[[str], str] = lambda _: "") -> Server:
        servers.append(Server(folder, fails))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def contents(opened: ShardSet) -> list[object]:
    """All documents, without their caches."""
    return [(read.key, read.segments) for read in (opened[n] for n in range(len(opened)))]


def held(cache: Path) -> int:
    """Bytes in a cache."""
    return sum(path.stat().st_size for path in cache.iterdir())


def test_a_server_that_fails_at_random_gives_the_same_documents(
    folder: Path, serve: Callable[..., Server], tmp_path: Path
) -> None:
    """Catches an answer of 500, a cut connection, or wrong bytes that ends a run or is taken for a shard."""
    generator = random.Random(0)
    server = serve(lambda _: generator.choice(["", "error", "cut", "wrong"]))
    opened = open_quickly(server.url + "/", tmp_path / "cache", 1 << 30)
    expected = open_shards(folder)
    assert opened.sha256 == expected.sha256
    assert contents(opened) == contents(expected)
    assert sum(server.asked.values()) > 1.5 * (2 * SHARDS + 1), "it did fail"
    asked = server.asked - Counter({INDEX: server.asked[INDEX]})
    assert contents(open_quickly(server.url, tmp_path / "cache", 1 << 30)) == contents(expected)
    assert server.asked - Counter({INDEX: server.asked[INDEX]}) == asked, "the cache is used"


def test_a_cache_stays_within_its_bound_and_open_shards_stay_readable(
    folder: Path, serve: Callable[..., Server], tmp_path: Path
) -> None:
    """Catches a cache that fills the disk, an eviction of what was used last, or one that breaks a reader."""
    server, cache = serve(), tmp_path / "cache"
    sizes = sorted((remote._room(shard) for shard in open_shards(folder).shards), reverse=True)
    bound = sum(sizes[:16])
    opened = open_quickly(server.url, cache, bound)
    first, everything = opened.shards[0], contents(open_shards(folder))
    reader = first.folder.open(first)
    for number, expected in enumerate(everything):
        read = opened[number]
        assert (read.key, read.segments) == expected
        assert held(cache) <= bound
    assert not (cache / f"{first.sha256}.tar").exists()
    assert (cache / f"{opened.shards[-1].sha256}.tar").exists()
    assert len(reader.read(0, first.size)) == first.size
    assert server.asked[first.file] == 1
    assert opened.shards[0].read(0).key == "d0", "and it comes again"


def test_what_a_killed_process_left_is_cleared_away(folder: Path, serve: Callable[..., Server], tmp_path: Path) -> None:
    """Catches room that is taken for ever, for which the next run waits for ever, and a cut file in the cache."""
    cache = tmp_path / "cache"
    bound = sum(sorted((remote._room(shard) for shard in open_shards(folder).shards), reverse=True)[:16])
    opened = open_quickly(serve().url, cache, bound)
    with (cache / f"{'0' * 64}.room").open("wb") as room:
        room.truncate(bound)
    (cache / f"{'0' * 64}.part").write_bytes(b"half")
    (cache / f"{opened.shards[0].sha256}.tar").write_bytes(b"cut")
    assert opened[0].key == "d0"
    assert sorted({path.suffix for path in cache.iterdir()}) == [".lock", ".npy", ".tar"]


@pytest.mark.timeout(60)
def test_processes_fetch_each_shard_once(folder: Path, serve: Callable[..., Server], tmp_path: Path) -> None:
    """Catches workers that fetch a shard each for themselves, or read another's unfinished one."""
    server = serve(lambda name: random.choice(["", "", "cut"]) if name.endswith(".tar") else "")
    opened = open_quickly(server.url, tmp_path / "cache", 1 << 30)
    loader = DataLoader(opened, batch_size=None, sampler=range(30), num_workers=2, multiprocessing_context="fork")
    assert [read.key for read in loader] == [f"d{n}" for n in range(30)]
    assert {server.asked[f"shard-{n:05d}.offsets.npy"] for n in range(10)} == {1}
    travelled = pickle.loads(pickle.dumps(opened))  # as to a worker that is spawned
    assert (travelled[59].key, opened[59].key) == ("d59", "d59")
    assert server.asked["shard-00019.offsets.npy"] == 1


def test_what_cannot_be_fetched_is_named(serve: Callable[..., Server], tmp_path: Path) -> None:
    """Catches a final error without the URL, the attempts or the cause, and attempts at what is not there."""
    server = serve(lambda name: "wrong" if name == "shard-00001.tar" else "")
    opened = open_remote(server.url, tmp_path / "cache", 1 << 30, waits=(0.01, 0.01))
    with pytest.raises(FlamingoError, match=rf"{server.url}/shard-00001.tar: not fetched in 3 attempts; .* SHA-256"):
        opened.shards[1].read(0)
    assert server.asked["shard-00001.tar"] == 3
    assert not list((tmp_path / "cache").glob("*.part")) and not list((tmp_path / "cache").glob("*.room"))
    with pytest.raises(FlamingoError, match=rf"{server.url}/none/{INDEX}: FileNotFoundError"):
        open_remote(f"{server.url}/none", tmp_path / "cache", 1 << 30)
    server = serve(lambda _: "error")
    with pytest.raises(FlamingoError, match=rf"{server.url}/{INDEX}: not fetched in 2 attempts; .* 500"):
        open_remote(server.url, tmp_path / "cache", 1 << 30, waits=(0.01,))
    with pytest.raises(FlamingoError, match=r"nonsense://x/index\.json: .*nonsense"):
        open_remote("nonsense://x", tmp_path / "cache", 1 << 30, waits=())
    with pytest.raises(FlamingoError, match="expected a cache"):
        open_shards("http://127.0.0.1:9")


def test_a_cache_without_room_for_what_is_read_in_turn_is_refused(serve: Callable[..., Server], tmp_path: Path) -> None:
    """Catches a run that fetches a shard again for every sample."""
    with pytest.raises(FlamingoError, match=r"a cache of 5,000 bytes .*: expected at least"):
        open_quickly(serve().url, tmp_path / "cache", 5000)


def test_any_file_system_serves(folder: Path, tmp_path: Path) -> None:
    """Catches what only works over HTTP."""
    assert contents(open_shards(f"file://{folder}", cache=tmp_path)) == contents(open_shards(folder))
