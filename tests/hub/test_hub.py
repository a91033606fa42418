"""Over HTTP, against a Hub on loopback: datasets are streamed, adapters pushed and loaded, also when it often fails."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import training_options, write_parquet
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from peft import PeftModel
from safetensors.torch import load, save
from transformers import AutoModelForAudioClassification

from hub import Fault, loopback_hub

TOKEN = "hf_secret"
WEIGHTS = "adapter_model.safetensors"
SHARDS = [f"data/train-{index:05d}-of-00004.parquet" for index in range(4)]
CARD = """---
dataset_info:
  splits:
  - name: train
    num_bytes: 300000
    num_examples: 16
---
"""

# The clients wait for seconds before they try again, here for thousandths.
IMPATIENT = "import time; sleep = time.sleep; time.sleep = lambda seconds: sleep(seconds / 1000)\n"
SCRIPT = f"{IMPATIENT}import sys; from peft_softmoa.cli import main; main(['train', *sys.argv[1:]])"


@pytest.fixture(scope="module")
def sounds(tones_folder, tmp_path_factory):
    """The tones as a dataset of four Parquet files, with an id for each sample."""
    folder = tmp_path_factory.mktemp("sounds")
    whole = pq.read_table(write_parquet(folder / "whole", tones_folder) / "train.parquet")
    described = json.loads(whole.schema.metadata[b"huggingface"])
    described["info"]["features"]["sample_id"] = {"dtype": "string", "_type": "Value"}
    ids = pa.array([clip["path"].removesuffix(".wav") for clip in whole["audio"].to_pylist()])
    whole = whole.append_column("sample_id", ids).replace_schema_metadata({"huggingface": json.dumps(described)})
    (folder / "data").mkdir()
    for index, path in enumerate(SHARDS):
        pq.write_table(whole.slice(4 * index, 4), folder / path)
    return {path: (folder / path).read_bytes() for path in SHARDS}


@pytest.fixture(scope="module")
def base(base_folder):
    return {path.name: path.read_bytes() for path in base_folder.iterdir()}


def run(hub, home, *arguments, **variables):
    """Run Python as on another machine, where nothing was downloaded yet; reads that take a second are tried again."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **hub.environment(home), "HF_HUB_DOWNLOAD_TIMEOUT": "1", **variables},
    )


def requests_for(name, method="", part=""):
    """Matches requests for a repository or a file of it, with a method and a part of the path if they are given."""
    return lambda request: (
        f"{name}/" in f"{request.path}/" and request.method.startswith(method) and part in request.path
    )


def training_arguments(folder, **options):
    defaults = {"num_train_epochs": 1, "push_to_hub": True, "hub_model_id": "user/adapter", "hub_token": TOKEN}
    return training_options("user/base", "user/sounds", folder / "out", **{**defaults, **options})


def train(hub, folder, **variables):
    return run(hub, folder / "home", "-c", SCRIPT, *training_arguments(folder), **variables)


@pytest.fixture(scope="module")
def trained(sounds, base, tmp_path_factory):
    """A Hub, after the training script has read from it and pushed to it; the script's folder and its output."""
    folder = tmp_path_factory.mktemp("trained")
    with loopback_hub() as hub:
        hub.repos.update({"datasets/user/sounds": sounds, "user/base": base})
        result = train(hub, folder)
        assert result.returncode == 0, result.stderr
        yield hub, folder, result


def test_the_script_streams_with_range_requests(trained):
    hub, folder, _ = trained
    reads = [request for request in hub.requests if request.path.endswith(".parquet")]
    assert {request.path.rpartition("data/")[2] for request in reads} == {Path(path).name for path in SHARDS}
    assert all(request.method == "GET" and re.fullmatch(r"bytes=\d+-\d*", request.range) for request in reads)
    assert (folder / "home").exists() and not list((folder / "home").rglob("*.parquet"))


def test_the_script_pushes_the_adapter_and_nothing_of_the_training(trained):
    hub, folder, _ = trained
    files = hub.repos["user/adapter"]
    assert {WEIGHTS, "adapter_config.json", "README.md", "preprocessor_config.json"} <= set(files)
    assert files[WEIGHTS] == (folder / "out" / WEIGHTS).read_bytes()
    assert b"import peft_softmoa" in files["README.md"]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "user/base"
    assert list((folder / "out").glob("checkpoint-*"))
    assert not [name for name in files if "checkpoint" in name or not name.endswith((".safetensors", ".json", ".md"))]


