"""What somebody's adapter would change, told without a model."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_ast_config
from families import FAMILIES, build
from hub import loopback_hub
from peft import get_peft_model
from safetensors.torch import load_file, save, save_file
from transformers import ASTForAudioClassification, AutoModelForAudioClassification

from peft_softmoa import SoftMoAConfig, check_adapter, describe_targets
from peft_softmoa.cli import main

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
DATA = Path(__file__).parents[1] / "data"
EARLIER = [DATA / "first_version", *sorted((DATA / "version_0_1").iterdir())]
PREFIX = "base_model.model.audio_spectrogram_transformer"
SLOTS = f"{PREFIX}.layers.0.attention.softmoa_mixture.router.slots"
POSITIONS = f"{PREFIX}.embeddings.position_embeddings"


@pytest.fixture
def adapter(tmp_path):
    """A folder with an adapter that has its own head."""
    model = ASTForAudioClassification(tiny_ast_config())
    model.name_or_path = model.config._name_or_path = "user/base"
    config = SoftMoAConfig(num_experts=3, r=2, modules_to_save=["classifier"], label_names=["cat", "dog"])
    get_peft_model(model, config).save_pretrained(tmp_path)
    return tmp_path


def change(folder, tensors=(), without=(), **fields):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))
    kept = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if name not in without}
    save_file({**kept, **dict(tensors)}, folder / WEIGHTS)


def test_it_tells_what_describe_targets_tells(adapter):
    contents = check_adapter(adapter)
    config = SoftMoAConfig.from_pretrained(adapter)
    told = describe_targets(ASTForAudioClassification(tiny_ast_config()), config)
    assert contents.blocks == dict(zip((target.name for target in told.targets), told.parameters_by_block))
    assert contents.saved == told.saved and contents.parameters == told.parameters
    assert contents.label_names == ("cat", "dog") and contents.base_model == "'user/base'"


@pytest.mark.parametrize("folder", EARLIER, ids=lambda folder: folder.name)
def test_adapters_of_earlier_versions(folder):
    contents = check_adapter(folder)
    assert contents.parameters == sum(tensor.numel() for tensor in load_file(folder / WEIGHTS).values())
    assert contents.blocks


@pytest.mark.parametrize("options", [{"placement": "both", "train_norms": True}, {"task_type": "SEQ_CLS"}], ids=str)
def test_trained_modules(tmp_path, options):
    get_peft_model(ASTForAudioClassification(tiny_ast_config()), SoftMoAConfig(**options)).save_pretrained(tmp_path)
    told = describe_targets(ASTForAudioClassification(tiny_ast_config()), SoftMoAConfig.from_pretrained(tmp_path))
    assert check_adapter(tmp_path).saved == told.saved != {}


def test_the_command_prints_it(adapter, capsys):
    main(["check", str(adapter)])
    assert capsys.readouterr().out.splitlines() == [
        "adapted block",
        "'audio_spectrogram_transformer.layers.0.attention'            582",
        "'audio_spectrogram_transformer.layers.1.attention'            582",
        "trained whole",
        "'classifier'                                                  130",
        "parameters in all                                           1,294",
        "classes: 'cat', 'dog'",
        "base model: 'user/base'",
        "of its weights, none is replaced",
    ]


def test_names_do_not_reach_the_terminal_as_they_are(adapter, capsys):
    change(adapter, label_names=["\033[2Jcat", "dog"], base_model_name_or_path="\033[1A")
    main(["check", str(adapter)])
    assert "\033" not in capsys.readouterr().out


def test_a_model_in_the_folder_is_the_base_model(adapter):
    """transformers takes it, whatever the config says."""
    change(adapter, base_model_name_or_path="user/another")
    evil = ASTForAudioClassification(tiny_ast_config())
    evil.save_pretrained(adapter)
    loaded = AutoModelForAudioClassification.from_pretrained(adapter).get_parameter(
        POSITIONS.removeprefix("base_model.model.")
    )
    assert torch.equal(loaded, evil.get_parameter(POSITIONS.removeprefix("base_model.model.")))
    assert "loaders take the one in the adapter's folder" in str(check_adapter(adapter))


def test_what_replaces_weights_of_the_base_model_is_refused(adapter):
    """transformers reads it silently; that is what the command is for."""
    shape = (
        1,
        ASTForAudioClassification(tiny_ast_config())
        .get_parameter(POSITIONS.removeprefix("base_model.model."))
        .shape[1],
        32,
    )
    change(adapter, {POSITIONS: torch.full(shape, 7.0)}, label_names=None, modules_to_save=None, without=[
        "base_model.model.classifier.dense.weight", "base_model.model.classifier.dense.bias",
        "base_model.model.classifier.layernorm.weight", "base_model.model.classifier.layernorm.bias",
    ])  # fmt: skip
    model = ASTForAudioClassification(tiny_ast_config())
    model.load_adapter(adapter)
    assert (model.get_parameter(POSITIONS.removeprefix("base_model.model.")) == 7).all()
    with pytest.raises(
        SystemExit, match=f"peft-softmoa check: The adapter has 1 tensors that are not its own: '{POSITIONS}'"
    ):
        main(["check", str(adapter)])


@pytest.mark.parametrize(
    "name",
    [
        "x",
        SLOTS.removeprefix("base_model.model."),
        "base_model.model.classifier",
        "classifier.dense.x",
    ],
)
def test_other_tensors_are_refused(adapter, name):
    change(adapter, {name: torch.ones(2)})
    with pytest.raises(ValueError, match="1 tensors that are not its own"):
        check_adapter(adapter)


def test_resized_embeddings_replace_the_base_models(tmp_path):
    model = build(FAMILIES["Whisper, speech to text"].name)
    model.resize_token_embeddings(15)
    get_peft_model(model, SoftMoAConfig()).save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(ValueError, match="tensors that are not its own: '.*embed_tokens.weight'"):
        check_adapter(tmp_path)


@pytest.mark.parametrize(
    "tensors, without, fields, message",
    [
        ({SLOTS: torch.full((32, 3), float("nan"))}, (), {}, "has values in '.*slots' that are infinite or no numbers"),
        ({SLOTS: torch.full((32, 3), float("inf")).half()}, (), {}, "has values in '.*slots' that are infinite"),
        (
            {"base_model.model.classifier.dense.bias": torch.tensor([0, float("-inf")]).bfloat16()},
            (),
            {},
            "has values in '.*dense.bias' that are infinite",
        ),
        (
            {"base_model.model.classifier.x": torch.tensor([1, float("nan")]).to(torch.float8_e4m3fn)},
            (),
            {},
            "has values in '.*x' that are infinite",
        ),
        ({SLOTS: torch.ones(3, 32)}, (), {}, "does not fit its config: '.*layers.0.attention' has a mixture of shapes"),
        ({SLOTS: torch.ones(32, 3).long()}, (), {}, "slots' as I64; it must be one of F64"),
        ({"base_model.model.classifier.x": torch.ones(2, dtype=torch.complex64)}, (), {}, "classifier.x' as C64"),
        ({}, [SLOTS], {}, "does not fit its config"),
        ({SLOTS + "2": torch.ones(1)}, (), {}, "does not fit its config"),
        ({SLOTS.replace("softmoa_mixture.router", "softmoa_router"): torch.ones(32, 3)}, (), {}, "since version 0.2"),
        (
            {SLOTS.replace("layers.0", "layers.0.mlp"): torch.ones(1)},
            (),
            {"target_modules": ["attention"]},
            "fit its con",
        ),
        ({}, (), {"num_experts": 4}, r"does not fit its config: .*the config asks for .*\(32, 4\)"),
        ({}, (), {"patch_grid": True, "expert_type": "convolution", "routing": "dense"}, "does not fit its config"),
        ({}, (), {"target_modules": ["mlp"]}, "adapts '.*layers.0.attention', which `target_modules` in its config"),
        ({}, (), {"target_modules": "((.|[a-z])+)+[A-Z]"}, "takes too long to match"),
        ({}, (), {"target_modules": "a{10000000}"}, "`target_modules` must be"),
        ({}, (), {"label_names": ["a", "b", "c"]}, "has no head of 3 outputs"),
        ({}, (), {"extra": 1}, r"the fields \['extra'\] are unknown"),
        ({}, (), {"peft_type": "LORA"}, "`peft_type` must be 'SOFTMOA', got 'LORA'"),
    ],
)
def test_what_is_refused(adapter, tensors, without, fields, message):
    change(adapter, tensors, without, **fields)
    with pytest.raises(ValueError, match=message):
        check_adapter(adapter)


def test_values_are_read_to_the_end(adapter):
    """Not only the first piece of a tensor."""
    big = torch.zeros(2, 3 * 2**18)
    change(adapter, {"base_model.model.classifier.big": big})
    check_adapter(adapter)
    big[1, -1] = float("nan")
    change(adapter, {"base_model.model.classifier.big": big})
    with pytest.raises(ValueError, match="has values in '.*big' that are infinite or no numbers"):
        check_adapter(adapter)


def test_other_methods_and_no_weights(adapter):
    for name in list(load_file(adapter / WEIGHTS)):
        if ".softmoa_" in name:
            change(adapter, without=[name])
    with pytest.raises(ValueError, match="has no tensors of a Soft-MoA adapter"):
        check_adapter(adapter)
    (adapter / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="has no file"):
        check_adapter(adapter)
    with pytest.raises(ValueError, match="is not the config of a Soft-MoA adapter: Can't find"):
        check_adapter(adapter / "missing")


@pytest.mark.parametrize("allowed", [False, True])
def test_pickles_are_not_read_even_if_allowed(adapter, monkeypatch, allowed):
    (adapter / WEIGHTS).rename(adapter / PICKLE)
    if allowed:
        monkeypatch.setenv("SOFTMOA_ALLOW_PICKLE", "1")
    with pytest.raises(SystemExit, match=f"has its weights in '{PICKLE}' only. That is a pickle"):
        main(["check", str(adapter)])


def test_it_checks_an_adapter_on_the_hub(adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with loopback_hub() as hub:
        options = {"endpoint": hub.url, "cache_dir": tmp_path / "cache"}
        hub.repos["user/adapter"] = {name: (adapter / name).read_bytes() for name in (CONFIG, WEIGHTS)}
        assert str(check_adapter("user/adapter", **options)) == str(check_adapter(adapter))
        tensors = {**load_file(adapter / WEIGHTS), POSITIONS: torch.ones(1)}
        hub.repos["user/evil"] = {CONFIG: (adapter / CONFIG).read_bytes(), WEIGHTS: save(tensors)}
        with pytest.raises(ValueError, match="1 tensors that are not its own"):
            check_adapter("user/evil", **options)


def header(size, text=b"", rest=b""):
    return struct.pack("<Q", size) + text + rest


ENTRY = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
MANY = b"{" + b",".join(b'"%d":%s' % (index, ENTRY) for index in range(1_000_000)) + b"}"
BOMBS = {
    "config of 100 MB": (
        CONFIG,
        b'{"peft_type": "SOFTMOA", "a": "' + b"a" * 10**8 + b'"}',
        "more than 1,048,576 are no",
    ),
    "nested config": (CONFIG, b"[" * 10**6, "it is no JSON: maximum recursion"),
    "nested type": (CONFIG, b'{"peft_type":' + b"[" * 800 + b"]" * 800 + b"}", "`peft_type` must be"),
    "nested field": (CONFIG, b'{"peft_type":"SOFTMOA","r":' + b"[" * 800 + b"]" * 800 + b"}", "`r` must be"),
    "long number": (CONFIG, b'{"peft_type":"SOFTMOA","r":' + b"9" * 10**5 + b"}", "it is no JSON"),
    "header of 55 MB": (WEIGHTS, header(len(MANY), MANY), "has a header of .* bytes, and more than 4,194,304 are no"),
    "header longer than the file": (WEIGHTS, header(2**60), "is damaged"),
    "nested header": (WEIGHTS, header(2 * 10**6, b"[" * 2 * 10**6), "is damaged"),
    "shape that overflows": (
        WEIGHTS,
        header(77, b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}'.ljust(77), b"aaaa"),
        "is damaged",
    ),
}
SCRIPT = """
import resource, sys, time
from peft_softmoa import check_adapter
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
try:
    check_adapter(sys.argv[1])
