"""Flamingo: a Perceiver resampler and gated cross-attention put into a frozen causal language model.

Importing this package registers the model with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from flamingo.backbones import from_backbones
from flamingo.configuration import FlamingoConfig
from flamingo.document import Document, Image, Text, Video
from flamingo.errors import FlamingoError
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processing import FlamingoProcessor

AutoConfig.register(FlamingoConfig.model_type, FlamingoConfig)
AutoModelForImageTextToText.register(FlamingoConfig, FlamingoForConditionalGeneration)
AutoProcessor.register(FlamingoConfig, FlamingoProcessor)

__all__ = [
    "Document",
    "FlamingoConfig",
    "FlamingoError",
    "FlamingoForConditionalGeneration",
    "FlamingoProcessor",
    "Image",
    "Text",
    "Video",
    "from_backbones",
]
