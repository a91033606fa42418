"""Runs that resume notice what has changed under the same name, and two runs do not share a folder."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import train_no_trainer
from conftest import training_options, write_parquet, write_tone
from hub import loopback_hub
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from peft_softmoa import SoftMoAConfig
from peft_softmoa.commands.train import main
from peft_softmoa.training import fingerprint_weights, lock_run

RUN = {"max_steps": 1, "eval_strategy": "no", "save_strategy": "steps", "save_steps": 1}


def rewrite(path, change):
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))


def other_audio(base, tones):
    """Of the same size, as all tones are."""
    size = (tones / "1-low-0.wav").stat().st_size
    write_tone(tones / "1-low-0.wav", 1234.0)
    assert (tones / "1-low-0.wav").stat().st_size == size


def other_labels(base, tones):
    rewrite(tones / "metadata.csv", lambda text: text.replace("1-low-0.wav,low", "1-low-0.wav,high"))


def fewer_rows(base, tones):
    rewrite(tones / "metadata.csv", lambda text: text.replace("1-low-0.wav,low,1\n", ""))


def rows_in_another_order(base, tones):
    first, second = "1-low-0.wav,low,1\n", "1-low-1.wav,low,1\n"
    rewrite(tones / "metadata.csv", lambda text: text.replace(first + second, second + first))


def other_weights(base, tones):
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if name.endswith("layernorm_after.weight"))
    weights[name][0] += 1e-3
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def other_config(base, tones):
    rewrite(base / "config.json", lambda text: text.replace('"layer_norm_eps": 1e-12', '"layer_norm_eps": 1e-05'))


def other_features(base, tones):
    rewrite(base / "preprocessor_config.json", lambda text: text.replace('"mean": -4.26', '"mean": -4.16'))


CHANGES = {
    other_audio: "training_audio",
    other_labels: "training_rows",
    fewer_rows: "training_rows",
    rows_in_another_order: "training_rows",
    other_weights: "base_weights",
    other_config: "base_config",
    other_features: "feature_extractor",
}


@pytest.fixture
def places(base_folder, tones_folder, tmp_path):
    """Copies of the base model and of the dataset."""
    return shutil.copytree(base_folder, tmp_path / "base"), shutil.copytree(tones_folder, tmp_path / "tones")


def interrupted(folder):
    """Let a run seem to be interrupted."""
    run = folder / "run.json"
    assert json.loads(run.read_text())["finished"]
    run.write_text(run.read_text().replace('"finished": true', '"finished": false'))
    (folder / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changes_under_the_same_name_is_noticed(places, tmp_path, change):
    options = training_options(*places, tmp_path / "out", **RUN)
    main(options)
    interrupted(tmp_path / "out")
    main(options)  # nothing has changed
    interrupted(tmp_path / "out")
    change(*places)
    message = f"holds a run with other settings: {CHANGES[change]} was '\\w+' and is '\\w+'"
    with pytest.raises(ValueError, match=message):
        main(options)


@pytest.mark.parametrize("change", [other_audio, other_weights], ids=lambda change: change.__name__)
def test_the_plain_loop_notices_too(places, tmp_path, change):
    options = training_options(*places, tmp_path / "out", num_train_epochs=1)
    index = options.index("--report_to")
    options = options[:index] + options[index + 2 :]
    train_no_trainer.main(options)
    interrupted(tmp_path / "out")
    change(*places)
    with pytest.raises(ValueError, match=f"{CHANGES[change]} was '\\w+' and is '\\w+'"):
        train_no_trainer.main(options)


def test_files_that_hold_rows_and_audio(base_folder, places, tmp_path):
    _, tones = places
    folder = write_parquet(tmp_path / "parquet", tones)
    options = training_options(base_folder, folder, tmp_path / "out", **RUN)
    main(options)
    interrupted(tmp_path / "out")
    main(options)
    interrupted(tmp_path / "out")
    other_audio(None, tones)
    shutil.rmtree(folder)
    write_parquet(folder, tones)
    with pytest.raises(ValueError, match="other settings: training_audio was"):
        main(options)


def test_evaluation_counts_where_it_chooses_the_result(places, tmp_path):
    """The best checkpoint is that of the evaluation."""
    base, tones = places
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "eval_strategy": "steps"}
    for name, more in (("last", {}), ("best", {**best, "eval_steps": 1})):
        main(training_options(base, tones, tmp_path / name, **{**RUN, **more}))
        interrupted(tmp_path / name)
    write_tone(tones / "2-low-0.wav", 1234.0)
    main(training_options(base, tones, tmp_path / "last", **RUN))
    options = training_options(base, tones, tmp_path / "best", **{**RUN, **best, "eval_steps": 1})
    with pytest.raises(ValueError, match="other settings: evaluation_audio was"):
        main(options)
    with pytest.raises(ValueError, match="eval_rows was 'fold=2' and is 'label=low'"):
        main([*options, "--eval_rows", "label=low", "--train_rows", "fold=1"])


HUB = """
import sys
from peft_softmoa.training import load_stream
from transformers import ASTFeatureExtractor
print(load_stream("user/sounds", "train", ASTFeatureExtractor()).fingerprint["audio"])
"""


def test_another_commit_on_the_hub(tones_folder, tmp_path):
    content = (write_parquet(tmp_path / "parquet", tones_folder) / "train.parquet").read_bytes()
    with loopback_hub() as hub:
        hub.repos["datasets/user/sounds"] = {"data/train-00000-of-00001.parquet": content}
        found = []
        for index in range(3):
            if index == 2:
                hub.repos["datasets/user/sounds"]["README.md"] = b"# Other sounds"
            environment = {**os.environ, **hub.environment(tmp_path / str(index))}
            done = subprocess.run([sys.executable, "-c", HUB], capture_output=True, text=True, env=environment)
            assert done.returncode == 0, done.stderr
            found.append(done.stdout)
    assert found[0] == found[1] != found[2]


def test_weights_of_every_dtype(tiny_ast):
    model = get_peft_model(tiny_ast, SoftMoAConfig())
    tiny_ast.register_buffer("flags", torch.tensor([True, False]))
    tiny_ast.register_buffer("count", torch.tensor(3))
    found = [fingerprint_weights(model)]
    with torch.no_grad():
        next(parameter for parameter in model.parameters() if parameter.requires_grad).add_(1)
        assert fingerprint_weights(model) == found[0]  # what is trained does not count
        tiny_ast.flags[0] = False
        found.append(fingerprint_weights(model))
        tiny_ast.count += 1
        found.append(fingerprint_weights(model))
        for dtype in (torch.bfloat16, torch.float16):
            found.append(fingerprint_weights(model.to(dtype)))
    assert len(set(found)) == 5


HOLD = """
import sys, time, torch
from peft_softmoa.training import lock_run

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 1000

    def __getitem__(self, index):
        time.sleep(0.2)
        return index

with lock_run(sys.argv[1]):
    batches = iter(torch.utils.data.DataLoader(Rows(), num_workers=1, prefetch_factor=50))
    next(batches)
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_second_run_in_the_folder_is_refused(base_folder, tones_folder, tmp_path):
    folder = tmp_path / "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "locked\n"
        options = training_options(base_folder, tones_folder, folder, **RUN)
        with pytest.raises(
            ValueError, match="Another run writes into the output folder .* or choose another --output_dir"
        ):
            main(options)
        plain = training_options(base_folder, tones_folder, folder)
        plain = plain[: plain.index("--report_to")] + plain[plain.index("--report_to") + 2 :]
        with pytest.raises(ValueError, match="Another run writes into the output folder"):
            train_no_trainer.main(plain)
        assert not list(folder.glob("[!_]*"))
        with lock_run(folder, is_main=False):  # the other processes of a run do not lock
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    # Though its worker may still live.
    main(options)


def test_an_error_gives_the_folder_free(tmp_path):
    with pytest.raises(RuntimeError, match="in training"), lock_run(tmp_path):
        with pytest.raises(ValueError, match="Another run writes"), lock_run(tmp_path):
            pass
        raise RuntimeError("in training")
    with lock_run(tmp_path):
        pass
