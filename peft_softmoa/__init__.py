"""Soft mixture of adapters for Hugging Face PEFT. Importing this package registers the tuner."""

from .config import SoftMoAConfig
from .layer import SoftMoALayer
from .model import SoftMoAModel
from .registration import register

__version__ = "0.1.0"
__all__ = ["SoftMoAConfig", "SoftMoALayer", "SoftMoAModel"]

register(SoftMoAConfig, SoftMoAModel)
