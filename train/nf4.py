"""A linear layer whose frozen weight takes 4 bits an element (nf4 of bitsandbytes; QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn


class Linear4(Linear4bit):
    """bitsandbytes' layer, that says what it holds in floating point, and saves no more than its weight."""

    @classmethod
    def of(cls, linear: nn.Linear, compute_dtype: torch.dtype) -> Linear4:
        """A linear layer in 4 bits, on the same device; on the meta device it is as large as it would be.

        Args:
            compute_dtype: of the product, for which the weight is unpacked.
        """
        device = linear.weight.device
        made = cls(linear.in_features, linear.out_features, False, compute_dtype, quant_type="nf4", device="meta")
        if device.type == "meta":
            packed = torch.empty((linear.weight.numel() + 1) // 2, 1, dtype=torch.uint8, device=device)
            made.weight = Params4bit(packed, requires_grad=False, quant_type="nf4", bnb_quantized=True)
        else:
            weight = Params4bit(linear.weight.detach().clone(), requires_grad=False, quant_type="nf4")
            made.weight = weight.to(device)
            made.weight.module = made
        made.bias = linear.bias
        made.support_avx512bf16_for_cpu = False  # evaluations would pack the weight anew, for good, and round it
        return made

    def unpacked(self) -> Tensor:
        """The weight (outputs, inputs) in float32, as products see it but for the rounding to their precision."""
        if self.weight.is_meta:
            return torch.empty(self.out_features, self.in_features, device="meta")
        return dequantize_4bit(self.weight.data, self.weight.quant_state).float()

    def unpacked_linear(self) -> nn.Linear:
        """The layer in floating point, frozen."""
        made = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        made.weight = nn.Parameter(self.unpacked(), requires_grad=False)
        made.bias = self.bias
        return made

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Linear._save_to_state_dict(self, destination, prefix, keep_vars)
