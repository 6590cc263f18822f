"""The exact prompts of a task's first queries, as HTML pages with their pictures and tokens (`--show`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data_shards.page import write_page
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processing import FlamingoProcessor
from icl_eval.features import Features
from icl_eval.ledger import written
from icl_eval.prompts import Prompt, prompt_document
from icl_eval.questions import CellKey, Questions, cell_keys
from icl_eval.sources import load_pool
from icl_eval.tasks import Task

FOLDER = "prompts"


def write_prompts(
    model: FlamingoForConditionalGeneration,
    processor: FlamingoProcessor,
    task: Task,
    count: int,
    out: str | Path,
    *,
    controls: Sequence[str] = (),
    data: str | Path | None = None,
    cache: str | Path | None = None,
) -> list[Path]:
    """Write a page for each cell of the first queries: `prompts/TASK-NUMBER-SHOTS[-CONTROL][-ORDER].html`.

    Args:
        model: whose attention the pages tell of; `processor`: whose tokens.
        task: as it is run.
        count: queries.
        out: folder of the results.
        controls: see `icl_eval.diagnostics`; their prompts too.
        data: see `icl_eval.sources.load_pool`.
        cache: see `icl_eval.features.Features`.

    Raises:
        FlamingoError: the task's data are missing or do not fit it.
    """
    pool = load_pool(task, data)
    keys = cell_keys(task, controls)
    questions = Questions(task, pool, keys)
    if questions.draws.by_similarity:
        questions.draws.similarity = Features(model, processor, pool, cache)
    folder = Path(out) / FOLDER
    with written(folder):
        folder.mkdir(parents=True, exist_ok=True)
    pages = []
    for number in range(min(count, questions.draws.count)):
        episode = questions.draws.episode(number)
        for key in keys:
            for order, prompt in enumerate(questions.prompts(episode, key)):
                name = "-".join(map(str, filter(None, (*key[1:], order or ""))))
                path = folder / f"{task.name}-{number}-{key[0]}{'-' + name if name else ''}.html"
                document = replace(
                    prompt_document(pool, questions.chunks(prompt)),
                    key=episode.query_id,
                    source=task.name,
                    metadata=_about(questions, key, prompt, episode.target),
                )
                attention = model.config.media_attention
                pages.append(write_page(document, path, processor=processor, media_attention=attention, is_prompt=True))
    return pages


def _about(questions: Questions, key: CellKey, prompt: Prompt, target: int | None) -> dict[str, object]:
    shots, control = key
    candidates = [questions.template.answer(text) for text in prompt.candidates]
    return {
        "shots": shots,
        "control": control or "none",
        "demonstrations": list(prompt.demonstrations),
        "query": prompt.pictured.id,
        "candidates": candidates or "none: it is answered freely",
        "right": list(prompt.query.answers) if target is None else candidates[target],
    }
