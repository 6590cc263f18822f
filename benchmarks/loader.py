"""How many images a second does one core load, beside the limit of decoding alone and beside open_flamingo's pipeline?

    python benchmarks/loader.py [--quick] [--json FILE]

2,000 documents like those of MMC4: 3 images each on average, JPEG of 500 × 375 and some 45 kB, among 12 sentences. They
are written once as open_flamingo wants them (tars of JSON with base64 inside, three images of four above its 10 kB) and
converted by `flamingo-shards convert mmc4`'s own function. Then, each with one process that loads and one thread:

- limit: decoding, resizing and normalising the same images from memory, by the fastest way known (simplejpeg, torch);
- ours: `rank_batches`, from the shards to batches of tensors, and the same from open_flamingo's tars as they are;
- open_flamingo: its own `get_mmc4_dataset`, fed by a stand-in of torchvision's transforms made of Pillow.

Every side goes through all documents once; only images that come out are counted, not padding. In the end ours goes
through a small set 50 times: how much memory does the process have more at the end than after the fifth?
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import multiprocessing
import random
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import simplejpeg
import torch
from _models import Worker, in_turn
from _record import publish
from PIL import Image as PilImage
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast
from webdataset.tariterators import tar_file_expander

from data_shards.convert import Options, convert
from data_shards.indexing import index_folder
from data_shards.loader import MicroBatches, Source, rank_batches
from data_shards.sequences import Sequences
from data_shards.shards import open_shards
from data_shards.sources.mmc4 import Mmc4Reader
from flamingo import FlamingoProcessor
from flamingo.processing import END_OF_CHUNK, IMAGE_TOKEN

MICRO_BATCH, MOST_IMAGES, TOKENS, SIDE = 8, 6, 256, 224
DISTINCT = 120
"""different pictures, of which the documents' are drawn"""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


# -- the documents -----------------------------------------------------------------------------------------------------


