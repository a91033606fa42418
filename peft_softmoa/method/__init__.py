"""The mixture itself, without PEFT and without models: tensors in, tensors out."""

from .convolution import ConvolutionExperts, PatchGrid
from .experts import BottleneckExperts
from .mixture import Mixture

__all__ = ["BottleneckExperts", "ConvolutionExperts", "Mixture", "PatchGrid"]
