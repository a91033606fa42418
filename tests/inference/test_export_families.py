"""Every family of audio transformers as an ONNX file: what `Family.onnx` and the table of models say.

Exports take ten seconds or more each, so that only a few run by default; `make onnx` runs them all.
"""

import os

import numpy as np
import onnxruntime
import pytest
import torch
from families import FAMILIES, build
from peft import get_peft_model

from peft_softmoa import SoftMoAConfig
from peft_softmoa.inference.tracing import ExportError, compare, find_audio_part, trace

TEXT = ("input_ids", "decoder_input_ids")
# The others that the documentation lists are in test_export.py, or are refused, which takes no time.
FEW = ("Wav2Vec2-BERT", "Voxtral")


def audio_batches(name, same_length=False):
    """What the feature extractor would make of clips of different lengths, in batches of several sizes."""
    family = FAMILIES[name]
    short, long = family.lengths
    lengths = [[long, short], [short], [(long + short) // 2, short, short]]
    if same_length:
        lengths = [[long] * len(each) for each in lengths]
    batches = [family.inputs(each) for each in lengths]
    return [{key: value for key, value in batch.items() if key not in TEXT} for batch in batches]


def adapt(name):
    base = build(name)
    torch.manual_seed(0)
    config = SoftMoAConfig(placement="both", num_experts=3, r=2, init_weights=False)
    return get_peft_model(base, config).eval().get_base_model()


def export(part, path, batches):
    program, chosen = trace(part, batches)
    program.save(path)
    return chosen, compare(part, path, chosen)


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name, tmp_path):
    family, model, batches = FAMILIES[name], adapt(name), audio_batches(name)
    if not (name in FEW or family.onnx.startswith("no: ") or os.environ.get("SOFTMOA_ONNX") == "all"):
        pytest.skip("takes long: `make onnx` exports every family")
    if family.onnx.startswith("no: "):
        with pytest.raises(ExportError, match=f"^{type(model).__name__} cannot be exported"):
            trace(find_audio_part(model, batches[0]), batches)
        return
    part = find_audio_part(model, batches[0])
    assert (part is not model) == family.onnx.startswith("encoder")
    path = tmp_path / "model.onnx"
    if "one length" in family.onnx:
        with pytest.raises(ExportError, match="Fix the length of the clips, for example `seconds=5`"):
            export(part, path, batches)
        batches = audio_batches(name, same_length=True)
    chosen, comparisons = export(part, path, batches)
    assert all(each.largest_difference <= 1e-4 for each in comparisons)

    session = onnxruntime.InferenceSession(path)
    shapes = [each.shape for each in session.get_inputs()]
    assert all(shape[0] == "batch" for shape in shapes)
    assert ("length" in shapes[0]) == ("any length" in family.onnx)
    if part is not model:  # it says what it says in the model
        with torch.no_grad():
            long = family.lengths[1]
            lengths = [long, long if "one length" in family.onnx else family.lengths[0]]
            expected = family.encode(model, family.inputs(lengths))
        [found] = session.run(["last_hidden_state"], {key: value.numpy() for key, value in chosen[0].items()})
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-4, rtol=0)
    if name in FEW or part is not model:  # the adapter is in the file
        with torch.no_grad():
            plain = find_audio_part(build(name), batches[0])(**chosen[0])
        outputs = [each.name for each in session.get_outputs()]
        found = session.run(outputs, {key: value.numpy() for key, value in chosen[0].items()})
        assert not np.allclose(found[0], plain[outputs[0]].numpy(), atol=1e-3)
