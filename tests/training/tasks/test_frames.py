"""Labels in time: where the frames of models lie, and which events they are in."""

import json

import numpy as np
import pytest
import torch
import transformers as tf
from made_tasks import RATE, make_base, tone, write_clips

from peft_softmoa.training import Collate, DataOptions, load_stream
from peft_softmoa.training.frames import FrameGrid, find_frames
from peft_softmoa.training.tasks import Clip, FrameClassification
from peft_softmoa.training.tasks.frames import Event

LENGTHS = [1100, 1119, 1120, 1340, 1341, 4000, 5599, 5600, 5601, 7777, 16_000]
SEW = {"squeeze_factor": 2, "hidden_size": 16, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}


@pytest.mark.parametrize(
    "family, model_class, options",
    [
        ("Wav2Vec2", "ForAudioFrameClassification", {}),
        ("WavLM", "ForAudioFrameClassification", {}),
        ("Wav2Vec2Bert", "ForAudioFrameClassification", {}),
        ("Wav2Vec2", "ForCTC", {"add_adapter": True, "num_adapter_layers": 1}),
        ("Wav2Vec2Bert", "ForCTC", {}),
        ("Hubert", "ForCTC", {}),
        ("SEW", "ForCTC", SEW),
    ],
)
def test_the_grid_counts_the_frames_of_the_logits(family, model_class, options, tmp_path):
    make_base(tmp_path, family, model_class, **options)
    model = getattr(tf, f"{family}{model_class}").from_pretrained(tmp_path).eval()
    extract = tf.AutoFeatureExtractor.from_pretrained(tmp_path)
    grid = find_frames(model, extract)
    assert model.device.type == "cpu"
    for length in LENGTHS:
        inputs = extract(tone(500, length), sampling_rate=RATE, return_tensors="pt")
        with torch.no_grad():
            frames = model(**inputs).logits.shape[1]
        assert grid.count(length) == frames == len(grid.middles(length)), length


def test_the_grid_of_a_convolution():
    """One frame reads 80 + 40 * 15 samples, the next begins 320 later."""
    grid = FrameGrid(680, 320)
    assert [grid.count(length) for length in (0, 679, 680, 999, 1000)] == [0, 0, 1, 1, 2]
    assert grid.middles(1000).tolist() == [340, 660]


def test_models_without_frames_in_time(tiny_ast):
    extract = tf.ASTFeatureExtractor(max_length=64, num_mel_bins=128)
    with pytest.raises(ValueError, match="gives no frames that grow with the clip"):
        find_frames(tiny_ast, extract)


def framed(labels=("dog", "bell")):
    """A frame of 100 samples every 100 samples, at 1000 Hz: middles at 0.05, 0.15, … seconds."""
    return FrameClassification(list(labels), _grid=FrameGrid(100, 100))


def encode(events, start=0.0, num_samples=600):
    labels = framed().encode([Event(*event) for event in events], "x.wav", Clip(start, num_samples, 1000))
    return labels[:, 0].tolist()


@pytest.mark.parametrize(
    "event, expected",
    [
        ((0.0, 0.2), [1, 1, 0, 0, 0, 0]),
        ((0.05, 0.15), [1, 0, 0, 0, 0, 0]),  # the end does not belong to it
        ((0.051, 0.151), [0, 1, 0, 0, 0, 0]),
        ((0.16, 0.19), [0, 1, 0, 0, 0, 0]),  # too short for a middle: the nearest frame
        ((0.21, 0.22), [0, 0, 1, 0, 0, 0]),
        ((0.56, 0.60), [0, 0, 0, 0, 0, 1]),
        ((0.5, 9.0), [0, 0, 0, 0, 0, 1]),
        ((0.7, 0.8), [0, 0, 0, 0, 0, 0]),  # after the end
    ],
)
def test_frames_of_an_event(event, expected):
    assert encode([(*event, "dog")]) == expected


def test_events_move_with_the_crop():
    """The labels of a crop are a part of those of the whole clip, also of events at its ends."""
    events = [(0.0, 0.26, "dog"), (0.31, 0.33, "dog"), (0.5, 0.72, "dog"), (1.11, 1.12, "dog")]
    whole = encode(events, num_samples=2000)
    assert sum(whole) == 7
    for start in range(15):
        assert encode(events, start / 10, 500) == whole[start : start + 5]


def test_several_events_at_once_and_none():
    labels = framed().encode([Event(0.0, 0.2, "dog"), Event(0.1, 0.3, "bell")], "x", Clip(0.0, 300, 1000))
    assert labels.tolist() == [[1, 0], [1, 1], [0, 1]]
    assert framed().encode([], "x", Clip(0.0, 300, 1000)).tolist() == [[0, 0]] * 3
    with pytest.raises(ValueError, match="x: label 'cat' is none of the classes dog, bell"):
        framed().encode([Event(0.0, 0.2, "cat")], "x", Clip(0.0, 300, 1000))
    with pytest.raises(ValueError, match="call `task.prepare"):
        FrameClassification(["dog"]).encode([], "x", Clip(0.0, 300, 1000))


