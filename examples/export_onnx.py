#!/usr/bin/env python
"""Write a classifier with its adapter as an ONNX file, and check that it says what PyTorch says.

    python examples/export_onnx.py your-name/esc50-softmoa --output_dir esc50-onnx

takes an adapter's folder or its id on the Hub. The output folder gets `model.onnx`, `labels.json`, the classes in the
order of the outputs, which the ONNX file holds too, and `parity.json`, how far ONNX Runtime's outputs are from
PyTorch's on batches of noise. Needs onnx, onnxscript and onnxruntime: `pip install 'peft-softmoa[export]'`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Optional

import numpy as np
import onnxruntime
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification, SequenceFeatureExtractor

from peft_softmoa import SoftMoAConfig

TOLERANCE = 1e-4
# Batches, as the lengths of their clips in seconds, that the two are compared on; the first one is traced.
BATCHES = [(1.0, 0.7), (0.8,), (1.3, 0.4, 0.9)]


class Classifier(nn.Module):
    """A model as a function from tensors to a tensor.

    Args:
        model (nn.Module): returns logits.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor, attention_mask: Optional[Tensor] = None) -> Tensor:
        """Run the model.

        Args:
            features (Tensor): `(B, …)`, what its feature extractor makes of B clips.
            attention_mask (Tensor, optional): `(B, …)`, nonzero where they are no padding. Default: none.

        Returns:
            Tensor: logits `(B, classes)`.
        """
        masks = {} if attention_mask is None else {"attention_mask": attention_mask}
        return self.model(**{self.model.main_input_name: features}, **masks).logits


def load(adapter: str, base_model: Optional[str] = None) -> tuple[nn.Module, SequenceFeatureExtractor]:
    """Load a classifier with its adapter.

    Args:
        adapter (str): folder of the adapter, or its id on the Hub.
        base_model (str, optional): the same of the base model. Default: what the adapter says.

    Returns:
        tuple[nn.Module, SequenceFeatureExtractor]: the model in evaluation mode, and its feature extractor.
    """
    config = SoftMoAConfig.from_pretrained(adapter)
    base = base_model or config.base_model_name_or_path
    if base is None:
        sys.exit(f"'{adapter}' does not say which base model it is for: give --base_model.")
    revision = {"revision": config.revision} if config.revision and not base_model else {}
    # In float32, however it is stored: the tolerance is below what half precision can tell apart.
    model = AutoModelForAudioClassification.from_pretrained(base, dtype="float32", **revision)
    model = PeftModel.from_pretrained(model, adapter)
    try:
        extractor = AutoFeatureExtractor.from_pretrained(adapter)
    except OSError:  # an adapter need not have one
        extractor = AutoFeatureExtractor.from_pretrained(base)
    # The model within: its adapter and its head are modules of it.
    return model.eval().get_base_model(), extractor


def make_batches(extractor: SequenceFeatureExtractor) -> list[list[Tensor]]:
    """Features of batches of noise.

    Args:
        extractor (SequenceFeatureExtractor): makes them.

    Returns:
        list[list[Tensor]]: for each batch the features and, if the extractor makes one, their mask.
    """
    rng = np.random.default_rng(0)
    batches = []
    for seconds in BATCHES:
        clips = [rng.standard_normal(int(each * extractor.sampling_rate)).astype("f4") for each in seconds]
        batch = extractor(clips, sampling_rate=extractor.sampling_rate, padding=True, return_tensors="pt")
        names = [name for name in (*extractor.model_input_names, "attention_mask") if name in batch]
        batches.append([batch[name] for name in dict.fromkeys(names)])
    return batches


def export(model: nn.Module, batches: list[list[Tensor]]) -> Any:
    """Export a model with every axis free in which batches differ.

    Args:
        model (nn.Module): the model.
        batches (list[list[Tensor]]): its inputs, of several sizes.

    Returns:
        torch.onnx.ONNXProgram: the exported model, with the classes in its metadata.
    """
    free = [
        {
            axis: torch.export.Dim.DYNAMIC
            for axis, sizes in enumerate(zip(*(each.shape for each in same)))
            if len(set(sizes)) > 1
        }
        for same in zip(*batches)
    ]
    names = [model.main_input_name, "attention_mask"][: len(free)]
    with torch.no_grad():
        program = torch.onnx.export(
            Classifier(model),
            tuple(batches[0]),
            dynamo=True,
            input_names=names,
            output_names=["logits"],
            dynamic_shapes=tuple(free),
            verbose=False,
        )
    program.model.metadata_props["labels"] = json.dumps(labels(model))
    return program


def labels(model: nn.Module) -> list[str]:
    """The classes of a model.

    Args:
        model (nn.Module): the model.

    Returns:
        list[str]: their names, in the order of its outputs.
    """
    return [model.config.id2label[index] for index in sorted(model.config.id2label)]


def compare(model: nn.Module, path: Path, batches: list[list[Tensor]]) -> list[dict[str, Any]]:
    """Run batches through PyTorch and through ONNX Runtime.

    Args:
        model (nn.Module): the model.
        path (Path): the same as ONNX file.
        batches (list[list[Tensor]]): what they are compared on.

    Returns:
        list[dict[str, Any]]: for each batch its shape and the largest difference of the logits.
    """
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    checks = []
    for batch in batches:
        [given] = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, batch)})
        with torch.inference_mode():
            expected = Classifier(model)(*batch).numpy()
        checks.append({"shape": list(batch[0].shape), "largest_difference": float(np.abs(given - expected).max())})
    return checks


def main(arguments: Optional[list[str]] = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="folder of the adapter, or its id on the Hub")
    parser.add_argument("--base_model", help="the same of the base model; by default what the adapter says")
    parser.add_argument("--output_dir", type=Path, required=True)
    options = parser.parse_args(arguments)
    model, extractor = load(options.adapter, options.base_model)
    batches = make_batches(extractor)
    program = export(model, batches)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    path = options.output_dir / "model.onnx"
    program.save(path)
    (options.output_dir / "labels.json").write_text(json.dumps(labels(model), indent=2))
    report = {
        "adapter": options.adapter,
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "tolerance": TOLERANCE,
        "batches": compare(model, path, batches),
    }
    (options.output_dir / "parity.json").write_text(json.dumps(report, indent=2))
    largest = float(np.max([check["largest_difference"] for check in report["batches"]]))  # NaN, if there is one
    if not largest <= TOLERANCE:
        sys.exit(f"{path} differs from PyTorch by {largest:.1e}, and {TOLERANCE} is allowed: see parity.json.")
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, at most {largest:.1e} away from PyTorch")
    return report


if __name__ == "__main__":
    main()