def photograph(number: int) -> bytes:
    """A JPEG of 500 × 375 with coarse shapes, fine texture and about the bytes of a photograph."""
    generator = torch.Generator().manual_seed(number)
    layers = [
        interpolate(torch.rand(1, 3, 3 * 2**k, 4 * 2**k, generator=generator), (375, 500), mode="bilinear") / 1.6**k
        for k in range(8)
    ]
    pixels = sum(layers)
    pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min())
    picture = PilImage.fromarray((255 * pixels[0]).byte().permute(1, 2, 0).numpy())
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def write_documents(folder: Path, number: int) -> list[bytes]:
    """Tars as open_flamingo reads them; returns the pictures."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 8))) for _ in range(2000)]
    pictures = [photograph(k) for k in range(DISTINCT)]
    encoded = [base64.b64encode(picture).decode() for picture in pictures]
    folder.mkdir()
    for shard in range(8):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for key in range(shard, number, 8):
                sentences = [" ".join(rng.choices(words, k=rng.randint(6, 12))) + "." for _ in range(12)]
                images = rng.choice((2, 2, 3, 3, 3, 4, 4, 3))
                matched = sorted(rng.sample(range(12), images))
                info = [
                    {"image_name": f"{key}-{n}.jpg", "matched_text_index": at, "matched_sim": 0.3,
                     "image_base64": rng.choice(encoded)}
                    for n, at in enumerate(matched)
                ]  # fmt: skip
                matrix = [[0.3 if column == at else 0.1 for column in range(12)] for at in matched]
                page = {"url": "", "text_list": sentences, "image_info": info, "similarity_matrix": matrix}
                content = json.dumps(page).encode()
                member = tarfile.TarInfo(f"{key:07d}.json")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return pictures


def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE learnt from the documents' text, with the marks."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    texts = []
    with tarfile.open(folder / "00000.tar") as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            texts.append(" ".join(json.load(file)["text_list"]))
    trainer = trainers.BpeTrainer(vocab_size=4000, show_progress=False, special_tokens=["</s>", "<pad>"])
    backend.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="</s>", eos_token="</s>", pad_token="<pad>")
    made.add_special_tokens({"additional_special_tokens": [END_OF_CHUNK, IMAGE_TOKEN]})
    return made


# -- the sides, each in a process of its own ---------------------------------------------------------------------------


class Limit:
    """Decoding, resizing and normalising, and nothing else."""

    def __init__(self, folder: Path, documents: int):
        torch.set_num_threads(1)
        self.pictures = [photograph(k) for k in range(DISTINCT)]
        self.documents = documents
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))

    def images_per_second(self) -> float:
        """Over as many images as the documents have."""
        total = 3 * self.documents
        start = time.perf_counter()
        for number in range(total):
            self._pixels(self.pictures[number % DISTINCT])
        return total / (time.perf_counter() - start)

    def _pixels(self, data: bytes) -> Tensor:
        decoded = torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1)[None]
        small = interpolate(decoded, (SIDE, SIDE * 500 // 375), mode="bicubic", antialias=True)
        left = (small.shape[3] - SIDE) // 2
        pixels = small[0, :, :, left : left + SIDE].float()
        return pixels.mul_(1 / 255 / self.std).sub_(self.mean / self.std)


class Ours:
    """`rank_batches` with one worker."""

    def __init__(self, folder: Path, documents: int):
        _one_core()
        size = {"shortest_edge": SIDE}
        image_processor = CLIPImageProcessorPil(size=size, crop_size={"height": SIDE, "width": SIDE})
        processor = FlamingoProcessor(image_processor, tokenizer(folder / "tars"))
        self.sequences = Sequences(processor, TOKENS, MOST_IMAGES, rules="open_flamingo")
        self.folder, self.documents = folder, documents

    def data(self, name: str, documents: int) -> tuple[MicroBatches, int]:
        """The shards `name` of the folder, and the steps that go through them once."""
        shards = open_shards(self.folder / name)
        data = MicroBatches([Source("mmc4", shards)], self.sequences, micro_batch=MICRO_BATCH, seed=0)
        return data, min(documents, len(shards)) // MICRO_BATCH

    def images_per_second(self, name: str) -> float:
        """Over all documents."""
        data, steps = self.data(name, self.documents)
        start, images = time.perf_counter(), 0
        for batch in rank_batches(data, batch=MICRO_BATCH, start_step=0, steps=steps, workers=1):
            images += len(batch["pixel_values"])
        return images / (time.perf_counter() - start)

    def growth(self, documents: int, epochs: int) -> float:
        """Memory of the process at the end of many epochs, over that at the end of the fifth; it loads by itself."""
        data, steps = self.data("shards", documents)
        resident = []
        for epoch in range(epochs):
            for _ in rank_batches(data, batch=MICRO_BATCH, start_step=epoch * steps, steps=steps):
                pass
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident.append(pages)
        return max(resident[5:]) / resident[4]


class OpenFlamingo:
    """Its own pipeline with one worker."""

    def __init__(self, folder: Path, documents: int):
        _one_core()
        spec = find_spec("open_flamingo")
        assert spec is not None and spec.origin is not None
        sys.path.insert(0, str(Path(spec.origin).parent / "train"))  # it imports its neighbour by its bare name
        torchvision = ModuleType("torchvision")
        torchvision.transforms = SimpleNamespace(RandomHorizontalFlip=_Flip)  # type: ignore[attr-defined]
        sys.modules["torchvision"] = torchvision
        import data as theirs  # type: ignore[import-not-found]
        import data_utils  # type: ignore[import-not-found]

        def files_alone(*args: Any, **options: Any) -> Iterator[dict[str, Any]]:
            """Without the marks that webdataset 1.0 puts between shards, which end theirs with a KeyError."""
            return (member for member in tar_file_expander(*args, **options) if "fname" in member)

        data_utils.tar_file_expander = files_alone

        args = SimpleNamespace(
            mmc4_shards=str(folder / "tars" / "{00000..00007}.tar"),
            train_num_samples_mmc4=documents,
            mmc4_textsim_threshold=0.24,
            mmc4_min_num_images=1,
            mmc4_max_num_images=MOST_IMAGES,
            batch_size_mmc4=MICRO_BATCH,
            seed=0,
            world_size=1,
            workers=1,
        )
        info = theirs.get_mmc4_dataset(args, _transform, _TheirTokenizer(tokenizer(folder / "tars")))
        self.loader = info.dataloader

    def images_per_second(self) -> float:
        """Over all documents."""
        start, images = time.perf_counter(), 0
        for pixels, _ in self.loader:
            images += int((pixels != 0).flatten(2).any(dim=2).sum())
        return images / (time.perf_counter() - start)


def _one_core() -> None:
    """One thread; and loaders that fork, as they do in a run, though this process was spawned."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)