def test_the_token_is_used_to_push_and_is_written_nowhere(trained):
    hub, folder, result = trained
    assert not any(TOKEN.encode() in content for content in hub.repos["user/adapter"].values())
    assert not any(TOKEN.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert TOKEN not in result.stdout + result.stderr
    with_token = {request.path for request in hub.requests if request.token}
    assert with_token == {request.path for request in hub.requests if request.method == "POST"}
    assert any("/commit/" in path for path in with_token)


LOAD = """
import sys
import torch
import peft_softmoa
from peft import PeftModel
from transformers import AutoModelForAudioClassification, pipeline

spectrograms = torch.load(sys.argv[1], weights_only=True)
load = AutoModelForAudioClassification.from_pretrained
models = {"pipeline": pipeline("audio-classification", model="user/adapter").model}
for revision in sys.argv[3:]:
    models[revision] = PeftModel.from_pretrained(load("user/base"), "user/adapter", revision=revision).eval()
with torch.no_grad():
    torch.save({name: model(spectrograms).logits for name, model in models.items()}, sys.argv[2])
"""


def test_a_fresh_process_loads_every_revision(trained, base_folder, spectrograms, tmp_path):
    hub, folder, _ = trained
    pushed = hub.repos["user/adapter"]
    doubled = save({name: 2 * tensor for name, tensor in load(pushed[WEIGHTS]).items()})
    hub.repos["user/adapter@doubled"] = {**pushed, WEIGHTS: doubled}
    commit = HfApi(hub.url).repo_info("user/adapter").sha
    torch.save(spectrograms, tmp_path / "data.pt")
    result = run(
        hub, tmp_path / "home", "-c", LOAD, tmp_path / "data.pt", tmp_path / "logits.pt", "main", "doubled", commit
    )
    assert result.returncode == 0, result.stderr
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)

    def expect(adapter):
        model = PeftModel.from_pretrained(AutoModelForAudioClassification.from_pretrained(base_folder), adapter)
        with torch.no_grad():
            return model.eval()(spectrograms).logits

    expected = expect(folder / "out")
    assert all(torch.equal(logits[name], expected) for name in ("pipeline", "main", commit))
    (folder / "out" / WEIGHTS).write_bytes(doubled)
    assert torch.equal(logits["doubled"], expect(folder / "out"))
    (folder / "out" / WEIGHTS).write_bytes(pushed[WEIGHTS])
    assert not torch.allclose(logits["doubled"], expected)


def test_training_over_a_bad_network_gives_the_same_adapter(trained, sounds, base, tmp_path):
    with loopback_hub() as hub:
        hub.repos.update({"datasets/user/sounds": sounds, "user/base": base})
        for path, kind, times in zip(SHARDS, (503, "reset", "truncated", "slow"), (4, 4, 4, 1)):
            hub.faults.append(Fault(kind, requests_for(path), times))
        for kind in (500, "reset", "truncated"):
            hub.faults += [Fault(kind, requests_for(name), 1) for name in ("/tree", "/preupload", "/commit")]
            # What the clients do not try again by themselves.
            hub.faults.append(Fault(kind, lambda request: request.path == "/api/repos/create", 1))
        hub.faults.append(Fault(503, lambda request: request.method == "HEAD", 1))
        hub.faults.append(Fault("truncated", requests_for("/model.safetensors", "GET"), 2))
        hub.faults.append(Fault("reset", requests_for("user/base", "GET", "config.json"), 1))
        # With hf_xet, as users have it, the clients also try a commit again.
        result = train(hub, tmp_path, HF_HUB_DISABLE_XET="0")
        assert result.returncode == 0, result.stderr
        assert all(fault.seen for fault in hub.faults)
        assert hub.repos["user/adapter"][WEIGHTS] == trained[0].repos["user/adapter"][WEIGHTS]
        assert TOKEN not in result.stdout + result.stderr


