"""The mixture itself, without PEFT and without models: tensors in, tensors out."""

from .conformer import ConformerExperts
from .convolution import ConvolutionExperts, PatchGrid
from .experts import BottleneckExperts
from .mixture import Mixture

__all__ = ["BottleneckExperts", "ConformerExperts", "ConvolutionExperts", "Mixture", "PatchGrid"]
