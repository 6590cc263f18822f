"""open_flamingo's own models (package open_flamingo 2.0.1), driven as its evaluation drives them.

The images of a query are encoded for it, its prompt is read in one pass with a cache, and each candidate in one more
pass over that cache, which is then cut back. Two things differ from the original, whose evaluation is a script:
candidates are tokenised in their context, `<|endofchunk|>` with them, so that scores are those of `Engine`; and what
shares a batch has one length, so that nothing is padded and no score depends on the batch.

Legend: B rows, T tokens, N media of a row.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from flamingo.document import Image, Medium
from flamingo.errors import FlamingoError
from flamingo.processing import FlamingoProcessor
from icl_eval import plain
from icl_eval.engine import Ladder, Library, Query, answer_text, answer_tokens
from icl_eval.ranking import best_only

INSTALL = "pip install --no-deps open_flamingo==2.0.1 einops-exts"


@cache
def part(name: str) -> Any:
    """A module of `open_flamingo.src`.

    Its factory imports open_clip, which wants torchvision. Where that is not installed, a stand-in lets it be imported.

    Raises:
        FlamingoError: it is not installed; the message says how to.
    """
    stand_in = ModuleType("open_clip")
    try:
        import_module("open_clip")
    except ImportError:
        sys.modules["open_clip"] = stand_in
    try:
        return import_module(f"open_flamingo.src.{name}")
    except ImportError as error:
        raise FlamingoError(f"open_flamingo cannot be imported ({error}): {INSTALL}") from error
    finally:
        if sys.modules.get("open_clip") is stand_in:
            del sys.modules["open_clip"]


class Visual(nn.Module):
    """A CLIP tower of transformers with the output of open_clip's `visual`: the class token, and the patch tokens."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower = tower

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """`images` (N, C, H, W) → (N, D), (N, V, D)."""
        hidden = self.tower(pixel_values=images).last_hidden_state
        return hidden[:, 0], hidden[:, 1:]


def build(
    vision_tower: Any,
    language_model: Any,
    *,
    tokens: int,
    end_of_chunk_token_id: int,
    image_token_id: int,
    cross_attention_every: int = 1,
) -> Any:
    """An open_flamingo `Flamingo` over backbones at hand, put together, resized and frozen as by its own factory.

    The factory itself loads towers of open_clip and LMs of the hub by their names.

    Args:
        vision_tower: CLIP's; `language_model`: of a family that open_flamingo knows. Both become parts of the result.
        tokens: that the tokenizer knows, the two new ones among them; the LM's embedding gets as many rows.
        end_of_chunk_token_id, image_token_id: of the new tokens.
        cross_attention_every: a gated block before each so manyth decoder layer.

    Raises:
        FlamingoError: open_flamingo is not installed.
    """
    lm_module, factory = part("flamingo_lm"), part("factory")

    class Mixin(lm_module.FlamingoLMMixin):  # type: ignore[name-defined]
        # Newer versions of `generate` drop an all-ones mask, which the original requires.
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
            return super().forward(input_ids, attention_mask, **kwargs)

    part("utils").extend_instance(language_model, Mixin)
    language_model.set_decoder_layers_attr_name(factory._infer_decoder_layers_attr_name(language_model))
    # As transformers of its time: newer ones start all new rows at nearly one mean.
    language_model.resize_token_embeddings(tokens, mean_resizing=False)
    vision = nn.Module()
    vision.visual = Visual(vision_tower)
    model = part("flamingo").Flamingo(
        vision,
        language_model,
        end_of_chunk_token_id,
        image_token_id,
        vis_dim=vision_tower.config.hidden_size,
        cross_attn_every_n_layers=cross_attention_every,
    )
    model.requires_grad_(False)
    for trained in (model.perceiver, language_model.gated_cross_attn_layers, language_model.get_input_embeddings()):
        trained.requires_grad_(True)
    return model


class Prompt(NamedTuple):
    """A query with what comes before it, as tokens.

    Attributes:
        place: number of its ladder, and its number there.
        ids: of the prompt; `media`: indices of the media that stand in it; `answers`: ids of the candidates.
    """

    place: tuple[int, int]
    ids: tuple[int, ...]
    media: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]


class _Marks:
    """A library for prompts of which only the tokens are wanted."""

    def name(self, index: int) -> str:
        return str(index)

    def media(self, indices: Sequence[int]) -> Sequence[Medium]:
        return [Image(b"")] * len(indices)


