"""Training in several processes: two of them on a CPU do what one alone does."""

import os
import subprocess
import sys

import pytest
import torch
import train_distributed
from accelerate.commands.config.config_args import load_config_from_file
from families import build
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

from peft_softmoa import SoftMoAConfig
from peft_softmoa.recipes import FOLDER

CONFIGS = FOLDER / "accelerate"
WAYS = {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}
STEPS_LOGGED = train_distributed.STEPS // 2
TRAINED = ("ast", "wav2vec2", "balanced", "resumed")


def run(folder, *cases, way=None):
    """Run `train_distributed.py`, alone or, with a config of Accelerate, in two processes."""
    for case in cases:
        (folder / case).mkdir(parents=True)
    if way is None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as each of two has
        train_distributed.main(str(folder), *cases)
        torch.set_num_threads(threads)
        return folder
    config = ["--config_file", str(CONFIGS / f"{way}.yaml"), "--num_processes", "2", "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *config, train_distributed.__file__, str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # where the tests' own modules are
    done = subprocess.run([*command, *cases], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of all cases by what trained them: one process, or two as a config of Accelerate says."""
    folder = tmp_path_factory.mktemp("runs")
    cases = (*TRAINED, "bf16")
    return {
        "one": run(folder / "one", *cases),
        "ddp": run(folder / "ddp", *cases, train_distributed.DROPPED, way="ddp"),
        "fsdp2": run(folder / "fsdp2", *cases, way="fsdp2"),
    }


def results(folder):
    return [torch.load(path) for path in sorted(folder.glob("?.pt"))]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", TRAINED)
def test_two_processes_train_as_one_does_with_the_same_samples(runs, way, case):
    [alone] = results(runs["one"] / case)
    first, second = results(runs[way] / case)
    assert first["way"] == f"DistributedType.{WAYS[way]}"
    assert len(alone["losses"]) == train_distributed.STEPS and len(set(alone["losses"])) > 1
    for each in (first, second):
        assert each["losses"] == pytest.approx(alone["losses"], rel=1e-6)  # the Trainer gathers them in float32
        torch.testing.assert_close(each["logits"], alone["logits"], rtol=1e-9, atol=1e-12)
    # The experts' use is that of the samples of both.
    assert len(first["experts"]) == STEPS_LOGGED and len(alone["experts"]) == STEPS_LOGGED
    for entry, wanted in zip(first["experts"], alone["experts"]):
        assert entry == pytest.approx(wanted, rel=1e-6)
    if way == "fsdp2":
        assert first["held"] + second["held"] == alone["held"] > first["held"] > 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", TRAINED)
def test_two_processes_save_the_whole_adapter_and_one_loads_it(runs, way, case):
    folder, choices = runs[way] / case, train_distributed.CASES[case]
    saved, alone = (load_file(runs[each] / case / "adapter_model.safetensors") for each in (way, "one"))
    fresh = get_peft_model_state_dict(train_distributed.build(choices))
    assert {name: tensor.shape for name, tensor in saved.items()} == {name: each.shape for name, each in fresh.items()}
    torch.testing.assert_close(saved, alone, rtol=1e-9, atol=1e-12)
    assert all(not torch.equal(saved[name], fresh[name]) for name in saved)
    model = PeftModel.from_pretrained(choices.make_model().to(choices.dtype), str(folder))
    trained = results(folder)[0]["logits"]
    torch.testing.assert_close(train_distributed.logits(model, choices), trained, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_go_on_from_a_checkpoint_as_if_nothing_had_happened(runs, way):
    whole, resumed = (load_file(runs[way] / case / "adapter_model.safetensors") for case in ("ast", "resumed"))
    at_checkpoint = load_file(runs[way] / "ast" / "checkpoint-3" / "adapter_model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not any(torch.equal(whole[name], at_checkpoint[name]) for name in whole)
    assert not (runs[way] / "resumed" / "checkpoint-3").exists() and (runs[way] / "resumed" / "checkpoint-6").exists()


@pytest.mark.parametrize("way", WAYS)
def test_in_half_precision_two_processes_keep_the_adapter_in_full_precision(runs, way):
    [alone], [first, _] = results(runs["one"] / "bf16"), results(runs[way] / "bf16")
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-2)
    saved = load_file(runs[way] / "bf16" / "adapter_model.safetensors")
    adapter = [tensor for name, tensor in saved.items() if ".softmoa_" in name]
    assert {tensor.dtype for tensor in adapter} == {torch.float32}
    # Values that bfloat16 does not have: the optimizer has worked in float32.
    assert all(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in adapter)


def test_layers_that_are_dropped_in_some_processes_only(runs):
    """Under DistributedDataParallel, a skipped layer's parameters have no gradient in one process, but in another."""
    first, second = results(runs["ddp"] / train_distributed.DROPPED)
    assert first["ran"] != second["ran"] and len(first["ran"]) < 24
    assert torch.equal(first["weights"], second["weights"])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configs_of_accelerate_have_no_unknown_fields(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == 2 and config.mixed_precision == "no"
    assert f"recipes accelerate/{path.stem} > {path.name}" in path.read_text()


@pytest.mark.parametrize("way", ["deepspeed_zero2", "deepspeed_zero3"])
def test_deepspeed_trains_saves_and_resumes_as_one_process_does(tmp_path, way):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install deepspeed")
    [alone] = results(run(tmp_path / "one", "fp32") / "fp32")
    folder = run(tmp_path / way, "fp32", "fp32_resumed", way=way)
    for case in ("fp32", "fp32_resumed"):
        for each in results(folder / case):
            assert each["way"] == "DistributedType.DEEPSPEED"
            assert each["losses"] == pytest.approx(alone["losses"], rel=1e-5)
            torch.testing.assert_close(each["logits"], alone["logits"], rtol=1e-3, atol=1e-4)
        choices = train_distributed.CASES[case]
        model = PeftModel.from_pretrained(choices.make_model(), str(folder / case))
        torch.testing.assert_close(train_distributed.logits(model, choices), each["logits"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "choices",
    [
        {"placement": "both"},
        {"target_modules": ["layers.0", "layers.1"]},
        {"train_norms": True},
        {"modules_to_save": ["classifier"], "label_names": ["low", "high"]},
    ],
    ids=lambda choices: "-".join(choices),
)
def test_parameters_that_zero_3_has_partitioned_get_the_same_adapter(choices):
    """As DeepSpeed's `zero.Init` leaves them while a model is loaded: empty, with their shape beside them."""
    whole, partitioned = build("AST"), build("AST")
    for parameter in partitioned.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, parameter.data.new_empty(0)
    models = [get_peft_model(model, SoftMoAConfig(**choices)) for model in (whole, partitioned)]
    wanted, found = (
        {name: each.shape for name, each in model.named_parameters() if ".softmoa_" in name} for model in models
    )
    assert wanted and found == wanted
    assert models[0].peft_config["default"].modules_to_save == models[1].peft_config["default"].modules_to_save
