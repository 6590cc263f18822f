"""MIMIC-IT: its files, its faults and its mixtures, from the command line to shards."""

from __future__ import annotations

import base64
import json
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_shards.account import Account
from data_shards.convert import InstructionOptions, convert, convert_each, examine
from data_shards.faults import (
    BAD_BASE64,
    BAD_RECORD,
    DANGLING_IMAGE,
    DANGLING_INSTRUCTION,
    DUPLICATE_ID,
    EMPTY_ANSWER,
    MISSING_IMAGE,
    NO_IMAGE,
    NO_IMAGES,
    OF_DROPPED,
    OF_TURN,
    OWN_CONTEXT,
    SURPLUS,
    TOO_LONG,
    UNPICKED,
    SampleError,
)
from data_shards.shards import open_shards
from data_shards.sources import store
from data_shards.sources.mimic_it import MimicItReader, evenly, subset_of
from flamingo import FlamingoError, Text, Video
from tests.data_shards.sources.made import base64_of, image_bytes, read
from tests.data_shards.sources.mimic import as_object, instruction, mimic_it, pictures, write_images
from tests.data_shards.test_command import run
from tests.data_shards.test_convert import SPAWN, contents

LONG = InstructionOptions()


def url_safe(seed: int) -> str:
    """Base64 with the letters in which the two alphabets differ."""
    text = base64.urlsafe_b64encode(image_bytes(seed)).decode()
    assert "-" in text or "_" in text
    return text


PLANTED_IMAGES = [
    ("standard", base64_of(0)),
    ("url-safe", url_safe(1)),
    ("unpadded", base64_of(2).rstrip("=")),
    ("not base64", "!!!"),
    ("html", base64.b64encode(b"<html>").decode()),
    ("standard", base64_of(5)),
]
PLANTED = [
    ("good", instruction("q", "a", ["standard"], ["string", "nowhere", "empty", "half"])),
    ("string", instruction("q", "a", "url-safe")),
    ("unpadded", instruction("q", "a", ["unpadded"], ["unpadded", "string"])),
    ("null", instruction("q", "a", None)),
    ("absent", {"instruction": "q", "answer": "a"}),
    ("empty", instruction("q", " ", ["standard"], ["good"])),
    ("nothing asked", instruction("", "a", ["standard"])),
    ("no image", instruction("q", "a", ["gone"])),
    ("half", instruction("q", "a", ["standard", "gone"])),
    ("broken", instruction("q", "a", ["not base64"])),
    ("page", instruction("q", "a", ["html"])),
    ("malformed", instruction("q", "a", [["standard"]])),
    ("string", instruction("another q", "another a", ["standard"])),
]
EXPECTED = Account(
    documents_read=13,
    documents_kept=3,
    documents_dropped=Counter(
        {MISSING_IMAGE: 2, EMPTY_ANSWER: 1, BAD_RECORD: 2, NO_IMAGES: 4, DUPLICATE_ID: 1}
    ),
    # good and its contexts string and half, string, unpadded and its context, no image, half, broken, page, and the
    # image that stands twice
    images_read=1 + 1 + 2 + 1 + 2 + 1 + 2 + 1 + 1 + 1,
    images_kept=5,
    images_dropped=Counter(
        {DANGLING_IMAGE: 3, OF_TURN: 1, OF_DROPPED: 1, BAD_BASE64: 1, NO_IMAGE: 1, DUPLICATE_ID: 1}
    ),
    # 4 contexts of good, 2 of unpadded; a record that stands twice has none
    turns_read=12 + 4 + 2,
    turns_kept=5,
    turns_dropped=Counter({OF_DROPPED: 9, DANGLING_INSTRUCTION: 1, EMPTY_ANSWER: 1, NO_IMAGES: 1, OWN_CONTEXT: 1}),
    samples=3,
)  # fmt: skip


