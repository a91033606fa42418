"""The channels of a recording: which are read, and features that keep the differences between them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any, Optional, Union

import numpy as np
from transformers import SeamlessM4TFeatureExtractor, WhisperFeatureExtractor

from .audio_file import DecodeError, Samples

# "mono" is the mean of all channels, "all" is each of them, and numbers from 0 on are some of them, in that order.
Channels = Union[str, Sequence[int]]
# Whisper's features below its loudest one: eight powers of ten, in the scale of its features.
WHISPER_RANGE = 2.0


def parse_channels(given: Union[Channels, Sequence[str], None]) -> Optional[Channels]:
    """Read a choice of channels, as Python or a command line give it.

    Args:
        given (Channels, sequence of str, or None): `"mono"`, `"all"`, numbers from 0 on, or words for one of them.

    Returns:
        Channels, optional: `"mono"`, `"all"`, or a tuple of numbers; None if nothing is given.

    Raises:
        ValueError: if it is something else, or a channel comes twice.
    """
    if given is None:
        return None
    words: list[Any] = [given] if isinstance(given, (str, int)) else list(given)
    if words in (["mono"], ["all"]):
        return str(words[0])
    numbers = tuple(int(word) for word in words if str(word).isdecimal())
    if not words or len(numbers) < len(words) or len(set(numbers)) < len(numbers):
        raise ValueError(
            "`channels` must be 'mono', 'all', or numbers of channels from 0 on, each once, such as [0, 2], got "
            f"{given!r}."
        )
    return numbers


def select_channels(frames: Samples, channels: Channels) -> Samples:
    """Choose or mix the channels of decoded samples.

    Args:
        frames (np.ndarray): `(samples, channels)` float32.
        channels (Channels): the choice.

    Returns:
        np.ndarray: `(samples,)`, the mean of all channels, if mono; otherwise `(C, samples)`.

    Raises:
        DecodeError: if there is no such channel.
    """
    if channels == "mono":
        mean: Samples = frames.mean(axis=1)
        return mean
    if channels != "all":
        count = frames.shape[1]
        numbers = [int(number) for number in channels]
        missing = [str(number) for number in numbers if number >= count]
        if missing:
            raise DecodeError(
                f"it has {count} channel{'s' if count > 1 else ''}, counted from 0, and no channel "
                f"{', '.join(missing)} of `channels={numbers}`: choose others, or 'all'"
            )
        frames = frames[:, numbers]
    return np.ascontiguousarray(frames.T)


def resolve_channels(given: Optional[Channels], model: Any) -> Channels:
    """The channels that a model reads.

    Args:
        given (Channels, optional): the choice of the user.
        model (nn.Module): the model, with or without an adapter.

    Returns:
        Channels: the choice or, without one, `"all"` for an adapter with `num_channels` and `"mono"` for others.

    Raises:
        ValueError: if the choice does not go with the adapter.
    """
    config = _active_config(model)
    number = getattr(config, "num_channels", None)
    if number is not None and given == "mono":
        raise ValueError(
            f"`channels=mono` mixes all channels, but the adapter reads them one by one (num_channels={number}): leave "
            "it out."
        )
    if number is None and hasattr(config, "num_channels") and given not in (None, "mono"):
        raise ValueError(
            f"`channels={given if isinstance(given, str) else list(given)}` is for an adapter with `num_channels`, and "
            "this one has none: set it, or leave `channels` out."
        )
    most = most_channels(model)
    if most is not None and isinstance(given, tuple) and len(given) > most:
        raise ValueError(
            f"`channels={list(given)}` are more than the adapter reads (num_channels={most}): leave some out."
        )
    if number is not None:
        warn_of_levels(model)
    return given or ("mono" if number is None else "all")


def most_channels(model: Any) -> Optional[int]:
    """The number of channels that a model reads: an adapter without `channel_embedding` reads any number.

    Args:
        model (nn.Module): the model, with or without an adapter.

    Returns:
        int, optional: the number; None if there is no limit.
    """
    config = _active_config(model)
    return getattr(config, "num_channels", None) if getattr(config, "channel_embedding", True) else None


def _active_config(model: Any) -> Any:
    """The config of the adapter in use, also in a model that transformers has loaded it into."""
    config = getattr(model, "active_peft_config", None)
    if config is None and getattr(model, "_hf_peft_config_loaded", False):
        config = model.peft_config[model.active_adapters()[0]]
    return config


def warn_of_levels(model: Any) -> None:
    """Warn if a model itself removes the differences in level between the channels of a clip.

    Args:
        model (nn.Module): the model.
    """
    config = getattr(model, "config", None)
    norm = getattr(config, "feat_extract_norm", None)
    if norm == "group" or (norm == "layer" and not getattr(config, "conv_bias", True)):
        warnings.warn(
            f"The convolutions of {type(model).__name__} normalize each channel by itself (`feat_extract_norm='{norm}'`"
            f"{'' if norm == 'group' else ' without biases'}), so that next to nothing of the differences in level "
            "between channels is left. Where these tell something, take another model.",
            stacklevel=2,
        )


def extract_jointly(feature_extractor: Any, waveforms: Samples) -> dict[str, Any]:
    """Extract the features of the channels of one clip, normalized together: their differences in level stay.

    Feature extractors normalize each waveform by itself, so that the louder channel of a clip would be as loud as the
    others. Here all channels have one mean and one variance (wav2vec 2.0, SpeechT5), those of each mel bin (wav2vec
    2.0 BERT), or one floor below the loudest feature (Whisper). Other feature extractors are used as they are.

    Args:
        feature_extractor (SequenceFeatureExtractor): the model's feature extractor.
        waveforms (np.ndarray): `(C, samples)` float32.

    Returns:
        dict[str, np.ndarray]: inputs of the model, `(C, ...)` each.
    """
    extract, options = feature_extractor, {"sampling_rate": feature_extractor.sampling_rate, "return_tensors": "np"}
    if getattr(extract, "do_normalize", False) and hasattr(extract, "zero_mean_unit_var_norm"):
        [joined] = extract.zero_mean_unit_var_norm([waveforms.reshape(-1)], None)
        waveforms = joined.reshape(waveforms.shape)
        extract = copy.copy(extract)
        extract.do_normalize = False
    elif isinstance(extract, SeamlessM4TFeatureExtractor):
        options["do_normalize_per_mel_bins"] = False
    state, each = np.random.get_state(), []
    for waveform in waveforms:
        np.random.set_state(state)  # CLAP cuts long clips at a random place, which is one for all channels
        each.append(extract(waveform, **options))
    features = {name: np.concatenate([channel[name] for channel in each]) for name in each[0]}
    if isinstance(extract, WhisperFeatureExtractor) and len(waveforms) > 1:
        values = features["input_features"]
        features["input_features"] = np.maximum(values, values.max() - WHISPER_RANGE)
    elif isinstance(extract, SeamlessM4TFeatureExtractor):
        # Several frames are stacked, the last of which may be padding.
        stacked = features["input_features"]
        frames = stacked.reshape(len(waveforms), -1, extract.num_mel_bins)
        real = frames.any((0, 2))
        # In the order in which the extractor sums.
        values = np.asfortranarray(frames[:, real].reshape(-1, extract.num_mel_bins))
        frames[:, real] = (frames[:, real] - values.mean(0)) / np.sqrt(values.var(0, ddof=1) + 1e-7)
        features["input_features"] = frames.reshape(stacked.shape)
    return features


def check_levels(feature_extractor: Any) -> None:
    """Check that a feature extractor keeps the differences in level between the channels of a clip.

    Args:
        feature_extractor (SequenceFeatureExtractor): the model's feature extractor.

    Raises:
        ValueError: if a channel at half the level has the same features.
    """
    noise = np.random.default_rng(0).standard_normal(feature_extractor.sampling_rate).astype(np.float32) / 10
    features = extract_jointly(feature_extractor, np.stack([noise, noise / 2]))[feature_extractor.model_input_names[0]]
    differences = np.abs(features[0] - features[1])
    differences = differences[differences > 0]  # padding does not differ
    # Not the greatest one: guards of logarithms differ also where each is normalized by itself.
    if len(differences) == 0 or np.median(differences) < 1e-3:
        raise ValueError(
            f"{type(feature_extractor).__name__} normalizes each channel by itself, which removes the differences in "
            "level between them: give another model or feature extractor, or leave `channels` out and mix them."
        )
