"""The machine is wanted back: SIGTERM or SIGUSR1 lets the step end, saves, and ends the run.

Schedulers send them some seconds before they kill: Slurm by `--signal`, Kubernetes and torchrun (30 s) by SIGTERM.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

import torch.distributed as dist

from flamingo.files import write_text
from train.checkpoint import FOLDER, PREEMPTED
from train.parallel import Processes

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 85
"""Of a process that saved and ended because it was asked to (ERESTART)."""
SAME_SECONDS = 3.0
"""Signals so close together are one request: Slurm signals all processes, and torchrun passes on what it gets."""


class Preemption:
    """Notes the signals of this process while it is open, and brings all processes of the run to the same answer.

    The first signal is a request; another one, `SAME_SECONDS` later, ends the process at once. Handlers are those of
    the main thread's; opened in another one, nothing is caught. What was there before is put back at the end. Keep it
    open until the state is saved: the second of two signals that are one request must not end the process before.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._first: float | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._mask: set[Any] = set()
        # Before, not in the child: libraries start threads there that would be all ears.
        os.register_at_fork(before=self._cover_ears, after_in_parent=self._listen)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def requested(self) -> bool:
        """Whether a process of the run was signalled. All processes ask at the end of a step: one word between them."""
        return self._processes.any(self._first is not None)

    def _cover_ears(self) -> None:
        """Processes that are forked, which read data, stay deaf to the job's signals; this one only for the moment."""
        if self._before:
            self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def _listen(self) -> None:
        if self._before:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
        elif now - self._first > SAME_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def end(out: Path, step: int, processes: Processes) -> NoReturn:
    """End the process after a save that was asked for.

    `checkpoints/PREEMPTED` says so to whoever starts the run again; resuming removes it. The exit code is 85; under
    torchrun it is 0, because torchrun reports 1 for every other one and would start the processes again.
    """
    if processes.is_main:
        write_text(out / FOLDER / PREEMPTED, f"{step}\n")
        print(f"preempted: saved at step {step} in {out}; start the run again to go on")
    processes.wait()
    raise SystemExit(0 if dist.is_torchelastic_launched() else EXIT_CODE)
