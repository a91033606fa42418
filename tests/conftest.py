import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification, Wav2Vec2Config, Wav2Vec2Model

from peft_softmoa.method import Mixture

SAMPLING_RATE = 16_000
MEL_BINS = 128
FRAMES = 64
BROWSERS = ("chromium", "google-chrome", "chromium-browser")
# No GPU, no sandbox in a container, and nothing that the browser would fetch by itself.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

needs_results = pytest.mark.skipif(
    (Path(__file__).parents[1] / "PKG-INFO").exists(), reason="a source distribution holds neither results nor pictures"
)


def pytest_addoption(parser):
    parser.addoption("--help-pages", action="store_true", help="write the stored pages of the command's help")
    parser.addoption("--notebooks", action="store_true", help="write the outputs of the notebooks from a run")
    parser.addoption("--models-table", action="store_true", help="write the table of models from the outcome")


def pytest_configure(config):
    if config.getoption("--models-table"):
        from models_table import Outcomes  # which imports the tests that it is about

        config.pluginmanager.register(Outcomes())


def tiny_ast_config(**overrides):
    return ASTConfig(
        **{
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "max_length": FRAMES,
            "num_mel_bins": MEL_BINS,
            "frequency_stride": 16,
            "time_stride": 16,
            "num_labels": 5,
            **overrides,
        }
    )


@pytest.fixture
def tiny_ast():
    """A tiny AST with random weights and five classes."""
    torch.manual_seed(0)
    return ASTForAudioClassification(tiny_ast_config()).eval()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """The same model saved with its feature extractor, as a checkpoint on the Hub would be."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    ASTForAudioClassification(tiny_ast_config()).save_pretrained(folder)
    ASTFeatureExtractor(max_length=FRAMES, num_mel_bins=MEL_BINS).save_pretrained(folder)
    return folder


@pytest.fixture
def spectrograms():
    return torch.randn(3, FRAMES, MEL_BINS, generator=torch.Generator().manual_seed(1))


def write_tone(path, pitch=440.0, seconds=0.5, sampling_rate=SAMPLING_RATE, **options):
    """Write a sine tone and return its samples."""
    samples = (0.3 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * sampling_rate)) / sampling_rate)).astype("f4")
    soundfile.write(path, samples, sampling_rate, **options)
    return samples


@pytest.fixture(scope="session")
def tones_folder(tmp_path_factory):
    """A labelled folder: low and high tones in folds 1 and 2, with a metadata.csv."""
    folder = tmp_path_factory.mktemp("tones")
    lines = ["file_name,label,fold"]
    for fold in (1, 2):
        for label, pitch in (("low", 200), ("high", 2000)):
            for index in range(4):
                name = f"{fold}-{label}-{index}.wav"
                write_tone(folder / name, pitch * (1 + index / 10))
                lines.append(f"{name},{label},{fold}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def write_parquet(folder, source, class_label=True):
    """A folder with a metadata.csv as a Parquet file with an Audio column, in the form in which datasets writes it."""
    folder.mkdir()
    with open(source / "metadata.csv") as file:
        rows = list(csv.DictReader(file))
    names = sorted({row["label"] for row in rows})
    label_feature = {"_type": "ClassLabel", "names": names} if class_label else {"dtype": "string", "_type": "Value"}
    features = {"audio": {"_type": "Audio"}, "label": label_feature, "fold": {"dtype": "int64", "_type": "Value"}}
    clips = [{"bytes": (source / row["file_name"]).read_bytes(), "path": row["file_name"]} for row in rows]
    table = pa.table(
        {
            "audio": pa.array(clips, pa.struct({"bytes": pa.binary(), "path": pa.string()})),
            "label": [names.index(row["label"]) if class_label else row["label"] for row in rows],
            "fold": [int(row["fold"]) for row in rows],
        }
    )
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), folder / "train.parquet", row_group_size=100)
    return folder


def training_options(base, dataset, output, **arguments):
    """A command line of the training script: fold 1 for training, fold 2 for evaluation."""
    defaults = {
        "model_name_or_path": base,
        "dataset_name": dataset,
        "train_rows": "fold=1",
        "eval_split_name": "train",
        "eval_rows": "fold=2",
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "output_dir": output,
    }
    return [part for key, value in {**defaults, **arguments}.items() for part in (f"--{key}", str(value))]


@pytest.fixture(scope="session")
def esc10_folder():
    folder = os.environ.get("SOFTMOA_ESC10")
    if not folder:
        pytest.skip("needs real audio: set SOFTMOA_ESC10 to a folder with the ESC-10 recordings and their metadata.csv")
    return Path(folder)


@pytest.fixture
def masks(monkeypatch):
    """The token masks that mixtures are called with, in their order."""
    seen = []

    def keep(self, tokens, mask=None, *, forward=Mixture.forward, **options):
        seen.append(mask)
        return forward(self, tokens, mask, **options)

    monkeypatch.setattr(Mixture, "forward", keep)
    return seen


@pytest.fixture
def tiny_wav2vec2():
    """Makes a tiny wav2vec 2.0 with random weights, whose layers normalize before or after their blocks."""

    def make(pre_norm):
        torch.manual_seed(0)
        config = Wav2Vec2Config(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            conv_dim=(8,),
            conv_stride=(4,),
            conv_kernel=(8,),
            num_feat_extract_layers=1,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            do_stable_layer_norm=pre_norm,
        )
        return Wav2Vec2Model(config).eval()

    return make


@pytest.fixture(scope="session")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"needs a browser, one of {', '.join(BROWSERS)}")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


def wait_until(page, expression):
    """Wait until an expression of a page is true. The page's policy does not let playwright's own way wait in there."""
    for _ in range(1000):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(20)
    raise AssertionError(f"It never became true that {expression}")


@pytest.fixture
def visit(browser):
    """Opens a page; at the end of the test there must have been neither messages nor requests beyond the file."""
    contexts, problems = [], []

    def visit(path, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: problems.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
        page.on("requestfailed", lambda request: problems.append(f"failed: {request.url[:80]}"))
        page.on(
            "request",
            lambda request: request.url.startswith(("data:", path.as_uri())) or problems.append(request.url[:80]),
        )
        page.goto(path.as_uri())
        return page

    yield visit
    for context in contexts:
        context.close()
    assert problems == []