except ValueError as error:
    print(error)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
assert time.process_time() - started < float(sys.argv[2]) and grown < 200, (time.process_time() - started, grown)
"""


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused(adapter, name):
    file, content, message = BOMBS[name]
    (adapter / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        check_adapter(adapter)


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux tells it")
@pytest.mark.parametrize("name", ["config of 100 MB", "header of 55 MB", "large tensor"])
def test_bombs_take_neither_time_nor_memory(adapter, name):
    if name == "large tensor":  # a gigabyte of zeros, of which the disk holds nothing
        change(adapter, {"base_model.model.classifier.big": torch.zeros(4, dtype=torch.uint8)})
        data = (adapter / WEIGHTS).read_bytes()
        size = int.from_bytes(data[:8], "little")
        head = json.loads(data[8 : 8 + size])
        places = [entry["data_offsets"] for key, entry in head.items() if key != "__metadata__"]
        end = max(place[1] for place in places)
        head["base_model.model.classifier.zeros"] = {
            "dtype": "F32",
            "shape": [2**28],
            "data_offsets": [end, end + 2**30],
        }
        text = json.dumps(head).encode()
        (adapter / WEIGHTS).write_bytes(header(len(text), text, data[8 + size :]))
        with open(adapter / WEIGHTS, "r+b") as file:
            file.truncate(8 + len(text) + end + 2**30)
    else:
        file, content, _ = BOMBS[name]
        (adapter / file).write_bytes(content)
    subprocess.run(
        [sys.executable, "-c", SCRIPT, adapter, "20" if name == "large tensor" else "2"],
        check=True,
        cwd=Path(__file__).parents[2],
    )
