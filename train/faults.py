"""Samples that were replaced: counted over all processes, kept in checkpoints, written down; too many end the run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_shards.faults import Fault, described
from flamingo.errors import FlamingoError
from train.parallel import Processes
from train.tracking import drop_rows_after

FAULTS_FILE = "faults.jsonl"
LEAST_SAMPLES = 1000
"""A source of which fewer were used is judged as if it were so many: three bad ones of the first ten are no verdict."""
EXAMPLES = 3


@dataclass
class Faults:
    """The faults of a run. Every process notes its own; `settle` brings them together, at some steps.

    Args:
        processes: of the run.
        folder: of the run; its `faults.jsonl` gets a line a fault, with the step that met it, from the main process.
        most: largest share of a source's samples that may be faulty.
    """

    processes: Processes
    folder: Path
    most: float
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    """source → reason → number, over all processes and from the first step on, as of the last settling"""
    examples: list[Fault] = field(default_factory=list)
    """some of each reason"""
    _noted: list[tuple[int, Fault]] = field(default_factory=list)

    def note(self, step: int, faults: Iterable[Fault]) -> None:
        """Add what this process met in a step."""
        self._noted += [(step, fault) for fault in faults]

    def settle(self, used: Mapping[str, int]) -> None:
        """Count what all processes noted since the last time, and write it down. All processes call this.

        Args:
            used: how many samples each source has given so far.

        Raises:
            FlamingoError: in all processes, where more of a source's samples than `most` were faulty; it names the ten
                most frequent reasons, with examples.
        """
        for _, fault in (noted := self._gather()):
            self.counts.setdefault(fault.source, Counter())[fault.reason] += 1
            if sum(example.reason == fault.reason for example in self.examples) < EXAMPLES:
                self.examples.append(fault)
        if noted and self.processes.is_main:
            with (self.folder / FAULTS_FILE).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step, **asdict(fault)}) + "\n" for step, fault in noted)
        for source, samples in used.items():
            found = self.counts.get(source, Counter()).total()
            if found > self.most * max(samples, LEAST_SAMPLES):
                reasons = described(sum(self.counts.values(), Counter()), self.examples)
                raise FlamingoError(
                    f"data: {found:,} of {samples:,} samples of {source} were not usable, more than "
                    f"data.max_fault_share={self.most}: {reasons}; all are in {self.folder / FAULTS_FILE}"
                )

    def row(self, sources: Iterable[str]) -> dict[str, float]:
        """Columns of the log: each source's faults since the first step, and those of each reason."""
        columns = {f"faults/{source}": float(self.counts.get(source, Counter()).total()) for source in sources}
        for source, reasons in self.counts.items():
            columns |= {f"faults/{source}/{reason}": float(count) for reason, count in reasons.items()}
        return columns

    def state(self) -> dict[str, Any]:
        """Plain data, for checkpoints."""
        return {"counts": self.counts, "examples": [asdict(example) for example in self.examples]}

    def resume(self, step: int, state: Mapping[str, Any]) -> None:
        """Go on from the `state` of a step, {} at the first; what was written down of later steps comes again."""
        self.counts = {source: Counter(reasons) for source, reasons in state.get("counts", {}).items()}
        self.examples = [Fault(**example) for example in state.get("examples", [])]
        if self.processes.is_main:
            drop_rows_after(self.folder / FAULTS_FILE, step)

    def _gather(self) -> list[tuple[int, Fault]]:
        """What was noted in all processes, by steps; they talk at length only where there is something to say."""
        own, self._noted = self._noted, []
        if not self.processes.any(bool(own)):
            return []
        everyone = self.processes.gather(own)
        return sorted((each for noted in everyone for each in noted), key=lambda each: each[0])
