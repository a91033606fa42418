"""Which samples of a clip a model needs for a token, and which each of its frames reads."""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import numpy as np
import numpy.typing as npt
from peft import PeftModel
from torch import nn

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
    """Find out how a model divides a clip into the frames of its logits, by running a copy without weights on shapes.

    Args:
        model (nn.Module): the model, with or without an adapter.
        feature_extractor (SequenceFeatureExtractor): its feature extractor.

    Returns:
        FrameGrid: of the frames.

    Raises:
        ValueError: if they do not grow with the clip.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    frames = _counter(base, feature_extractor, None)
    # Most models have a frame for each token of the encoder, which a run up to its first layer counts much faster.
    for count in (_counter(base, feature_extractor, _first_layer(base)), frames):
        # Not one frame: some feature extractors need two to normalize.
        two, three = (_shortest(count, tokens, feature_extractor.sampling_rate) for tokens in (2, 3))
        if 1 < two < three:
            grid = FrameGrid(two - (three - two), three - two)
            if all(frames(length) == grid.count(length) for length in (three - 1, three, three + 7 * grid.step)):
                return grid
    raise ValueError(
        f"{type(model).__name__} gives no frames that grow with the clip, so that no frame has a place in time."
    )


def shortest_clip(model: nn.Module, feature_extractor: Any) -> int:
    """Find how long a clip must be to give a model one token.

    A copy of the model without weights is run on shapes alone, up to the first layer of its encoder.

    Args:
        model (nn.Module): the model, with or without an adapter; it is neither run nor changed.
        feature_extractor (SequenceFeatureExtractor): its feature extractor.

    Returns:
        int: the smallest number of samples; 1 if the model cannot run so, or has no layers.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layer = _first_layer(base)
    if layer is None:
        return 1
    return _shortest(_counter(base, feature_extractor, layer), 1, feature_extractor.sampling_rate)


def _first_layer(model: nn.Module) -> Optional[str]:
    try:
        return find_encoder(model)[0].name
    except Exception:  # noqa: BLE001 - a foreign model may raise anything
        return None


def _counter(model: nn.Module, feature_extractor: Any, layer: Optional[str]) -> Callable[[int], int]:
    """What counts the tokens that come to a layer, or the frames of the logits, by the length of a clip."""
    name, rate = feature_extractor.model_input_names[0], feature_extractor.sampling_rate
    try:
        probe = token_probe(model, layer)
    except Exception:  # noqa: BLE001 - a foreign model may raise anything
        return lambda length: 0

    def count(length: int) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                clip = np.zeros(length, np.float32)
                features = feature_extractor(clip, sampling_rate=rate, return_tensors="pt")[name]
                # Some extractors divide by the deviation over time, which a single frame does not have.
                return probe({name: features}) if features.isfinite().all() else 0
            except Exception:  # noqa: BLE001 - so may a foreign feature extractor
                return 0

    return count


def _shortest(count: Callable[[int], int], tokens: int, rate: int) -> int:
    """The smallest length of a clip that has a number of tokens; 1 if there is none."""
    enough = 1
    while count(enough) < tokens:
        if enough > LONGEST_TOKEN * rate:
            return 1
        enough *= 2
    lengths = range(enough // 2 + 1, enough)
    return enough // 2 + 1 + bisect_left(lengths, True, key=lambda length: count(length) >= tokens)


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
