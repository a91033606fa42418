"""The mixture itself, without PEFT and without models: tensors in, tensors out."""

from .experts import BottleneckExperts, ConvolutionExperts, PatchGrid
from .mixture import Mixture

__all__ = ["BottleneckExperts", "ConvolutionExperts", "Mixture", "PatchGrid"]
