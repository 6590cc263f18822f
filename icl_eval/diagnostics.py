"""Does the model really use its demonstrations? Controls under which a fair evaluation must fall to chance.

Each control breaks one link between a query and its answer by a change that is independent of the answer, so that the
expected accuracy of any predictor, a perfect one included, is exactly 1 / ways:

- `gates_at_zero`: the model's gates are shut, so no picture reaches the language model. The answer is uniform over the
  ways and the text does not depend on it.
- `labels_permuted`: the names of the demonstrations go through one uniformly random permutation of the ways, identity
  included. A model that reads them answers the permuted name of the right class: each name with equal probability.
- `images_swapped`: the demonstrations' pictures are permuted uniformly over their places, across classes; the labels
  stay. Where the pictures of the query's class come to stand says nothing about its name.
- `random_query`: the query's picture is replaced by one of a way drawn uniformly (the right one included), which is in
  none of the demonstrations. The picture shown is independent of the answer that counts.

All are pure functions of (seed, episode, shots); `gates_at_zero` changes the model, the others the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from icl_eval.demonstrations import Episode, generator

CONTROLS = ("gates_at_zero", "labels_permuted", "images_swapped", "random_query")
CONTROL_SHOTS = 4


@dataclass(frozen=True)
class Prompt:
    """What a model is shown of an episode: pictures as indices into the pool, and texts of labels.

    Attributes:
        images: of the demonstrations, in order.
        labels: of the demonstrations, as many.
        query: the query's picture.
        candidates: labels to choose among.
    """

    images: tuple[int, ...]
    labels: tuple[str, ...]
    query: int
    candidates: tuple[str, ...]


def plain(episode: Episode, shots: int) -> Prompt:
    """The prompt of `episode` with `shots` demonstrations per way."""
    return Prompt(
        tuple(episode.ranking[:shots].ravel().tolist()),
        tuple(episode.names[way] for way in episode.ranking_ways[:shots].flat),
        episode.query,
        episode.names,
    )


def under_control(episode: Episode, shots: int, control: str, seed: int) -> Prompt:
    """The prompt of `episode` under a control of `CONTROLS`."""
    prompt = plain(episode, shots)
    rng = generator(seed, episode.query_id, control, shots)
    ways = len(episode.names)
    if control == "labels_permuted":
        renamed = rng.permutation(ways)
        labels = tuple(episode.names[renamed[way]] for way in episode.ranking_ways[:shots].flat)
        return replace(prompt, labels=labels)
    if control == "images_swapped":
        return replace(prompt, images=tuple(rng.permutation(np.array(prompt.images, dtype=int)).tolist()))
    if control == "random_query":
        way = int(rng.integers(ways))
        if way == episode.target:
            return prompt
        unseen = episode.ranking_ways[shots] == way  # the round after the last one shown
        return replace(prompt, query=int(episode.ranking[shots][unseen][0]))
    return prompt
