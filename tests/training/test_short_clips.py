"""Clips that are too short to give a model one token are audio that cannot be used."""

import logging

import numpy as np
import pytest
import soundfile
import torch
import transformers as tf
from conftest import FRAMES, MEL_BINS, SAMPLING_RATE, tiny_ast_config, write_tone
from datasets import IterableDataset
from families import CONFORMER, MASKED_WAVE, WHISPER, build
from peft import get_peft_model
from transformers import DataCollatorWithPadding

from peft_softmoa import SoftMoAConfig
from peft_softmoa.training import (
    AudioError,
    AudioStream,
    AudioTrainer,
    DataOptions,
    DatasetSummary,
    ExtractFeatures,
    shortest_clip,
)
from peft_softmoa.training.tasks import SingleLabel

CONVOLUTIONS = {"conv_kernel": (10, 3), "conv_stride": (5, 2)}
SUMMARY = DatasetSummary(4, ("x",), (4,))
SHORTEST = 10 + (3 - 1) * 5


def wav2vec2():
    torch.manual_seed(0)
    config = tf.Wav2Vec2Config(**{**MASKED_WAVE, **CONVOLUTIONS, "num_labels": 1, "mask_time_prob": 0.0})
    return tf.Wav2Vec2ForSequenceClassification(config)


@pytest.fixture
def extractor():
    return tf.Wav2Vec2FeatureExtractor(return_attention_mask=True)


MODELS = [
    (wav2vec2, tf.Wav2Vec2FeatureExtractor(), SHORTEST),
    (lambda: get_peft_model(wav2vec2(), SoftMoAConfig()), tf.Wav2Vec2FeatureExtractor(), SHORTEST),
    (lambda: wav2vec2().to(torch.bfloat16), tf.Wav2Vec2FeatureExtractor(), SHORTEST),
    (lambda: build("HuBERT"), tf.Wav2Vec2FeatureExtractor(), 8 + (4 - 1) * 4),
    # It joins pairs of tokens.
    (lambda: build("SEW"), tf.Wav2Vec2FeatureExtractor(), 8 + (4 - 1 + 2) * 4),
    (lambda: build("Moonshine"), tf.Wav2Vec2FeatureExtractor(), None),
    (lambda: tf.ASTModel(tiny_ast_config()), tf.ASTFeatureExtractor(max_length=FRAMES, num_mel_bins=MEL_BINS), None),
    (
        lambda: tf.WhisperModel(tf.WhisperConfig(**{**WHISPER, "max_source_positions": 50})),
        tf.WhisperFeatureExtractor(feature_size=8, chunk_length=1),
        1,
    ),
    (
        lambda: tf.Wav2Vec2BertModel(tf.Wav2Vec2BertConfig(**CONFORMER, feature_projection_input_dim=160)),
        tf.SeamlessM4TFeatureExtractor(),
        None,
    ),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of a single frame
@pytest.mark.parametrize("make, extractor, wanted", MODELS)
def test_the_shortest_clip_is_the_first_that_the_model_takes(make, extractor, wanted):
    model = make().eval()
    shortest = shortest_clip(model, extractor)
    assert wanted in (None, shortest)

    def tokens(length):
        inputs = extractor(np.zeros(length, "f4"), sampling_rate=SAMPLING_RATE, return_tensors="pt")
        if not inputs[extractor.model_input_names[0]].isfinite().all():
            return 0
        inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
        inputs["output_hidden_states"] = True
        inner = getattr(model, "model", model)
        encoder = inner.get_encoder() if model.config.is_encoder_decoder else model
        dtype = next(model.parameters()).dtype
        inputs = {name: value.to(dtype) if torch.is_tensor(value) else value for name, value in inputs.items()}
        return encoder(**inputs).hidden_states[0].shape[1]

    assert tokens(shortest) > 0
    if shortest > 1:
        with pytest.raises((RuntimeError, ValueError, AssertionError, IndexError)):
            assert tokens(shortest - 1) > 0


def test_a_model_that_cannot_be_asked():
    assert shortest_clip(torch.nn.Linear(2, 2), tf.Wav2Vec2FeatureExtractor()) == 1


@pytest.fixture
def stream_of(tmp_path, extractor):
    """Makes a stream of clips, of which one is just too short, one just long enough, and two are long."""
    for name, length in (("short", SHORTEST - 1), ("enough", SHORTEST), ("long", 4000), ("longer", 5000)):
        soundfile.write(tmp_path / f"{name}.wav", 0.1 * np.sin(np.arange(length) / 5), SAMPLING_RATE)
    names = ("long", "short", "enough", "longer")
    rows = [{"audio": str(tmp_path / f"{name}.wav"), "label": "x"} for name in names]

    def make(**options):
        extract = ExtractFeatures(extractor, SingleLabel(["x"]), DataOptions(**options))
        return AudioStream(IterableDataset.from_generator(rows_of, gen_kwargs={"rows": rows}), extract, SUMMARY)

    return make


def rows_of(rows):
    yield from rows


def trainer_of(stream, output, workers=0):
    arguments = tf.TrainingArguments(
        str(output), num_train_epochs=1, per_device_train_batch_size=4, per_device_eval_batch_size=4, use_cpu=True,
        report_to="none", save_strategy="no", dataloader_num_workers=workers,
    )  # fmt: skip
    model = get_peft_model(wav2vec2(), SoftMoAConfig(modules_to_save=["classifier"]))
    collate = DataCollatorWithPadding(stream.extract.feature_extractor)
    return AudioTrainer(model, arguments, train_dataset=stream, data_collator=collate)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_short_clip_is_skipped_and_named(stream_of, tmp_path, caplog, workers):
    trainer = trainer_of(stream_of(), tmp_path / "out", workers)
    seen, step = [], trainer.training_step
    trainer.training_step = lambda model, inputs, *args: (
        seen.append(inputs["attention_mask"].sum(1).tolist()) or step(model, inputs, *args)
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert [sorted(lengths) for lengths in seen] == [[SHORTEST, 4000, 5000]]
    assert workers or "short.wav: the model does not take its 0.001 s, which is shorter than what one" in caplog.text


def test_a_short_clip_can_be_an_error(stream_of, tmp_path):
    trainer = trainer_of(stream_of(on_bad_audio="raise"), tmp_path / "out")
    with pytest.raises(AudioError, match="short.wav: the model does not take its 0.001 s"):
        trainer.train()


def test_a_short_clip_is_not_evaluated(stream_of, tmp_path):
    trainer = trainer_of(stream_of(), tmp_path / "out")
    assert len(trainer.predict(stream_of()).predictions) == 3
    for evaluate in (trainer.predict, trainer.evaluate):
        with pytest.raises(AudioError, match="short.wav: the model does not take its 0.001 s"):
            evaluate(stream_of(on_bad_audio="raise"))


def test_features_that_are_not_finite(tmp_path):
    """One frame has no deviation."""
    soundfile.write(tmp_path / "frame.wav", np.full(500, 0.1), SAMPLING_RATE)
    write_tone(tmp_path / "tone.wav")
    extract = ExtractFeatures(tf.SeamlessM4TFeatureExtractor(stride=1), None, DataOptions(label_column=None))
    rows = [{"audio": str(tmp_path / name)} for name in ("frame.wav", "tone.wav")]
    stream = AudioStream(IterableDataset.from_generator(lambda: iter(rows)), extract)
    with np.errstate(all="ignore"), pytest.warns(RuntimeWarning):
        assert len(list(stream)) == 1
    assert "frame.wav: features of 500 samples are not finite" in str(extract.skipped[0])
