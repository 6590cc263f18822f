"""LoRA on the LM (arXiv 2106.09685, by peft), and its frozen weights in 4 bits (QLoRA, arXiv 2305.14314).

peft puts the adapters *into* the LM, in the place of its projections. It stays the LM that Flamingo knows: hooks on its
decoder layers, its forward and its own names work as before, but for the projections' weights, which are `….base_layer`
as long as there are adapters. `merge` folds them in, and gives every tensor its name back.

    add_adapters(model, LoraRecipe(rank=8))     # before the optimizer is built
    save_adapters(model, "adapters")            # as peft writes them: PeftModel.from_pretrained(lm, "adapters")
    merge(model)                                # the same logits, from an LM without adapters

Legend: O, I outputs and inputs of a projection, r rank.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from flamingo import FlamingoForConditionalGeneration
from flamingo.errors import FlamingoError
from flamingo.modeling import decoder_layers
from train.recipe import LoraRecipe

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

    from train.nf4 import Linear4

# peft imports bitsandbytes, which asks for a kernel that only inference uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

ADAPTER = "default"
"""peft's name of the one adapter that there is."""
LANGUAGE = "language_model."
PROJECTIONS = {
    "attention": re.compile(r"(self_attn|self_attention|attention|attn)\..+"),
    "mlp": re.compile(r"((mlp|ffn|feed_forward)\..+|fc1|fc2)"),
}
"""Names of projections within a decoder layer: all causal LMs of transformers call them by one of these."""


def add_adapters(model: FlamingoForConditionalGeneration, recipe: LoraRecipe) -> None:
    """Put adapters beside the LM's projections, in place. They start without effect, and they alone of the LM train.

    Raises:
        FlamingoError: where peft is not installed, the LM has adapters, or has no such projections; it names the LM.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise FlamingoError(f"lora: expected peft, as pip install 'flamingo-icl[lora]' brings it ({error})") from error
    lm = model.language_model
    if adapters(model):
        raise FlamingoError(f"lora: {type(lm).__name__} has adapters already; expected it without, or `merge` first")
    names = target_names(model, recipe)
    settings = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=pattern_of(names),
        fan_in_fan_out=any(isinstance(lm.get_submodule(name), Conv1D) for name in names),
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.config.backbones.get("language", {}).get("name"),
    )
    lm.is_loaded_in_4bit = any(module.weight.dtype == torch.uint8 for module in _linear(lm))  # peft asks the model
    inject_adapter_in_model(settings, lm, ADAPTER)
    del lm.is_loaded_in_4bit


def target_names(model: FlamingoForConditionalGeneration, recipe: LoraRecipe) -> list[str]:
    """Names, within the LM, of the projections that get adapters.

    Raises:
        FlamingoError: where none is one; it names the LM's class and the choice.
    """
    lm = model.language_model
    wanted = [PROJECTIONS[each] for each in recipe.projections]
    if recipe.pattern is not None:
        try:
            wanted = [re.compile(recipe.pattern)]
        except re.error as error:
            raise FlamingoError(f"lora.pattern={recipe.pattern!r}: expected a regular expression ({error})") from None
    path = layers_path(model)
    found = []
    for name, module in lm.named_modules():
        within = re.fullmatch(rf"{re.escape(path)}\.\d+\.(.+)", name)
        matches = within is not None and any(each.fullmatch(within[1]) for each in wanted)
        if matches and isinstance(module, (nn.Linear, Conv1D)):
            found.append(name)
    if not found:
        asked = recipe.pattern or " and ".join(recipe.projections)
        raise FlamingoError(
            f"lora: {type(lm).__name__} has no projections of {asked} in its decoder layers; expected lora.pattern to "
            f"match some of {', '.join(_within_a_layer(model))}"
        )
    return found


def pattern_of(names: list[str]) -> str:
    """The regular expression of names that differ in the number of their layer, as peft keeps it with adapters."""
    parts = dict.fromkeys(re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name), count=1) for name in names)
    return "|".join(parts)


def layers_path(model: FlamingoForConditionalGeneration) -> str:
    """Name of the list of decoder layers within the LM."""
    layers = decoder_layers(model.language_model, model.config.decoder_layers)
    return next(path for path, module in model.language_model.named_modules() if module is layers)


def _within_a_layer(model: FlamingoForConditionalGeneration) -> list[str]:
    """What might have adapters in the decoder layers: names within a layer."""
    layers = decoder_layers(model.language_model, model.config.decoder_layers)
    kinds = (nn.Linear, Conv1D)
    return sorted({name for layer in layers for name, each in layer.named_modules() if isinstance(each, kinds)})


def _linear(module: nn.Module) -> list[nn.Linear]:
    return [each for each in module.modules() if isinstance(each, nn.Linear)]


# -- 4 bits ------------------------------------------------------------------------------------------------------------


def quantise(model: FlamingoForConditionalGeneration, compute_dtype: torch.dtype = torch.float32) -> None:
    """Store the matrices of the LM's decoder layers in 4 bits a weight (nf4), in place. Call it before `add_adapters`.

    Nothing of the quantised weights is in the model's `state_dict` but themselves: they follow from the LM's own.

    Args:
        compute_dtype: of the products, for which the weights are unpacked.

    Raises:
        FlamingoError: where bitsandbytes is not installed, or the LM's matrices are not of `nn.Linear` (GPT-2).
    """
    try:
        from train.nf4 import Linear4
    except ImportError as error:
        raise FlamingoError(
            f"lora.quantised: expected bitsandbytes, as pip install 'flamingo-icl[quantised]' brings it ({error})"
        ) from error
    lm = model.language_model
    layers = decoder_layers(lm, model.config.decoder_layers)
    plain = [
        (layer, name, each)
        for layer in layers
        for name, each in layer.named_modules()
        if isinstance(each, nn.Linear) and type(each) is nn.Linear
    ]
    if not plain:
        raise FlamingoError(f"lora.quantised: {type(lm).__name__} has no nn.Linear in its decoder layers")
    for layer, name, linear in plain:
        layer.set_submodule(name, Linear4.of(linear, compute_dtype))


def dequantise(model: FlamingoForConditionalGeneration) -> list[str]:
    """Unpack what `quantise` packed, in place: the names of the weights, which are not the LM's own any more."""
    layers = decoder_layers(model.language_model, model.config.decoder_layers)
    packed = [
        (layer, name, cast("Linear4", each))
        for layer in layers
        for name, each in layer.named_modules()
        if hasattr(each, "unpacked_linear")
    ]
    for layer, name, linear in packed:
        layer.set_submodule(name, linear.unpacked_linear())
    paths = {module: name for name, module in model.named_modules()}
    return [f"{paths[layer.get_submodule(name)]}.weight" for layer, name, _ in packed]


