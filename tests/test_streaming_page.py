"""The code of `docs/streaming.md` is run, with local models in place of those on the Hub."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from families import WAVE, WHISPER
from test_order_in_time import adapt, draw, streaming

from peft_softmoa.inference import load_classifier

PAGE = (Path(__file__).parent.parent / "docs/streaming.md").read_text()


def code(name):
    return re.search(rf"<!-- {name} -->\n```python\n(.*?)```", PAGE, re.DOTALL).group(1)


def run(name, names, folder=None, there=None):
    text = code(name)
    if there is not None:
        assert there in text
        text = text.replace(there, str(folder))
    exec(text, names)


@pytest.fixture
def wave_folder(tmp_path):
    torch.manual_seed(0)
    tf.Wav2Vec2ForSequenceClassification(tf.Wav2Vec2Config(**{**WAVE, "num_labels": 3})).save_pretrained(
        tmp_path / "wave"
    )
    tf.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "wave")
    return tmp_path / "wave"


def test_mixtures_that_are_causal(wave_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    run("causal", names, wave_folder, "facebook/wav2vec2-base")
    names["model"].save_pretrained("my-adapter")
    names |= {"pieces": torch.randn(2, 24_000).split(8000, dim=1), "next_piece": torch.randn(2, 8000)}
    run("stream", names)
    assert names["logits"].shape == (2, 3)
    run("inspect", names)
    shape = re.search(r"attention \((\d+), (\d+), 7, 1\)", capsys.readouterr().out).groups()
    assert shape[0] == "2" and int(shape[1]) > 30
    assert (tmp_path / "reading.png").stat().st_size > 10_000
    names["microphone"] = np.split(np.random.default_rng(0).uniform(-1, 1, 88_200), 9)
    run("follow", names)
    assert re.findall(r"^[\d.]+ s LABEL_\d$", capsys.readouterr().out, re.MULTILINE)
    assert load_classifier("my-adapter").model.active_peft_config.causal


def test_caches(tmp_path):
    torch.manual_seed(0)
    tf.WhisperForConditionalGeneration(tf.WhisperConfig(**{**WHISPER, "max_source_positions": 50})).save_pretrained(
        tmp_path
    )
    tf.WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(tmp_path)
    names = {"clip": np.zeros(16_000, "f4")}
    exec(code("causal").partition("base =")[0], names)
    run("generate", names, tmp_path, "openai/whisper-tiny")
    assert names["text"].shape[0] == 1
    encoder, audio = adapt(streaming("Nemotron")), draw("Nemotron")[:, :93]
    names = {"encoder": encoder, "pieces": audio.split([9, 12, 24, 12, 36], dim=1)}
    with torch.no_grad():
        whole = encoder(audio).last_hidden_state
        run("encoder", names)
    torch.testing.assert_close(torch.cat(names["hidden"], dim=1), whole, rtol=0, atol=1e-5)