# What is read, the requests of it that fail, how, and how often; by the repository that it is in.
SURVIVED = [
    ("rows", "GET", ".parquet", 500, 2),
    ("rows", "GET", ".parquet", 503, 4),
    ("rows", "GET", ".parquet", "reset", 4),
    ("rows", "GET", "train-00001", "reset", 30),
    ("rows", "GET", ".parquet", "truncated", 4),
    ("rows", "GET", "train-00002", "slow", 2),
    ("rows", "GET", "/tree/", 503, 2),
    ("rows", "GET", "/tree/", "reset", 2),
    ("rows", "HEAD", "README.md", 503, 2),
    ("base", "HEAD", "config.json", 503, 2),
    ("base", "GET", "model.safetensors", "truncated", 2),
    ("base", "GET", "model.safetensors", "slow", 1),
    ("rows", "GET", "/api/datasets/", 503, 1),
    ("rows", "GET", "/api/datasets/", "reset", 1),
    ("rows", "HEAD", "README.md", "reset", 1),
    ("adapter", "HEAD", "adapter_config.json", 503, 2),
    ("adapter", "GET", WEIGHTS, "truncated", 2),
    ("adapter", "GET", WEIGHTS, "slow", 1),
]
SURVIVED = {f"user/{case[0]}-{index}": case for index, case in enumerate(SURVIVED)}
# What the script or PEFT is asked for, and what it answers.
REFUSED = [
    ("script(dataset_name='user/missing')", "DatasetNotFoundError: Dataset 'user/missing' doesn't exist on the Hub"),
    ("script(dataset_name='user/private')", "DatasetNotFoundError: .*'user/private' .* or cannot be accessed"),
    ("script(dataset_name='user/gated')", "DatasetNotFoundError: .*'user/gated' is a gated .*must be authenticated"),
    ("script(dataset_name='user/gated', token='hf_wrong')", "'user/gated' is a gated dataset .*to ask for access"),
    ("script(dataset_name='user/sounds', token='wrong')", "Invalid credentials in Authorization header"),
    ("script(dataset_name='user/sounds', dataset_revision='old')", "Revision 'old' doesn't exist for dataset"),
    ("script(dataset_name='user/sounds', train_split_name='test')", "split: test|no split 'test'"),
    ("script(model_name_or_path='user/missing')", "user/missing is not .* a valid model identifier"),
    ("script(model_name_or_path='user/private')", "If this is a private repository, make sure to pass a token"),
    ("script(model_name_or_path='user/gated')", "trying to access a gated repo.*user/gated"),
    ("script(model_revision='old')", "old is not a valid git identifier"),
    ("script(dataset_name='user/down')", "trying to locate the file on the Hub.*check your connection"),
    ("script(dataset_name='user/lost')", "503 Service Unavailable"),
    ("script(dataset_name='user/cut')", "ConnectionError: Server Disconnected"),
    ("script(model_name_or_path='user/down')", "couldn't connect to .* to load the files"),
    ("script(model_name_or_path='user/lost')", "connection error .* to load user/lost.*503 Service Unavailable"),
    ("adapter('user/missing')", "Can't find 'adapter_config.json' at 'user/missing'"),
    ("adapter('user/gated')", "Can't find 'adapter_config.json' at 'user/gated'"),
    ("adapter('user/adapter', revision='old')", "Can't find 'adapter_config.json' at 'user/adapter'"),
    ("adapter('user/adapter', revision='no-adapter')", "Can't find 'adapter_config.json' at 'user/adapter'"),
    ("adapter('user/adapter', revision='no-weights')", "Can't find weights for user/adapter"),
]
READ = f"""{IMPATIENT}
import json, sys, tempfile, zlib
import peft_softmoa
from conftest import training_options
from peft import PeftModel
from peft_softmoa.training import load_rows
from peft_softmoa.commands.train import main
from transformers import AutoModelForAudioClassification

load = AutoModelForAudioClassification.from_pretrained

def rows(name):
    return [(row["sample_id"], zlib.crc32(row["audio"]["bytes"])) for row in load_rows(name, "train")]

def tensors(model):
    return [(name, zlib.crc32(tensor.numpy().tobytes())) for name, tensor in model.state_dict().items()]

def base(name):
    return tensors(load(name))

def adapter(name, **options):
    return tensors(PeftModel.from_pretrained(load("user/base"), name, **options))

def script(**options):
    with tempfile.TemporaryDirectory() as folder:
        main(training_options("user/base", "user/sounds", folder, **{{"max_steps": 1, **options}}))

outcomes = {{}}
for call in json.loads(sys.argv[1]):
    try:
        outcomes[call] = repr(eval(call))
    except (Exception, SystemExit) as error:
        outcomes[call] = f"{{type(error).__name__}}: {{error}}"
print()
print(json.dumps(outcomes), flush=True)
main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def outcomes(trained, sounds, base, tmp_path_factory):
    """What came of each call, with a repository of its own for each that fails, and what became of the process.

    All calls are made in one process, whose last act is a training whose push fails.
    """
    adapter = trained[0].repos["user/adapter"]
    faults, calls = {}, []
    with loopback_hub() as hub:
        for kind, files in (("rows", sounds), ("base", base), ("adapter", adapter)):
            names = [f"user/{kind}"] + [name for name, case in SURVIVED.items() if case[0] == kind]
            hub.repos.update({f"datasets/{name}" if kind == "rows" else name: files for name in names})
            calls += [f"{kind}('{name}')" for name in names]
        for name, (_, method, part, fault, times) in SURVIVED.items():
            faults[name] = Fault(fault, requests_for(name, method, part), times)
        hub.faults += faults.values()
        for name in ("user/sounds", "user/private", "user/gated", "user/down", "user/lost", "user/cut"):
            hub.repos.update({f"datasets/{name}": sounds, name: base})
        hub.private.update({"datasets/user/private": TOKEN, "user/private": TOKEN})
        hub.gated.update({"datasets/user/gated": TOKEN, "user/gated": TOKEN})
        hub.repos["user/adapter@no-adapter"] = base
        hub.repos["user/adapter@no-weights"] = {path: adapter[path] for path in adapter if path != WEIGHTS}
        hub.faults += [
            Fault(503, requests_for("user/down")),
            Fault(503, requests_for("user/lost", "GET", "/resolve/")),
            Fault("truncated", requests_for("user/cut", "GET", ".parquet")),
            Fault(503, requests_for("user/closed", "POST", "/commit/")),
        ]
        calls += [call for call, _ in REFUSED]
        folder = tmp_path_factory.mktemp("outcomes")
        last = training_arguments(folder, hub_model_id="user/closed")
        paths = os.pathsep.join(sys.path)
        process = run(hub, folder / "home", "-c", READ, json.dumps(calls), *last, PYTHONPATH=paths)
    results = [line for line in process.stdout.splitlines() if line.startswith('{"rows(')]
    assert results, process.stderr
    return SimpleNamespace(results=json.loads(results[0]), faults=faults, process=process, folder=folder)


@pytest.mark.parametrize("name", SURVIVED, ids=[" ".join(map(str, case)) for case in SURVIVED.values()])
def test_reading_survives(outcomes, name):
    kind = SURVIVED[name][0]
    result = outcomes.results[f"{kind}('{name}')"]
    assert outcomes.faults[name].seen
    assert result.startswith("[(") and result == outcomes.results[f"{kind}('user/{kind}')"]


@pytest.mark.parametrize("call, message", REFUSED)
def test_what_cannot_be_read_is_an_error(outcomes, call, message):
    assert re.search(message, outcomes.results[call], re.DOTALL)


def test_a_push_that_fails_is_an_error_and_keeps_the_adapter(outcomes):
    process = outcomes.process
    assert process.returncode != 0
    error = process.stderr.rpartition("huggingface_hub.errors.HfHubHTTPError: ")[2]
    assert error.startswith("Server error '503 Service Unavailable'") and "user/closed/commit/main" in error
    assert load((outcomes.folder / "out" / WEIGHTS).read_bytes())
    assert TOKEN not in process.stdout + process.stderr


def test_splits_come_from_the_dataset_card(sounds, tmp_path):
    code = "import datasets, sys; print(datasets.load_dataset_builder(sys.argv[1]).info.splits['train'].num_examples)"
    with loopback_hub() as hub:
        hub.repos["datasets/user/sounds"] = {**sounds, "README.md": CARD.encode()}
        result = run(hub, tmp_path, "-c", code, "user/sounds")
    assert result.stdout == "16\n", result.stderr


def test_repositories_revisions_and_who_may_read_them(base):
    with loopback_hub() as hub:
        api = HfApi(hub.url, token=False)
        hub.repos.update({"user/base": base, "user/base@small": {"config.json": b"{}", "a/b/c.txt": b"c"}})
        commits = [api.repo_info("user/base", revision=revision).sha for revision in (None, "main", "small")]
        assert commits[0] == commits[1] != commits[2]
        assert api.list_repo_files("user/base", revision=commits[2]) == ["a/b/c.txt", "config.json"]
        tree = [entry.path for entry in api.list_repo_tree("user/base", "a", revision="small")]
        assert tree == ["a/b"]
        paths = api.get_paths_info("user/base", ["config.json", "a", "nothing"], revision="small")
        assert [(path.path, getattr(path, "size", None)) for path in paths] == [("a", None), ("config.json", 2)]
        for kind, error in (("private", RepositoryNotFoundError), ("gated", GatedRepoError)):
            getattr(hub, kind)[f"user/{kind}"] = TOKEN
            hub.repos[f"user/{kind}"] = base
            statuses = {}
            for token in (False, "hf_wrong", TOKEN):
                try:
                    url = hf_hub_url(f"user/{kind}", "config.json", endpoint=hub.url)
                    statuses[token] = api.get_hf_file_metadata(url=url, token=token).commit_hash
                except error as refusal:
                    statuses[token] = refusal.response.status_code
            assert statuses == {False: 401, "hf_wrong": 404 if kind == "private" else 403, TOKEN: commits[0]}
        with pytest.raises(RevisionNotFoundError):
            api.repo_info("user/base", revision="large")
        with pytest.raises(RepositoryNotFoundError):
            api.repo_info("user/base", repo_type="dataset")
        with pytest.raises(HfHubHTTPError, match="401"):
            api.create_repo("user/new")
