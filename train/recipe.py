"""What a run is: dataclasses, read from YAML and overridden on the command line."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import jsonargparse

from flamingo.errors import FlamingoError, plain_options

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

R = TypeVar("R")


@dataclass
class ModelRecipe:
    """The backbones and the shape of Flamingo's own parts (`flamingo.FlamingoConfig`)."""

    vision: str = "package:data_shards/glyphs/assets/vision"
    """folder or hub id of the vision tower; `package:NAME/FOLDER` is inside an installed package"""
    language: str = "package:data_shards/glyphs/assets/language"
    """folder or hub id of the causal LM"""
    cross_attention_every: int = 1
    """a gated block stands before every this many decoder layers"""
    cross_attention_heads: int = 8
    """attention heads of a gated block"""
    cross_attention_head_dim: int = 64
    """channels of each head"""
    cross_attention_ff_mult: int = 4
    """inner width of a gated block's feed-forward, as a multiple of its width"""
    resampler_depth: int = 6
    """layers of the resampler"""
    resampler_latents: int = 64
    """latents that a medium becomes"""
    resampler_heads: int = 8
    """attention heads of the resampler"""
    resampler_head_dim: int = 64
    """channels of each head"""
    resampler_ff_mult: int = 4
    """inner width of the resampler's feed-forward, as a multiple of its width"""
    media_attention: Literal["previous", "all"] = "previous"
    """which media a text token sees"""
    train_new_tokens: bool = True
    """whether the new rows for `<image>` and `<|endofchunk|>` train, where the LM lacks these tokens"""
    trust_remote_code: bool = False
    """run code that comes with the backbones"""


@dataclass
class SourceRecipe:
    """One shard set of the mixture."""

    shards: str
    """folder of indexed shards, or its URL; `{out}` stands for the run's folder"""
    share: float = 1.0
    """share of the samples, relative to the other active sources"""
    loss_weight: float = 1.0
    """weight of this source's mean loss in the sum (Flamingo, section 3.2)"""
    start_step: int = 0
    """step from which on the source is used"""


@dataclass
class GlyphsRecipe:
    """The embedded world's documents, written before the first step where they are not there yet."""

    folder: str = "{out}/shards"
    """where `naming` and `episodes` are written; `{out}` stands for the run's folder"""
    naming: int = 9000
    """naming documents"""
    episodes: int = 17000
    """episodes, each with names of its own"""
    processes: int = 2
    """processes that write"""


@dataclass
class InstructionsRecipe:
    """The embedded world's instructions, written and converted before the first step where they are not there yet."""

    folder: str = "{out}/instructions"
    """where MIMIC-IT's files are written, and the shards of each dataset below `shards`; `{out}`: the run's folder"""
    queries: dict[str, int] = field(default_factory=dict)
    """instructions that are asked, of each kind that is to be written (data_shards/glyphs/instructions.py)"""
    processes: int = 2
    """processes that write"""


@dataclass
class DataRecipe:
    """What is read."""

    sources: dict[str, SourceRecipe] = field(default_factory=dict)
    """the mixture, by name"""
    shares_of: Literal["samples", "documents"] = "samples"
    """what shares are of: samples; or documents, so that of equal shares every document is read equally often"""
    max_tokens: int = 256
    """tokens of a sequence"""
    max_media: int = 5
    """media of a sequence"""
    next_media: float = 0.0
    """probability that the texts of a sequence see the medium that comes next instead of the one before"""
    rules: Literal["flamingo", "open_flamingo"] = "flamingo"
    """where `<|endofchunk|>` stands and which tokens count"""
    leading_space: float = 0.0
    """probability that a space is put before the texts of a sequence (Flamingo: 0.5)"""
    packing: bool = False
    """short sequences of a micro-batch share rows of max_tokens; the LM must keep them apart, which is checked"""
    flip: float = 0.0
    """probability that left and right of a medium are exchanged"""
    crop: float = 1.0
    """least share of a medium's area that a random crop keeps; 1: no crop"""
    max_fault_share: float = 0.02
    """largest share of a source's samples that may be faulty; faulty ones are replaced, past the share the run stops"""
    cache: str = "{out}/cache"
    """folder for remote shards on this machine; `{out}` stands for the run's folder"""
    cache_gb: float = 64.0
    """how much of it those of all sources may fill together, in units of 10⁹ bytes"""
    workers: int = 1
    """processes a rank that read ahead; 0 reads in the training process"""
    glyphs: GlyphsRecipe | None = None
    """set: write the embedded world first"""
    instructions: InstructionsRecipe | None = None
    """set: write the embedded world's instructions first"""

    def shares(self, documents: Mapping[str, int]) -> list[float]:
        """The sources' shares of the samples, where they have so many documents, by name."""
        return sampling_shares(asdict(self), documents)


