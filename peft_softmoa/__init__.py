"""Soft mixture of adapters for Hugging Face PEFT. Importing this package registers the tuner."""

from .calls.router_losses import router_aux_loss
from .calls.streaming import RoutingStream, stream_routing
from .config import SoftMoAConfig
from .layer import SoftMoALayer
from .model import SoftMoAModel
from .registration import register, rename_first_containers
from .saving.checks import read_shapes
from .saving.contents import check_adapter
from .saving.pickles import check_loading
from .saving.publishing import complete_pushed_cards
from .strength import rescale_adapter_scale
from .targets.clip_length import fit_feature_extractor, fitting_length
from .targets.description import count_parameters, describe_targets

__version__ = "0.2.0"
__all__ = [
    "RoutingStream",
    "SoftMoAConfig",
    "SoftMoALayer",
    "SoftMoAModel",
    "check_adapter",
    "count_parameters",
    "describe_targets",
    "fit_feature_extractor",
    "fitting_length",
    "rescale_adapter_scale",
    "router_aux_loss",
    "stream_routing",
]

register(SoftMoAConfig, SoftMoAModel)
rename_first_containers()
# PEFT and transformers ask nothing of a method at these places.
complete_pushed_cards()
check_loading(read_shapes)
