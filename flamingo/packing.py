"""Packed rows: several documents in one row that see neither one another's text nor media.

Self-attention is kept apart by an additive mask and positions that begin anew, media by their intervals
(`flamingo.media`). Whether an LM obeys is not read off its name but measured, once, when a model is built for packing.

Legend: B rows, T tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flamingo.errors import FlamingoError

if TYPE_CHECKING:
    from flamingo.modeling import FlamingoForConditionalGeneration


def pack(documents: Tensor, language_model: Any) -> tuple[Tensor, Tensor]:
    """What an LM is given for packed rows.

    Args:
        documents: (B, T) number of each token's document, not falling along a row; 0 for padding.
        language_model: the LM, for its precision and its sliding window.

    Returns:
        The mask (B, 1, T, T), 0 where a token may attend and the least number of the LM's precision elsewhere (not
        a boolean one, which several families misread), and the positions (B, T), from 0 in each document.

    Raises:
        FlamingoError: where rows are longer than the LM's sliding window, which such a mask does not have.
    """
    length = documents.shape[1]
    window = getattr(language_model.config.get_text_config(), "sliding_window", None)
    if window is not None and length > window:
        raise FlamingoError(
            f"packed rows of {length} tokens: expected at most {window}, the sliding window of "
            f"{type(language_model).__name__}"
        )
    place = torch.arange(length, device=documents.device)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    positions = place - (place * starts).cummax(dim=1).values
    apart = (documents[:, None] != documents[:, :, None]) | (place > place[:, None])
    dtype = language_model.dtype
    mask = torch.zeros(apart.shape, dtype=dtype, device=documents.device).masked_fill(apart, torch.finfo(dtype).min)
    return mask[:, None], positions


def check_packing(model: FlamingoForConditionalGeneration) -> None:
    """Read two documents through the LM, packed and alone.

    That nothing leaks is seen in the gradient of the second document's logits by the first one's embeddings, which is
    exactly zero or not, where a difference of logits would be lost in rounding at low precision.

    Raises:
        FlamingoError: where the LM lets documents see one another, or reads them differently when packed; it names
            the LM's class.
    """
    lm, first, second = model.language_model, 9, 8
    name = type(lm).__name__
    known = torch.tensor([i for i in range(model.row_of.shape[0]) if model.row_of[i] < 0])
    ids = known[torch.randint(len(known), (1, first + second), generator=torch.Generator().manual_seed(0))]
    ids = ids.to(next(model.get_input_embeddings().parameters()).device)
    documents = torch.tensor([[1] * first + [2] * second], device=ids.device)
    mask, positions = pack(documents, lm)
    more = {"position_ids": positions} if model.takes_positions else {}
    training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            embeddings = model.embed_tokens(ids).detach().requires_grad_()
            packed = lm(inputs_embeds=embeddings, attention_mask=mask, use_cache=False, **more).logits[:, first:]
            (leak,) = torch.autograd.grad(packed.float().square().sum(), embeddings)
        with torch.no_grad():
            alone = lm(inputs_embeds=embeddings[:, first:], use_cache=False).logits.float()
    except (ValueError, RuntimeError, TypeError, NotImplementedError) as error:
        raise FlamingoError(f"packing=True: {name} cannot read packed rows ({error})") from error
    finally:
        model.train(training)
    if leak[:, :first].any():
        raise FlamingoError(
            f"packing=True: in {name} a packed document sees the one before it; expected an LM that reads through "
            "attention alone and obeys a 4-D mask"
        )
    difference = float((packed.detach().float() - alone).abs().max() / alone.abs().max())
    if difference > torch.finfo(lm.dtype).eps ** 0.5:
        raise FlamingoError(
            f"packing=True: {name} reads a document differently when it is packed (logits differ by {difference:.2g} "
            "of the largest); expected one whose positions can begin anew"
        )
