"""Classify audio of any length with a trained adapter, window by window."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional, Union

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_AUDIO_FRAME_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_CTC_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)

from ..training.audio import AudioError
from ..training.channels import Channels, check_levels, most_channels, parse_channels, resolve_channels
from ..training.features import extract_features, mask_channels
from ..training.frames import shortest_clip
from ..training.inputs import Collate, cast_inputs
from .loading import load_adapter
from .scores import Scores, scores_of
from .windows import Window

# The window of models that take any length.
DEFAULT_SECONDS = 5.0
# Spectrograms of models with a greatest number of frames have a frame every ten milliseconds.
FRAMES_PER_SECOND = 100


class WindowScores(NamedTuple):
    """What a model says about a part of a clip.

    Args:
        name (str): the clip.
        start (float): where the part begins in the clip, in seconds.
        end (float): where it ends.
        scores (np.ndarray): `(C,)` float32, a score for each class.
    """

    name: str
    start: float
    end: float
    scores: np.ndarray


@dataclass(frozen=True)
class Classifier:
    """A model that classifies clips or their frames, with its feature extractor.

    Args:
        model (nn.Module): the model, for evaluation.
        feature_extractor (SequenceFeatureExtractor): makes its inputs.
        label_names (tuple[str, ...]): the classes, in the order of the model's outputs.
        scores (str): how scores are made of logits: `"softmax"`, `"sigmoid"`, or `"none"` as in regression.
        per_frame (bool): whether it classifies frames and not whole clips.
        max_samples (int, optional): the greatest number of samples that it takes, to which shorter clips are padded.
            None: it takes any.
        min_samples (int): the smallest number.
        channels (Channels): the channels that it reads, as for `decode_audio`. Default: `"mono"`.
        num_channels (int, optional): the number of channels that it takes, of which some may be missing. Default: any.
    """

    model: nn.Module
    feature_extractor: Any
    label_names: tuple[str, ...]
    scores: Scores
    per_frame: bool
    max_samples: Optional[int]
    min_samples: int
    channels: Channels = "mono"
    num_channels: Optional[int] = None

    @property
    def sampling_rate(self) -> int:
        """The sampling rate that the model takes, in Hz."""
        return int(self.feature_extractor.sampling_rate)

    def window(self, seconds: Optional[float] = None, overlap_seconds: float = 0.0) -> tuple[int, int]:
        """Length and step of windows.

        Args:
            seconds (float, optional): length of a window. Default: the length to which the model's clips are padded, or
                five seconds if it takes any.
            overlap_seconds (float): how much of a window is in the next one too. Default: 0.

        Returns:
            tuple[int, int]: both as numbers of samples.

        Raises:
            ValueError: if the model does not take this length, or the overlap is as long as a window.
        """
        rate = self.sampling_rate
        length = self.max_samples or round(DEFAULT_SECONDS * rate)
        if seconds is not None:
            length = round(seconds * rate)
        least, most = self.min_samples / rate, (self.max_samples or np.inf) / rate
        if not self.min_samples <= length <= (self.max_samples or np.inf):
            up_to = f" to {most:.4g}: it cuts off what is longer" if self.max_samples else ""
            raise ValueError(f"`window_seconds` of this model must be from {least:.4g}{up_to}, got {seconds}.")
        step = length - round(overlap_seconds * rate)
        if not 1 <= step <= length:
            raise ValueError(
                f"`overlap` must be less than the {length / rate:.4g} s of a window and not negative, got "
                f"{overlap_seconds:.4g} s."
            )
        if self.per_frame and step < length:
            raise ValueError("`overlap` is not for a model that classifies frames: each frame would come twice.")
        return length, step


def load_classifier(
    adapter: str,
    revision: Optional[str] = None,
    *,
    scores: Optional[Scores] = None,
    channels: Optional[Channels] = None,
    device: Union[str, torch.device, None] = None,
    dtype: Union[str, torch.dtype, None] = None,
) -> Classifier:
    """Load a classifier of clips or frames with its adapter.

        classifier = load_classifier("your-name/esc50-softmoa")
        length, step = classifier.window(overlap_seconds=1.0)
        rate = classifier.sampling_rate
        blocks = audio_blocks("concert.flac", rate, classifier.channels)
        windows = cut_windows("concert", blocks, rate, length, step)
        for result in classify_windows(classifier, windows):
            ...

    Args:
        adapter (str): folder of the adapter, or its id on the Hub.
        revision (str, optional): branch, tag or commit of the adapter.
        scores (str, optional): how scores are made of logits, one of `"softmax"`, `"sigmoid"` and `"none"`. Default:
            what the model's `problem_type` says; without one, `"none"` for one output, and `"softmax"` for several.
        channels (Channels, optional): the channels that are read of a clip, as for `decode_audio`. Default: all for an
            adapter with `num_channels`, otherwise mono.
        device (str or torch.device, optional): where the model runs. Default: the device that Accelerate chooses.
        dtype (str or torch.dtype, optional): dtype of the base model. Default: float32 on a CPU, which is slow with
            others; elsewhere as it is stored.

    Returns:
        Classifier: the classifier.

    Raises:
        ValueError: if the model does not classify, the adapter does not say what its base model is, or the channels
            do not go with the adapter.
        OSError: if the adapter or its base model cannot be read.
    """
    try:
        device = torch.empty(0, device=device or PartialState().default_device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`device` is '{device}', which cannot be used: {str(error).splitlines()[0]}") from error
    model, feature_extractor = load_adapter(
        adapter, revision, device=device, dtype=dtype or ("float32" if device.type == "cpu" else None)
    )
    config: Any = model.config
    _check_task(adapter, type(model.get_base_model()).__name__)
    channels = resolve_channels(parse_channels(channels), model)
    if channels != "mono":
        check_levels(feature_extractor)
    names = tuple(config.id2label[index] for index in range(config.num_labels))
    return Classifier(
        model,
        feature_extractor,
        names,
        scores or scores_of(config),
        type(model.get_base_model()).__name__ in MODEL_FOR_AUDIO_FRAME_CLASSIFICATION_MAPPING_NAMES.values(),
        _max_samples(feature_extractor, getattr(model.active_peft_config, "max_length_seconds", None)),
        shortest_clip(model, feature_extractor),
        channels,
        most_channels(model),
    )


def classify_windows(
    classifier: Classifier,
    windows: Iterable[Window],
    batch_size: int = 8,
    on_bad_audio: Optional[Callable[[AudioError], None]] = None,
) -> Iterator[WindowScores]:
    """Classify windows, of one clip or of several.

    Windows of which the model reads inputs of one shape are batched; padding is added by feature extractors alone.

    Args:
        classifier (Classifier): the classifier.
        windows (iterable of Window): the windows, at its sampling rate.
        batch_size (int): number of windows in a batch; the results of a batch come together. Default: 8.
        on_bad_audio (callable, optional): takes the error of a window that cannot be used, such as a clip that is too
            short; the window is left out. Default: the error is raised.

    Yields:
        WindowScores: the result of each window or, if the model classifies frames, of each frame, in their order.

    Raises:
        AudioError: if a window cannot be used.
        ValueError: if `batch_size` is less than 1, or a score is not finite.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be positive, got {batch_size}.")
    waiting: list[tuple[Window, dict[str, np.ndarray]]] = []
    for window in windows:
        try:
            features = extract_features(
                classifier.feature_extractor, window.samples, window.name, classifier.min_samples
            )
        except AudioError as error:
            if on_bad_audio is None:
                raise
            on_bad_audio(error)
            continue
        if waiting and _shapes(waiting[0][1]) != _shapes(features):
            yield from _classify(classifier, waiting)
            waiting = []
        waiting.append((window, features))
        if len(waiting) == batch_size:
            yield from _classify(classifier, waiting)
            waiting = []
    if waiting:
        yield from _classify(classifier, waiting)