def sampling_shares(data: Mapping[str, Any], documents: Mapping[str, int]) -> list[float]:
    """`DataRecipe.shares` of a recipe as a checkpoint has it."""
    by_documents = data.get("shares_of") == "documents"
    return [source["share"] * (documents[name] if by_documents else 1) for name, source in data["sources"].items()]


@dataclass
class OptimizerRecipe:
    """AdamW, its groups and its schedule."""

    learning_rate: float = 1e-4
    """peak learning rate"""
    gate_factor: float = 1.0
    """learning rate of the gates, as a multiple"""
    weight_decay: float = 0.1
    """decoupled decay, of the gated blocks' matrices alone"""
    betas: tuple[float, float] = (0.9, 0.999)
    """decay of AdamW's running means"""
    clip: float = 1.0
    """largest global norm of the gradient"""
    adapter_factor: float = 1.0
    """learning rate of the LM's adapters, as a multiple (tuning with LoRA)"""
    warmup_steps: int = 5000
    """steps of linear warm-up"""
    warmup_share: float | None = None
    """share of all steps that are warm-up, instead of warmup_steps"""
    schedule: Literal["constant", "cosine"] = "constant"
    """after the warm-up: constant, or a cosine to zero at the last step"""

    def warmup(self, steps: int) -> int:
        """Steps of warm-up among so many."""
        return self.warmup_steps if self.warmup_share is None else math.ceil(self.warmup_share * steps)

    def check(self) -> None:
        """Raise FlamingoError for numbers that cannot be, naming the field."""
        if self.warmup_share is not None and not 0 <= self.warmup_share <= 1:
            raise FlamingoError(f"optimizer.warmup_share={self.warmup_share}: expected a share, 0 to 1")


@dataclass
class ParallelRecipe:
    """How the processes of a run share the work (`train.parallel`); losses do not depend on it but for rounding."""

    kind: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every process holds the whole model; fsdp: parameters, gradients and optimizer are shared out (FSDP2)"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """of matrix products; parameters that train, their gradients and the optimizer are float32 in either case"""
    frozen_in_bfloat16: bool = False
    """store frozen backbones in bfloat16: half the memory"""
    activation_checkpointing: bool = False
    """compute decoder layers and gated blocks again in the backward pass: less memory, about a third more time"""
    cpu_offload: bool = False
    """keep what fsdp shares out in the memory of the CPU between uses, and step there"""
    compile: bool = False
    """torch.compile the forward pass; not with fsdp"""
    timeout: float = 600.0
    """seconds after which a process that no longer answers ends the job"""

    def check(self) -> None:
        """Raise FlamingoError for what does not go together, naming the field."""
        if self.timeout <= 0:
            raise FlamingoError(f"parallel.timeout={self.timeout}: expected a positive number of seconds")
        for name, kind in (("cpu_offload", "fsdp"), ("compile", "ddp")):
            if getattr(self, name) and self.kind != kind:
                raise FlamingoError(f"parallel.{name}=true: expected parallel.kind={kind}, got {self.kind}")


@dataclass
class TrackingRecipe:
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online where a key is set, else offline"""
    project: str = "flamingo"
    """W&B project"""
    log_every: int = 10
    """steps between two rows"""


