"""Write a model with its adapter as an ONNX file, with what is needed to run it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from tqdm.auto import tqdm

from ..layer import SoftMoALayer
from .loading import load_adapter, load_tokenizer
from .scores import scores_of
from .tracing import (
    TOLERANCE,
    Comparison,
    ExportError,
    compare,
    find_audio_part,
    make_batches,
    open_session,
    require_packages,
    trace,
)


@dataclass(frozen=True)
class OnnxExport:
    """What has been written.

    Args:
        path (Path): the ONNX file.
        part (str): class of what it holds: the model's, or that of its audio encoder.
        inputs (dict): shapes of the inputs by name; an axis with a name is free.
        outputs (list[str]): names of the outputs.
        labels (list[str], optional): the classes, in the order of the outputs.
        scores (str, optional): what makes scores of the logits of the classes: `"softmax"`, `"sigmoid"` or `"none"`.
        notes (list[str]): what the file does not hold.
        comparisons (list[Comparison]): one for each batch.
    """

    path: Path
    part: str
    inputs: dict[str, list[Any]]
    outputs: list[str]
    labels: Optional[list[str]]
    scores: Optional[str]
    notes: list[str]
    comparisons: list[Comparison]

    @property
    def largest_difference(self) -> float:
        """The greatest difference over all batches."""
        return float(np.max([each.largest_difference for each in self.comparisons]))  # NaN, if there is one

    def __str__(self) -> str:
        size = sum(file.stat().st_size for file in self.path.parent.glob(f"{self.path.name}*")) / 2**20
        shapes = ", ".join(f"{name} ({', '.join(map(str, shape))})" for name, shape in self.inputs.items())
        lines = [f"{self.path}: {self.part}, {size:.1f} MiB, takes {shapes}, gives {', '.join(self.outputs)}"]
        if self.labels:
            means = {"none": "the logits are the values"}.get(str(self.scores), f"{self.scores} makes scores of logits")
            lines.append(f"{len(self.labels)} outputs: {means}; their names are in config.json and in the ONNX file")
        lines.append(f"greatest difference from PyTorch: {self.largest_difference:.1e}")
        return "\n".join([*lines, *self.notes])


def export_adapter(
    adapter: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    revision: Optional[str] = None,
    base_model: Optional[str] = None,
    seconds: Optional[float] = None,
    show_progress: bool = True,
) -> OnnxExport:
    """Write a model with its adapter as a folder with an ONNX file and what is needed to run it.

    The folder gets `model.onnx`, `config.json` with the names of the classes, which the ONNX file has in its metadata
    too, `preprocessor_config.json`, the tokenizer of a CTC model, and `parity.json`, how far ONNX Runtime's outputs are
    from PyTorch's on batches of noise. Weights are float32, however the base model is stored. The batch size is free
    and, where the model takes clips of any length, so is the length; masks stay inputs. An adapter with `num_channels`
    makes a file that takes that many, and a `channel_mask`. Of a model that writes text or takes text, the file holds
    the audio encoder.

    Args:
        adapter (str or PathLike): folder of the adapter, or its id on the Hub.
        output_dir (str or PathLike): the folder; it is created.
        revision (str, optional): branch, tag or commit of the adapter.
        base_model (str, optional): folder or id of the base model. Default: what the adapter says.
        seconds (float, optional): fix the length of the inputs to that of clips of so many seconds. Default: it is
            free, if the model takes clips of any length.
        show_progress (bool): show a progress bar. Default: True.

    Returns:
        OnnxExport: what has been written.

    Raises:
        ExportError: if the model cannot be exported, or the outputs differ by more than `TOLERANCE`.
        ImportError: if a package that is needed is not installed.
        ValueError: if the adapter does not say what its base model is.
        OSError: if the adapter or its base model cannot be read.
    """
    require_packages()
    adapter = os.fspath(adapter)
    folder = Path(output_dir)
    path = folder / "model.onnx"
    with tqdm(total=4, desc="Loading", bar_format="{desc} {n}/{total} [{elapsed}]", disable=not show_progress) as bar:
        model, feature_extractor = load_adapter(adapter, revision, base_model=base_model, device="cpu", dtype="float32")
        base: Any = model.get_base_model()  # its adapter and its head are modules of it
        config: Any = model.peft_config[str(model.active_adapter)]
        batches = make_batches(feature_extractor, seconds, config.num_channels)
        part = find_audio_part(base, batches[0])
        _advance(bar, "Tracing")
        program, batches = trace(part, batches)
        labels, scores = _classes(part, program)
        if labels is not None:
            program.model.metadata_props.update(labels=json.dumps(labels), scores=str(scores))
        _advance(bar, "Writing")
        folder.mkdir(parents=True, exist_ok=True)
        program.save(path)
        part.config.save_pretrained(folder)
        feature_extractor.save_pretrained(folder)
        tokenizer = _save_tokenizer(base, adapter, revision, base_model, folder)
        notes = [*describe_rest(base, part), *tokenizer]
        _advance(bar, "Comparing")
        comparisons = compare(part, path, batches)
        _advance(bar, "Done")
    written = OnnxExport(
        path,
        type(part).__name__,
        {value.name: list(value.shape) for value in open_session(path).get_inputs()},
        [value.name for value in program.model.graph.outputs],
        labels,
        scores,
        notes,
        comparisons,
    )
    report = {"adapter": adapter, "part": written.part, "tolerance": TOLERANCE, "torch": torch.__version__}
    report["batches"] = [asdict(each) for each in comparisons]
    (folder / "parity.json").write_text(json.dumps(report, indent=2))
    if not all(each.largest_difference <= each.allowed for each in comparisons):
        raise ExportError(
            f"{path} differs from PyTorch by {written.largest_difference:.1e}, and {comparisons[0].allowed:.1e} is "
            "allowed: see parity.json. Do not use the file."
        )
    return written


def _advance(bar: Any, description: str) -> None:
    bar.update()
    bar.set_description(description)


def _classes(part: Any, program: Any) -> tuple[Optional[list[str]], Optional[str]]:
    """The classes of a classifier, and what makes scores of its logits."""
    names = getattr(part.config, "id2label", None) or {}
    widths = [value.shape[-1] for value in program.model.graph.outputs if value.name == "logits"]
    if widths != [len(names)]:
        return None, None
    return [names[index] for index in sorted(names)], scores_of(part.config)


def describe_rest(model: nn.Module, part: nn.Module) -> list[str]:
    """Say what of a model with an adapter is in none of its parts that is exported.

    Args:
        model (nn.Module): the model.
        part (nn.Module): the part that is exported.

    Returns:
        list[str]: a sentence, or none if that is all of the model.
    """
    if part is model:
        return []
    inside = set(part.modules())
    changed = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (SoftMoALayer, ModulesToSaveWrapper)) and module not in inside
    ]
    rest = (
        f"what the adapter changes there neither: {', '.join(changed)}"
        if changed
        else "which the adapter leaves as it is"
    )
    return [f"The file holds the audio encoder alone; the rest of {type(model).__name__} is not in it, {rest}."]


def _save_tokenizer(
    model: nn.Module, adapter: str, revision: Optional[str], base_model: Optional[str], folder: Path
) -> list[str]:
    """Save what makes text of the outputs of a CTC model, and say so if there is none."""
    if "ForCTC" not in type(model).__name__:
        return []
    tokenizer = load_tokenizer(adapter, revision, base_model)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        return []
    return ["Neither the adapter nor its base model has a tokenizer, which makes text of the outputs."]