@pytest.mark.parametrize("form", ["parquet", "json"])
def test_planted_faults_are_counted_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    """Catches a fault that stops the conversion, is counted twice or not at all, or for another reason; base64 of other
    spellings that is lost; a second of an id that wins; `validate` that finds other things than `convert`.
    """
    reader = mimic_it(tmp_path, "LACR_I2I", PLANTED, PLANTED_IMAGES, form=form)
    words = ["mimic_it", reader.input, "--images", reader.images]
    assert run(monkeypatch, "convert", *words, "--out", tmp_path / "out", "--processes", 1) == 0
    assert "3 samples in" in capsys.readouterr().out
    account = Account.from_dict(json.loads((tmp_path / "out" / "account.json").read_text()))
    assert account.adds_up and replace(account, examples={}) == EXPECTED
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".tar") == [
        "00000-00-00000.offsets.npy", "account.json", "conversion.json", "index.json",
    ]  # fmt: skip
    shards = open_shards(tmp_path / "out")
    found = [shards[n] for n in range(3)]
    assert [document.metadata["ids"] for document in found] == [["string", "good"], ["string"], ["string", "unpadded"]]
    assert [[image.data for image in document.images] for document in found] == [
        [image_bytes(1), image_bytes(0)], [image_bytes(1)], [image_bytes(1), image_bytes(2)],
    ]  # fmt: skip
    assert {document.source for document in found} == {"LACR_I2I"}
    where = ["validate", *words[1:], "--json", tmp_path / "report.json"]
    assert run(monkeypatch, *where) == 1
    assert json.loads((tmp_path / "report.json").read_text()) == {"LACR_I2I": account.as_dict()}
    assert "dangling instruction" in capsys.readouterr().out


def test_list_values_and_other_indexes_of_parquet(tmp_path: Path) -> None:
    """Catches base64 in a list that is taken for broken, and an index that has another name than pandas gives."""
    for index, table in enumerate(
        (
            pa.table({"base64": [[base64_of(0)], [base64_of(1)]], "__index_level_0__": ["a", "b"]}),
            pa.table({"image_id": ["a", "b"], "base64": [base64_of(0), base64_of(1)]}),
            pa.table({"width": [1, 2], "base64": pa.array([base64_of(0), base64_of(1)], pa.large_string()),
                      "image_id": pa.array(["a", "b"], pa.large_string())}),
        )
    ):  # fmt: skip
        path = tmp_path / f"{index}.parquet"
        pq.write_table(table, path)
        found = store.store_of(str(path), store.image_rows, str(tmp_path / "index"))
        assert [found.get(key) for key in "ab"] == [image_bytes(0), image_bytes(1)] and list(found.ids()) == ["a", "b"]
    (tmp_path / "list.json").write_text(as_object({"a": [base64_of(0)], "b": [base64_of(0), base64_of(1)], "c": None}))
    found = store.store_of(str(tmp_path / "list.json"), store.image_rows, str(tmp_path / "index"))
    assert found.get("a") == image_bytes(0) and isinstance(found.get("b"), str) and isinstance(found.get("c"), str)
    assert found.get("d") is None and "c" in found and "d" not in found


def test_an_index_is_made_again_where_its_source_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches images of yesterday's file, and an index that is made every time, or kept unfinished."""
    path = write_images(tmp_path / "i.json", {"a": base64_of(0)})
    index = str(tmp_path / "index")
    assert store.store_of(str(path), store.image_rows, index).get("a") == image_bytes(0)
    before = contents(tmp_path / "index")
    store.store_of(str(path), store.image_rows, index)
    assert contents(tmp_path / "index") == before
    write_images(path, {"a": base64_of(1)})
    os.utime(path, ns=(1, 1))
    assert store.store_of(str(path), store.image_rows, index).get("a") == image_bytes(1)
    path.write_text(path.read_text()[:-1])
    with pytest.raises(FlamingoError, match=r"i\.json: expected a JSON object"):
        store.store_of(str(path), store.image_rows, index)
    assert len(contents(tmp_path / "index")) == 2  # the store before, and its lock


def test_contexts_come_from_the_train_file(tmp_path: Path) -> None:
    """Catches rel_ins_ids beside a train file, contexts in another order, queries that it does not name, and a query of
    it that is not there.
    """
    data = {key: instruction(f"ask {key}", key, None, ["d"]) for key in "abcd"}
    train = [("c", ["b", "a"]), ("a", []), ("nowhere", ["a"]), ("b", None), ("c", ["d"])]
    reader = mimic_it(tmp_path, "TEXT", data, train=None)
    (tmp_path / "train.json").write_text(as_object(train))
    documents, account = read(replace(reader, train=str(tmp_path / "train.json")))
    assert [document.metadata["ids"] for document in documents] == [["b", "a", "c"], ["a"], ["b"]]
    assert account.documents_dropped == {DANGLING_INSTRUCTION: 1, DUPLICATE_ID: 1}
    one = replace(reader, train=str(tmp_path / "train.json"), max_contexts=1)
    assert [document.metadata["ids"] for document in read(one)[0]] == [["b", "c"], ["a"], ["b"]]
    assert ["d", "c"] in [document.metadata["ids"] for document in read(reader)[0]]