@dataclass
class EvaluationRecipe:
    """Few-shot scores and generations while training (`train.evaluations`)."""

    every: int = 0
    """steps between two evaluations, and one at the last step; 0: none"""
    tasks: list[str] = field(default_factory=lambda: ["glyphs_5way"])
    """names of tasks of `icl_eval`, or paths of their YAML files"""
    shots: list[int] = field(default_factory=lambda: [0, 1, 4])
    """demonstrations per class, each a point of the curve; a task that knows 0 shots only keeps to it"""
    queries: int = 200
    """queries of each point, shared among the processes"""
    generations: int = 4
    """queries of each task that the model also answers in its own words, for the table of generations"""
    batch: int = 32
    """queries that are evaluated at once; scores do not depend on it"""
    split: str = "validation"
    """held-out split to use instead of each task's own, so that choices while training never touch the test classes"""

    def check(self) -> None:
        """Raise FlamingoError for numbers that cannot be, naming the field."""
        least = {"every": 0, "queries": 1, "generations": 0, "batch": 1}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise FlamingoError(f"evaluation.{name}={getattr(self, name)}: expected {number} or more")
        if self.every and not (self.tasks and self.shots):
            raise FlamingoError("evaluation.every: expected at least one of evaluation.tasks and evaluation.shots")


@dataclass
class Run:
    """What a run is, whatever it begins with: the fields that pretraining and tuning share."""

    out: str = "runs/run"
    """folder of the run"""
    seed: int = 0
    """seed of initialisation, order and augmentation"""
    steps: int = 1000
    """optimizer steps"""
    batch: int = 32
    """sequences of a step, over all processes; a multiple of micro_batch · processes"""
    micro_batch: int = 32
    """sequences of one forward pass"""
    save_every: int = 500
    """steps between two checkpoints"""
    keep_checkpoints: int = 2
    """how many of the newest checkpoints stay"""
    keep_every: int = 0
    """the checkpoint of every so many steps stays too; 0: none"""
    non_finite_limit: int = 10
    """steps in a row whose loss or gradient is not finite, after which the run stops; each such step is skipped"""
    resume_anyway: bool = False
    """resume although data or recipe differ from the checkpoint's"""
    data: DataRecipe = field(default_factory=DataRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    parallel: ParallelRecipe = field(default_factory=ParallelRecipe)
    tracking: TrackingRecipe = field(default_factory=TrackingRecipe)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)

    def place(self, template: str) -> str:
        """A path or URL of the recipe, with `{out}` filled in."""
        return template.replace("{out}", self.out)

    def path(self, template: str) -> Path:
        """A path of the recipe, with `{out}` filled in."""
        return Path(self.place(template))

    def settled(self, documents: Mapping[str, int]) -> Self:
        """With what depends on how many documents each source has."""
        return self

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for checkpoints and trackers."""
        return asdict(self)

    def check(self, processes: int = 1) -> None:
        """Raise FlamingoError for numbers that cannot be, naming the field, before anything takes time."""
        own = ("batch", "micro_batch", "save_every", "keep_checkpoints", "non_finite_limit")
        positive = {name: getattr(self, name) for name in own} | {
            "steps": self.settled({}).steps,
            "tracking.log_every": self.tracking.log_every,
            "data.max_tokens": self.data.max_tokens,
            "data.max_media": self.data.max_media,
        }
        for name, number in positive.items():
            if number < 1:
                raise FlamingoError(f"{name}={number}: expected a positive number")
        if not 0 <= self.data.max_fault_share <= 1:
            raise FlamingoError(f"data.max_fault_share={self.data.max_fault_share}: expected a share, 0 to 1")
        if self.keep_every < 0:
            raise FlamingoError(f"keep_every={self.keep_every}: expected 0 or more steps")
        if self.data.cache_gb <= 0:
            raise FlamingoError(f"data.cache_gb={self.data.cache_gb}: expected a positive number")
        if self.data.workers < 0:
            raise FlamingoError(f"data.workers={self.data.workers}: expected 0 or more")
        if self.batch % (self.micro_batch * processes):
            raise FlamingoError(
                f"batch={self.batch}: expected a multiple of micro_batch · processes = {self.micro_batch} · {processes}"
            )
        if not self.data.sources:
            raise FlamingoError("data.sources: expected at least one source")
        self.optimizer.check()
        self.parallel.check()
        self.evaluation.check()


@dataclass
class Recipe(Run):
    """One pretraining run."""

    out: str = "runs/pretrain"
    """folder of the run"""
    model: ModelRecipe = field(default_factory=ModelRecipe)

    def alone(self) -> Recipe:
        """Without what a command adds to it: what a checkpoint keeps, and is read back as."""
        return Recipe(**{field.name: getattr(self, field.name) for field in fields(Recipe)})


@dataclass
class InitRecipe:
    """The model that tuning begins with."""

    path: str = ""
    """folder of a model (`from_pretrained` or `save_trained`), a checkpoint or folder of a run, or file or folder of an
    OpenFlamingo or Otter checkpoint; `{out}` stands for the run's folder"""
    kind: Literal["auto", "flamingo", "checkpoint", "open_flamingo", "otter"] = "auto"
    """what `path` is; auto: by what is in the folder, and a file is OpenFlamingo's"""
    vision: str | None = None
    """folder or hub id of the vision tower: needed for OpenFlamingo and Otter, else if it is not where it was"""
    language: str | None = None
    """folder or hub id of the LM, likewise"""
    new_output_rows: Literal["mean", "input", "random"] | None = None
    """where to start output rows of new tokens that an OpenFlamingo or Otter checkpoint has none of"""
    trust_remote_code: bool = False
    """run code that comes with the backbones"""


