"""Runs that are cut off: by a kill, a full disk, or somebody who starts another one in their place."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import training_options

from peft_softmoa.commands.train import main
from peft_softmoa.training import AudioTrainer, atomic_checkpoint, newest_checkpoint, start_or_resume, write_run_state

EXAMPLES = Path(__file__).parents[2] / "examples"
# A run with all that is drawn at random: order, cuts, masks and dropout.
RANDOM = {
    "max_length_seconds": 0.4,
    "mask_frequencies": 24,
    "mask_frames": 30,
    "dropout": 0.2,
    "shuffle_buffer_size": 5,
    "per_device_train_batch_size": 3,
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "no",
    "logging_strategy": "no",
}

# Starts runs as forks of one process that has imported everything, and kills them at random moments.
KILLS = """
import os, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch
from peft_softmoa.commands.train import main
from peft_softmoa.training import newest_checkpoint
from safetensors.torch import load_file
from transformers import TrainerState

folder, kills, options = sys.argv[2], int(sys.argv[3]), sys.argv[4:]

def start(name):
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        main([*options, "--output_dir", f"{folder}/{name}"])
        os._exit(0)
    return pid

def check_newest():
    newest = newest_checkpoint(f"{folder}/killed")
    if newest is None:
        return 0
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(f"{newest}/{name}", weights_only=True)
    torch.load(f"{newest}/rng_state.pth", weights_only=False)
    load_file(f"{newest}/adapter_model.safetensors")
    return TrainerState.load_from_json(f"{newest}/trainer_state.json").global_step

draw = random.Random(0)
steps = [0]
while len(steps) <= kills:
    newest = newest_checkpoint(f"{folder}/killed")
    pid = start("killed")
    deadline = time.monotonic() + 60
    # Some while it starts, most at some moment after its first new checkpoint.
    if draw.random() > 0.2:
        while newest_checkpoint(f"{folder}/killed") == newest and time.monotonic() < deadline:
            time.sleep(0.01)
    time.sleep(draw.uniform(0, 0.15))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), f"the run ended by itself, after {len(steps)} kills"
    steps.append(check_newest())
    assert steps[-1] >= steps[-2], steps
for name in ("killed", "whole"):
    _, status = os.waitpid(start(name), 0)
    assert status == 0, name