class _TheirTokenizer:
    """A tokenizer with the attributes that transformers had when open_flamingo was written."""

    def __init__(self, plain: PreTrainedTokenizerFast):
        self.plain, self.eos_token, self.padding_side = plain, plain.eos_token, "right"
        self.additional_special_tokens = [END_OF_CHUNK, IMAGE_TOKEN]
        self.additional_special_tokens_ids = plain.convert_tokens_to_ids(self.additional_special_tokens)

    def __call__(self, text: str, **options: Any) -> Any:
        return self.plain(text, padding_side=self.padding_side, **options)


class _Flip:
    """torchvision's RandomHorizontalFlip."""

    def __init__(self, p: float):
        self.p = p

    def __call__(self, images: Tensor) -> Tensor:
        return images.flip(-1) if torch.rand(1) < self.p else images


def _transform(picture: PilImage.Image) -> Tensor:
    """open_clip's transform: shorter edge to 224 (bicubic), centre crop, tensor, normalise."""
    scale = SIDE / min(picture.size)
    width, height = (int(edge * scale) for edge in picture.size)
    picture = picture.resize((width, height), PilImage.Resampling.BICUBIC)
    left, top = round((width - SIDE) / 2), round((height - SIDE) / 2)
    picture = picture.crop((left, top, left + SIDE, top + SIDE))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float().div(255)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return pixels.sub_(mean).div_(std)


# -- the run -----------------------------------------------------------------------------------------------------------


def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few documents: shows that it runs")
    parser.add_argument("--json", help="where to keep the results")
    parser.add_argument("--runs", type=int, help="of each side (default 3; --quick: 1)")
    options = parser.parse_args()
    documents, rounds = (64, 1) if options.quick else (2000, 3)
    rounds = options.runs or rounds
    figures: dict[str, float | str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pictures = write_documents(folder / "tars", documents)
        figures["KB an image"] = float(np.mean([len(picture) for picture in pictures])) / 1e3
        start = time.perf_counter()
        account = convert(Mmc4Reader(str(folder / "tars")), folder / "shards", Options(max_media=MOST_IMAGES))
        figures["documents/s converted"] = account.documents_read / (time.perf_counter() - start)
        index_folder(folder / "tars", "mmc4")
        kinds: dict[str, type] = {"limit": Limit, "ours": Ours, "open_flamingo": OpenFlamingo}
        sides = {name: Worker(kind, folder=folder, documents=documents) for name, kind in kinds.items()}
        measures: dict[str, Callable[[], float]] = {
            "limit": partial(sides["limit"], "images_per_second"),
            "ours": partial(sides["ours"], "images_per_second", "shards"),
            "ours from base64 tars": partial(sides["ours"], "images_per_second", "tars"),
            "open_flamingo": partial(sides["open_flamingo"], "images_per_second"),
        }
        rates: dict[str, list[float]] = {name: [] for name in measures}
        for _ in range(rounds):
            for name, measure in measures.items():
                rates[name].append(measure())
        for name, each in rates.items():
            figures[f"images/s a core {name}"] = median(each)
        epochs = 8 if options.quick else 50
        figures[f"memory after {epochs} epochs / after 5"] = in_turn({"ours": sides["ours"]}, 1, "growth", 64, epochs)[
            "ours"
        ][0]
        for side in sides.values():
            side.close()
    for peer in ("limit", "open_flamingo"):
        figures[f"ratio images_per_second vs {peer}"] = median(rates["ours"]) / median(rates[peer])
    publish(figures, options.json)


if __name__ == "__main__":
    main()
