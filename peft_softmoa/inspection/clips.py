"""A saved adapter and one clip: where in the clip its slots read."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Optional
from urllib.parse import urlsplit

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from ..inference.scores import scores_of
from ..method import PatchGrid
from ..targets.architectures import known_patch_grid
from ..targets.placement import find_encoder
from ..training.audio import AudioError, audio_seconds, decode_audio
from ..training.frames import check_length, shortest_clip
from ..training.inputs import cast_inputs
from .clip_plots import Clip
from .maps import ReadingMap, reading_map
from .records import Record, record_routing
from .spectrograms import FRAME_SECONDS, log_mel, mel_frequencies, own_spectrogram


class ClipReading(NamedTuple):
    """One clip, and what each block did with it."""

    clip: Clip
    duration: float  # duration of the whole file, in seconds
    inputs: dict[str, Tensor]  # inputs of the model, in a batch of one
    grid: Optional[PatchGrid]  # how the model's tokens lie in time and frequency
    records: tuple[Record, ...]
    maps: tuple[Optional[ReadingMap], ...]  # one for each record, or none
    without_map: tuple[str, ...]  # why blocks have no map
    prediction: Optional[str]  # the most likely class, if the model is a classifier
    reads_spectrogram: bool = True  # whether the spectrogram of the clip is what the model reads


def read_clip(model: PeftModel, feature_extractor: Any, audio: str, max_seconds: Optional[float] = None) -> ClipReading:
    """Run a model on one clip, and find where in the clip the slots read.

    Args:
        model (PeftModel): the model with its adapter.
        feature_extractor (SequenceFeatureExtractor): its feature extractor.
        audio (str): path or URL of the file.
        max_seconds (float, optional): how much of the file is read, from its start. Default: all.

    Returns:
        ClipReading: what each block did.

    Raises:
        AudioError: if the audio cannot be used, or the model does not take it.
    """
    rate = feature_extractor.sampling_rate
    # Some feature extractors pad every clip to one length and cut longer clips, some of them at a random place.
    filled = getattr(feature_extractor, "n_samples", None) or getattr(feature_extractor, "nb_max_samples", None)
    samples = decode_audio(audio, rate, min(max_seconds or math.inf, filled / rate) if filled else max_seconds)
    check_length(audio, len(samples), shortest_clip(model, feature_extractor), rate)
    seconds = len(samples) / rate
    try:
        inputs = dict(feature_extractor(samples, sampling_rate=rate, return_tensors="pt"))
        with record_routing(model) as records, torch.no_grad():
            output = model(**next(prepare_batches(model, [inputs])))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise AudioError(
            audio,
            f"the model does not take its {seconds:.3f} s: {error} For a model that takes more than audio, call "
            "`expert_report` with inputs of your own",
        ) from error
    config: Any = model.config
    grid = known_patch_grid(config.to_dict())
    elsewhere = _blocks_without_place(model, records)
    maps = [None if record.block in elsewhere else reading_map(record, grid) for record in records]
    values = inputs[feature_extractor.model_input_names[0]][0]
    own: Optional[tuple[np.ndarray, np.ndarray]]
    if grid:
        span = len(values) * FRAME_SECONDS
        own = values.T.numpy(), mel_frequencies(values.shape[1], rate)
    else:
        span = filled / rate if filled else seconds
        own = own_spectrogram(feature_extractor, values.numpy())
    spectrogram, frequencies = own or log_mel(samples, rate, span)
    clip = Clip(shared_name(audio), samples, rate, spectrogram, span, frequencies)
    return ClipReading(
        clip,
        max(0.0 if "://" in audio else audio_seconds(audio), seconds),
        inputs,
        grid,
        tuple(records),
        tuple(maps),
        tuple(elsewhere.values()),
        _predicted_class(model, output),
        own is not None,
    )


def shared_name(name: str, folder: Optional[str] = None) -> str:
    """Name of a clip for a report that may be sent to others: without folders of this computer and keys of URLs.

    Args:
        name (str): path or URL of the clip.
        folder (str, optional): the folder of its dataset.

    Returns:
        str: the path in the folder, or the name of the file if it is not in there.
    """
    path = urlsplit(name).path if "://" in name else name
    if folder is not None and "://" not in name:
        inside = os.path.relpath(path, folder)
        if not inside.startswith(os.pardir):
            return inside
    return re.split(r"[/\\]", path)[-1]


def prepare_batches(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Move batches of audio to the model's device and dtype, and add the first token that a model of text needs.

    Args:
        model (nn.Module): the model with its adapter.
        batches (iterable of mappings): inputs of the encoder.

    Yields:
        dict[str, Any]: inputs of the model.
    """
    config: Any = model.config
    device = next(model.parameters()).device
    start = getattr(config, "decoder_start_token_id", None)
    writes = getattr(config, "is_encoder_decoder", False) and hasattr(model, "prepare_inputs_for_generation")
    for batch in batches:
        moved = {name: value.to(device) for name, value in cast_inputs(model, batch).items()}
        if writes and start is not None:
            first = next(iter(moved.values()))
            moved["decoder_input_ids"] = torch.full((len(first), 1), start, device=device)
        yield moved


def _blocks_without_place(model: PeftModel, records: list[Record]) -> dict[str, str]:
    """The blocks whose tokens have no place in the time of a clip, with the reason."""
    if any(len(record.dispatch) > 1 for record in records):
        why = "takes clips in parts, such as windows, whose place in the clip is not known"
        return {record.block: f"The block '{record.block}' has no map: the model {why}." for record in records}
    try:
        encoder = [f"{layer.name}." for layer in find_encoder(model.get_base_model())]
    except ValueError:
        return {}  # the model has no layers
    return {
        record.block: f"The block '{record.block}' has no map: it is not in the audio encoder."
        for record in records
        # A layer may itself be a block. A module in no layer, such as a projection in front of them, is no decoder.
        if not f"{record.block}.".startswith(tuple(encoder)) and any(map(str.isdigit, record.block.split(".")))
    }


def _predicted_class(model: PeftModel, output: Any) -> Optional[str]:
    logits = getattr(output, "logits", None)
    names = getattr(model.config, "id2label", None) or {}
    if not isinstance(logits, Tensor) or logits.shape != (1, len(names)) or scores_of(model.config) != "softmax":
        return None
    best = int(logits.argmax())
    return f"{names[best]} ({logits.softmax(-1)[0, best].item():.0%})"