@pytest.mark.parametrize(
    "given",
    [
        [{"start": 0.5, "end": 1, "label": "dog"}],
        '[{"start": 0.5, "end": 1, "label": "dog"}]',
        [{"onset": 0.5, "offset": 1, "event_label": "dog"}],
        [{"start_time": "0.5", "end_time": "1", "class": "dog"}],
        {"start": [0.5], "end": [1.0], "label": ["dog"]},
    ],
)
def test_forms_of_events(given):
    assert FrameClassification().parse({"events": given}, "x") == [Event(0.5, 1.0, "dog")]


@pytest.mark.parametrize("nothing", ["", "[]", [], None, float("nan")])
def test_rows_without_events(nothing):
    assert FrameClassification().parse({"events": nothing}, "x") == []


def test_random_crops_of_a_stream(tmp_path):
    """A tone begins at 0.3 s, and so does the event, wherever the clip is cut."""
    folder = write_clips(tmp_path / "data", "events", {"low": [{"start": 0.3, "end": 9, "label": "tone"}]}, 0.6, 2)
    import soundfile

    for path in folder.glob("*.wav"):
        samples, _ = soundfile.read(path)
        samples[: int(0.3 * RATE)] = 0
        soundfile.write(path, samples, RATE)
    make_base(tmp_path / "base", "Wav2Vec2", "ForAudioFrameClassification")
    model = tf.Wav2Vec2ForAudioFrameClassification.from_pretrained(tmp_path / "base")
    extract = tf.Wav2Vec2FeatureExtractor(return_attention_mask=True, do_normalize=False)
    options = DataOptions(label_column="events", max_length_seconds=0.3, shuffle_buffer=0)
    stream = load_stream(str(folder), "train", extract, options, task=FrameClassification())
    stream.prepare(model)
    middles = find_frames(model, extract).middles(int(0.3 * RATE)).astype(int)
    begins = set()
    for epoch in range(4):
        stream.set_epoch(epoch)
        for sample in stream:
            heard = np.abs(sample["input_values"]) > 0
            begin = int(heard.argmax()) if heard.any() else len(heard)
            begins.add(begin)
            # A crop begins at a whole sample, the event at 4800 of them.
            assert sample["labels"][:, 0].tolist() == (middles >= begin - 1).astype(float).tolist()
    assert len(begins) > 3


def test_a_batch_of_clips_is_the_clips(tmp_path):
    """Padding changes neither the logits of a clip's frames, nor their number."""
    make_base(tmp_path, "Wav2Vec2Bert", "ForAudioFrameClassification")
    model = tf.Wav2Vec2BertForAudioFrameClassification.from_pretrained(tmp_path).eval()
    extract = tf.AutoFeatureExtractor.from_pretrained(tmp_path)
    task = FrameClassification(["a", "b", "c", "d", "e"])
    task.prepare(model, extract)
    samples = []
    for length in (4000, 6111, 8888):
        features = extract(tone(500, length), sampling_rate=RATE, return_tensors="np")
        labels = task.encode([Event(0.0, 0.1, "a")], "x", Clip(0.0, length, RATE))
        samples.append({**{key: value[0] for key, value in features.items()}, "labels": labels})
    collate = Collate(extract, task)
    with torch.no_grad():
        batch = collate(samples)
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        alone = [
            model(**{key: value for key, value in collate([each]).items() if key != "labels"}).logits
            for each in samples
        ]
    prediction = tf.EvalPrediction(logits.numpy(), batch["labels"].numpy())
    scores = task.score(prediction)
    whole = torch.cat([each[0] for each in alone])[None]
    expected = tf.EvalPrediction(whole.numpy(), np.concatenate([each["labels"] for each in samples])[None])
    assert scores == pytest.approx(task.score(expected))
    items = batch["labels"].ne(-100).sum()
    parts = [task.loss(each, collate([sample])["labels"], items) for each, sample in zip(alone, samples)]
    torch.testing.assert_close(task.loss(logits, batch["labels"]), sum(parts))


def test_json_events_in_a_table(tmp_path):
    """As a CSV has them."""
    folder = write_clips(tmp_path, "events", {"low": "x"}, 0.4, 1)
    (folder / "metadata.jsonl").unlink()
    events = json.dumps([{"start": 0, "end": 1, "label": "dog"}]).replace('"', '""')
    (folder / "metadata.csv").write_text(f'file_name,events\n1-low-0.wav,"{events}"\n2-low-0.wav,\n')
    options = DataOptions(label_column="events")
    stream = load_stream(str(folder), "train", tf.Wav2Vec2FeatureExtractor(), options, task=FrameClassification())
    assert stream.label_names == ["dog"] and stream.summary.num_rows == 2
    (folder / "metadata.csv").write_text("file_name,events\n1-low-0.wav,dog 0 1\n")
    with pytest.raises(ValueError, match=r"column 'events' must be a list of events.*got 'dog 0 1'"):
        load_stream(str(folder), "train", tf.Wav2Vec2FeatureExtractor(), options, task=FrameClassification())
