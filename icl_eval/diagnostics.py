"""Does the model really use its demonstrations? Controls under which scores must fall, and variants that tell why.

Each control breaks one link between a query and its answer by a change that is independent of the answer, so that in
fast binding the expected accuracy of any predictor, a perfect one included, is exactly 1 / ways:

- `gates_at_zero`: the model's gates are shut, so no picture reaches the language model. The answer is uniform over the
  ways and the text does not depend on it.
- `labels_permuted`: the names of the demonstrations go through one uniformly random permutation of the ways, identity
  included. A model that reads them answers the permuted name of the right class: each name with equal probability.
  Where there are no ways, the demonstrations' answers are permuted uniformly over their places.
- `images_swapped`: the demonstrations' pictures are permuted uniformly over their places, across classes; the labels
  stay. Where the pictures of the query's class come to stand says nothing about its name.
- `random_query`: the query's picture is replaced by one of a way drawn uniformly (the right one included), which is in
  none of the demonstrations. The picture shown is independent of the answer that counts. Where there are no ways, it is
  that of any query of the split.

Variants, of which nothing is known beforehand:

- `text_only`: the demonstrations without their media: what their texts alone contribute.
- `order_1`, `order_2`, `order_3`: the demonstrations in other orders.

All are pure functions of (seed, episode, shots); `gates_at_zero` changes the model, the others the prompt.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from icl_eval.datasets import Example
from icl_eval.demonstrations import Episode, generator, orders
from icl_eval.prompts import Prompt
from icl_eval.sources import Pool

CONTROLS = ("gates_at_zero", "labels_permuted", "images_swapped", "random_query")
ORDERS = ("order_1", "order_2", "order_3")
VARIANTS = ("text_only", *ORDERS)
DIAGNOSTICS = (*CONTROLS, *VARIANTS)
CONTROL_SHOTS = 4


def under_control(episode: Episode, shots: int, control: str, seed: int, pool: Pool) -> Prompt:
    """The prompt of `episode` under a control of `DIAGNOSTICS`."""
    prompt = episode.prompt(shots, text_only=control == "text_only")
    rng = generator(seed, episode.query_id, control, shots)
    if control == "labels_permuted":
        return _relabelled(prompt, _permuted(episode, shots, rng))
    if control == "images_swapped":
        return _swapped(prompt, rng)
    if control == "random_query":
        return replace(prompt, pictured=_any_picture(episode, shots, rng, pool))
    if control in ORDERS:
        return reordered(prompt, _other_order(episode, shots, ORDERS.index(control) + 1, seed))
    return prompt


def reordered(prompt: Prompt, order: tuple[int, ...]) -> Prompt:
    """The prompt with its demonstrations in another order."""
    return replace(prompt, shown=tuple(prompt.shown[place] for place in order))


def _permuted(episode: Episode, shots: int, rng: np.random.Generator) -> list[str]:
    shown = episode.first(shots)
    if episode.per_shot > 1:
        renamed = rng.permutation(len(episode.candidates))
        return [episode.candidates[renamed[each.way]] for each in shown]
    return [shown[place].answer for place in rng.permutation(len(shown))]


def _relabelled(prompt: Prompt, answers: list[str]) -> Prompt:
    shown = (replace(each, answer=answer) for each, answer in zip(prompt.shown, answers, strict=True))
    return replace(prompt, shown=tuple(shown))


def _swapped(prompt: Prompt, rng: np.random.Generator) -> Prompt:
    places = rng.permutation(len(prompt.shown)).tolist()
    pictured = [prompt.shown[place].pictured for place in places]
    shown = (replace(each, pictured=other) for each, other in zip(prompt.shown, pictured, strict=True))
    return replace(prompt, shown=tuple(shown))


def _any_picture(episode: Episode, shots: int, rng: np.random.Generator, pool: Pool) -> Example:
    if episode.per_shot == 1:
        return pool.queries[int(rng.integers(len(pool.queries)))]
    way = int(rng.integers(episode.per_shot))
    if way == episode.target:
        return episode.query
    start = shots * episode.per_shot  # the round after the last one shown
    return next(each.example for each in episode.ranking[start : start + episode.per_shot] if each.way == way)


def _other_order(episode: Episode, shots: int, number: int, seed: int) -> tuple[int, ...]:
    """The `number`th other order; with few demonstrations there may be fewer, and they recur."""
    found = orders(episode, shots, seed, number + 1)
    return found[min(number, len(found) - 1)]