def test_turns_carry_their_own_images(tmp_path: Path) -> None:
    """Catches a turn by itself without its images, where in a document they stand before its contexts."""
    data = {key: instruction("q", key, [f"{key}0", f"{key}1"], ["b"]) for key in "ab"}
    reader = mimic_it(tmp_path, "DC", data, pictures("a0", "a1", "b0", "b1"))
    assert [[image.name for image in each.frames] for each in reader.turn("b").media] == [["b0.png", "b1.png"]]  # type: ignore[union-attr]
    with pytest.raises(SampleError, match="dangling instruction id"):
        reader.turn("nowhere")


def test_frames_are_picked_evenly_among_those_that_are_there(tmp_path: Path) -> None:
    """Catches a video that loses its end, or more frames than are missing, and frames that the account forgets."""
    ids = [f"f{n}" for n in range(10)]
    data = {"q": instruction("q", "a", ids)}
    reader = mimic_it(tmp_path, "DC", data, pictures(*(key for key in ids if key != "f9")), resample_frames=3)
    (document,), account = read(reader)
    (video,) = document.media
    assert isinstance(video, Video) and [frame.name for frame in video.frames] == ["f0.png", "f4.png", "f8.png"]
    assert account.images_dropped == {UNPICKED: 6, DANGLING_IMAGE: 1} and account.faults == {DANGLING_IMAGE: 1}


def test_a_turn_by_itself_lacks_no_frame(tmp_path: Path) -> None:
    """Catches a held-out video that is asked about without a frame of it, and one that is refused for being picked."""
    data = {"q": instruction("q", "a", ["f0", "f1", "f2"]), "r": instruction("q", "a", ["f0", "gone", "f1"])}
    reader = mimic_it(tmp_path, "DC", data, pictures("f0", "f1", "f2"), resample_frames=2)
    (video,) = reader.turn("q").media
    assert isinstance(video, Video) and len(video.frames) == 2
    with pytest.raises(SampleError, match=r"r: image gone: expected an id of .* \(dangling image id\)"):
        reader.turn("r")


@given(st.integers(1, 300), st.integers(1, 64))
def test_evenly_is_linspace(length: int, number: int) -> None:
    """Catches other frames than Otter picks, and frames that are repeated."""
    expected = np.linspace(0, length - 1, number, dtype=int).tolist() if length > number else list(range(length))
    assert evenly(length, number) == expected and evenly(length, None) == list(range(length))


def test_samples_are_drawn_by_their_ids(tmp_path: Path) -> None:
    """Catches a draw that depends on the order of the file, is the same for every seed, or has another size."""
    data = {f"i{n}": instruction("q", "a") for n in range(50)}
    (tmp_path / "other").mkdir()
    other = list(data.items())
    random.Random(0).shuffle(other)

    def drawn(reader: MimicItReader) -> set[str]:
        return {document.metadata["ids"][-1] for document in read(reader)[0]}

    some = drawn(mimic_it(tmp_path, "TEXT", data, num_samples=20))
    assert len(some) == 20 and some == drawn(mimic_it(tmp_path / "other", "TEXT", other, num_samples=20))
    assert some < drawn(mimic_it(tmp_path, "TEXT", data, num_samples=30))
    assert some != drawn(mimic_it(tmp_path, "TEXT", data, num_samples=20, seed=1))
    assert {len(drawn(mimic_it(tmp_path, "TEXT", data, num_samples=n))) for n in (0, -1, 50, 60)} == {50}