# -- merging and saving ------------------------------------------------------------------------------------------------


def adapters(model: FlamingoForConditionalGeneration) -> dict[str, LoraLayer]:
    """Names within the model → projections with adapters, in order; none for a model without."""
    found = (
        (name, module)
        for name, module in model.language_model.named_modules(prefix=LANGUAGE.rstrip("."))
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    )
    return dict(found)


def merge(model: FlamingoForConditionalGeneration) -> None:
    """Fold the adapters into the LM's weights, in place: an LM without adapters that gives the same logits.

    W (O, I) becomes W + α/r · B (O, r) · A (r, I), rounded to the precision of W; quantised weights become float32.
    `config.replaced` then names them, so that `save_trained` keeps them. Without adapters nothing happens.
    """
    merged(model, model.state_dict())


@torch.no_grad()
def merged(model: FlamingoForConditionalGeneration, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` with the adapters folded in, under the names of an LM without; the model too is without afterwards.

    Args:
        tensors: the model's whole tensors by name: its `state_dict`, or what was gathered of a model that is shared
            out, whose own weights then stay what they were.
    """
    found = adapters(model)
    if not found:
        return dict(tensors)
    made = {}
    for name, tensor in tensors.items():
        layer, _, inside = name.partition(".base_layer.")
        if not _is_adapters(name):
            made[f"{layer}.{inside}" if inside else name] = tensor
    for name, layer in found.items():
        base, weight = layer.get_base_layer(), made[f"{name}.weight"]
        if hasattr(base, "unpacked_linear"):
            base = base.unpacked_linear()
            weight = base.weight
        down, up = (tensors[f"{name}.lora_{part}.{ADAPTER}.weight"] for part in "AB")
        change = layer.scaling[ADAPTER] * (up @ down)
        made[f"{name}.weight"] = weight + (change.T if layer.fan_in_fan_out else change).to(weight)
        if not isinstance(base.weight, DTensor):
            base.weight.copy_(made[f"{name}.weight"])
        model.set_submodule(name, base)
    others = dequantise(model)
    made.update({name: model.get_parameter(name) for name in others})
    model.config.replaced = sorted({*model.config.replaced, *others, *(f"{name}.weight" for name in found)})
    del model.language_model.peft_config
    return made


def _is_adapters(name: str) -> bool:
    """Whether a tensor of the model is one of an adapter."""
    return name.startswith(LANGUAGE) and ".lora_" in name


def save_adapters(
    model: FlamingoForConditionalGeneration, folder: str | Path, tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Write the adapters as peft does, for `PeftModel.from_pretrained(lm, folder)`: beside, and not in, the LM.

    Args:
        tensors: the model's whole tensors by name, where it is shared out.

    Raises:
        FlamingoError: where there are none.
    """
    if not adapters(model):
        raise FlamingoError("save_adapters: expected a model with adapters")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings: Any = model.language_model.peft_config[ADAPTER]
    settings.save_pretrained(folder)
    tensors = model.state_dict() if tensors is None else tensors
    written = {
        f"base_model.model.{name.removeprefix(LANGUAGE)}".replace(f".{ADAPTER}.", "."): tensor.cpu().contiguous()
        for name, tensor in tensors.items()
        if _is_adapters(name)
    }
    save_file(written, folder / "adapter_model.safetensors", metadata={"format": "pt"})
