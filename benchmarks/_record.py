"""What every benchmark prints and keeps: its figures, a line each, with command, commit and machine."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch


def publish(figures: dict[str, float | str], json_file: str | None, **more: object) -> None:
    """Print `name: value` lines, and write them to `json_file` with what is needed to repeat them."""
    for name, value in figures.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    if json_file:
        record = {"command": command(), "commit": commit(), "machine": machine(), **more}
        Path(json_file).write_text(json.dumps({**record, "figures": figures}, indent=1) + "\n")


def command() -> str:
    """The command line, but for the places of its outputs, which are this machine's."""
    words = ["python", "benchmarks/" + Path(sys.argv[0]).name]
    arguments = iter(sys.argv[1:])
    for word in arguments:
        if word in ("--json", "--out"):
            next(arguments, None)
        elif not word.startswith(("--json=", "--out=")):
            words.append(word)
    return shlex.join(words)


def commit() -> str:
    """The commit of the checkout; "+changes" where files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    status = subprocess.run([*git, "status", "--porcelain", "-uno"], check=True, capture_output=True, text=True)
    return head + ("+changes" if status.stdout.strip() else "")


def machine() -> dict[str, str | int]:
    """Processor, cores and versions."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": model,
        "cores": os.cpu_count() or 0,
        "gpus": ", ".join(gpus) or "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
