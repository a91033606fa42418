"""Trace the part of a model that takes audio, and compare what ONNX Runtime makes of it with PyTorch."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, PreTrainedModel

from ..calls.folding import CHANNEL_MASK
from ..calls.masks import is_mask

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# Allowed difference of an output, where the outputs are no greater than one; beyond that, it grows with them.
TOLERANCE = 1e-4
# Batches, as the lengths of their clips in seconds, that are compared; the first one is traced.
BATCHES = ((1.0, 0.7), (0.8,), (1.3, 0.4, 0.9))
# What is written of a model's outputs, where it has them.
OUTPUTS = ("logits", "embeddings", "audio_embeds", "last_hidden_state", "pooler_output")


class ExportError(ValueError):
    """A model cannot be written as ONNX, or ONNX Runtime makes something else of it."""


@dataclass(frozen=True)
class Comparison:
    """The outputs of ONNX Runtime beside those of PyTorch, on one batch.

    Args:
        shape (list[int]): shape of the audio or features.
        largest_difference (float): the greatest absolute difference of an output.
        allowed (float): what it may be: `TOLERANCE`, times the greatest output if that is above one.
    """

    shape: list[int]
    largest_difference: float
    allowed: float


class _Part(nn.Module):
    """A model as a function from tensors to tensors."""

    def __init__(self, model: nn.Module, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        found = self.model(**dict(zip(self.inputs, values)))
        return tuple(found[name] for name in self.outputs)


def require_packages() -> None:
    """Check that what writes and runs ONNX files is installed.

    Raises:
        ImportError: if not; it says what to install.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ImportError(f'Export to ONNX needs {", ".join(missing)}: pip install "peft-softmoa[export]"')


def make_batches(
    feature_extractor: Any, seconds: Optional[float] = None, channels: Optional[int] = None
) -> list[dict[str, Tensor]]:
    """Batches of noise, as the feature extractor makes them of clips one by one and pads them together.

    With channels, the clips are `(B, C, …)`, one mask is for all channels of a clip, and `channel_mask` `(B, C)` says
    that the last channel of some clips is missing.

    Args:
        feature_extractor (SequenceFeatureExtractor): makes the features and pads them.
        seconds (float, optional): the length of the longest clip of each batch. Default: they differ.
        channels (int, optional): C. Default: the model takes mono clips.

    Returns:
        list[dict[str, Tensor]]: the inputs of each batch, by name.

    Raises:
        ValueError: if `seconds` is not positive.
    """
    if seconds is not None and not seconds > 0:
        raise ValueError(f"`seconds` must be positive, got {seconds}.")
    rng, rate = np.random.default_rng(0), feature_extractor.sampling_rate
    collate = DataCollatorWithPadding(feature_extractor)
    batches = []
    for lengths in BATCHES:
        scale = 1.0 if seconds is None else seconds / max(lengths)
        each_channel = [each for each in lengths for _ in range(channels or 1)]
        clips = [rng.standard_normal(round(each * scale * rate)).astype("f4") for each in each_channel]
        features = [feature_extractor(clip, sampling_rate=rate, return_tensors="np") for clip in clips]
        batch = dict(collate([{name: value[0] for name, value in each.items()} for each in features]))
        batches.append(batch if channels is None else _with_channels(batch, channels))
    return batches


def _with_channels(batch: Mapping[str, Tensor], channels: int) -> dict[str, Tensor]:
    by_clip = {name: value.unflatten(0, (-1, channels)) for name, value in batch.items()}
    stacked = {name: value[:, 0] if is_mask(name) else value for name, value in by_clip.items()}
    present = torch.ones(next(iter(by_clip.values())).shape[:2], dtype=torch.bool)
    present[1::2, channels - 1] = channels == 1
    return {**stacked, CHANNEL_MASK: present}


def find_audio_part(model: Any, batch: Mapping[str, Tensor]) -> Any:
    """The part of a model that takes audio alone: the model itself, or the audio encoder of one that has text too.

    Args:
        model (PreTrainedModel): the model.
        batch (mapping): what the feature extractor makes of clips.

    Returns:
        PreTrainedModel: the model, or its encoder.

    Raises:
        ExportError: if no part takes these inputs and nothing else.
    """
    inner = [module for module in model.modules() if isinstance(module, PreTrainedModel) and module is not model]
    # transformers returns the model itself where it finds no encoder.
    parts = [part for part in (model.get_encoder("audio"), model.get_encoder(), *inner) if part is not model]
    if not (getattr(model.config, "is_encoder_decoder", False) and model.can_generate()):
        parts.insert(0, model)
    for part in parts:
        if next(iter(inspect.signature(part.forward).parameters)) in batch:
            break
    else:
        raise ExportError(f"{type(model).__name__} cannot be exported: no part of it takes {sorted(batch)} alone.")
    takes_text = next(iter(inspect.signature(model.forward).parameters)) not in batch
    if takes_text and any("mask" in name for name in batch):
        raise ExportError(
            f"{type(model).__name__} cannot be exported: it makes the mask of its {type(part).__name__} itself, and "
            "without it, the encoder reads the padding of short clips."
        )
    return part


