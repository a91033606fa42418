"""Pushes to a Hub on loopback: what each `hub_strategy` of the Trainer leaves there, and what every push must have."""

import io
import json
import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard

from hub import Fault, loopback_hub

TOKEN = "hf_secret"
STRATEGIES = ["end", "every_save", "checkpoint", "all_checkpoints"]
WEIGHTS = "adapter_model.safetensors"

# Trains in a process of its own, whose clients know the Hub of the test.
PUSH = f"""
import sys, time
import torch
import transformers
from conftest import tiny_ast_config
from peft import get_peft_model
from peft_softmoa import SoftMoAConfig
from peft_softmoa.training import AudioTrainer
from transformers import ASTFeatureExtractor, ASTForAudioClassification, TrainingArguments

sleep = time.sleep
time.sleep = lambda seconds: sleep(seconds / 1000)

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {{"input_values": torch.randn(64, 128, generator=generator), "labels": index % 2}}

def adapted():
    torch.manual_seed(0)
    base = ASTForAudioClassification(tiny_ast_config(num_labels=2))
    base.name_or_path = base.config._name_or_path = "user/base"
    return get_peft_model(base, SoftMoAConfig(modules_to_save=["classifier"], label_names=["a", "b"]))

def make(name, trainer_class=AudioTrainer, **arguments):
    defaults = dict(max_steps=3, save_strategy="steps", save_steps=1, per_device_train_batch_size=2, use_cpu=True)
    pushing = dict(push_to_hub=True, hub_model_id=f"user/{{name}}", hub_token="{TOKEN}", hub_always_push=True)
    options = {{**defaults, **pushing, "report_to": "none", **arguments}}
    return trainer_class(
        adapted(),
        TrainingArguments(f"{{sys.argv[1]}}/{{name}}", **options),
        train_dataset=Rows(),
        eval_dataset=Rows(),
        processing_class=ASTFeatureExtractor(max_length=64, num_mel_bins=128),
    )
"""
COMPARE = f"""{PUSH}
for strategy in {STRATEGIES}:
    for trainer_class in (transformers.Trainer, AudioTrainer):
        trainer = make(f"{{strategy}}-{{trainer_class.__name__}}", trainer_class, hub_strategy=strategy)
        trainer.train()
        trainer.save_model()
trainer.evaluate()
trainer.push_to_hub()
adapted().push_to_hub("user/model", token="{TOKEN}")
"""


def run(hub, folder, code, *arguments):
    environment = {**os.environ, **hub.environment(folder / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A Hub and a folder, after runs of the plain Trainer and of AudioTrainer with each strategy."""
    folder = tmp_path_factory.mktemp("compared")
    with loopback_hub() as hub:
        run(hub, folder, COMPARE)
        yield hub, folder


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_strategy_gives_what_the_plain_trainer_gives(compared, strategy):
    hub, _ = compared
    plain, ours = (hub.repos[f"user/{strategy}-{name}"] for name in ("Trainer", "AudioTrainer"))
    assert set(ours) == set(plain)
    assert ours[WEIGHTS] == plain[WEIGHTS]
    folders = {"checkpoint": ["last-checkpoint"], "all_checkpoints": ["checkpoint-1", "checkpoint-2", "checkpoint-3"]}
    assert sorted({name.partition("/")[0] for name in ours if "/" in name}) == folders.get(strategy, [])
    for name in folders.get(strategy, []):
        assert ours[f"{name}/{WEIGHTS}"] == plain[f"{name}/{WEIGHTS}"]
        states = [json.loads(files[f"{name}/trainer_state.json"])["global_step"] for files in (ours, plain)]
        assert states[0] == states[1]
        optimizer = torch.load(io.BytesIO(ours[f"{name}/optimizer.pt"]), weights_only=True)
        assert optimizer["state"]


def cards(hub):
    """All cards of all commits of what we push."""
    return {
        (name, path): content.decode()
        for name, files in hub.repos.items()
        if "-Trainer" not in name
        for path, content in files.items()
        if path.rpartition("/")[2] == "README.md"
    }


def test_every_commit_has_the_card(compared):
    hub, _ = compared
    found = cards(hub)
    # Of each strategy the last commit, and those of the training.
    assert len(found) > 10
    for where, text in found.items():
        assert "import peft_softmoa" in text and "peft-softmoa" in ModelCard(text).data.tags, where
        assert ModelCard(text).data.library_name == "peft", where
    for name, files in hub.repos.items():
        if WEIGHTS in files and "-Trainer" not in name:
            assert "README.md" in files, name


def test_the_trainers_own_card_keeps_its_text(compared):
    hub, _ = compared
    text = hub.repos["user/all_checkpoints-AudioTrainer"]["README.md"].decode()
    assert "training hyperparameters" in text.lower() and "- Loss: " in text
    assert text.count("import peft_softmoa") == 1


def test_the_card_of_a_model_that_pushes_itself(compared):
    hub, _ = compared
    card = ModelCard(hub.repos["user/model"]["README.md"].decode())
    assert "More Information Needed" not in card.text and "with [PEFT]" in card.text
    assert card.data.base_model == "user/base" and "base_model:adapter:user/base" in card.data.tags


def test_the_token_is_nowhere(compared):
    hub, folder = compared
    ours = [path for path in folder.glob("*-AudioTrainer/**/*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in ours)
    assert not [path for path in ours if TOKEN.encode() in path.read_bytes()]
    pushed = {(name, path) for name, files in hub.repos.items() for path in files if TOKEN.encode() in files[path]}
    assert not [where for where in pushed if "-Trainer" not in where[0]]
    arguments = torch.load(folder / "end-AudioTrainer" / "training_args.bin", weights_only=False)
    assert arguments.hub_token is None and arguments.hub_model_id == "user/end-AudioTrainer"
    # What the plain Trainer does, or the test above could not fail.
    assert TOKEN.encode() in (folder / "end-Trainer" / "training_args.bin").read_bytes()


SLOW = f"""{PUSH}
arguments = dict(save_total_limit=1, hub_always_push=False, hub_strategy=sys.argv[2])
trainer = make("slow", **arguments)
trainer.train()
"""


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_a_slow_hub_gets_every_checkpoint_before_it_is_removed(tmp_path, strategy):
    with loopback_hub() as hub:
        hub.faults.append(Fault("slow", lambda request: "/preupload/" in request.path, seconds=0.5))
        run(hub, tmp_path, SLOW, strategy)
        files = set(hub.repos["user/slow"])
    assert [path.name for path in tmp_path.glob("slow/checkpoint-*")] == ["checkpoint-3"]
    steps = (1, 2, 3) if strategy == "all_checkpoints" else ()
    wanted = [f"checkpoint-{step}" for step in steps] or ["last-checkpoint"]
    assert {f"{name}/{part}" for name in wanted for part in (WEIGHTS, "optimizer.pt", "scheduler.pt")} <= files
    assert {name.partition("/")[0] for name in files if "/" in name} == set(wanted)


def test_a_push_in_the_background_that_fails_is_said(tmp_path):
    code = f'{PUSH}\nmake("failing", hub_strategy="every_save").train()\n'
    with loopback_hub() as hub:
        hub.faults.append(Fault(403, lambda request: "/commit/" in request.path))
        done = run(hub, tmp_path, code)
    assert done.stderr.count("A push to 'user/failing' failed: HfHubHTTPError") == 3
