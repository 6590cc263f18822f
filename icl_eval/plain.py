"""The same answers the plain way, one forward for each candidate: what the engine's short cuts are measured against.

Nothing is shared, cached, batched or padded here. It is as slow as it looks, and so short that it can be checked by
reading it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flamingo.document import Document, Segment
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processing import END_OF_CHUNK, Encoding, FlamingoProcessor
from icl_eval.engine import Chunk, Ladder, Library, Query, answer_text


def document(library: Library, ladder: Ladder, query: Query, answer: str | None = None) -> Document:
    """Demonstrations and query as one document: a prompt, or, with an answer, a whole one."""

    def filled(chunk: Chunk, answer: str | None) -> list[Segment]:
        return chunk.segments(library.media(chunk.media), answer)

    before = [part for chunk in ladder.demonstrations[: query.after] for part in filled(chunk, "")]
    return Document((*before, *filled(query.chunk, answer)), complete=False)


@torch.inference_mode()
def rank(
    model: FlamingoForConditionalGeneration,
    processor: FlamingoProcessor,
    library: Library,
    ladder: Ladder,
    *,
    normalise: str = "sum",
) -> list[np.ndarray]:
    """As `Engine.rank` for one ladder."""
    return [
        np.array([_score(model, processor, library, ladder, query, answer, normalise) for answer in query.answers])
        for query in ladder.queries
    ]


def _score(
    model: FlamingoForConditionalGeneration,
    processor: FlamingoProcessor,
    library: Library,
    ladder: Ladder,
    query: Query,
    answer: str,
    normalise: str,
) -> float:
    start = len(processor.encode(document(library, ladder, query)).input_ids)
    encoding = processor.encode(document(library, ladder, query, answer))
    logits = model(**_inputs(model, processor, encoding)).logits[0]
    likelihoods = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    tokens = encoding.input_ids[start:]
    each = torch.stack([likelihoods[start + place - 1, token] for place, token in enumerate(tokens)])
    return float(each.sum() if normalise == "sum" else each.mean())


def _inputs(
    model: FlamingoForConditionalGeneration, processor: FlamingoProcessor, encoding: Encoding
) -> dict[str, Tensor]:
    """One row, each of its media encoded alone, whatever its number of frames."""
    alone = [model.encode_media(processor.pixels([medium]).to(model.device)) for medium in encoding.media]
    inputs = {"input_ids": torch.tensor([encoding.input_ids], device=model.device)}
    return {**inputs, "media_latents": torch.cat(alone)} if alone else inputs


@torch.inference_mode()
def generate(
    model: FlamingoForConditionalGeneration,
    processor: FlamingoProcessor,
    library: Library,
    ladder: Ladder,
    *,
    max_new_tokens: int,
    beams: int = 1,
    length_penalty: float = 1.0,
) -> list[str]:
    """As `Engine.generate` for one ladder."""
    texts = []
    end = processor.tokenizer.convert_tokens_to_ids(END_OF_CHUNK)
    for query in ladder.queries:
        encoding = processor.encode(document(library, ladder, query))
        found = model.generate(
            **_inputs(model, processor, encoding),
            do_sample=False,
            num_beams=beams,
            length_penalty=length_penalty,
            max_new_tokens=max_new_tokens,
            eos_token_id=end,
            pad_token_id=end,
        )
        texts.append(answer_text(processor, found[0, len(encoding.input_ids) :].tolist()))
    return texts
