"""Two hosts: network namespaces of this machine, joined by a cable that can be cut."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.train.runs import losses, prepare_folder, recipe_of, saved
from train.killtest import ENVIRONMENT
from train.recipe import ParallelRecipe

TIMEOUT = 8
"""seconds that a process waits for another"""
PORT = 29511


def ip(*words: str) -> None:
    """`ip …`, or its error."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two namespaces, 10.77.0.1 and 10.77.0.2."""
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need `ip` of iproute2 (apt-get install iproute2)")
    names = [f"flamingo{os.getpid()}{side}" for side in "ab"]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            cable = ["link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable"]
            ip(*cable, "netns", names[1])
            for number, name in enumerate(names, start=1):
                ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "cable")
                for device in ("lo", "cable"):
                    ip("-n", name, "link", "set", device, "up")
        except PermissionError as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        yield names
    finally:
        for name in names:
            end_all(name)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def end_all(host: str) -> None:
    """Kill what runs on a host: torchrun's workers outlive it."""
    found = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True)
    for process in found.stdout.split():
        os.kill(int(process), signal.SIGKILL)


def start(host: str, number: int, recipe: Path, log: Path) -> subprocess.Popen[bytes]:
    """torchrun on one of two hosts."""
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d",
        f"--rdzv-endpoint=10.77.0.1:{PORT}", f"--local-addr=10.77.0.{number}", "--rdzv-id=run",
        f"--rdzv-conf=is_host={int(number == 1)}",
    ]  # fmt: skip
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "GLOO_SOCKET_IFNAME": "cable",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # as train/recipes/multinode.sh
    }
    command = ["ip", "netns", "exec", host, *torchrun, "-m", "train.pretrain", "--config", str(recipe)]
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment)


def wait_until(holds: Callable[[], bool], logs: list[Path], seconds: float = 120) -> None:
    """Wait, not for ever."""
    limit = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < limit, [log.read_text()[-2000:] for log in logs]
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_host_that_is_cut_off_ends_the_job_which_then_goes_on(tmp_path: Path, hosts: list[str]) -> None:
    """Catches a job that holds its GPUs for hours because one host is gone, and one that cannot go on afterwards."""
    folder = prepare_folder(tmp_path)
    out = tmp_path / "run"

    def recipe(steps: int) -> Path:
        path = tmp_path / "recipe.yaml"
        settings = dict(steps=steps, save_every=20, parallel=ParallelRecipe(timeout=TIMEOUT))
        plain = json.loads(json.dumps(recipe_of(folder, out, **settings).as_dict()))
        path.write_text(yaml.safe_dump(plain, sort_keys=False))
        return path

    def begin(path: Path) -> tuple[list[subprocess.Popen[bytes]], list[Path]]:
        logs = [tmp_path / f"{host}.log" for host in hosts]
        return [start(host, n, path, log) for n, (host, log) in enumerate(zip(hosts, logs, strict=True), 1)], logs

    running, logs = begin(recipe(100_000))
    try:
        wait_until(lambda: max(saved(out), default=0) >= 40, logs)
        ip("-n", hosts[1], "link", "set", "cable", "down")
        cut = time.monotonic()
        wait_until(lambda: running[0].poll() is not None, logs, seconds=TIMEOUT + 40)
        assert running[0].returncode != 0 and time.monotonic() - cut >= TIMEOUT / 2
    finally:
        for host, each in zip(hosts, running, strict=True):
            end_all(host)
            each.wait()
    said = logs[0].read_text()
    assert "error: process " in said and f"did not answer for parallel.timeout={TIMEOUT} seconds" in said, said[-3000:]
    ip("-n", hosts[1], "link", "set", "cable", "up")
    last = max(saved(out))
    running, logs = begin(recipe(100_000))
    try:
        wait_until(lambda: max(saved(out), default=0) > last + 20, logs)
    finally:
        for host, each in zip(hosts, running, strict=True):
            end_all(host)
            each.wait()
    assert f"resumed from step {last} of 100000" in logs[0].read_text() + logs[1].read_text()
    assert len(losses(out)) > last
