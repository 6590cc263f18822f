"""Many candidate answers of one prompt: a trie of their tokens, and the search for the best of them.

A node is a beginning that some answers share, and its token is read once for all of them. After reading a node, the
log-likelihoods of its children's tokens are known, and those of answers that end there: the last token of an answer is
only ever predicted.

Log-likelihoods only fall along an answer. So the sum up to a node bounds the score of all answers below it; of means,
that sum over the tokens of the longest answer below it. Where only the k best answers are wanted, nodes are read best
bound first, until none is left that could still bring an answer among them. That is exact: nothing is estimated.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from flamingo.errors import FlamingoError

TIE = 1e-4  # nats: closer scores count as equal, since they may change order with the batch
NODES_AN_ANSWER = 2  # that are read in a round at least, for each answer that is wanted


class Trie:
    """Answers as a tree of tokens. Node 0 is the prompt; nodes come after their parents, depth first.

    Args:
        answers: at least one token each.

    Attributes:
        tokens, parents, depths: of each node; those of node 0 say nothing, and 0.
        children: of each node.
        ends: node at which each answer ends; `lengths`: tokens of each answer.
    """

    def __init__(self, answers: Sequence[tuple[int, ...]]):
        self.tokens, self.parents, self.depths = [-1], [0], [0]
        self.children: list[list[int]] = [[]]
        self.lengths = np.array([len(answer) for answer in answers], dtype=np.int64)
        self.ends = np.zeros(len(answers), dtype=np.int64)
        path = [0]  # nodes of the answer before: in order, an answer shares most with that one
        for place in sorted(range(len(answers)), key=lambda place: answers[place]):
            answer = answers[place]
            shared = 0
            while shared < min(len(answer), len(path) - 1) and self.tokens[path[shared + 1]] == answer[shared]:
                shared += 1
            del path[shared + 1 :]
            for token in answer[shared:]:
                path.append(self._add(path[-1], token))
            self.ends[place] = path[-1]

    def _add(self, parent: int, token: int) -> int:
        node = len(self.tokens)
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.children.append([])
        self.children[parent].append(node)
        return node

    @cached_property
    def inner(self) -> list[int]:
        """Nodes to read, if all answers are to be scored: those that something follows, without the prompt."""
        return [node for node in range(1, len(self.tokens)) if self.children[node]]

    @cached_property
    def longest(self) -> np.ndarray:
        """Tokens of the longest answer that begins with each node."""
        longest = np.zeros(len(self.tokens), dtype=np.int64)
        np.maximum.at(longest, self.ends, self.lengths)
        for node in range(len(self.tokens) - 1, 0, -1):
            longest[self.parents[node]] = max(longest[self.parents[node]], longest[node])
        return longest

    @cached_property
    def ending(self) -> dict[int, list[int]]:
        """Answers that end at a node."""
        ending: dict[int, list[int]] = {}
        for answer, node in enumerate(self.ends.tolist()):
            ending.setdefault(node, []).append(answer)
        return ending

    def path(self, node: int) -> list[int]:
        """Nodes from below the prompt to a node."""
        path: list[int] = []
        while node:
            path.append(node)
            node = self.parents[node]
        return path[::-1]

    def closure(self, nodes: Sequence[int]) -> list[int]:
        """Nodes and all before them but the prompt, in order."""
        found: set[int] = set()
        for node in nodes:
            while node and node not in found:
                found.add(node)
                node = self.parents[node]
        return sorted(found)

    def ends_of(self, nodes: Sequence[int]) -> list[int]:
        """Those of some nodes with which no other of them begins: paths to these pass all of them."""
        before = {parent for node in nodes for parent in self.path(node)[:-1]}
        return [node for node in nodes if node not in before]


class Search:
    """Which nodes of a trie are to be read, and what comes of it, for one prompt.

    Args:
        normalise: "sum" over the tokens of an answer, or their "mean".
        top_k: answers that are wanted; None: all.

    Attributes:
        scores: of each answer, −inf where it is not known.
    """

    def __init__(self, trie: Trie, normalise: str, top_k: int | None):
        self.trie, self.means = trie, normalise == "mean"
        self.top_k = None if top_k is None or top_k >= len(trie.ends) else top_k
        self.sums = np.zeros(len(trie.tokens))
        self.scores = np.full(len(trie.ends), -np.inf)
        self.read = 0
        self.waiting: list[tuple[float, int]] = []
        """nodes that could be read next: minus their bounds, and they"""

    def wanted(self) -> list[int]:
        """Nodes to be read next, in order; none: the scores that are wanted are known."""
        if self.top_k is None:
            chosen = [] if self.read else self.trie.inner
            self.read = len(self.trie.inner)
            return chosen
        least = np.partition(self.scores, -self.top_k)[-self.top_k] - 2 * TIE  # twice: bounds are rounded too
        chosen = []
        # Ever more: where answers are hard to tell apart, rounds would be many, and each of them is a pass.
        width = max(NODES_AN_ANSWER * self.top_k, self.read // 2)
        while self.waiting and len(chosen) < width:
            bound, node = self.waiting[0]
            if -bound < least:
                break
            heapq.heappop(self.waiting)
            chosen.append(node)
        self.read += len(chosen)
        return sorted(chosen)

    def learn(self, node: int, likelihoods: Sequence[float]) -> None:
        """Take the log-likelihoods of the tokens of a node's children; those of nodes before it are known."""
        for child, likelihood in zip(self.trie.children[node], likelihoods, strict=True):
            total = self.sums[child] = self.sums[node] + likelihood
            for answer in self.trie.ending.get(child, ()):
                self.scores[answer] = total / self.trie.lengths[answer] if self.means else total
            if self.top_k is not None and self.trie.children[child]:
                heapq.heappush(self.waiting, (-total / (self.trie.longest[child] if self.means else 1), child))


def best_only(scores: np.ndarray, top_k: int | None) -> np.ndarray:
    """Scores of the `top_k` best, and of what is at most `TIE` below them; −inf for the others. None: all scores.

    Raises:
        FlamingoError: `top_k` is below 1.
    """
    if top_k is not None and top_k < 1:
        raise FlamingoError(f"top_k: {top_k}, expected at least 1, or None for all")
    if top_k is None or top_k >= len(scores):
        return scores
    least = np.partition(scores, -top_k)[-top_k] - TIE
    return np.where(scores >= least, scores, -np.inf)
