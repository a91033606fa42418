"""The benchmark's parts. What it measures is asserted nowhere: times are noise on a busy machine."""

import json
import re
import subprocess
import weakref
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import needs_results
from peft import get_peft_model
from torch import nn
from transformers import ASTConfig, ASTForAudioClassification

from examples.benchmark import audio, run, streaming
from examples.benchmark.literal import LITERAL, write_literally
from examples.benchmark.measure import commit_of, count_flops, import_seconds, in_turn, memory_of, ratio
from examples.benchmark.methods import (
    BUDGET,
    FLOOR,
    METHODS,
    MODELS,
    PROBE,
    SMALL_AST,
    make_ast,
    make_batch,
    make_small_ast,
)
from examples.benchmark.report import BEGIN, END, draw_sweeps, for_page, rates, tables, write_into
from examples.benchmark.run import in_onnx_runtime, main
from peft_softmoa import SoftMoAConfig
from peft_softmoa.method import Mixture

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "examples" / "benchmark" / "results").glob("*.json"))


def tiny_ast(layers=2):
    torch.manual_seed(0)
    return ASTForAudioClassification(
        ASTConfig(
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=64,
            max_length=64,
            frequency_stride=16,
            time_stride=16,
            num_labels=4,
        )
    ).eval()


@pytest.mark.parametrize("num_experts, num_slots", [(3, 1), (2, 3), (1, 2)])
@pytest.mark.parametrize("routing", ["soft", "dense"])
def test_the_literal_mixtures_compute_the_same(routing, num_experts, num_slots):
    torch.manual_seed(0)
    options = {"num_slots": num_slots} if routing == "soft" else {}
    config = SoftMoAConfig(routing=routing, num_experts=num_experts, r=2, init_weights=False, **options)
    mixture = Mixture(8, 6, **config.mixture_options()).double()
    literal = LITERAL[routing](mixture.router, mixture.experts).double()
    tokens = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    given = literal(tokens)
    expected = mixture(tokens, added_to=torch.zeros_like(given))[0]
    torch.testing.assert_close(given, expected)
    upstream = torch.randn_like(given)
    gradients = [torch.autograd.grad((output * upstream).sum(), tokens) for output in (given, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("routing", ["soft", "dense"])
def test_a_model_with_literal_mixtures_computes_the_same(routing):
    model = get_peft_model(tiny_ast(), SoftMoAConfig(routing=routing, r=2, init_weights=False)).get_base_model()
    values = torch.randn(2, 64, 128)
    expected = model(values).logits
    write_literally(model, routing)
    torch.testing.assert_close(model(values).logits, expected)
    assert not any("softmoa" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("method", METHODS)
def test_what_each_method_trains(method):
    model = METHODS[method](tiny_ast())
    model(torch.randn(2, 64, 128), labels=torch.arange(2)).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    head = {name for name, _ in model.named_parameters() if name.startswith("classifier.")}
    if method == FLOOR:
        assert trained == {"audio_spectrogram_transformer.layers.0.zero"}
    elif method == PROBE:
        assert trained == head
    else:
        assert trained > head
        assert (method == "full fine-tuning") == (len(trained) == len(list(model.parameters())))


def test_the_batch_fits_the_model():
    batch = make_batch("AST-base, 500 frames", 3, "cpu")
    assert batch["input_values"].shape == (3, 500, 128) and batch["labels"].tolist() == [0, 1, 2]


def test_functions_run_in_turn():
    calls = []
    seconds = in_turn({name: lambda name=name: calls.append(name) for name in "abcde"}, 2, "cpu")
    rounds = ["".join(calls[i : i + 5]) for i in (0, 5, 10)]
    assert len(calls) == 15 and all(sorted(turn) == list("abcde") for turn in rounds) and len(set(rounds)) == 3
    assert set(seconds) == set("abcde") and all(len(each) == 2 and min(each) >= 0 for each in seconds.values())


def test_memory_is_what_autograd_keeps():
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.Sigmoid())
    inputs = torch.randn(5, 8)
    # The inputs of both layers and of the first activation, and the output of the second; not the weights.
    assert memory_of(lambda: model(inputs).sum(), None, model, "cpu") == 4 * 5 * (8 + 16 + 16 + 16)
    outputs = []
    for module in model:
        module.register_forward_hook(lambda module, args, output: outputs.append(weakref.ref(output)))
    memory_of(lambda: model(inputs).sum(), None, model, "cpu")
    assert [output() for output in outputs] == [None] * 4  # nothing is left behind
    model.requires_grad_(False)
    assert memory_of(lambda: model(inputs).sum(), None, model, "cpu") == 0


def test_soft_moa_keeps_little_more_than_the_floor():
    """On AST-base; of a batch, each sample takes its part."""
    batch = make_batch("AST-base, 500 frames", 1, "cpu")
    kept = {}
    for method in (FLOOR, "Soft-MoA"):
        model = METHODS[method](make_ast(12)).train()
        kept[method] = memory_of(lambda model=model: model(**batch).loss, None, model, "cpu")
    assert kept["Soft-MoA"] <= 1.10 * kept[FLOOR]


@pytest.mark.parametrize("model_name", MODELS)
def test_methods_have_one_budget(model_name):
    trained = {}
    for method in METHODS:
        if "literal" not in method:  # they take the parameters of others
            with torch.device("meta"):
                model = METHODS[method](MODELS[model_name][0](12))
            trained[method] = sum(each.numel() for each in model.parameters() if each.requires_grad)
    head = trained.pop(PROBE)
    assert trained.pop(FLOOR) == 1 and trained.pop("full fine-tuning") > 80e6
    assert trained["Soft-MoA"] == 903_672 + head
    assert all(0.97 * BUDGET < number - head <= BUDGET for number in trained.values()), trained


def test_floating_point_operations():
    model = nn.Linear(8, 16)
    assert count_flops(lambda: model(torch.randn(5, 8))) == 2 * 5 * 8 * 16
    query = torch.randn(1, 2, 5, 4)
    attend = nn.functional.scaled_dot_product_attention
    assert count_flops(lambda: attend(query, query, query)) == 2 * (2 * 2 * 5 * 5 * 4)


def test_the_time_of_the_import():
    (seconds,) = import_seconds(1)
    assert seconds > 0


def test_results_that_change_are_no_uncommitted_changes(tmp_path):
    assert commit_of(tmp_path) == (None, None)
    code, runs = (
        tmp_path / "examples" / "run.py",
        tmp_path / "examples" / "method_comparison" / "results" / "runs.jsonl",
    )
    runs.parent.mkdir(parents=True)
    for path in (code, runs):
        path.write_text("first\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    runs.write_text("second\n")
    commit, changed = commit_of(runs.parent)
    assert len(commit) == 40 and not changed
    code.write_text("second\n")
    assert commit_of(runs.parent) == (commit, True)


def test_ratios_are_of_the_same_round():
    assert ratio([2.0, 20.0, 1.0], [1.0, 10.0, 10.0]) == 2.0


def test_a_quick_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(MODELS, next(iter(MODELS)), (tiny_ast, (64, 128)))
    main(
        ["--quick", "--layers", "1", "--batch_size", "1", "--forward_batch_sizes", "1", "--rounds", "1"]
        + ["--layer_rounds", "1", "--output_dir", str(tmp_path)]
    )
    (path,) = tmp_path.glob("*-quick.json")
    results = json.loads(path.read_text())
    printed = capsys.readouterr().out
    assert printed == f"{tables(results)}\nEvery single time is in {path}.\n"
    for row in results["models"][0]["rows"]:
        assert re.search(rf"^\| {row['method']} \| ", printed, re.MULTILINE)
        assert len(row["step_seconds"]) == len(row["forward_1_seconds"]) == 1
    assert {"device", "threads", "torch", "commit", "uncommitted changes"} <= set(results["environment"])
    for picture in draw_sweeps(results, tmp_path / "pictures"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    page = tmp_path / "costs.md"
    page.write_text(f"before\n{BEGIN}old\n{END}after\n")
    write_into(page, results)
    assert page.read_text() == f"before\n{BEGIN}{for_page(results)}{END}after\n"
    page.write_text("no place\n")
    with pytest.raises(ValueError, match="has no place for the tables"):
        write_into(page, results)


def test_deployment(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, next(iter(MODELS)), (tiny_ast, (64, 128)))
    main(
        [
            "--parts",
            "deployment",
            "--layers",
            "1",
            "--forward_batch_sizes",
            "3",
            "--rounds",
            "2",
            "--output_dir",
            str(tmp_path),
        ]
    )
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())
    rows = results["deployment"]
    assert [row["runtime"] for row in rows] == ["PyTorch", "compiled", "ONNX Runtime"] * 2
    assert all(len(row["forward_3_seconds"]) == 2 for row in rows)
    assert not results["models"] and not results["layer"]
    assert "| ONNX Runtime | " in path.with_suffix(".md").read_text()


def test_mixed_batches(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, next(iter(MODELS)), (tiny_ast, (64, 128)))
    main(["--parts", "mixed batches", "--layers", "1", "--rounds", "1", "--output_dir", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["mixed_batches"]
    assert [len(row["seconds"]["one by one"]) for row in rows] == [1, 5]
    assert all(max(row["difference"].values()) < 1e-5 for row in rows)
    assert f"| {SMALL_AST} | " in path.with_suffix(".md").read_text()


def test_the_input_pipeline(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, next(iter(MODELS)), (make_small_ast, (128, 128)))
    main(["--parts", "input", "--layers", "1", "--rounds", "1", "--output_dir", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["input"]
    assert [row["samples"] for row in rows] == [64, 64, 64, 8] and all(len(row["seconds"]) == 1 for row in rows)
    assert "| input, 2 workers, 64 samples | " in path.with_suffix(".md").read_text()


def test_recording(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, next(iter(MODELS)), (make_small_ast, (128, 128)))
    main(["--parts", "recording", "--layers", "1", "--rounds", "1", "--output_dir", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["recording"]
    assert [row["method"] for row in rows] == ["Soft-MoA", "Dense-MoA"]
    assert all(len(row["plain"]) == len(row["recorded"]) == 1 for row in rows)
    assert "| Dense-MoA | " in path.with_suffix(".md").read_text()


def test_lengths(tmp_path):
    options = ["--layers", "1", "--rounds", "1", "--batch_size", "1", "--output_dir", str(tmp_path)]
    main(["--parts", "lengths", *options])
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["lengths"]
    assert [list(row["seconds"]) for row in rows] == [["1", "5", "10.24"], ["1", "5", "30"]]
    assert all(len(seconds) == 1 for row in rows for seconds in row["seconds"].values())
    assert "| Whisper tiny | 30 | " in path.with_suffix(".md").read_text()


def test_order_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "LENGTHS", (16, 64))
    monkeypatch.setattr(run, "POSITIONS", (3, 1500))
    monkeypatch.setattr(streaming, "BATCH_TOKENS", 32)
    main(["--parts", "order in time", "--layer_rounds", "1", "--output_dir", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())
    assert [(row["num_experts"], row["batch_size"], row["num_tokens"]) for row in results["order"][::3]] == [
        (number, batch_size, length) for number in (7, 64) for batch_size, length in ((2, 16), (1, 64))
    ]
    assert all(row["memory_bytes"] > 0 and len(row["seconds"]) == 1 for row in results["order"])
    # S·(R + 2) numbers, or 2·N·R of a convolution with a kernel of 3.
    assert [row["state_numbers"] for row in results["stream"]] == [56, 84, 192, 128]
    assert all(list(row["seconds"]) == ["3", "1500"] for row in results["stream"])
    text = path.with_suffix(".md").read_text()
    assert "| 64 | 1 | 1 | 64 | " in text and "| Dense-MoA, causal convolutions | 7 | 6 | 84 | " in text


def test_the_model_in_onnx_runtime_says_the_same():
    model, values = tiny_ast(), torch.randn(1, 64, 128)
    run = in_onnx_runtime(model, values)
    values = torch.randn(3, 64, 128)
    with torch.no_grad():
        expected = model(values).logits
    torch.testing.assert_close(torch.from_numpy(run(values)[0]), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results_can_be_shown(path):
    results = json.loads(path.read_text())
    assert results["environment"]["commit"] and not results["environment"]["uncommitted changes"]
    assert (path.with_suffix(".md")).read_text() == tables(results)
    assert list(path.with_suffix("").glob("*.png")) or not results["layer"]


@needs_results
def test_the_page_quotes_committed_results():
    quoted = (ROOT / "docs" / "costs.md").read_text().partition(BEGIN)[2].partition(END)[0]
    results = [json.loads(path.read_text()) for path in RESULTS]
    assert quoted in [for_page(each) for each in results if each["models"]]


def test_the_ways_of_reading_audio_read_the_same(tmp_path):
    for name, ending in audio.FORMATS.items():
        folder = tmp_path / ending
        paths = audio.write_clips(folder, ending, 2, audio.CLIP_SECONDS, 2)
        assert soundfile.info(paths[0]).format == name.upper()
        (folder / "metadata.csv").write_text("\n".join(["file_name,label", *(f"{path.name},x" for path in paths)]))
        both = [sorted(audio.stream_of(folder, None), key=_first), sorted(audio.map_of(paths, None), key=_first)]
        for ours, plain in zip(*both, strict=True):
            assert len(ours["input_values"]) == audio.CLIP_SECONDS * audio.RATE
            difference = ours["input_values"] - plain["input_values"]
            assert np.abs(difference).max() < 1e-5
        for rows in (audio.stream_of(folder, 2), audio.map_of(paths, 2)):
            assert [len(row["input_values"]) for row in rows] == [2 * audio.RATE] * 2
        with pytest.raises(RuntimeError, match="2 of 3 clips were read"):
            audio.read_all(audio.map_of(paths, 2), 3)


def _first(row):
    return float(row["input_values"][0])


def test_audio_and_epochs_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "CLIPS", 2)
    monkeypatch.setattr(audio, "CROPS", 2)
    monkeypatch.setattr(audio, "LONG_SECONDS", 15)
    main(["--parts", "audio", "epochs", "--rounds", "1", "--other_rounds", "2", "--output_dir", str(tmp_path)])
    [path] = tmp_path.glob("*.json")
    results = json.loads(path.read_text())
    assert [row["format"] for row in results["audio"]] == 2 * list(audio.FORMATS)
    for row in results["audio"]:
        assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in row["processor_seconds"].values())
    for row in results["epochs"]:
        assert row["clips"] == 2 and row["cache_bytes"] > 2 * 80 * 1000 * 4
        for clock in ("seconds", "processor_seconds"):
            assert {what: len(each) for what, each in row[clock].items()} == {
                "streamed": 2, "first epoch": 2, "second epoch": 2
            }  # fmt: skip
    text = path.with_suffix(".md").read_text()
    assert text == tables(results)
    assert "| clips of 5 s, mono | WAV |" in text and "| Whisper | 2 | second epoch |" in text


def test_rates():
    assert rates(100, [1.0, 2.0, 4.0]) == "50.0 (25.0–100.0)"
    assert rates(1000, [1.0]) == "1,000 (1,000–1,000)"