class OpenFlamingo:
    """Ranks and generates with a `Flamingo` of open_flamingo (`icl_eval.engine.Answerer`).

    Args:
        model: of `create_model_and_transforms`, of `build`, …; it is put into evaluation mode.
        processor: its tokenizer with the two new tokens, and an image processor that does as its tower's transform
            (for towers of OpenAI's CLIP: `CLIPImageProcessorPil`).
        batch_size: rows of a pass, at most; only prompts of one length share one.
    """

    def __init__(self, model: Any, processor: FlamingoProcessor, *, batch_size: int = 8):
        if batch_size < 1:
            raise FlamingoError(f"batch_size: {batch_size}, expected at least 1")
        self.model, self.processor, self.batch_size = model.eval(), processor, batch_size

    @torch.inference_mode()
    def rank(
        self,
        library: Library,
        ladders: Sequence[Ladder],
        *,
        normalise: str = "sum",
        top_k: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[np.ndarray]]:
        """As `Engine.rank`.

        Raises:
            FlamingoError: where the tokens of a prompt are no prefix of those of prompt and answer, or a medium is a
                video, which open_flamingo does not read.
        """
        scores = [[np.zeros(0) for _ in ladder.queries] for ladder in ladders]
        for batch in self._batches(self._prompts(ladders, answers=True)):
            lengths = np.array([len(ids) for ids in batch[0].answers])
            found = self._score(*self._inputs(library, batch), batch[0].answers)
            for (ladder, query), row in zip((prompt.place for prompt in batch), found, strict=True):
                scores[ladder][query] = best_only(row / lengths if normalise == "mean" else row, top_k)
            if progress is not None:
                progress(len(batch))
        return scores

    @torch.inference_mode()
    def generate(
        self,
        library: Library,
        ladders: Sequence[Ladder],
        *,
        max_new_tokens: int,
        beams: int = 1,
        length_penalty: float = 1.0,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[str]]:
        """As `Engine.generate`.

        Raises:
            FlamingoError: a medium is a video.
        """
        texts = [[""] * len(ladder.queries) for ladder in ladders]
        for batch in self._batches(self._prompts(ladders, answers=False)):
            ids, images = self._inputs(library, batch)
            found = self.model.generate(
                images,
                ids,
                torch.ones_like(ids),
                do_sample=False,
                num_beams=beams,
                length_penalty=length_penalty,
                max_new_tokens=max_new_tokens,
                pad_token_id=self.model.eoc_token_id,
                # An image that is generated is one that it must have.
                suppress_tokens=[self.model.lang_encoder.media_token_id],
            )
            for (ladder, query), row in zip((prompt.place for prompt in batch), found[:, ids.shape[1] :], strict=True):
                texts[ladder][query] = answer_text(self.processor, row.tolist())
            if progress is not None:
                progress(len(batch))
        return texts

    def _prompts(self, ladders: Sequence[Ladder], *, answers: bool) -> Iterator[Prompt]:
        for number, ladder in enumerate(ladders):
            for place, query in enumerate(ladder.queries):
                ids = self._ids(ladder, query)
                chunks = (*ladder.demonstrations[: query.after], query.chunk)
                media = tuple(index for chunk in chunks for index in chunk.media)
                wanted = query.answers if answers else ()
                rests = tuple(
                    answer_tokens(ladder.key, query.chunk, answer, ids, self._ids(ladder, query, answer))
                    for answer in wanted
                )
                yield Prompt((number, place), tuple(ids), media, rests)

    def _ids(self, ladder: Ladder, query: Query, answer: str | None = None) -> list[int]:
        return self.processor.encode(plain.document(_Marks(), ladder, query, answer)).input_ids

    def _batches(self, prompts: Iterator[Prompt]) -> Iterator[Sequence[Prompt]]:
        """Prompts that can be read together without padding, and have the same candidates."""
        alike = defaultdict(list)
        for prompt in prompts:
            alike[len(prompt.ids), len(prompt.media), prompt.answers].append(prompt)
        for group in alike.values():
            yield from (group[start : start + self.batch_size] for start in range(0, len(group), self.batch_size))

    def _inputs(self, library: Library, batch: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """Ids (B, T), and images (B, N, 1, C, H, W), N at least 1: it cannot do without any."""
        weight = next(self.model.perceiver.parameters())
        pixels = self.processor.pixels([medium for prompt in batch for medium in library.media(prompt.media)])
        if pixels.ndim != 5 or (len(pixels) and pixels.shape[1] != 1):
            raise FlamingoError(f"open_flamingo reads images, not videos: {tuple(pixels.shape)}")
        images = rearrange(pixels, "(b n) f c h w -> b n f c h w", b=len(batch))
        if not images.shape[1]:
            images = images.new_zeros(len(batch), 1, *images.shape[2:])
        ids = torch.tensor([prompt.ids for prompt in batch], device=weight.device)
        return ids, images.to(weight)

    def _score(self, ids: Tensor, images: Tensor, answers: Sequence[tuple[int, ...]]) -> np.ndarray:
        """Summed log-likelihoods (B, answers) of the candidates, one pass for each."""
        self.model.cache_media(input_ids=ids, vision_x=images)
        try:
            cache, last = self._pass(ids, ids.shape[1], None)
            last, columns = last[:, -1:], []
            for answer in answers:
                tokens = torch.tensor(answer, device=ids.device).expand(len(ids), -1)
                cache, logits = self._pass(tokens, ids.shape[1] + len(answer), cache)
                cache.crop(-len(answer))
                logits = torch.cat((last, logits[:, :-1]), dim=1)
                likelihoods = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
                columns.append(likelihoods.gather(-1, tokens[..., None])[..., 0].sum(-1))
        finally:
            self.model.uncache_media()
        return torch.stack(columns, dim=1).double().cpu().numpy() if columns else np.zeros((len(ids), 0))

    def _pass(self, ids: Tensor, length: int, past: Any) -> tuple[Any, Tensor]:
        """Read `ids` (B, T), so that `length` tokens are read; the cache, and logits (B, T, V)."""
        output = self.model(
            vision_x=None,
            lang_x=ids,
            attention_mask=ids.new_ones(len(ids), length),
            clear_conditioned_layers=False,
            past_key_values=past,
            use_cache=True,
        )
        return output.past_key_values, output.logits
