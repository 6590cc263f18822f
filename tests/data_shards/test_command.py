"""`flamingo-shards`: every command, what users get wrong, and the way from ten pictures to a trained model."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image as PilImage
from pyarrow import parquet

from data_shards import command
from data_shards.account import Account
from data_shards.convert import Options, convert
from data_shards.shards import open_shards
from data_shards.sources.obelics import ObelicsReader
from train import pretrain

COLOURS = ["red", "green", "blue", "yellow", "black", "white", "orange", "purple", "brown", "grey"]


def run(monkeypatch: pytest.MonkeyPatch, *words: object, main: object = command.main) -> int:
    """The exit code of a command line."""
    monkeypatch.setattr(sys, "argv", ["flamingo-shards", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()  # type: ignore[operator]
    return int(ended.value.code or 0)


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The README's folder of ten pictures and documents.jsonl, in the current folder."""
    monkeypatch.chdir(tmp_path)
    folder = Path("pictures")
    folder.mkdir()
    lines = []
    for colour in COLOURS:
        PilImage.new("RGB", (64, 48), colour).save(folder / f"{colour}.png")
        document = [f"A {colour} picture:", {"image": f"{colour}.png"}, f"It is {colour}."]
        lines.append(json.dumps({"document": document}))
    (folder / "documents.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_ten_pictures_become_a_model(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a README whose tutorial does not run: convert, validate, stats, show, pretrain."""
    assert run(monkeypatch, "convert", "folder", "pictures", "--out", "shards") == 0
    said = capsys.readouterr()
    assert "10 samples in shards" in said.out and said.err == ""  # quiet where no terminal is
    assert run(monkeypatch, "validate", "shards") == 0
    assert "10 samples, 10 images" in capsys.readouterr().out
    assert run(monkeypatch, "show", "shards", "--sample", "0", "--out", "document.html") == 0
    assert "It is red." in Path("document.html").read_text()
    arguments = ["--data.sources", '{"mine": {"shards": "shards"}}', "--data.glyphs", "null", "--steps", 2]
    arguments += ["--batch", 10, "--micro-batch", 10, "--tracking.mode", "disabled", "--out", "runs/mine"]
    assert run(monkeypatch, *arguments, main=pretrain.main) == 0
    assert Path("runs/mine/model/config.json").is_file()


def test_show_finds_a_document_by_its_key(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a key that is taken for a number, and a page without a name."""
    run(monkeypatch, "convert", "folder", "pictures", "--out", "shards")
    assert run(monkeypatch, "show", "shards", "--sample", "00000-0000003") == 0
    assert "It is yellow." in Path("00000-0000003.html").read_text()
    assert run(monkeypatch, "show", "shards", "--sample", "10") == 2


def test_validate_and_stats_write_what_they_find(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches faults that leave the exit code at 0, JSON that is no JSON, and a plot that is not there."""
    whole = (pictures / "red.png").read_bytes()
    (pictures / "red.png").write_bytes(whole[:60])
    run(monkeypatch, "convert", "folder", "pictures", "--out", "shards")
    assert run(monkeypatch, "validate", "shards", "--json", "report.json") == 1
    report = json.loads(Path("report.json").read_text())
    assert [fault["key"] for fault in report["faults"]] == ["00000-0000000"]
    assert run(monkeypatch, "stats", "shards", "--json", "stats.json", "--plot", "stats.png") == 0
    assert json.loads(Path("stats.json").read_text())["documents"] == 10 and Path("stats.png").is_file()
    assert run(monkeypatch, "convert", "folder", "pictures", "--out", "checked", "--check-images") == 0
    said = capsys.readouterr().out
    assert "9 samples in checked" in said and "no image file" in said and "red.png" in said
    assert run(monkeypatch, "validate", "checked") == 0


def test_tars_of_others_are_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an index command that does not make foreign shards open."""
    buffer = io.BytesIO()
    PilImage.new("RGB", (8, 8)).save(buffer, "PNG")
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name, content in (("a.png", buffer.getvalue()), ("a.txt", b"a caption")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert run(monkeypatch, "index", tmp_path, "--samples", "pairs") == 0
    assert len(open_shards(tmp_path)[0].media) == 1


def test_urls_are_listed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a list that downloads an image twice, and a table that img2dataset does not take."""
    names = [["a", None, "b", "a"], ["c"], ["b"]]
    rows = [
        {"images": [name and f"http://x/{name}.jpg" for name in row], "texts": [None if name else "t" for name in row]}
        for row in names
    ]
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(command, "ROW_GROUP", 2)
    assert run(monkeypatch, "urls", "obelics", tmp_path / "docs.jsonl", "--out", tmp_path / "list.parquet") == 0
    assert "3 distinct URLs of 5 images" in capsys.readouterr().out
    table = parquet.read_table(tmp_path / "list.parquet")
    assert table.column_names == ["url", "name"]
    assert table["url"].to_pylist() == [f"http://x/{name}.jpg" for name in "abc"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["convert"], "expected a source, one of mmc4, obelics, pairs, folder"),
        (["convert", "flickr", "x"], "found flickr"),
        (["convert", "folder", "nowhere", "--out", "y"], "nowhere"),
        (["convert", "folder", "x"], "out"),
        (["convert", "folder", "x", "--out", "y", "--quality", "best"], "quality"),
        (["convert", "folder", "x", "--out", "y", "--max-edge", "0"], "max_edge=0"),
        (["convert", "folder", "x", "--outt", "y"], "--outt"),
        (["convert", "folder", "x", "--out", "y", "--tokenizer", "nowhere/at/all"], "tokenizer nowhere/at/all"),
        (["urls", "pairs", "x", "--out", "y"], "one of mmc4, obelics, found pairs"),
        (["validate", "nowhere"], "nowhere"),
        (["validate"], "folder"),
        (["show", "nowhere", "--sample", "3"], "nowhere"),
        (["frobnicate"], "expected a command, one of convert, urls"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    """Catches tracebacks, usage texts of a page, and messages that do not name what is wrong."""
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *words) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1 and said in errors


def test_help_is_quick_and_explains_every_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches help that waits for torch, commands that it leaves out, and options without a word of explanation."""
    code = "import sys, data_shards.command as c\ntry: c.main()\nfinally: print('torch' in sys.modules)"
    for words in ([], ["--help"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert done.stdout.endswith("False\n")
        assert all(name in done.stdout + done.stderr for name in command.COMMANDS)
    for words in (
        *(["convert", source] for source in command.SOURCES),
        ["urls", "mmc4"],
        ["validate"],
        ["stats"],
        ["show"],
    ):
        assert run(monkeypatch, *words, "--help") == 0
        shown = " ".join(capsys.readouterr().out.split("options:")[1].split())
        for option in shown.split(" --")[1:]:
            explained = option.partition("(type")[0].partition("(required")[0].split()
            assert len(explained) > 3, option
    assert run(monkeypatch, "convert", "--help") == 0


def test_the_table_of_an_account_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches reasons that the table leaves out, and names of foreign data that steer the terminal."""
    account = Account()
    account.keep(3)
    account.drop_image("place one", "missing image")
    account.drop("place \x1b[31m[bold]two", "no text", 2)
    command._print(command.account_table(account, "folder"))
    said = capsys.readouterr().out
    for row in (("read", "2", "6"), ("kept", "1", "3"), ("missing image", "1"), ("no text", "1"), ("dropped", "2")):
        assert any(all(word in line for word in row) for line in said.splitlines()), row
    assert "\x1b" not in said and "[bold]two" in said


@pytest.mark.parametrize("name, documents, images", [("openstax_astronomy", 175, 589), ("based_cooking", 92, 112)])
def test_real_documents_keep_every_image(
    real_data: Path, tmp_path: Path, name: str, documents: int, images: int
) -> None:
    """Catches images of real documents that are lost between the source and its shards."""
    source = real_data / name
    account = convert(ObelicsReader(str(source)), tmp_path, Options(stripes=2))
    assert account.adds_up and not account.documents_dropped and not account.images_dropped
    assert (account.documents_kept, account.images_kept) == (documents, images)
    shards = open_shards(tmp_path)
    assert len(shards) == account.samples
    found: Counter[str] = Counter()
    for number in range(len(shards)):
        found.update(hashlib.sha256(medium.data).hexdigest() for medium in shards[number].media)  # type: ignore[union-attr]
    rows = [json.loads(line) for line in (source / "docs.jsonl").read_text().splitlines()]
    named = [name for row in rows for name in row["images"] if name is not None]
    assert found == Counter(hashlib.sha256((source / name).read_bytes()).hexdigest() for name in named)
