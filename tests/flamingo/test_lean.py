"""Sums that keep less: the same numbers as the plain formula, and less kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flamingo.lean import add_feed_forward, add_linear
from flamingo.loss import negative_log_likelihood
from flamingo.resampler import feed_forward


def parts(dtype: torch.dtype) -> tuple[list[Tensor], nn.Linear, nn.Sequential]:
    """Stream, branch and scale, and the two modules, all random."""
    torch.manual_seed(0)
    projection, ff = nn.Linear(12, 16, bias=False).to(dtype), feed_forward(16, 4).to(dtype)
    for parameter in ff[0].parameters():
        nn.init.normal_(parameter)
    inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((2, 5, 16), (2, 5, 12), (1,))]
    return inputs, projection, ff


@pytest.mark.parametrize(("dtype", "autocast", "bound"), [
    (torch.float64, False, 1e-14), (torch.float32, False, 1e-6), (torch.float32, True, 0.03),
])  # fmt: skip
def test_sums_and_gradients_are_those_of_the_plain_formula(dtype: torch.dtype, autocast: bool, bound: float) -> None:
    """Catches a wrong gradient of any input, weight or gate, and one in another precision than its tensor."""
    (stream, branch, scale), projection, ff = parts(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        lean = add_feed_forward(add_linear(stream, branch, projection, scale), ff, scale)
        middle = stream + scale * projection(branch)
        plain = middle + scale * ff(middle)
    assert torch.equal(lean, plain)
    wanted = [stream, branch, scale, projection.weight, *ff.parameters()]
    outer = torch.randn_like(plain)
    pairs = zip(torch.autograd.grad(lean, wanted, outer), torch.autograd.grad(plain, wanted, outer), strict=True)
    for found, expected in pairs:
        assert found.dtype == expected.dtype
        assert float((found - expected).abs().max() / expected.abs().max()) <= bound


def test_a_feed_forward_keeps_its_widest_tensor_once() -> None:
    """Catches the values after GELU being kept beside those before."""
    (stream, _, scale), _, ff = parts(torch.float32)
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        if tensor.shape[-1] == 64 and tensor.numel() == 2 * 5 * 64:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        lean = add_feed_forward(stream, ff, scale)
        assert list(kept.values()) == [2 * 5 * 64]
        plain = stream + scale * ff(stream)
        assert len(kept) == 3
    assert torch.equal(lean, plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_in_place_is_the_cross_entropy(dtype: torch.dtype) -> None:
    """Catches a gradient at another row or column, unused logits that take part, and a second use of what is gone."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(600, 8, dtype=dtype, requires_grad=True), torch.randn(40, 8, dtype=dtype)
    targets, outer = torch.randint(37, (600,)), torch.rand(600)
    losses = negative_log_likelihood(hidden @ weight.T, targets, 37)
    logits = (hidden @ weight.T)[:, :37]
    expected = nn.functional.cross_entropy(logits.to(losses.dtype), targets, reduction="none")
    torch.testing.assert_close(losses, expected)
    (gradient,) = torch.autograd.grad(losses, hidden, outer.to(losses.dtype), retain_graph=True)
    (wanted,) = torch.autograd.grad(expected, hidden, outer.to(losses.dtype))
    assert float((gradient - wanted).abs().max() / wanted.abs().max()) < 4 * torch.finfo(dtype).eps
    with pytest.raises(RuntimeError, match="kept for one"):
        losses.sum().backward()


def test_small_gradients_survive_half_precision() -> None:
    """Catches probabilities that are rounded to float16 before the loss scale lifts them into its range."""
    torch.manual_seed(0)
    logits = (8 * torch.randn(4, 4000)).half().requires_grad_()
    (gradient,) = torch.autograd.grad(
        negative_log_likelihood(logits * 1, torch.zeros(4).long(), 4000).sum() * 65536, logits
    )
    expected = nn.functional.cross_entropy(logits.float(), torch.zeros(4).long(), reduction="sum") * 65536
    (wanted,) = torch.autograd.grad(expected, logits)
    assert (gradient != 0).float().mean() == (wanted != 0).float().mean()


@pytest.mark.parametrize("kind", ["hook", "subclass"])
def test_modules_that_are_more_than_their_weights_are_called(kind: str) -> None:
    """Catches adapters and hooks that act in evaluation but not in training."""
    (stream, branch, scale), projection, ff = parts(torch.float32)

    class Doubled(nn.Linear):
        def forward(self, given: Tensor) -> Tensor:
            return 2 * super().forward(given)

    plain = add_linear(stream, branch, projection, scale) - stream
    if kind == "hook":
        projection.register_forward_hook(lambda module, args, output: 2 * output)
        ff[3].register_forward_hook(lambda module, args, output: 2 * output)
    else:
        projection.__class__ = ff[3].__class__ = Doubled
    torch.testing.assert_close(add_linear(stream, branch, projection, scale) - stream, 2 * plain)
    with torch.no_grad():
        expected = add_feed_forward(stream, ff, scale)
    assert torch.equal(add_feed_forward(stream, ff, scale), expected)