def test_one_description_of_the_task_stands_before_the_first_instruction(tmp_path: Path) -> None:
    """Catches a description in every turn, or one that counts in the loss or differs from run to run."""
    data = {f"i{n}": instruction("q", "a", None, ["i0"]) for n in range(1, 30)} | {"i0": instruction("q0", "a0")}
    reader = mimic_it(tmp_path, "TEXT", data, task_description=("one", "two"))
    documents, _ = read(reader)
    texts = [[each.text for each in document.segments if isinstance(each, Text)] for document in documents]
    assert {text[0] for text in texts[:-1]} == {f"User:{each}\nq0 GPT:<answer>" for each in ("one", "two")}
    assert {text[2] for text in texts[:-1]} == {"User:q GPT:<answer>"}
    assert documents == read(reader)[0]


MIXTURE = """
IMAGE_TEXT:
  SD: {mimicit_path: SD_instructions.json, images_path: all.parquet}
TEXT_ONLY:
  LIMA:
    mimicit_path: LIMA_instructions.json
    num_samples: 2
    task_description: Be brief.
IMAGE_TEXT_IN_CONTEXT:
  MINE:
    mimicit_path: MINE_instructions.json
    images_path: all.parquet
    train_config_path: MINE_train.json
    num_samples: -1
    subset: LACR_I2I
"""


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """Three datasets, of which two share their images."""
    ids = [f"i{n}" for n in range(6)]
    write_images(tmp_path / "all.parquet", pictures(*ids))
    pairs = {f"sd{n}": instruction("What differs?", f"This {n}.", ids[n : n + 2]) for n in range(5)}
    mine = {f"m{n}": instruction("What is it?", f"That {n}.", ids[n]) for n in range(6)}
    mimic_it(tmp_path, "SD", pairs, images={"unused": ""})
    mimic_it(tmp_path, "TEXT", {f"t{n}": instruction("Hello?", f"Hello {n}.") for n in range(5)})
    (tmp_path / "TEXT_instructions.json").rename(tmp_path / "LIMA_instructions.json")
    mimic_it(tmp_path, "LACR", mine, images={"unused": ""}, train={f"m{n}": [f"m{(n + 1) % 6}"] for n in range(6)})
    for kind in ("instructions", "train"):
        (tmp_path / f"LACR_{kind}.json").rename(tmp_path / f"MINE_{kind}.json")
    (tmp_path / "mixture.yaml").write_text(MIXTURE)
    return tmp_path / "mixture.yaml"


