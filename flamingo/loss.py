"""The loss at supervised positions, with one tensor of logits in memory instead of four.

Logits are by far the largest tensor of a step (positions × vocabulary), and the plain way holds them, their softmax,
and the gradients of both. Here the gradient is written over the logits, as it is known as soon as they are.

Legend: S supervised positions, V logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

ROWS = 256  # positions whose softmax is taken at once, in float32 beside the logits


class _LossInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, used: int) -> Tensor:
        exact = torch.promote_types(logits.dtype, torch.float32)
        losses = logits.new_empty(logits.shape[0], dtype=exact)
        for start in range(0, logits.shape[0], ROWS):
            rows, target = logits[start : start + ROWS], targets[start : start + ROWS, None]
            likelihood = rows[:, :used].to(exact).log_softmax(-1)
            losses[start : start + ROWS] = -likelihood.gather(1, target).squeeze(1)
            gradient = likelihood.exp_()
            gradient.scatter_add_(1, target, gradient.new_full(target.shape, -1.0))
            rows[:, :used] = gradient
            rows[:, used:] = 0
        ctx.gradient = logits.detach()
        return losses

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("the loss was already used for a backward pass: its gradient is kept for one")
        return gradient.mul_(outer[0].to(gradient.dtype)[:, None]), None, None


def negative_log_likelihood(logits: Tensor, targets: Tensor, used: int) -> Tensor:
    """(S, V) logits, (S,) targets → (S,) losses in nats, float32 or wider.

    Args:
        logits: consumed where gradients are on: their values are gone afterwards.
        targets: ids below `used`.
        used: the first `used` logits take part, the others belong to no token.
    """
    if logits.dtype == torch.float16:  # too narrow to hold a gradient before the loss scale is known
        return cross_entropy(logits[:, :used].float(), targets, reduction="none")
    return _LossInPlace.apply(logits, targets, min(used, logits.shape[1]))


class PutColumns(torch.autograd.Function):
    """Columns `ids` of (…, V) logits become `new` (…, K), in place, in the gradient too.

    Only for logits that go into `negative_log_likelihood`: the gradient that comes back must be nobody else's.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, new: Tensor, ids: Tensor) -> Tensor:
        """Overwrites `logits`."""
        ctx.mark_dirty(logits)
        ctx.save_for_backward(ids)
        return logits.index_copy_(-1, ids, new)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor, None]:
        """The gradients of both; that of the overwritten columns is zero."""
        (ids,) = ctx.saved_tensors
        (gradient,) = outer
        new = gradient.index_select(-1, ids)
        return gradient.index_fill_(-1, ids, 0), new, None