print("steps at the kills:", *steps)
"""


def test_twenty_kills_lose_nothing(base_folder, tones_folder, tmp_path):
    """The adapter is, to the bit, that of a run that was let alone; with a worker that reads the data."""
    arguments = {
        **RANDOM,
        "max_steps": 149,
        "lr_scheduler_type": "constant",
        "save_total_limit": 2,
        "dataloader_num_workers": 1,
    }
    options = training_options(base_folder, tones_folder, tmp_path, **arguments)[:-2]
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(EXAMPLES), str(tmp_path), "20", *options], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    steps = list(map(int, done.stdout.rpartition("steps at the kills:")[2].split()))
    assert len(set(steps)) > 10 and steps[-1] < 149
    killed, whole = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("killed", "whole"))
    assert killed == whole
    assert json.loads((tmp_path / "killed" / "run.json").read_text())["finished"]
    assert not list((tmp_path / "killed").glob("_unfinished*"))


def run_of(base_folder, tones_folder, folder, **arguments):
    return training_options(base_folder, tones_folder, folder, **{**RANDOM, "max_steps": 4, **arguments})


def test_a_full_disk_leaves_the_newest_checkpoint(base_folder, tones_folder, tmp_path, monkeypatch):
    save = torch.save

    def fail(content, path, *args, **kwargs):
        if "checkpoint-3" in str(path) and str(path).endswith("optimizer.pt"):
            raise OSError(28, "No space left on device", path)
        save(content, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", fail)
    options = run_of(base_folder, tones_folder, tmp_path / "out")
    with pytest.raises(OSError, match="checkpoint-3 could not be saved.*No space left.*checkpoint-2.*same command"):
        main(options)
    assert newest_checkpoint(tmp_path / "out").endswith("checkpoint-2")
    assert not (tmp_path / "out" / "_unfinished-checkpoint").exists()
    monkeypatch.undo()
    assert main(options).state.global_step == 4
    with pytest.raises(ValueError, match="is finished. Choose another --output_dir, or train it longer"):
        main(options)
    whole = main(run_of(base_folder, tones_folder, tmp_path / "whole"))
    assert whole.state.global_step == 4
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "whole")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_experts": 3}, "num_experts was 7 and is 3"),
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size was 3 and is 4"),
        (
            {"train_rows": "fold=2", "shuffle_buffer_size": 7},
            "train_rows was 'fold=1' and is 'fold=2'; shuffle_buffer_size was 5",
        ),
    ],
)
def test_a_run_with_other_settings_does_not_go_on(base_folder, tones_folder, tmp_path, changes, message):
    note = run_of(base_folder, tones_folder, tmp_path / "out", max_steps=1)
    main(note)
    run = tmp_path / "out" / "run.json"
    run.write_text(run.read_text().replace('"finished": true', '"finished": false'))
    with pytest.raises(ValueError, match=f"holds a run with other settings: .*{message}"):
        main(run_of(base_folder, tones_folder, tmp_path / "out", max_steps=1, **changes))


def test_when_a_run_goes_on(tmp_path):
    folder = tmp_path / "out"
    assert start_or_resume(folder, {"seed": 1}) is None
    (folder / "checkpoint-9").mkdir()
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-best").mkdir()
    assert newest_checkpoint(folder) == start_or_resume(folder, {"seed": 1}) == str(folder / "checkpoint-10")
    # Back to an earlier one: those after it do not get in its way, nor are they lost.
    earlier = str(folder / "checkpoint-9")
    assert start_or_resume(folder, {"seed": 1}, earlier) == earlier
    assert {path.name for path in folder.glob("*checkpoint-*")} == {
        "checkpoint-9",
        "checkpoint-best",
        "_later-checkpoint-10",
    }
    (folder / "checkpoint-10").mkdir()
    # The same command, started again, goes on from where it was.
    for again in (earlier, f"{earlier}/", f"{folder}/../out/checkpoint-9"):
        assert start_or_resume(folder, {"seed": 1}, again) == str(folder / "checkpoint-10")
    # Also in another place.
    moved = folder.rename(tmp_path / "moved")
    assert start_or_resume(moved, {"seed": 1}, str(moved / "checkpoint-9")) == str(moved / "checkpoint-10")
    moved.rename(folder)
    with pytest.raises(ValueError, match="seed was 1 and is 2"):
        start_or_resume(folder, {"seed": 2})
    with pytest.raises(ValueError, match="seed was 1 and is 2"):
        start_or_resume(folder, {"seed": 2}, True)
    with pytest.raises(ValueError, match="There is no checkpoint .*checkpoint-11"):
        start_or_resume(folder, {"seed": 1}, str(folder / "checkpoint-11"))
    for other in (tmp_path / "other" / "checkpoint-1", folder / "checkpoint-best"):
        with pytest.raises(ValueError, match="must be a checkpoint in the output folder"):
            start_or_resume(folder, {"seed": 1}, str(other))
    # A setting that another version does not know is no other one.
    assert start_or_resume(folder, {"seed": 1, "new": 5})
    with pytest.raises(ValueError, match="already holds a model"):
        start_or_resume(folder, {"seed": 1}, False)
    write_run_state(folder, {"seed": 1, "epochs": 2}, finished=True)
    with pytest.raises(ValueError, match="epochs was 2 and is 3"):
        start_or_resume(folder, {"seed": 1, "epochs": 3}, may_change=["epochs"])
    assert start_or_resume(folder, {"seed": 1, "epochs": 3}, True, may_change=["epochs"])
    write_run_state(folder, {"seed": 1}, finished=True)
    with pytest.raises(ValueError, match="is finished"):
        start_or_resume(folder, {"seed": 1})
    assert start_or_resume(folder, {"seed": 1}, True) == str(folder / "checkpoint-10")
    noted = json.loads((folder / "run.json").read_text())
    assert noted == {"finished": False, "resume": True, "settings": {"seed": 1}}
    assert start_or_resume(tmp_path / "new", {"seed": 1}, None) is None
    with pytest.raises(ValueError, match="There is no checkpoint in .*new"):
        start_or_resume(tmp_path / "new", {"seed": 1}, True)


def test_a_checkpoint_is_whole_or_not_there(tmp_path):
    with atomic_checkpoint(tmp_path, "checkpoint-1") as path:
        Path(path, "file").write_text("1")
        assert newest_checkpoint(tmp_path) is None
    assert (tmp_path / "checkpoint-1" / "file").read_text() == "1"
    with pytest.raises(ValueError, match="other"), atomic_checkpoint(tmp_path, "checkpoint-2") as path:
        Path(path, "file").write_text("2")
        raise ValueError("other")
    message = "checkpoint-2 could not be saved.*cannot write.*checkpoint-1"
    with pytest.raises(OSError, match=message), atomic_checkpoint(tmp_path, "checkpoint-2"):
        raise RuntimeError("cannot write")
    with atomic_checkpoint(tmp_path, "checkpoint-1") as path:  # what a killed run has left does not matter
        Path(path, "file").write_text("3")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["checkpoint-1"]
    assert (tmp_path / "checkpoint-1" / "file").read_text() == "3"


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_a_run_goes_on_from_the_end_of_an_epoch(base_folder, tones_folder, tmp_path, monkeypatch, strategy):
    """Where it evaluates, which is not done again."""
    options = {"eval_strategy": strategy, "save_strategy": strategy, "save_steps": 3, "eval_steps": 1, "max_steps": 7}
    main(run_of(base_folder, tones_folder, tmp_path / "whole", **options))

    def cut_off(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(AudioTrainer, "_save_checkpoint", _until(3, AudioTrainer._save_checkpoint, cut_off))
    with pytest.raises(KeyboardInterrupt):
        main(run_of(base_folder, tones_folder, tmp_path / "cut", **options))
    assert newest_checkpoint(tmp_path / "cut").endswith("checkpoint-3")
    monkeypatch.undo()
    main(run_of(base_folder, tones_folder, tmp_path / "cut", **options))
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("cut", "whole")]
    assert files[0] == files[1]


def _until(step, save, then):
    def save_or_stop(trainer, *args):
        if trainer.state.global_step > step:
            then()
        save(trainer, *args)

    return save_or_stop


@pytest.mark.parametrize("length", [{"max_steps": 4}, {"max_steps": -1, "num_train_epochs": 1.2}], ids=str)
def test_a_run_that_lacks_only_its_end_trains_no_more(base_folder, tones_folder, tmp_path, length):
    """Its last step is within an epoch, of which the Trainer would go on with the next."""
    options = run_of(base_folder, tones_folder, tmp_path / "out", lr_scheduler_type="constant", **length)
    main(options)
    adapter = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    (tmp_path / "out" / "all_results.json").write_text("")  # cut off while it was written
    run = tmp_path / "out" / "run.json"
    run.write_text(run.read_text().replace('"finished": true', '"finished": false'))
    assert main(options).state.global_step == 4
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == adapter


@pytest.mark.parametrize("name", ["save_only_model", "ignore_data_skip"])
def test_what_a_run_needs_to_go_on_is_not_left_out(base_folder, tones_folder, tmp_path, name):
    with pytest.raises(ValueError, match=f"With --{name} an interrupted run could not resume"):
        main(run_of(base_folder, tones_folder, tmp_path / "out", **{name: True}))


def test_small_last_batches_are_kept(base_folder, tones_folder, tmp_path):
    with pytest.raises(ValueError, match="leave out --dataloader_drop_last"):
        main(run_of(base_folder, tones_folder, tmp_path / "out", dataloader_drop_last=True))


def test_the_best_checkpoint_is_kept_and_loaded(base_folder, tones_folder, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1}
    trainer = main(run_of(base_folder, tones_folder, tmp_path / "out", metric_for_best_model="eval_loss", **options))
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / f"checkpoint-{best}")
    kept = {path.name for path in (tmp_path / "out").glob("checkpoint-*")}
    assert kept == {f"checkpoint-{best}"}  # the Trainer itself removes another last one at the end
    state = json.loads((tmp_path / "out" / f"checkpoint-{best}" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == trainer.state.best_model_checkpoint


@pytest.fixture
def run_with_a_best_checkpoint(base_folder, tones_folder, tmp_path):
    """Options of a run whose first of three checkpoints is the best, and which was interrupted after the second."""
    options = {"eval_strategy": "steps", "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    options |= {"learning_rate": 10.0, "warmup_steps": 1, "eval_steps": 1, "max_steps": 3}

    def options_in(folder):
        return run_of(base_folder, tones_folder, folder, **options)

    trainer = main(options_in(tmp_path / "first"))
    assert trainer.state.best_global_step == 1
    for name in ("adapter_model.safetensors", "checkpoint-3/adapter_model.safetensors"):
        (tmp_path / "first" / name).rename(tmp_path / name.replace("/", "-"))
    run = tmp_path / "first" / "run.json"
    run.write_text(run.read_text().replace('"finished": true', '"finished": false'))
    return options_in


@pytest.mark.parametrize("trained", ["whole", "in part"])
@pytest.mark.parametrize("how", ["moved", "copied"])
def test_a_run_that_was_moved_finds_its_best_checkpoint(run_with_a_best_checkpoint, tmp_path, trained, how):
    first, other = tmp_path / "first", tmp_path / "other"
    if trained == "whole":
        (tmp_path / "checkpoint-3-adapter_model.safetensors").rename(
            first / "checkpoint-3" / "adapter_model.safetensors"
        )
    else:
        shutil.rmtree(first / "checkpoint-3")
    if how == "moved":
        first.rename(other)
    else:
        shutil.copytree(first, other)
        (first / "checkpoint-1" / "adapter_model.safetensors").write_bytes(b"of another run")
    trainer = main(run_with_a_best_checkpoint(other))
    assert trainer.state.global_step == 3
    assert trainer.state.best_model_checkpoint == str(other / "checkpoint-1")
    adapter = (other / "adapter_model.safetensors").read_bytes()
    assert adapter == (other / "checkpoint-1" / "adapter_model.safetensors").read_bytes()
    assert adapter == (tmp_path / "adapter_model.safetensors").read_bytes()


def test_a_best_checkpoint_that_is_missing(run_with_a_best_checkpoint, tmp_path):
    shutil.rmtree(tmp_path / "first" / "checkpoint-1")
    with pytest.raises(ValueError, match="The best checkpoint .*checkpoint-1', is missing.*leave out --load_best"):
        main(run_with_a_best_checkpoint(tmp_path / "first"))


def test_masks_are_for_training_only(base_folder, tones_folder, tmp_path):
    trainer = main(run_of(base_folder, tones_folder, tmp_path / "out", max_steps=1))
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_values"]), with_kwargs=True
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.training_step(trainer.model, dict(batch))
    assert seen[0].shape == batch["input_values"].shape and not torch.equal(seen[0], batch["input_values"])
    trainer.prediction_step(trainer.model, dict(batch), True)
    assert torch.equal(seen[1], batch["input_values"])
