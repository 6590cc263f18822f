"""The embedded world's instructions, written before the first step of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from data_shards.shards import open_shards
from flamingo import FlamingoError, Text, Video
from tests.data_shards.test_convert import contents
from train.parallel import Processes
from train.plan import to_be_written
from train.pretrain import made_once, make_instructions
from train.recipe import DataRecipe, InstructionsRecipe, SourceRecipe, TuneRecipe

QUERIES = {"style": 3, "sequence": 2}
DATASETS = {"LA_STYLE": 3, "DC_SEQUENCE": 2}


def recipe(out: Path, **data: object) -> TuneRecipe:
    """A run that reads what it writes."""
    sources = {name: SourceRecipe(f"{{out}}/instructions/shards/{name}") for name in DATASETS}
    settings = {"max_tokens": 128, "max_media": 5, "instructions": InstructionsRecipe(queries=QUERIES, processes=1)}
    return TuneRecipe(out=str(out), data=DataRecipe(sources, **{**settings, **data}))  # type: ignore[arg-type]


def test_instructions_are_written_once_and_are_those_of_the_recipe(tmp_path: Path) -> None:
    """Catches shards of other numbers than are asked for or planned, instructions that are written at every start, and
    those of another seed, number, spacing or size of sequence that are read all the same.
    """
    wanted = recipe(tmp_path)
    wanted.data.sources["other"] = SourceRecipe(str(tmp_path / "other"))
    wanted.data.sources["unknown"] = SourceRecipe("{out}/instructions/shards/unknown")
    planned = {name: to_be_written(wanted, source) for name, source in wanted.data.sources.items()}
    assert planned == {**DATASETS, "other": None, "unknown": None}

    written = make_instructions(wanted, Processes())
    assert {kind: numbers["queries"] for kind, numbers in written.items()} == QUERIES
    assert all(to_be_written(wanted, source) is None for source in wanted.data.sources.values())
    shards = {name: open_shards(wanted.place(wanted.data.sources[name].shards)) for name in DATASETS}
    assert {name: len(each) for name, each in shards.items()} == DATASETS
    style, sequence = shards["LA_STYLE"][0], shards["DC_SEQUENCE"][0]
    assert style.source == "LA_STYLE" and len(style.media) == len(style.metadata["ids"]) == 5
    assert [len(each.frames) for each in sequence.media if isinstance(each, Video)] == [3]
    assert isinstance(style.segments[1], Text) and style.segments[1].text.endswith(" GPT:<answer>")

    before = contents(tmp_path / "instructions")
    assert make_instructions(wanted, Processes(rank=1)) == written
    assert contents(tmp_path / "instructions") == before
    fewer = InstructionsRecipe(queries={"style": 2}, processes=1)
    others = (replace(wanted, seed=1), replace(wanted, spaced=True), recipe(tmp_path, max_tokens=64),
              recipe(tmp_path, max_media=3), recipe(tmp_path, instructions=fewer))  # fmt: skip
    for other in others:
        with pytest.raises(FlamingoError, match=r"instructions: holds the embedded world of \{'seed': 0,.* expected"):
            make_instructions(other, Processes())


def test_a_start_that_was_stopped_leaves_no_shards_of_another_seed(tmp_path: Path) -> None:
    """Catches finished shards of a run that was stopped while it wrote the next, in one of another seed."""
    make_instructions(recipe(tmp_path / "stopped"), Processes())
    (tmp_path / "stopped" / "instructions" / "account.json").unlink()
    for name in ("stopped", "fresh"):
        make_instructions(replace(recipe(tmp_path / name), seed=1), Processes())
    texts = [
        [each.text for each in open_shards(tmp_path / name / "instructions/shards/LA_STYLE")[0].segments
         if isinstance(each, Text)]
        for name in ("stopped", "fresh")
    ]  # fmt: skip
    assert texts[0] == texts[1]


def test_what_is_written_once_is_written_by_the_main_process(tmp_path: Path) -> None:
    """Catches processes that write over one another, and a folder of something else that is taken for the world."""
    with pytest.raises(FileNotFoundError):
        made_once(tmp_path, {"seed": 0}, dict, Processes(rank=1))
    assert made_once(tmp_path, {"seed": 0}, lambda: {"a": 1}, Processes()) == {"a": 1}
    (tmp_path / "account.json").write_text('{"samples": 3}')
    with pytest.raises(FlamingoError, match="holds the embedded world of None, expected"):
        made_once(tmp_path, {"seed": 0}, dict, Processes())
