"""Recipes that parse and say what is true, and the scripts that start them on several machines."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GPTNeoXConfig,
    MptConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen3Config,
    SiglipVisionConfig,
)

from tests.tiny import tokenizer
from train.memory import components, memory_estimate
from train.plan import Lengths, outline_of_backbones, plan
from train.pretrain import Pretraining
from train.recipe import Recipe, TuneRecipe, from_command_line
from train.tune import Tuning

RECIPES = Path(__file__).resolve().parents[2] / "train" / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
TUNED = [name for name in NAMES if "\ninit:" in (RECIPES / f"{name}.yaml").read_text()]
LARGE = [name for name in NAMES if not name.startswith("embedded")]
PRETRAINED = [name for name in LARGE if name not in TUNED]

BACKBONES: dict[str, PretrainedConfig] = {
    "openai/clip-vit-large-patch14": CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    ),
    "google/siglip2-so400m-patch16-256": SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=256
    ),
    "facebook/opt-1.3b": OPTConfig(
        vocab_size=50272, hidden_size=2048, word_embed_proj_dim=2048, ffn_dim=8192, num_hidden_layers=24,
        num_attention_heads=32,
    ),
    "togethercomputer/RedPajama-INCITE-Base-3B-v1": GPTNeoXConfig(
        vocab_size=50432, hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32
    ),
    "mosaicml/mpt-7b": MptConfig(d_model=4096, n_heads=32, n_layers=32, vocab_size=50432),
    "Qwen/Qwen3-1.7B-Base": Qwen3Config(
        hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, tie_word_embeddings=True,
    ),
}  # fmt: skip
"""What stands in the configurations of the recipes' backbones, as far as size goes."""


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of configurations of the real sizes, with a tokenizer or an image processor, and no weights."""
    folders = {}
    for name, config in BACKBONES.items():
        folder = folders[name] = tmp_path_factory.mktemp(name.replace("/", "-"))
        config.save_pretrained(folder)
        if (side := getattr(config, "image_size", None)) is not None:
            size = {"height": side, "width": side}
            CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(folder)
        else:
            tokenizer().save_pretrained(folder)
    return folders


def read(name: str) -> Recipe:
    """A recipe as a command reads it."""
    return from_command_line(Recipe, ["--config", str(RECIPES / f"{name}.yaml")])


def read_tuning(name: str) -> TuneRecipe:
    """A recipe of tuning, likewise."""
    return from_command_line(TuneRecipe, ["--config", str(RECIPES / f"{name}.yaml")])


def head(name: str) -> str:
    """The comment at a recipe's head, its lines joined."""
    lines = (RECIPES / f"{name}.yaml").read_text().splitlines()
    return " ".join(line.lstrip("# ") for line in lines[: next(n for n, line in enumerate(lines) if line[:1] != "#")])


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_parses_and_its_head_is_complete(name: str) -> None:
    """Catches a field that was renamed, a batch that nothing divides, and a head without command or hours."""
    recipe = read_tuning(name) if name in TUNED else read(name)
    for world in (1, 2) if name.startswith("embedded") else (1, 8, 64):
        if recipe.batch >= recipe.micro_batch * world:
            recipe.check(world)
    for word in (f"--config train/recipes/{name}.yaml", "Hardware:", "Hours:", "Score:"):
        assert word in head(name), word


@pytest.mark.parametrize("name", PRETRAINED)
def test_hours_and_memory_of_a_head_are_those_of_the_plan(name: str, backbones: dict[str, Path]) -> None:
    """Catches a head that was written for another model, batch or number of steps, and a plan that needs weights."""
    recipe = read(name)
    options = {part: str(backbones[getattr(recipe.model, part)]) for part in ("vision", "language")}
    recipe = replace(recipe, model=replace(recipe.model, **options))
    planned = plan(Pretraining(recipe), world=8)
    assert [fault.partition(":")[0] for fault in planned.faults] == ["data.sources.mmc4", "data.sources.pairs"]
    given = re.search(
        r"Hours: ([\d,]+) of one A100 .* (\d+) tokens and (\d) images .* (\d+) tokens and 1 image", head(name)
    )
    assert given is not None
    hours, tokens, images, caption = (int(figure.replace(",", "")) for figure in given.groups())
    lengths = {
        "mmc4": Lengths(tokens, tokens, images, tokens**2, images),
        "pairs": Lengths(caption, caption, 1, caption**2, 1),
    }
    sources = [replace(source, lengths=lengths[source.name]) for source in planned.sources]
    expected = replace(planned, sources=sources, world=1).hours(312e12)
    assert hours == pytest.approx(expected, rel=0.03)
    assert "GPUs of 40 GB" in head(name) and memory_estimate(planned.model, recipe, 8).total < 36e9


