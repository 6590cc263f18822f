"""Few-shot scores and generations while training, which leave the training exactly as it was.

All processes take part. Under DDP each scores its share of the queries with its own copy of the model. Under FSDP the
parameters are gathered on every process for the time of an evaluation, which needs room for the whole model there, but
not for gradients or activations: the passes then exchange nothing, so processes need not make equally many.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image as PilImage
from torch import nn

from flamingo import FlamingoProcessor
from flamingo.document import Document
from icl_eval.demonstrations import Episode
from icl_eval.engine import Engine
from icl_eval.evaluation import evaluate, evaluating, prepared
from icl_eval.examples import in_a_row
from icl_eval.features import Features
from icl_eval.prompts import prompt_document
from icl_eval.questions import Questions, cell_keys
from icl_eval.sources import load_pool
from icl_eval.tasks import Generation as Decoding
from icl_eval.tasks import Task
from train.checkpoint import TrainingState
from train.parallel import Processes, gathered
from train.recipe import Run
from train.tracking import Generation, Tracker

SPARE_TOKENS = 4
"""How much longer than the longest label an answer may become, where the task does not say."""


@dataclass
class Evaluations:
    """The evaluations of a run; making them checks tasks and shots, before training takes time.

    Raises:
        FlamingoError: where a task is unknown or malformed, or asks for more shots than it has pictures.
    """

    recipe: Run
    state: TrainingState
    processor: FlamingoProcessor
    tracker: Tracker
    processes: Processes
    tasks: list[Task] = field(default_factory=list, init=False)
    questions: dict[str, Questions] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not self.recipe.evaluation.every:
            return
        self.tasks = [self._prepared(name) for name in self.recipe.evaluation.tasks]
        for task in self.tasks:
            self.questions[task.name] = Questions(task, load_pool(task), cell_keys(task, ()))

    def _prepared(self, name: str) -> Task:
        """A task with the recipe's split, shots and number of queries."""
        settings = self.recipe.evaluation
        return prepared(name, shots=settings.shots, queries=settings.queries, split=settings.split or None)

    def run(self, step: int) -> None:
        """Evaluate the model as it is after `step`; all processes call this.

        The log gets `fewshot/TASK/SHOTS`, accuracies, and a table of generations. Neither modes of modules nor random
        states nor buffers are others afterwards: the losses that follow are those of a run without evaluations.
        """
        model = self.state.model
        reduced = self.recipe.parallel.precision == "bfloat16"
        precision = torch.autocast(self.processes.device.type, torch.bfloat16, enabled=reduced)
        with undisturbed(model), gathered(model), precision:
            results = evaluate(model, self.processor, self.tasks, batch_size=self.recipe.evaluation.batch)
            self._look_for_similar()
            generations = self._generations() if self.processes.is_main else []
        scores = {f"fewshot/{cell.task}/{cell.shots}": cell.value for cell in results.cells}
        self.tracker.log(step, scores | {"samples": float(step * self.recipe.batch)}, generations)

    def _look_for_similar(self) -> None:
        """Give tasks that go by similarity what they go by; the evaluation before has left it on disk."""
        for questions in self.questions.values():
            if questions.draws.by_similarity:
                questions.draws.similarity = Features(self.state.model, self.processor, questions.pool)

    def _generations(self) -> list[Generation]:
        """Answers to the first queries of every task: always the same ones, so that one sees the model learn."""
        count = min(self.recipe.evaluation.generations, self.recipe.evaluation.queries)
        return [each for task in self.tasks for each in self._answered(task, count)] if count else []

    def _answered(self, task: Task, count: int) -> list[Generation]:
        """The task's first queries, each after as few demonstrations as there may be."""
        questions, shots = self.questions[task.name], min((shots for shots in task.shots if shots), default=0)
        numbers = range(min(count, questions.draws.count))
        asked = [_Asked(questions, questions.draws.episode(number), shots) for number in numbers]
        texts = {text for each in asked for text in (*each.candidates, *each.right)}
        longest = max((len(self.processor.tokenizer(text).input_ids) for text in texts), default=0)
        how = task.generate or Decoding(longest + SPARE_TOKENS)
        engine = Engine(self.state.model, self.processor, batch_size=self.recipe.evaluation.batch)
        answers = engine.generate(
            questions.pool,
            [each.ladder for each in asked],
            max_new_tokens=how.max_new_tokens,
            beams=how.beams,
            length_penalty=how.length_penalty,
        )
        return [
            Generation(
                task=task.name,
                shots=shots,
                query=each.episode.query_id,
                demonstrations=in_a_row([image.data for image in each.shown]),
                prompt=self.processor.encode(each.document).text,
                picture=in_a_row([image.data for image in each.pictures]) or PilImage.new("RGB", (1, 1), "white"),
                answer=each.right[0] if each.right else "",
                generated=answer,
                right=how.kept(answer) in each.right,
            )
            for each, (answer,) in zip(asked, answers, strict=True)
        ]


class _Asked:
    """A query that is answered freely: its prompt, the pictures in it, and answers as the model has to say them."""

    def __init__(self, questions: Questions, episode: Episode, shots: int):
        self.episode = episode
        self.ladder = questions.asked(episode, [(shots, None)])[0].ladder
        prompt = questions.prompts(episode, (shots, None))[0]
        *shown, query = questions.chunks(prompt)
        pool, answer = questions.pool, questions.template.answer
        self.document = prompt_document(pool, (*shown, query))
        self.pictures = Document(tuple(pool.media(query.media))).images
        self.shown = self.document.images[: len(self.document.images) - len(self.pictures)]
        self.candidates = tuple(answer(text).strip() for text in prompt.candidates)
        known = prompt.query.answers if episode.target is None else (prompt.candidates[episode.target],)
        self.right = tuple(answer(text).strip() for text in known)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Within it the model is in evaluation mode; afterwards modes, buffers and random states are what they were.

    Buffers, because some LMs compute theirs anew for longer texts (rotary embeddings), and what is made in inference
    mode cannot be trained with.
    """
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    numbers = random.getstate(), np.random.get_state()  # noqa: NPY002  others' code may use them
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices), evaluating(model):
            yield
    finally:
        random.setstate(numbers[0])
        np.random.set_state(numbers[1])  # noqa: NPY002
        for module, held in buffers:
            module._buffers.update(held)
