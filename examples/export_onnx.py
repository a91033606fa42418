#!/usr/bin/env python
"""Write a classifier with its adapter as an ONNX file, and classify a clip with it in ONNX Runtime.

    python examples/export_onnx.py your-name/esc50-softmoa --output_dir esc50-onnx

takes an adapter's folder or its id on the Hub, as `peft-softmoa export` does. Needs `pip install
'peft-softmoa[export]'`.
"""

from __future__ import annotations

import argparse
import json
from typing import Optional

import numpy as np
import onnxruntime
from transformers import AutoFeatureExtractor

from peft_softmoa.inference.export import export_adapter


def main(arguments: Optional[list[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="folder of the adapter, or its id on the Hub")
    parser.add_argument("--base_model", help="the same of the base model; by default what the adapter says")
    parser.add_argument("--output_dir", required=True)
    options = parser.parse_args(arguments)
    print(export_adapter(options.adapter, options.output_dir, base_model=options.base_model))

    # From here on, only the folder is needed, neither the adapter nor its base model. In place of noise, read a clip.
    extractor = AutoFeatureExtractor.from_pretrained(options.output_dir)
    session = onnxruntime.InferenceSession(f"{options.output_dir}/model.onnx", providers=["CPUExecutionProvider"])
    labels = json.loads(session.get_modelmeta().custom_metadata_map["labels"])
    clip = np.random.default_rng(0).standard_normal(extractor.sampling_rate).astype("f4")
    features = extractor(clip, sampling_rate=extractor.sampling_rate, return_tensors="np")
    inputs = {each.name: features[each.name] for each in session.get_inputs()}
    [logits] = session.run(["logits"], inputs)
    print(f"one second of noise: {labels[int(logits[0].argmax())]} of {len(labels)} classes")


if __name__ == "__main__":
    main()