def _check_task(adapter: str, model_class: str) -> None:
    text = {*MODEL_FOR_CTC_MAPPING_NAMES.values(), *MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.values()}
    classes = {
        *MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES.values(),
        *MODEL_FOR_AUDIO_FRAME_CLASSIFICATION_MAPPING_NAMES.values(),
    }
    if model_class in text:
        raise ValueError(
            f"The model of '{adapter}', {model_class}, writes text and has no classes: use "
            'transformers\' pipeline("automatic-speech-recognition").'
        )
    if model_class not in classes:
        raise ValueError(
            f"The model of '{adapter}', {model_class}, does not classify audio. Those that do are of a class "
            "…ForAudioClassification, …ForSequenceClassification or …ForAudioFrameClassification."
        )


def _max_samples(feature_extractor: Any, fitted_seconds: Optional[float]) -> Optional[int]:
    """The length to which a feature extractor pads clips, and cuts them."""
    rate = feature_extractor.sampling_rate
    frames = getattr(feature_extractor, "max_length", None)
    lengths = (
        getattr(feature_extractor, "n_samples", None),
        getattr(feature_extractor, "nb_max_samples", None),
        frames and frames * rate // FRAMES_PER_SECOND,
        fitted_seconds and round(fitted_seconds * rate),
    )
    return min(filter(None, lengths), default=None)


def _shapes(features: dict[str, np.ndarray]) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, values.shape) for name, values in features.items()]


def _classify(classifier: Classifier, batch: list[tuple[Window, dict[str, np.ndarray]]]) -> Iterator[WindowScores]:
    device = next(classifier.model.parameters()).device
    if classifier.channels == "mono":
        inputs = {
            name: torch.from_numpy(np.concatenate([features[name] for _, features in batch])) for name in batch[0][1]
        }
    else:
        masks = [mask_channels(window.name, len(window.samples), classifier.num_channels) for window, _ in batch]
        inputs = Collate(classifier.feature_extractor)(
            [
                {**{name: values[0] for name, values in features.items()}, "channel_mask": mask}
                for (_, features), mask in zip(batch, masks)
            ]
        )
    inputs = {name: value.to(device) for name, value in inputs.items()}
    with torch.no_grad():
        logits: Tensor = classifier.model(**cast_inputs(classifier.model, inputs)).logits.float()
    if not logits.isfinite().all():
        raise ValueError("The model's outputs are not finite: try another `dtype`, such as float32.")
    if classifier.scores == "softmax":
        logits = logits.softmax(-1)
    elif classifier.scores == "sigmoid":
        logits = logits.sigmoid()
    for (window, _), scores in zip(batch, logits.cpu().numpy()):
        frames = scores if classifier.per_frame else scores[None]
        times = np.linspace(window.start, window.end, len(frames) + 1).tolist()
        for start, end, frame in zip(times, times[1:], frames):
            yield WindowScores(window.name, start, end, frame)
