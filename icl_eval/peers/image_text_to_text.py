"""Any model of transformers that reads images and text (`AutoModelForImageTextToText`), asked what ours are asked.

It is done the plain way, for models of any design: the model's own processor reads a whole prompt, images and all, and
each candidate answer costs a forward of prompt and answer. Nothing is shared, batched or padded.

A prompt takes one of two forms:

- "plain", for base models (Idefics): texts and images in their order; `end` closes every answer, as `<|endofchunk|>`
  does in ours.
- "chat", for models with a chat template (Qwen-VL, SmolVLM, LLaVA, …): the demonstrations, `end` after each, and the
  query are one turn of the user; the answer is the assistant's. It is closed by what the template puts after it. Where
  a template would put all images first (LLaVA's), they are marked in the text, and stay beside their texts.

The score of a candidate is the log-likelihood of all tokens after the prompt: the answer's, and what closes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image as PilImage
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, IdeficsProcessor

from flamingo.document import Medium, Video
from flamingo.errors import FlamingoError
from flamingo.images import decode
from icl_eval.engine import Chunk, Ladder, Library, Query, answer_tokens
from icl_eval.ranking import best_only

Form = Literal["plain", "chat"]
Part = str | PilImage.Image


class _Asked(NamedTuple):
    """A query and all before it, as texts and images in their order."""

    ladder: Ladder
    query: Query
    parts: tuple[Part, ...]


class ImageTextToText:
    """Ranks and generates with a model of transformers (`icl_eval.engine.Answerer`).

    Args:
        model: it is put into evaluation mode.
        processor: the model's, for images and text.
        form: "plain" or "chat"; default: "chat" where the processor has a chat template.
        end: what closes an answer; see above.

    Raises:
        FlamingoError: the processor cannot make prompts of that form.
    """

    def __init__(self, model: Any, processor: Any, *, form: Form | None = None, end: str = "\n"):
        has_template = getattr(processor, "chat_template", None) is not None
        if form == "chat" and not has_template:
            raise FlamingoError(f"form: chat, but {type(processor).__name__} has no chat template")
        if not end:
            raise FlamingoError("end: '', expected what closes an answer")
        self.model, self.processor, self.end = model.eval(), processor, end
        self.form: Form = form or ("chat" if has_template else "plain")
        self.reads_rows = isinstance(processor, IdeficsProcessor)  # of texts and images, instead of marks in a text
        self.marks_images = not self.reads_rows if self.form == "plain" else not self._keeps_order()
        if self.marks_images and not hasattr(processor, "image_token"):
            raise FlamingoError(
                f"form: {self.form}, but {type(processor).__name__} names no image_token to mark images with"
            )

    @classmethod
    def from_pretrained(cls, model: str | Path, *, form: Form | None = None, end: str = "\n", **options: Any) -> Any:
        """Of a name on the hub, or a folder.

        Args:
            options: of `AutoModelForImageTextToText.from_pretrained`, such as `dtype` and `device_map`.
        """
        processor = AutoProcessor.from_pretrained(model)
        return cls(AutoModelForImageTextToText.from_pretrained(model, **options), processor, form=form, end=end)

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
            FlamingoError: where the tokens of a prompt are no prefix of those of prompt and answer, a medium is a
                video, or a text holds the mark of images.
        """

        def scores(asked: _Asked) -> np.ndarray:
            prompt = self._inputs(asked, None)["input_ids"][0].tolist()
            each = [self._score(asked, answer, prompt, normalise) for answer in asked.query.answers]
            return best_only(np.array(each), top_k)

        return self._each(library, ladders, scores, progress)

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
        """As `Engine.generate`: what the model says until it closes its answer.

        Raises:
            FlamingoError: a medium is a video, or a text holds the mark of images.
        """

        def text(asked: _Asked) -> str:
            inputs = self._inputs(asked, None)
            found = self.model.generate(
                **inputs,
                do_sample=False,
                num_beams=beams,
                length_penalty=length_penalty,
                max_new_tokens=max_new_tokens,
                stop_strings=[self.end] if self.form == "plain" else None,
                tokenizer=self.processor.tokenizer,
            )
            new = found[0, inputs["input_ids"].shape[1] :]
            said: str = self.processor.tokenizer.decode(new, skip_special_tokens=True)
            return (said.partition(self.end)[0] if self.form == "plain" else said).strip()

        return self._each(library, ladders, text, progress)

    def _each(
        self,
        library: Library,
        ladders: Sequence[Ladder],
        answer: Callable[[_Asked], Any],
        progress: Callable[[int], None] | None,
    ) -> list[list[Any]]:
        found: list[list[Any]] = []
        for ladder in ladders:
            found.append([])
            for query in ladder.queries:
                shown = [(*self._parts(library, chunk), self.end) for chunk in ladder.demonstrations[: query.after]]
                parts = [part for chunk in shown for part in chunk] + self._parts(library, query.chunk)
                mark = getattr(self.processor, "image_token", "<image>")
                if any(mark in part for part in parts if isinstance(part, str)):
                    raise FlamingoError(f"{ladder.key}: a text holds {mark}, which would be read as an image")
                found[-1].append(answer(_Asked(ladder, query, _joined(parts))))
                if progress is not None:
                    progress(1)
        return found

    @staticmethod
    def _parts(library: Library, chunk: Chunk) -> list[Part]:
        media = iter(library.media(chunk.media))
        return [part if isinstance(part, str) else _picture(next(media)) for part in chunk.parts]

    def _score(self, asked: _Asked, answer: str, prompt: list[int], normalise: str) -> float:
        inputs = self._inputs(asked, answer)
        whole = inputs["input_ids"][0].tolist()
        tokens = answer_tokens(asked.ladder.key, asked.query.chunk, answer, prompt, whole)
        logits = self.model(**inputs).logits[0, -len(tokens) - 1 : -1]
        likelihoods = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
        each = likelihoods.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])
        return float(each.sum() if normalise == "sum" else each.mean())

    # -- forms of prompts ----------------------------------------------------------------------------------------------

    def _inputs(self, asked: _Asked, answer: str | None) -> dict[str, Tensor]:
        """What the model takes: one prompt, or, with an answer, a whole that is closed."""
        made = self._plain(asked, answer) if self.form == "plain" else self._chat(asked, answer)
        inputs: dict[str, Tensor] = made.to(self.model.device, self.model.dtype)
        return inputs

    def _plain(self, asked: _Asked, answer: str | None) -> Any:
        parts = asked.parts if answer is None else _joined([*asked.parts, answer, self.end])
        images = [part for part in parts if not isinstance(part, str)]
        if self.reads_rows:
            return self.processor(text=[list(parts)], add_end_of_utterance_token=False, return_tensors="pt")
        return self.processor(text=[self._marked(parts)], images=images or None, return_tensors="pt")

    def _marked(self, parts: Sequence[Part]) -> str:
        return "".join(part if isinstance(part, str) else self.processor.image_token for part in parts)

    def _chat(self, asked: _Asked, answer: str | None) -> Any:
        images = [part for part in asked.parts if not isinstance(part, str)]
        text = self._turns((self._marked(asked.parts),) if self.marks_images else asked.parts, answer)
        bos = self.processor.tokenizer.bos_token
        special = bos is None or not text.startswith(bos)
        return self.processor(text=[text], images=images or None, add_special_tokens=special, return_tensors="pt")

    def _turns(self, parts: Sequence[Part | None], answer: str | None) -> str:
        """The user's turn and the assistant's, or its beginning, as the template has them."""
        content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
        turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if answer is not None:
            turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        text: str = self.processor.apply_chat_template(turns, add_generation_prompt=answer is None, tokenize=False)
        # Templates go on to the next turn, which is no part of the answer.
        return text if answer is None else text.rstrip("\n")

    def _keeps_order(self) -> bool:
        """Whether the template leaves images where they stand among texts."""
        _, _, rest = self._turns((None, "first", None, "second"), None).partition("first")
        return bool(rest.partition("second")[0].strip())


def _joined(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Texts that follow one another as one."""
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return tuple(joined)


def _picture(medium: Medium) -> PilImage.Image:
    if isinstance(medium, Video):
        raise FlamingoError("models of AutoModelForImageTextToText are asked about images here, found a video")
    return PilImage.fromarray(rearrange(decode(medium, 3), "c h w -> h w c").contiguous().numpy())