@pytest.fixture(scope="module")
def openflamingo(backbones: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a folder of OpenFlamingo-9B says of itself, without weights."""
    folder = tmp_path_factory.mktemp("openflamingo")
    vision, language = (str(backbones[name]) for name in ("openai/clip-vit-large-patch14", "mosaicml/mpt-7b"))
    model, processor = outline_of_backbones(vision, language, cross_attention_every=4)
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [name for name in LARGE if name in TUNED])
def test_hours_and_memory_of_tuning_are_those_of_the_plan(name: str, openflamingo: Path) -> None:
    """Catches what the test above does, a plan without frames or adapters, and epochs that make no steps."""
    recipe = read_tuning(name)
    given = re.search(
        r"Hours: ([\d,]+) of one A100 .* (\d+) epochs of ([\d,]+) documents of (\d+) tokens and (\d) media of "
        r"(\d+) frames",
        head(name),
    )
    assert given is not None
    hours, epochs, documents, tokens, media, frames = (int(figure.replace(",", "")) for figure in given.groups())
    assert recipe.epochs == epochs and recipe.steps == 0
    settled = recipe.settled({"all": documents})
    planned = plan(Tuning(replace(settled, init=replace(recipe.init, path=str(openflamingo)))), world=8)
    missing = {fault.partition(":")[0] for fault in planned.faults}
    assert missing == {f"data.sources.{each}" for each in recipe.data.sources}
    lengths = Lengths(tokens, tokens, media, tokens**2, media * frames)
    sources = [replace(source, lengths=lengths) for source in planned.sources]
    assert hours == pytest.approx(replace(planned, sources=sources, world=1).hours(312e12), rel=0.03)
    assert "GPUs of 40 GB" in head(name) and memory_estimate(planned.model, recipe, 8).total < 36e9
    trained = {part.name: part.trained for part in components(planned.model)}
    assert (trained["language model"] > 0) == (recipe.train_language == "lora") and trained["new tokens"] > 0


# -- several machines --------------------------------------------------------------------------------------------------

WORKER = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--out") + 1]) / "checkpoints"
asked = []
signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
folder.mkdir(parents=True, exist_ok=True)
(folder / ("ready-" + os.environ["RANK"])).write_text(" ".join(sys.argv[1:]))
deadline = time.monotonic() + 100
while not asked and time.monotonic() < deadline:
    time.sleep(0.05)
(folder / ("asked-" + os.environ["RANK"])).write_text(str(len(asked)))
if os.environ["RANK"] == "0":
    (folder / "PREEMPTED").write_text("7")
"""
"""Stands for train.pretrain: asked by SIGUSR1 it saves and ends well."""
FAKES = {
    "srun": 'while [[ $1 == -* ]]; do shift; done\nexec "$@"\n',
    "scontrol": 'if [[ $1 == show ]]; then echo localhost; else echo "$@" >>"$FAKE_LOG"; fi\n',
    "failing": "exit 3\n",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the scripts, a stand-in for train.pretrain, and Slurm's commands in `bin`."""
    project = tmp_path / "project"
    shutil.copytree(RECIPES, project / "train" / "recipes")
    (project / "train" / "__init__.py").touch()
    (project / "train" / "pretrain.py").write_text(WORKER)
    (tmp_path / "bin").mkdir()
    for name, body in FAKES.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{body}")
        path.chmod(0o755)
    return project


def sbatch(project: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """As Slurm's: runs a copy of the script, from anywhere, with the variables of a job on this machine."""
    spool = project.parent / "spool"
    spool.mkdir(exist_ok=True)
    shutil.copy(project / "train" / "recipes" / "slurm.sh", spool / "slurm_script")
    job = {
        "SLURM_SUBMIT_DIR": str(project), "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost",
        "SLURM_GPUS_ON_NODE": "2", "FAKE_LOG": str(project.parent / "log"), "PYTHON": sys.executable,
        "PATH": f"{project.parent / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return subprocess.Popen(
        ["bash", str(spool / "slurm_script"), *arguments],
        cwd=spool, env={**os.environ, **job, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def test_a_slurm_job_saves_before_its_time_is_up_and_is_queued_again(project: Path) -> None:
    """Catches a signal to torchrun, which dies of it, a job that is not queued again, and a second request to end."""
    out = project / "runs" / "try"
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / "PREEMPTED").write_text("3")  # of the job before: this one goes on from there
    job = sbatch(project, "RECIPE", "runs/try", "--steps", "9")
    try:
        deadline = time.monotonic() + 60
        while len(list((out / "checkpoints").glob("ready-*"))) < 2 and time.monotonic() < deadline:
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.1)
        assert not (out / "checkpoints" / "PREEMPTED").exists()
        directives = re.findall(r"^#SBATCH --signal=(\w+):(\w+)@\d+$", (RECIPES / "slurm.sh").read_text(), re.MULTILINE)
        assert directives == [("B", "USR1")]
        job.send_signal(signal.SIGUSR1)  # to the batch shell alone, as B: says
        said, _ = job.communicate(timeout=60)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == 0, said
    assert f"saved at step 7; job {os.getpid()} goes back" in said
    assert (project.parent / "log").read_text() == f"requeue {os.getpid()}\n"
    for rank in (0, 1):
        assert (out / "checkpoints" / f"asked-{rank}").read_text() == "1"
        told = (out / "checkpoints" / f"ready-{rank}").read_text()
        assert told == "--config RECIPE --out runs/try --steps 9"


def test_a_slurm_job_that_fails_says_so(project: Path) -> None:
    """Catches an exit code that is lost, and a job that fails again and again because it is queued again."""
    job = sbatch(project, "RECIPE", "runs/try", PYTHON="failing")
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 3, said
    assert not (project.parent / "log").exists()
    job = sbatch(project, "RECIPE")
    said, _ = job.communicate(timeout=60)
    assert (job.returncode, said[:6]) == (2, "usage:")


def test_save_and_stop_without_a_run_is_an_error(project: Path) -> None:
    """Catches a request that reaches nobody and is taken for one that was obeyed."""
    done = subprocess.run(
        ["bash", "train/recipes/multinode.sh", "--save-and-stop"],
        cwd=project, env={**os.environ, "RUN": f"none-{os.getpid()}"}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, f"no run named none-{os.getpid()} on this machine\n")
