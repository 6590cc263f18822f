"""Matrix products by oneDNN: equal to those of torch, where they pay, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flamingo import products
from flamingo.products import fast_products, product
from tests.tiny import document, tiny_flamingo

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this build of torch has no oneDNN"
)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Products of any size and on any processor go to oneDNN; each adds its number of rows to the list."""
    rows: list[int] = []
    plain = products._product

    def counted(left: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows.append(left.shape[0])
        return plain(left, weight, bias)

    monkeypatch.setattr(products, "available", lambda: True)
    monkeypatch.setattr(products, "MANY_PRODUCTS", 0)
    monkeypatch.setattr(products, "_product", counted)
    return rows


def largest(found: Tensor, expected: Tensor) -> float:
    """Difference, relative to the largest value."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 40), (2, 5, 40), (1, 40)])
def test_layers_and_their_gradients_are_torchs(taken: list[int], shape: tuple[int, ...], bias: bool) -> None:
    """Catches a gradient of the wrong factor or layout."""
    torch.manual_seed(0)
    layer = nn.Linear(40, 24, bias=bias)
    stream, outer = torch.randn(shape, requires_grad=True), torch.randn(*shape[:-1], 24)
    inputs = [stream, *layer.parameters()]
    with fast_products():
        made = layer(stream)
    found = torch.autograd.grad(made, inputs, outer)
    assert len(taken) == 3
    expected = layer.double()(stream.double())
    exact = torch.autograd.grad(expected, [stream, *layer.parameters()], outer.double())
    assert largest(made, expected) < 1e-6
    assert all(largest(a, b) < 1e-6 for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("left", [lambda: torch.randn(30, 7).T, lambda: torch.randn(1, 30).expand(7, 30),
                                  lambda: torch.randn(7, 60)[:, ::2], lambda: torch.randn(0, 30)])  # fmt: skip
@pytest.mark.parametrize("right", [lambda: torch.randn(30, 9), lambda: torch.randn(9, 30).T])
def test_any_strides_are_read_rightly(
    taken: list[int], left: Callable[[], Tensor], right: Callable[[], Tensor]
) -> None:
    """Catches a kernel that takes a view for a contiguous matrix."""
    torch.manual_seed(0)
    a, b = left(), right()
    assert torch.allclose(product(a, b).double(), a.double() @ b.double(), atol=1e-5)
    assert taken


def test_frozen_layers_keep_nothing_for_themselves(taken: list[int]) -> None:
    """Catches activations kept for the gradient of a weight that has none, or a gradient computed for it."""
    layer, stream = nn.Linear(40, 24).requires_grad_(False), torch.randn(7, 40, requires_grad=True)
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda each: each)
    with hooks, fast_products():
        made = layer(stream)
    made.sum().backward()
    assert [each.shape for each in kept] == [layer.weight.shape] and layer.weight.grad is None


def test_a_training_step_takes_them_and_a_plain_forward_does_not(taken: list[int], tmp_path: Path) -> None:
    """Catches gradients that differ, steps that miss the path, and logits that are no longer the LM's own bits."""
    model, processor = tiny_flamingo(tmp_path, "opt")
    inputs = processor(documents=[document(1, 2, lead=True), document(2, 1)])
    with torch.no_grad():
        model(**inputs)
    model(**{name: value for name, value in inputs.items() if name != "labels"})
    assert not taken

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        taken.clear()
        model(**inputs).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    found = gradients()
    assert len(taken) > 40
    plainly = len(taken)
    model.train()
    model.activation_checkpointing_enable()
    checkpointed = gradients()  # what is computed again is computed alike, or torch refuses it
    assert len(taken) > 1.2 * plainly
    products.MANY_PRODUCTS = 1 << 40
    expected = gradients()
    assert not taken
    for some in (found, checkpointed):
        assert some.keys() == expected.keys()
        assert all(largest(some[name], expected[name]) < 1e-5 for name in some)


def test_generation_takes_them(taken: list[int], tmp_path: Path) -> None:
    """Catches a path that decoding misses, or other tokens by it."""
    model, processor = tiny_flamingo(tmp_path, "opt")
    inputs = processor(documents=[document(1, 2), document(2, 1)])
    del inputs["labels"]
    found = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert len(taken) > 6 * 2 * 6
    products.MANY_PRODUCTS = 1 << 40
    assert torch.equal(found, model.generate(**inputs, max_new_tokens=6, do_sample=False))


def test_only_plain_float32_on_the_cpu_is_taken(taken: list[int]) -> None:
    """Catches other precisions, autocast, compiled graphs and tensors of other kinds on this path."""
    layer = nn.Linear(40, 24)
    with fast_products(), torch.no_grad():
        layer.double()(torch.randn(7, 40).double())
        layer.bfloat16()(torch.randn(7, 40).bfloat16())
        layer.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(torch.randn(7, 40)).dtype == torch.bfloat16
        assert not taken
        layer(torch.randn(7, 40))
        assert len(taken) == 1
