"""Which samples of a clip a model needs for a token, and which each of its frames reads."""

from __future__ import annotations

import warnings
from bisect import bisect_left
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from peft import PeftModel
from torch import nn
from transformers import SequenceFeatureExtractor

from ..targets.placement import find_encoder
from ..targets.probes import token_probe
from .audio import AudioError

LONGEST_TOKEN = 30  # seconds; no token reads so much


class FrameGrid(NamedTuple):
    """Where the frames of a model lie: frame t reads the samples from `t step` to `t step + window`.

    Args:
        window (int): number of samples that a frame reads.
        step (int): number of samples from one frame to the next.
    """

    window: int
    step: int

    def count(self, num_samples: int) -> int:
        """Number of frames of a clip: `floor((samples - window) / step) + 1`.

        Args:
            num_samples (int): its length.

        Returns:
            int: at least 0.
        """
        return max((num_samples - self.window) // self.step + 1, 0)

    def middles(self, num_samples: int) -> npt.NDArray[np.float64]:
        """Middles of the frames of a clip, in samples.

        Args:
            num_samples (int): its length.

        Returns:
            np.ndarray: `(frames,)`.
        """
        starts: npt.NDArray[np.float64] = np.arange(self.count(num_samples), dtype=np.float64) * self.step
        return starts + self.window / 2


def find_frames(model: nn.Module, feature_extractor: Any) -> FrameGrid:
    """Find out how a model divides a clip into frames, by running a copy without weights on shapes.

    Args:
        model (nn.Module): the model, with or without an adapter.
        feature_extractor (SequenceFeatureExtractor): its feature extractor.

    Returns:
        FrameGrid: of the tokens that the encoder reads.

    Raises:
        ValueError: if they do not grow with the clip.
    """
    one, two = (shortest_clip(model, feature_extractor, tokens=tokens) for tokens in (1, 2))
    if not 1 <= one < two:
        raise ValueError(
            f"{type(model).__name__} gives no frames that grow with the clip, so that no frame has a place in time."
        )
    return FrameGrid(one, two - one)


def shortest_clip(model: nn.Module, feature_extractor: SequenceFeatureExtractor, tokens: int = 1) -> int:
    """Find how long a clip must be to give a model one token, or more.

    A copy of the model without weights is run on shapes alone, up to the first layer of its encoder.

    Args:
        model (nn.Module): the model, with or without an adapter; it is neither run nor changed.
        feature_extractor (SequenceFeatureExtractor): its feature extractor.
        tokens (int): how many. Default: 1.

    Returns:
        int: the smallest number of samples; 1 if the model cannot run so, or has no layers.
    """
    extract: Any = feature_extractor
    name, rate = extract.model_input_names[0], extract.sampling_rate
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    try:
        probe = token_probe(base, find_encoder(base)[0].name)
    except Exception:  # noqa: BLE001 - a foreign model may raise anything
        return 1

    def is_enough(length: int) -> bool:
        try:
            features = extract(np.zeros(length, np.float32), sampling_rate=rate, return_tensors="pt")[name]
            # Some extractors divide by the deviation over time, which a single frame does not have.
            return bool(features.isfinite().all()) and probe({name: features}) >= tokens
        except Exception:  # noqa: BLE001 - so may a foreign feature extractor
            return False

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        enough = 1
        while not is_enough(enough):
            if enough > LONGEST_TOKEN * rate:
                return 1
            enough *= 2
        lengths = range(enough // 2 + 1, enough)
        return enough // 2 + 1 + bisect_left(lengths, True, key=is_enough)


def check_length(name: str, length: int, min_samples: int, sampling_rate: int) -> None:
    """Check that a clip is long enough for the model.

    Args:
        name (str): the clip, for the error.
        length (int): its number of samples.
        min_samples (int): the smallest number that the model takes, from `shortest_clip`.
        sampling_rate (int): in Hz.

    Raises:
        AudioError: if it is too short.
    """
    if length < min_samples:
        raise AudioError(
            name,
            f"the model does not take its {length / sampling_rate:.3f} s, which is shorter than what one token reads "
            f"({min_samples / sampling_rate:.3f} s)",
        )
