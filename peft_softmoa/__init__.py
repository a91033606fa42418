"""Soft mixture of adapters for Hugging Face PEFT. Importing this package registers the tuner."""

from .budget import count_parameters
from .config import SoftMoAConfig
from .describe import describe_targets
from .layer import SoftMoALayer
from .load_balancing import router_aux_loss
from .model import SoftMoAModel
from .registration import register

__version__ = "0.1.0"
__all__ = [
    "SoftMoAConfig",
    "SoftMoALayer",
    "SoftMoAModel",
    "count_parameters",
    "describe_targets",
    "router_aux_loss",
]

register(SoftMoAConfig, SoftMoAModel)