@dataclass
class LoraRecipe:
    """Low-rank adapters on the LM (`train.lora`)."""

    rank: int = 16
    """of the adapters' matrices"""
    alpha: float = 32.0
    """the adapters' output is multiplied by alpha / rank"""
    dropout: float = 0.05
    """probability that an input of an adapter is zero, in training"""
    projections: list[Literal["attention", "mlp"]] = field(default_factory=lambda: ["attention", "mlp"])
    """which matrices of each decoder layer get one; their names are found for every family of LMs"""
    pattern: str | None = None
    """regular expression of names within a decoder layer, such as `self_attn\\.[qv]_proj`, instead of `projections`"""
    quantised: bool = False
    """QLoRA: store the frozen matrices of the decoder layers in 4 bits (nf4); one process, or parallel.kind=ddp"""

    def check(self) -> None:
        """Raise FlamingoError for numbers that cannot be, naming the field."""
        if self.rank < 1 or self.alpha <= 0:
            raise FlamingoError(f"lora.rank={self.rank}, lora.alpha={self.alpha:g}: expected positive numbers")
        if not 0 <= self.dropout < 1:
            raise FlamingoError(f"lora.dropout={self.dropout}: expected a probability below 1")
        if not self.projections and self.pattern is None:
            raise FlamingoError("lora.projections: expected attention, mlp or both, or lora.pattern")