def trace(part: Any, batches: Sequence[Mapping[str, Tensor]]) -> tuple[Any, list[dict[str, Tensor]]]:
    """Export a model with every axis free in which batches differ.

    Args:
        part (PreTrainedModel): the model, in evaluation mode.
        batches (sequence of mappings): its inputs, of several sizes; the first batch is traced.

    Returns:
        tuple[torch.onnx.ONNXProgram, list[dict[str, Tensor]]]: the exported model, and the inputs that it takes.

    Raises:
        ExportError: if the model cannot be exported, or takes only what has the length of the first batch.
    """
    parameters = inspect.signature(part.forward).parameters
    # Clips with channels have one more, which a hook on the model takes.
    names = [name for name in (*parameters, CHANNEL_MASK) if name in batches[0]]
    chosen = [{name: batch[name] for name in names} for batch in batches]
    shapes = [[batch[name].shape for batch in chosen] for name in names]
    free = [[axis for axis, sizes in enumerate(zip(*each)) if len(set(sizes)) > 1] for each in shapes]
    titles = [{axis: "batch" if axis == 0 else "length" for axis in each} for each in free]
    with torch.no_grad():
        try:
            with _quietly():
                found = part(**chosen[0])
                outputs = [name for name in OUTPUTS if isinstance(found.get(name), Tensor)]
                program = torch.onnx.export(
                    _Part(part, names, outputs).eval(),
                    tuple(chosen[0].values()),
                    dynamo=True,
                    input_names=names,
                    output_names=outputs,
                    dynamic_shapes=(tuple(titles),),
                    verbose=False,
                )
        except Exception as error:  # a foreign model may raise anything
            raise ExportError(_reason(part, len(free[0]) > 1, error)) from error
    inputs: Any = program.model.graph.inputs  # type: ignore[union-attr]
    fixed = any(isinstance(value.shape[axis], int) for value, axes in zip(inputs, free) for axis in axes)
    if fixed or [value.name for value in inputs] != names:
        raise ExportError(_reason(part, len(free[0]) > 1))
    return program, chosen


def compare(part: Any, path: Path, batches: Sequence[Mapping[str, Tensor]]) -> list[Comparison]:
    """Run batches through PyTorch and through ONNX Runtime.

    Args:
        part (PreTrainedModel): the model.
        path (Path): the same as an ONNX file.
        batches (sequence of mappings): what they are compared on.

    Returns:
        list[Comparison]: one for each batch.

    Raises:
        ExportError: if ONNX Runtime cannot run the file on one of them.
    """
    session = open_session(path)
    outputs = [each.name for each in session.get_outputs()]
    comparisons = []
    for batch in batches:
        try:
            given = session.run(outputs, {name: tensor.numpy() for name, tensor in batch.items()})
        except Exception as error:  # each of its errors has a class of its own
            raise ExportError(_reason(part, "length" in session.get_inputs()[0].shape, error)) from error
        with torch.inference_mode():
            found = part(**batch)
        expected = [found[name].numpy() for name in outputs]
        comparisons.append(
            Comparison(
                list(next(iter(batch.values())).shape),
                float(np.max([np.abs(a - b).max() for a, b in zip(given, expected)])),
                TOLERANCE * max(1.0, *(float(np.abs(each).max()) for each in expected)),
            )
        )
    return comparisons


def open_session(path: Path) -> Any:
    """Open an ONNX file in ONNX Runtime, on the CPU.

    Args:
        path (Path): the file.

    Returns:
        onnxruntime.InferenceSession: it runs the model.
    """
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what torch says about its own parts while it exports."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _reason(part: Any, length_is_free: bool, error: Optional[BaseException] = None) -> str:
    """Why a model cannot be exported, in one sentence or two."""
    while error is not None and error.__cause__ is not None:
        error = error.__cause__
    first = next((line.strip() for line in str(error or "").splitlines() if line.strip()), "")
    why = f" ({type(error).__name__}: {first[:200]})" if error else ""
    if length_is_free:
        return (
            f"{type(part).__name__} cannot be exported for clips of any length{why}. Fix the length of the clips, for "
            "example `seconds=5`."
        )
    return f"{type(part).__name__} cannot be exported{why}."
