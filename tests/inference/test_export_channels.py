"""Adapters for clips of several channels as ONNX files."""

import pytest
import torch
from test_export import MODELS, batch, run, save_adapter

from peft_softmoa.inference.export import export_adapter


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("AST", {"num_channels": 2}), ("CTC", {"num_channels": 3})],
)
def test_the_file_says_what_pytorch_says(kind, fields, tmp_path):
    model, channels = save_adapter(tmp_path, kind, **fields), fields["num_channels"]
    folder = tmp_path / "onnx"
    written = export_adapter(tmp_path / "adapter", folder, show_progress=False)
    assert written.part == MODELS[kind][0].__name__ and written.outputs == ["logits"]
    assert written.inputs["input_values"][:2] == ["batch", channels]
    assert written.inputs["channel_mask"] == ["batch", channels]
    for size in (1, 4):
        mono = batch(kind, size)
        inputs = {name: value for name, value in mono.items() if "mask" in name}
        gains = torch.linspace(0.5, 1.5, channels).reshape(channels, *[1] * (mono["input_values"].ndim - 1))
        inputs["input_values"] = mono["input_values"].unsqueeze(1) * gains
        present = torch.ones(size, channels, dtype=torch.bool)
        for missing in (False, True):
            present[-1, 0] = not missing
            with torch.no_grad():
                expected = model(**inputs, channel_mask=present).logits
            given = run(folder, {**inputs, "channel_mask": present})
            torch.testing.assert_close(given, expected, atol=1e-4, rtol=0)