def test_a_mixture_becomes_a_folder_of_shards_for_each_dataset(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches paths that are not relative to the mixture, options that reach one dataset alone, images that are indexed
    once for each dataset, an index that stays, and lines for the recipe that do not fit the folders.
    """
    made: list[str] = []
    real = store._write

    def counting(path: Path, *rest: Any) -> None:
        made.append(path.name)
        real(path, *rest)

    monkeypatch.setattr(store, "_write", counting)
    out = tmp_path / "out"
    assert run(monkeypatch, "convert", "mimic_it", mixture, "--out", out, "--processes", 1, "--spaced") == 0
    assert len(made) == 5 and sum(name.startswith("all-") for name in made) == 1
    assert sorted(path.name for path in out.iterdir()) == ["LIMA", "MINE", "SD"]
    said = capsys.readouterr().out
    assert f"\n    MINE: {{shards: {out}/MINE}}\n" in said and f"\n    SD: {{shards: {out}/SD}}\n" in said
    first = {name: open_shards(out / name)[0] for name in ("SD", "LIMA", "MINE")}
    assert [len(open_shards(out / name)) for name in first] == [5, 2, 6]
    assert all(document.source == name for name, document in first.items())
    texts = {name: [each.text for each in found.segments if isinstance(each, Text)] for name, found in first.items()}
    assert texts["SD"][0] == "User: What differs? GPT:<answer>" and texts["MINE"][1] == " That 1.<|endofchunk|>"
    assert texts["LIMA"][0] == "User: Be brief.\nHello? GPT:<answer>"
    assert first["MINE"].metadata == {"subset": "LACR", "ids": ["m1", "m0"]}
    made.clear()
    assert run(monkeypatch, "convert", "mimic_it", mixture, "--out", out, "--processes", 1, "--spaced") == 0
    assert not made  # of finished shards only the account is read
    assert run(monkeypatch, "validate", mixture) == 0
    assert len(made) == 5 and sum(name.startswith("all-") for name in made) == 1


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ("IMAGE_TEXT:", "IMAGES:", "expected groups IMAGE_TEXT, TEXT_ONLY, VIDEO_TEXT"),
        ("subset: LACR_I2I", "subsets: LACR_I2I", "IMAGE_TEXT_IN_CONTEXT.MINE: subsets: expected keys mimicit_path"),
        ("    subset: LACR_I2I", "", "MINE: expected a name that begins with a known subset, or the option subset, of"),
        ("subset: LACR_I2I", "subset: XYZ", "MINE: XYZ: expected a name that begins with a known subset"),
        ("num_samples: 2", "num_samples: many", "TEXT_ONLY.LIMA: expected num_samples to be a number"),
        ("LIMA:", "SD:", "each of a name of its own"),
        ("LIMA:", "a/b:", "expected a name that a folder can have"),
        ("mimicit_path: LIMA_instructions.json", "images_path: x", "mimicit_path among them"),
        (", images_path: all.parquet}", "}", "IMAGE_TEXT.SD: SD: expected images, which SD shows"),
        (MIXTURE, "{", "expected a mixture in YAML"),
        (MIXTURE, "", "expected groups"),
    ],
)
def test_mistakes_in_a_mixture_are_named(mixture: Path, was: str, now: str, said: str) -> None:
    """Catches a mistyped key that is passed over, and messages that do not say where it stands."""
    assert was in MIXTURE
    mixture.write_text(MIXTURE.replace(was, now))
    with pytest.raises(FlamingoError, match=f"mixture.yaml.*{said}"):
        MimicItReader(str(mixture)).datasets()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"images": "x.parquet"}, "images: expected in .*mixture.yaml, for each dataset"),
        ({"max_contexts": -1}, "max_contexts=-1: expected at least 0"),
        ({"resample_frames": 0}, "resample_frames=0"),
    ],
)
def test_options_that_cannot_be_are_named(mixture: Path, options: dict[str, Any], said: str) -> None:
    """Catches options of one dataset that are given to a mixture and passed over."""
    with pytest.raises(FlamingoError, match=said):
        MimicItReader(str(mixture), **options)
    with pytest.raises(FlamingoError, match="of which every dataset is read alone"):
        MimicItReader(str(mixture)).parts()


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """Catches a missing or another file that is read as an empty one."""
    reader = mimic_it(tmp_path, "SD", {"a": instruction("q", "a", ["i"])}, {"i": base64_of(0)})
    pq.write_table(pa.table({"picture": ["x"]}), tmp_path / "other.parquet")
    (tmp_path / "list.json").write_text("[]")
    for change, said in (
        ({"images": str(tmp_path / "none.parquet")}, "none.parquet: expected a file"),
        ({"images": str(tmp_path / "other.parquet")}, "other.parquet: expected a column base64"),
        ({"images": reader.input.replace(".json", ".csv")}, "expected a .parquet or .json file"),
        ({"input": str(tmp_path / "list.json"), "name": "SD"}, r"list.json: expected instructions"),
        ({"train": str(tmp_path / "cut.json")}, "cut.json: expected a JSON object"),
    ):
        (tmp_path / "SD_instructions.csv").write_text("")
        (tmp_path / "cut.json").write_text('{"a": [')
        with pytest.raises(FlamingoError, match=said):
            convert(replace(reader, **change), tmp_path / "out", LONG)


def test_strict_stops_at_the_first_fault_and_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a strict conversion that goes on, one that calls an option's doing a fault, and a message that does not
    say which id of which file was expected to be what.
    """
    good = {"good": instruction("q", "a", [f"i{n}" for n in range(9)])}
    reader = mimic_it(tmp_path, "DC", good, pictures(*(f"i{n}" for n in range(9))))
    words = ["convert", "mimic_it", reader.input, "--images", reader.images, "--strict", "--processes", 1, "--out"]
    assert run(monkeypatch, *words, tmp_path / "good", "--resample-frames", 4) == 0
    capsys.readouterr()
    mimic_it(tmp_path, "DC", good | {"bad": instruction("q", "a", ["i0", "gone"])}, pictures("i0"))
    assert run(monkeypatch, *words, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert f"{reader.input}: good: image i1: expected an id of {reader.images} (dangling image id)" in said


def test_subsets_follow_from_names() -> None:
    """Catches a name that is taken for a shorter one, or for another spelling of none."""
    names = ["LACONV_x", "LACR_T2T", "LLaVAR", "FunQA_dia", "sd", "LA_NAMING", "TVC1"]
    assert [subset_of(name) for name in names] == ["LACONV", "LACR", "LLAVAR", "FUNQA", "SD", "LA_", "TVC"]
    with pytest.raises(FlamingoError, match="LRV: expected a name that begins with a known subset.*LACR.*TEXT"):
        subset_of("LRV")


# -- long documents ----------------------------------------------------------------------------------------------------


def test_a_document_that_is_too_long_loses_its_first_contexts(tmp_path: Path) -> None:
    """Catches a question that is parted from its picture or its answer, a query that is left out in place of a context,
    and turns and images that the account forgets.
    """
    data = {f"i{n}": instruction("What is it?", "word " * 20, [f"p{n}"], [f"i{m}" for m in range(n)]) for n in range(5)}
    data["huge"] = instruction("What is it?", "word " * 90, ["p0"], ["i0"])
    reader = mimic_it(tmp_path, "LACR", data, pictures(*(f"p{n}" for n in range(5))))
    account = convert(reader, tmp_path / "out", replace(LONG, max_tokens=90))
    shards = open_shards(tmp_path / "out")
    kept = [shards[n].metadata["ids"] for n in range(len(shards))]
    assert kept == [["i0"], ["i0", "i1"], *([f"i{n - 1}", f"i{n}"] for n in range(2, 5))]
    assert [image.data for image in shards[4].images] == [image_bytes(3), image_bytes(4)]
    assert account.adds_up and not account.faults and account.documents_dropped == {TOO_LONG: 1}
    assert account.turns_dropped == {TOO_LONG: 1 + 2 + 3, OF_DROPPED: 2} and account.turns_kept == 9
    assert account.images_dropped == {OF_TURN: 6, TOO_LONG: 2} and account.images_kept == 9


def test_images_shown_once_stay_when_contexts_go(tmp_path: Path) -> None:
    """Catches a picture that is lost with the first of the rounds about it."""
    data = {f"i{n}": instruction("What is it?", "word " * 20, ["p"], ["i0", "i1"]) for n in range(3)}
    reader = mimic_it(tmp_path, "LACONV", data, pictures("p"))
    account = convert(reader, tmp_path / "out", replace(LONG, max_tokens=90))
    last = open_shards(tmp_path / "out")[2]
    assert last.metadata["ids"] == ["i1", "i2"] and len(last.images) == 1
    assert account.images_kept == 3 and account.turns_dropped == {TOO_LONG: 1, OWN_CONTEXT: 2}


def test_documents_hold_no_more_media_than_the_maximum(tmp_path: Path) -> None:
    """Catches a story that loses a picture, and contexts beyond the maximum that stay."""
    data = {f"i{n}": instruction("What?", "This.", [f"p{n}"], ["i0", "i1"]) for n in range(3)}
    data["story"] = instruction("What?", "This.", ["p0", "p1", "p2"])
    reader = mimic_it(tmp_path, "LACR", data, pictures("p0", "p1", "p2"))
    account = convert(reader, tmp_path / "out", replace(LONG, max_media=2))
    shards = open_shards(tmp_path / "out")
    kept = [shards[n].metadata["ids"] for n in range(len(shards))]
    assert kept == [["i1", "i0"], ["i0", "i1"], ["i1", "i2"]]
    assert account.documents_dropped == {SURPLUS: 1} and account.turns_dropped[SURPLUS] == 1


def test_broken_images_take_their_document_along(tmp_path: Path) -> None:
    """Catches a question that is trained on without the picture that it is about, where images are looked at."""
    cut = base64.b64encode(image_bytes(0)[:60]).decode()
    data = {key: instruction("q", "a", [f"{key}0", f"{key}1"]) for key in "abc"}
    images = pictures("a0", "a1", "b0", "b1", "c0") | {"a1": cut, "c1": cut, "c0": cut}
    reader = mimic_it(tmp_path, "SD", data, images)
    account = convert(reader, tmp_path / "out", replace(LONG, check_images=True))
    assert account.adds_up and account.samples == 1 and account.documents_dropped == {NO_IMAGES: 2}
    assert account.images_dropped == {NO_IMAGE: 3, NO_IMAGES: 1} and account.turns_dropped == {OF_DROPPED: 2}


# -- processes and kills -----------------------------------------------------------------------------------------------


def many(folder: Path) -> MimicItReader:
    ids = [f"i{n}" for n in range(40)]
    data = {f"q{n}": instruction("What is it?", f"It is {n}.", [ids[n]], [f"q{n - 1}", "nowhere"]) for n in range(40)}
    return mimic_it(folder, "LACR", data, pictures(*ids[:-1]))


SMALL = replace(LONG, max_samples=7, stripes=2)


def test_shards_do_not_depend_on_processes(tmp_path: Path) -> None:
    """Catches an index that each process makes for itself, or that gets into the shards."""
    reader = many(tmp_path)
    for processes in (1, 2):
        convert(reader, tmp_path / str(processes), SMALL, processes=processes)
    convert(replace(reader, cache=str(tmp_path / "cache")), tmp_path / "elsewhere", SMALL)
    expected = contents(tmp_path / "1")
    assert expected and contents(tmp_path / "2") == expected and contents(tmp_path / "elsewhere") == expected
    assert len([path for path in (tmp_path / "cache").iterdir() if path.suffix == ".sqlite"]) == 2
    account = Account.from_dict(json.loads(expected["account.json"]))
    examined = examine([reader])["LACR"]
    assert replace(examined, examples={}) == replace(account, examples={})


def killed_at(call: int, out: Path, reader: MimicItReader) -> None:
    """Convert, and die before the `call`-th time that a file gets its name, of the index or of the shards."""
    real, calls = os.replace, 0

    def dying(source: object, target: object) -> None:
        nonlocal calls
        if calls == call:
            os._exit(9)
        calls += 1
        real(source, target)  # type: ignore[call-overload]

    os.replace = dying  # type: ignore[assignment]
    convert(reader, out, SMALL)


def test_a_conversion_that_is_killed_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """Catches half an index that is taken for a whole one, and shards that differ after a kill."""
    reader = many(tmp_path)
    convert(reader, tmp_path / "expected", SMALL)
    died = []
    for call in (0, 1, 2, 5):
        out = tmp_path / str(call)
        process = SPAWN.Process(target=killed_at, args=(call, out, reader))
        process.start()
        process.join()
        died.append(process.exitcode)
        convert(reader, out, SMALL)
        assert contents(out) == contents(tmp_path / "expected")
    assert died == [9, 9, 9, 9]


def test_a_mixture_goes_on_with_the_dataset_where_it_stopped(mixture: Path, tmp_path: Path) -> None:
    """Catches a mixture that begins again after an error in one of its datasets."""
    lima = mixture.parent / "LIMA_instructions.json"
    whole = lima.read_text()
    lima.write_text("{")
    readers = MimicItReader(str(mixture)).datasets()
    with pytest.raises(FlamingoError, match="LIMA_instructions.json"):
        convert_each(readers, tmp_path / "out", LONG)
    before = (tmp_path / "out" / "SD" / "index.json").stat().st_mtime_ns
    lima.write_text(whole)
    accounts = convert_each(readers, tmp_path / "out", LONG)
    assert {name: account.samples for name, account in accounts.items()} == {"SD": 5, "LIMA": 2, "MINE": 6}
    assert (tmp_path / "out" / "SD" / "index.json").stat().st_mtime_ns == before


anything: st.SearchStrategy[Any] = st.none() | st.text(max_size=3) | st.integers() | st.lists(st.text(max_size=2))
entries: Callable[[], st.SearchStrategy[Any]] = lambda: st.fixed_dictionaries(  # noqa: E731
    {}, optional=dict.fromkeys(("instruction", "answer", "image_ids", "rel_ins_ids"), anything | st.just(["p", "a"]))
)


@given(
    data=st.dictionaries(st.sampled_from("abc"), entries() | anything, min_size=1), name=st.sampled_from(["LACR", "DC"])
)
def test_the_account_adds_up_for_broken_instructions(
    tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any], name: str
) -> None:
    """Catches a malformed instruction that raises, is counted twice or not at all, or whose images or turns are."""
    reader = mimic_it(tmp_path_factory.mktemp("broken"), name, data, {"p": base64_of(0), "a": "!"})
    documents, account = read(reader)
    assert account.documents_read == len(data) and account.documents_kept == len(documents)
