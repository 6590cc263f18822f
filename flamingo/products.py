"""Matrix products in float32 on processors of which the BLAS behind torch uses half.

MKL takes its AVX-512 kernels on Intel's processors alone; oneDNN, which is in the same builds of torch, takes them
wherever they are. On others with AVX-512 its products are twice as fast, and those of a few rows, as decoding has them,
three times (`python benchmarks/products.py`). They are as exact: only the order of the sums differs.

Within `fast_products` the linear layers of all modules, those of backbones too, go there. Training steps and generation
use it. A plain forward does not: with closed gates its logits are the LM's own, bit for bit.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

MANY_PRODUCTS, LARGE_MATRIX = 1 << 24, 1 << 18
"""multiplications, or elements of the matrix, from which on the detour (15 µs a product) saves more than it costs"""


@cache
def available() -> bool:
    """Whether this processor has AVX-512, is not Intel's, and this torch has oneDNN."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        maker = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        maker = platform.processor()
    return "GenuineIntel" not in maker


@contextmanager
def fast_products(wanted: bool = True) -> Iterator[None]:
    """Let linear layers take the faster product, where there is one and none of torch's other machinery is at work."""
    if not wanted or torch.compiler.is_compiling() or not available():
        yield
        return
    with _Linear():
        yield


class _Linear(TorchFunctionMode):
    """Takes `torch.nn.functional.linear` where it pays."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is linear and not kwargs and pays(*args[:2]):
            return _linear(*args)
        return function(*args, **(kwargs or {}))


def pays(left: Tensor, right: Tensor) -> bool:
    """Whether `left` (…, K) times `right` (J, K) transposed is a product that oneDNN should compute."""
    return (
        left.dtype == right.dtype == torch.float32
        and left.device.type == right.device.type == "cpu"
        and (left.numel() * right.shape[0] >= MANY_PRODUCTS or right.numel() >= LARGE_MATRIX)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and type(left) in PLAIN
        and type(right) in PLAIN
    )


PLAIN = (Tensor, torch.nn.Parameter)
"""what is no tensor of a distributed, quantised or traced kind"""


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left` (I, K) times `right` (K, J), outside of the graph."""
    return _product(left, right.T, None) if available() and pays(left, right.T) else left @ right


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def _linear(stream: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = stream.reshape(-1, stream.shape[-1])
    trains = torch.is_grad_enabled() and (stream.requires_grad or weight.requires_grad)
    made = _FastLinear.apply(rows, weight, bias) if trains else _product(rows, weight, bias)
    return made.view(*stream.shape[:-1], weight.shape[0])


class _FastLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows if weight.requires_grad else None, weight if rows.requires_grad else None)
        return _product(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (
            product(outer[0], weight) if needs[0] else None,
            product(outer[0].T, rows) if needs[1] else None,
            outer[0].sum(dim=0) if needs[2] else None,
        )
