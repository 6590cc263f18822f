"""Sums of a residual stream that keep less for the backward pass than autograd does by itself.

A feed-forward keeps its widest tensor twice, before and after GELU, and a gated sum keeps the branch that it scales.
Here GELU and LayerNorm are computed again in the backward pass, which costs little beside the matrix products, and the
gradient of a gate is taken from tensors that are there anyway: ⟨∂, W a⟩ = ⟨Wᵀ ∂, a⟩. Results are those of the plain
formula; where there is no gradient to take, or torch.compile plans memory itself, the plain formula is what runs.

Legend: D width, I inner width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu, layer_norm, linear

from flamingo.products import product


def add_feed_forward(stream: Tensor, ff: nn.Sequential, scale: Tensor) -> Tensor:
    """`stream` (…, D) + `scale` (1,) · `ff(stream)`, for a `feed_forward` of LayerNorm, linear, GELU, linear."""
    if _plain(*ff):
        return stream + scale * ff(stream)
    norm, up, _, down = cast(tuple[nn.LayerNorm, nn.Linear, nn.GELU, nn.Linear], tuple(ff))
    return _AddFeedForward.apply(stream, norm.weight, norm.bias, up.weight, down.weight, scale, norm.eps)


def add_linear(stream: Tensor, branch: Tensor, projection: nn.Linear, scale: Tensor) -> Tensor:
    """`stream` (…, D) + `scale` (1,) · `projection(branch)`, for a linear layer without bias."""
    if _plain(projection):
        return stream + scale * projection(branch)
    return _AddLinear.apply(stream, branch, projection.weight, scale)


def _plain(*modules: nn.Module) -> bool:
    """Whether to call the modules: where they are more than their weights, by adapters, hooks or offloading."""
    return (
        not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or any(
            type(module) not in (nn.LayerNorm, nn.Linear, nn.GELU)
            or module._forward_hooks
            or module._forward_pre_hooks
            or "forward" in vars(module)
            or any(parameter.is_meta for parameter in module.parameters())
            for module in modules
        )
    )


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


class _AddLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream: Tensor, branch: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(branch, weight, scale)
        projected = linear(branch, weight)
        ctx.precision = projected.dtype  # under autocast not that of the weight
        return stream + scale * projected

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        branch, weight, scale = ctx.saved_tensors
        with torch.autocast(outer[0].device.type, enabled=False):
            into = _rows(outer[0]).to(ctx.precision)
            kept = _rows(branch).to(ctx.precision)
            through = product(into, weight.to(ctx.precision))
            gate = (through * kept).sum(dtype=scale.dtype).view_as(scale) if ctx.needs_input_grad[3] else None
            factor = scale.to(ctx.precision)
            matrix = product(into.T, kept).mul_(factor).to(weight.dtype) if ctx.needs_input_grad[2] else None
            return outer[0], through.mul_(factor).view_as(branch).to(branch.dtype), matrix, gate


class _AddFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, stream: Tensor, norm: Tensor, bias: Tensor, up: Tensor, down: Tensor, scale: Tensor, eps: float
    ) -> Tensor:
        inner = linear(layer_norm(stream, stream.shape[-1:], norm, bias, eps), up)
        ctx.save_for_backward(stream, norm, bias, up, down, scale, inner)
        ctx.eps = eps
        return stream + scale * linear(gelu(inner), down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        stream, norm, bias, up, down, scale, inner = ctx.saved_tensors
        precision, needs = inner.dtype, ctx.needs_input_grad
        with torch.autocast(outer[0].device.type, enabled=False):
            normed, mean, deviation = torch.native_layer_norm(stream, stream.shape[-1:], norm, bias, ctx.eps)
            into, inner = _rows(outer[0]).to(precision), _rows(inner)
            active = gelu(inner)
            through = product(into, down.to(precision))
            gate = (through * active).sum(dtype=scale.dtype).view_as(scale) if needs[5] else None
            factor = scale.to(precision)
            lower = product(into.T, active).mul_(factor).to(down.dtype) if needs[4] else None
            del active
            through = torch.ops.aten.gelu_backward(through.mul_(factor), inner)
            upper = product(through.T, _rows(normed).to(precision)).to(up.dtype) if needs[3] else None
            del normed
            through = product(through, up.to(precision)).view_as(stream).to(stream.dtype)
            inwards, weight, offset = torch.ops.aten.native_layer_norm_backward(
                through, stream, stream.shape[-1:], mean, deviation, norm, bias, [needs[0], needs[1], needs[2]]
            )
            return outer[0] + inwards if needs[0] else None, weight, offset, upper, lower, gate, None
