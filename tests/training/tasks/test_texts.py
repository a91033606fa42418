"""Texts: vocabularies, clips that are too long for them, and lengths of padded batches."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as tf
from conftest import write_parquet
from made_tasks import RATE, WHISPER_TOKENS, make_base, tone, whisper_tokenizer, write_clips
from transformers import EvalPrediction

from peft_softmoa.commands.train import FLAGS
from peft_softmoa.training import Collate, DataOptions, load_stream
from peft_softmoa.training.audio import AudioError
from peft_softmoa.training.options import name_flags
from peft_softmoa.training.rows import DatasetSummary
from peft_softmoa.training.tasks import CTC, Clip, SpeechSeq2Seq
from peft_softmoa.training.tasks.text import BLANK, SPACE, UNKNOWN, make_tokenizer

TEXT = DataOptions(label_column="text", shuffle_buffer=0)


def test_a_vocabulary_of_the_texts():
    task = CTC()
    assert set(task.labels_in("ab a")) == {"a", "b", "|"}
    task = task.with_labels(None, DatasetSummary(1, ("a", "b", "ä", "|")))
    assert task.label_names == ["[PAD]", "[UNK]", "|", "a", "b", "ä"]
    assert task.encode("ä b", "x", Clip(0, 1, 1)).tolist() == [5, 2, 4]
    assert task.config_fields() == {"modules_to_save": ["lm_head"], "label_names": task.label_names}
    with pytest.raises(ValueError, match="--vocabulary model"), name_flags(FLAGS):
        CTC().with_labels(None)


def test_characters_that_a_vocabulary_lacks():
    task = CTC().with_labels(None, DatasetSummary(1, ("a", "|")))
    with pytest.warns(UserWarning, match="evaluation has the characters 'z', which the vocabulary does not have"):
        task.check_known(["a", "|", "z"], "evaluation")
    assert task.encode("az", "x", Clip(0, 1, 1)).tolist() == [3, 1]
    task = CTC(tokenizer=make_tokenizer(["[PAD]", "[UNK]", "|", "A"]))
    with (
        pytest.raises(ValueError, match="data has the characters 'a', .*--text_case.*--vocabulary texts"),
        name_flags(FLAGS),
    ):
        task.check_known(["a", "|"], "data")
    task.check_known(["A", "|"], "data")
    assert CTC(text_case="upper").parse({"text": "aß"}, "x") == "ASS"


def test_texts_that_are_longer_than_their_clips(tmp_path, caplog):
    """Whisper reads one second here: a longer clip is skipped and named, not cut."""
    make_base(tmp_path / "base", "Whisper", "ForConditionalGeneration", whisper_tokenizer(), **WHISPER_TOKENS)
    folder = write_clips(tmp_path / "data", "text", {"low": "ab"}, 0.85, 2)
    extract = tf.AutoFeatureExtractor.from_pretrained(tmp_path / "base")
    task = SpeechSeq2Seq(tokenizer=whisper_tokenizer())
    stream = load_stream(str(folder), "train", extract, TEXT, task=task)
    with caplog.at_level(logging.WARNING):
        assert len(list(stream)) == 4
    import soundfile

    soundfile.write(folder / "2-low-1.wav", tone(500, RATE + 1), RATE)
    soundfile.write(folder / "2-low-0.wav", tone(500, RATE), RATE)
    with caplog.at_level(logging.WARNING):
        assert len(list(stream)) == 3
    assert "2-low-1.wav: longer than the 1 s that are read" in caplog.text and "2-low-0" not in caplog.text
    caplog.clear()
    options = DataOptions(label_column="text", shuffle_buffer=0, max_length_seconds=0.87)
    with caplog.at_level(logging.WARNING):
        assert len(list(load_stream(str(folder), "train", extract, options, task=task))) == 1
    assert "longer than the 0.87 s that are read" in caplog.text
    with pytest.raises(AudioError, match="2-low-1.wav.*longer than the 1 s"):
        options = DataOptions(label_column="text", on_bad_audio="raise")
        list(load_stream(str(folder), "train", extract, options, task=task))


def test_texts_that_are_longer_than_what_the_model_gives(tmp_path):
    make_base(tmp_path / "base", "Whisper", "ForConditionalGeneration", whisper_tokenizer(), **WHISPER_TOKENS)
    model = tf.WhisperForConditionalGeneration.from_pretrained(tmp_path / "base")
    task = SpeechSeq2Seq(tokenizer=whisper_tokenizer())
    task.prepare(model, None)
    # The model puts its start in front.
    assert task.encode("ab", "x", Clip(0, 1, 1)).tolist() == [7, 0, 1, 4]
    task.encode("a" * 18, "x", Clip(0, 1, 1))
    with pytest.raises(AudioError, match="x: its text of 21 tokens is longer than the 20 of the decoder"):
        task.encode("a" * 19, "x", Clip(0, 1, 1))
    with pytest.raises(ValueError, match="`language` and `speech_task` are for a Whisper of many languages"):
        SpeechSeq2Seq(tokenizer=whisper_tokenizer(), language="german").prepare(model, None)
    make_base(tmp_path / "ctc", "Wav2Vec2", "ForCTC")
    model = tf.Wav2Vec2ForCTC.from_pretrained(tmp_path / "ctc")
    task = CTC(tokenizer=make_tokenizer(["[PAD]", "[UNK]", "|", "a"]))
    task.prepare(model, tf.Wav2Vec2FeatureExtractor())
    task.encode("aaa", "x", Clip(0.0, 1320, RATE))
    with pytest.raises(AudioError, match="x: its text of 4 tokens is longer than its 3 frames"):
        task.encode("aaaa", "x", Clip(0.0, 1320, RATE))


@pytest.mark.parametrize("family", ["Wav2Vec2", "Wav2Vec2Bert", "SEW"])
def test_padded_frames_are_not_decoded(family, tmp_path):
    """A batch gives the texts and the loss that its clips give alone."""
    options = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2} if family == "SEW" else {}
    make_base(tmp_path, family, "ForCTC", vocab_size=5, pad_token_id=0, **options)
    model = getattr(tf, f"{family}ForCTC").from_pretrained(tmp_path).eval()
    extract = tf.AutoFeatureExtractor.from_pretrained(tmp_path)
    tokens = ["[PAD]", "[UNK]", "|", "a", "b"]
    task = CTC(tokens, tokenizer=make_tokenizer(tokens))
    task.prepare(model, extract)
    # Without a bias towards letters the padding would be blanks.
    with torch.no_grad():
        model.lm_head.bias.copy_(torch.tensor([-9.0, -9.0, -9.0, 0.0, 0.0]))
    samples = []
    for length, text in ((4000, "a"), (6111, "ab"), (9999, "bab")):
        features = extract(tone(500, length), sampling_rate=RATE, return_tensors="np")
        labels = task.encode(text, "x", Clip(0.0, length, RATE))
        samples.append({**{key: value[0] for key, value in features.items()}, "labels": labels})
    collate = Collate(extract, task)

    def run(rows):
        batch = collate(rows)
        with torch.no_grad():
            output = model(**batch)
        ids = task.reduce_outputs(output.logits, batch)
        return output.loss, [[each for each in row if each != -100] for row in ids.tolist()]

    loss, ids = run(samples)
    alone = [run([each]) for each in samples]
    assert [len(row) for row in ids] == [len(rows[0]) for _, rows in alone]
    if family != "SEW":  # whose pooling lets padding in
        assert ids == [rows[0] for _, rows in alone]
        torch.testing.assert_close(loss, torch.stack([each for each, _ in alone]).mean(), rtol=1e-4, atol=1e-4)
    assert all(np.isfinite(float(each)) for each, _ in alone)


def test_declared_classes_are_texts_and_no_vocabulary(tones_folder, tmp_path):
    folder = write_parquet(tmp_path / "parquet", tones_folder, class_label=True)
    stream = load_stream(str(folder), "train", tf.Wav2Vec2FeatureExtractor(), task=CTC())
    assert stream.label_names == ["[PAD]", "[UNK]", "|", *sorted(set("highlow"))]
    assert stream.task.tokenizer.decode(next(iter(stream))["labels"], group_tokens=False) in ("high", "low")


def test_unknown_characters_are_counted_as_one_error_each():
    task = CTC().with_labels([BLANK, UNKNOWN, SPACE, *"acf"])
    labels = task.encode("café", "a clip", Clip(0.0, 16_000, 16_000))
    recognised = task.encode("caf", "a clip", Clip(0.0, 16_000, 16_000))
    prediction = EvalPrediction(predictions=recognised[None], label_ids=labels[None])
    assert task.score(prediction)["cer"] == 0.25
    assert task.score(EvalPrediction(predictions=labels[None], label_ids=labels[None]))["cer"] == 0.25


@pytest.mark.parametrize(
    ("text", "expected"), [("Don't  stop!", "don't stop"), ("हिन्दी, भाषा", "हिन्दी भाषा"), ("Ça va – oui?", "ça va oui")]
)
def test_normal_texts_keep_their_letters(text, expected):
    assert CTC(normalize_text=True).compared([text]) == [expected]


def test_a_whisper_of_many_languages_needs_the_language():
    class Tokenizer:
        def set_prefix_tokens(self, **prompt):
            self.prompt = prompt

    model = SimpleNamespace(
        config=SimpleNamespace(decoder_start_token_id=1, max_target_positions=40),
        generation_config=SimpleNamespace(is_multilingual=True, max_length=40),
    )
    with pytest.raises(ValueError, match="is of many languages, and learns texts of one: give `language`"):
        SpeechSeq2Seq(tokenizer=Tokenizer()).prepare(model, None)
    task = SpeechSeq2Seq(tokenizer=Tokenizer(), language="de")
    task.prepare(model, None)
    assert task.tokenizer.prompt == {"language": "de", "task": "transcribe"}
    assert (model.generation_config.language, model.generation_config.task) == ("de", "transcribe")
    assert not task.can_smooth