@dataclass
class TuneRecipe(Run):
    """One tuning run on instructions, by default as Otter is tuned (arXiv 2305.03726; github.com/Luodian/Otter)."""

    out: str = "runs/tune"
    """folder of the run"""
    steps: int = 0
    """optimizer steps; 0: as many as `epochs` make"""
    epochs: float = 3.0
    """how often all documents of all sources are read, where steps is 0"""
    init: InitRecipe = field(default_factory=InitRecipe)
    answer_token: bool = True
    """add Otter's `<answer>` where the model lacks it; false: for shards that do not have it, unlike those of ours"""
    spaced: bool = False
    """whether the shards have a space after `User:` and before the answer; the saved chat template does as they do"""
    frames: int = 0
    """give a model without them embeddings for so many frames of a video; 0: leave it as it is"""
    train_new_tokens: bool = True
    """whether the rows of tokens that the LM lacks train"""
    train_language: Literal["frozen", "lora", "full"] = "frozen"
    """what trains of the LM: nothing, adapters as `lora` says, or everything"""
    lora: LoraRecipe = field(default_factory=LoraRecipe)
    data: DataRecipe = field(default_factory=lambda: DataRecipe(max_tokens=512, shares_of="documents"))
    optimizer: OptimizerRecipe = field(
        default_factory=lambda: OptimizerRecipe(
            learning_rate=1e-5, betas=(0.9, 0.999), warmup_share=0.01, schedule="cosine"
        )
    )
    parallel: ParallelRecipe = field(default_factory=lambda: ParallelRecipe(precision="bfloat16"))

    def alone(self) -> TuneRecipe:
        """As `Recipe.alone`."""
        return TuneRecipe(**{field.name: getattr(self, field.name) for field in fields(TuneRecipe)})

    def settled(self, documents: Mapping[str, int]) -> TuneRecipe:
        """With the steps that its epochs make."""
        if self.steps:
            return self
        return replace(self, steps=max(1, math.ceil(self.epochs * sum(documents.values()) / self.batch)))

    def check(self, processes: int = 1) -> None:
        """As `Run.check`, for what tuning adds too."""
        if self.steps == 0 and self.epochs <= 0:
            raise FlamingoError(f"steps=0, epochs={self.epochs:g}: expected one of them to be positive")
        if self.frames < 0:
            raise FlamingoError(f"frames={self.frames}: expected 0 or more")
        if not self.init.path:
            raise FlamingoError("init.path: expected the model that tuning begins with")
        self.lora.check()
        if self.quantised and self.parallel.kind != "ddp":
            raise FlamingoError("lora.quantised=true: expected parallel.kind=ddp: fsdp cannot share out 4-bit weights")
        super().check(processes)

    @property
    def quantised(self) -> bool:
        """Whether the LM is stored in 4 bits."""
        return self.train_language == "lora" and self.lora.quantised


EMBEDDED = "package:train/recipes/embedded.yaml"


def packaged(name: str) -> Path:
    """The file of `package:NAME/FILE`."""
    package, _, path = name.removeprefix("package:").partition("/")
    return Path(str(resources.files(package))) / path


def from_command_line(
    recipe: type[R], arguments: Sequence[str] | None = None, *, default: str | Path | None = None, description: str = ""
) -> R:
    """Build a recipe of `--config FILE` (without one: of `default`) and dotted overrides; `--print_config` prints it.

    Raises:
        FlamingoError: for an unknown key, a value of another type, or a missing file: one line that names it.
    """
    arguments = plain_options(sys.argv[1:] if arguments is None else arguments)
    own_config = any(argument.partition("=")[0] == "--config" for argument in arguments)
    parser = jsonargparse.ArgumentParser(
        exit_on_error=False,
        description=description,
        default_config_files=[str(default)] if default and not own_config else [],
    )
    parser.add_argument("--config", action=jsonargparse.ActionConfigFile, help="recipe file (YAML)")
    parser.add_class_arguments(recipe)
    return _instance(recipe, parser, lambda: parser.parse_args(arguments))


def from_dict(recipe: type[R], values: Mapping[str, Any], source: str) -> R:
    """The inverse of `Recipe.as_dict`, for what was read from JSON.

    Raises:
        FlamingoError: for an unknown key or a value of another type; it names `source`.
    """
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(recipe)
    try:
        return _instance(recipe, parser, lambda: parser.parse_object(deepcopy(dict(values))))  # it changes what it gets
    except FlamingoError as error:
        raise FlamingoError(f"{source}: {error}") from error


def _instance(recipe: type[R], parser: jsonargparse.ArgumentParser, parse: Callable[[], Any]) -> R:
    try:
        parsed = parser.instantiate(parse())
    except (jsonargparse.ArgumentError, TypeError, OSError) as error:
        raise FlamingoError(" ".join(str(error).split())) from error
    return recipe(**{field.name: parsed[field.name] for field in fields(recipe)})  # type: ignore[arg-type]
