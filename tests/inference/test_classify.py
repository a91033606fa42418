import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
import transformers as tf
from conftest import FRAMES, MEL_BINS, SAMPLING_RATE, tiny_ast_config, write_tone
from families import WAVE, WHISPER
from peft import LoraConfig, get_peft_model

from peft_softmoa import SoftMoAConfig
from peft_softmoa.cli import main
from peft_softmoa.inference.classify import WindowScores, classify_windows, load_classifier
from peft_softmoa.inference.segments import Segment, Segments
from peft_softmoa.inference.windows import cut_windows
from peft_softmoa.training import AudioError, decode_audio
from peft_softmoa.training.audio import audio_blocks

AST_SAMPLES = FRAMES * SAMPLING_RATE // 100
NAMES = ["dog", "rain", "sea waves"]


def save_adapter(folder, model, extractor, config=None):
    """Save a model and an adapter on it, and return the adapter's folder."""
    model.save_pretrained(folder / "base")
    extractor.save_pretrained(folder / "base")
    torch.manual_seed(1)
    base = type(model).from_pretrained(folder / "base")
    get_peft_model(base, config or SoftMoAConfig(num_experts=2, r=2, init_weights=False)).save_pretrained(
        folder / "adapter"
    )
    return str(folder / "adapter")


def ast_extractor():
    return tf.ASTFeatureExtractor(max_length=FRAMES, num_mel_bins=MEL_BINS)


def tiny_wave(model_class, **options):
    torch.manual_seed(0)
    return model_class(tf.Wav2Vec2Config(**{**WAVE, "num_labels": 3, "id2label": dict(enumerate(NAMES)), **options}))


def tiny_whisper(model_class, **options):
    torch.manual_seed(0)
    return model_class(tf.WhisperConfig(**{**WHISPER, "max_source_positions": 50, **options}))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter on a tiny AST, which pads clips to 0.64 s."""
    torch.manual_seed(0)
    model = tf.ASTForAudioClassification(tiny_ast_config(num_labels=3, id2label=dict(enumerate(NAMES))))
    return save_adapter(tmp_path_factory.mktemp("ast"), model, ast_extractor())


@pytest.fixture(scope="module")
def wave_adapter(tmp_path_factory):
    """An adapter on a tiny wav2vec 2.0, which takes any length and knows no mask."""
    model = tiny_wave(tf.Wav2Vec2ForSequenceClassification)
    return save_adapter(tmp_path_factory.mktemp("wave"), model, tf.Wav2Vec2FeatureExtractor())


def noise(seconds, rate=SAMPLING_RATE, seed=0):
    swell = np.linspace(0.1, 0.9, int(seconds * rate))
    return (np.random.default_rng(seed).uniform(-1, 1, len(swell)) * swell).astype("f4")


def classify(classifier, path, seconds=None, overlap=0.0, **options):
    rate = classifier.sampling_rate
    length, step = classifier.window(seconds, overlap)
    windows = cut_windows(str(path), audio_blocks(path, rate), rate, length, step, classifier.min_samples)
    return list(classify_windows(classifier, windows, **options))


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("rate", [SAMPLING_RATE, 44_100])
@pytest.mark.parametrize(("family", "seconds", "overlap"), [("ast", None, 0.2), ("wave", 0.7, 0.1)])
def test_windows_equal_cut_files(adapter, wave_adapter, tmp_path, monkeypatch, rate, family, seconds, overlap):
    classifier = load_classifier(adapter if family == "ast" else wave_adapter)
    seen = []
    forward = type(classifier.model).forward

    def keep(self, *args, **inputs):
        seen.extend(inputs[classifier.feature_extractor.model_input_names[0]])
        return forward(self, *args, **inputs)

    monkeypatch.setattr(type(classifier.model), "forward", keep)
    soundfile.write(tmp_path / "long.wav", noise(9.5, rate), rate, "FLOAT")
    found = classify(classifier, tmp_path / "long.wav", seconds, overlap, batch_size=4)
    assert len(found) > 10 and found[-1].end == 9.5
    features, seen[:] = [*seen], []

    whole = decode_audio(tmp_path / "long.wav", SAMPLING_RATE)
    for result, of_long in zip(found, features, strict=True):
        start, end = (round(time * SAMPLING_RATE) for time in (result.start, result.end))
        soundfile.write(tmp_path / "cut.wav", whole[start:end], SAMPLING_RATE, "FLOAT")
        [alone] = classify(classifier, tmp_path / "cut.wav", seconds)
        assert torch.equal(seen.pop(), of_long)
        np.testing.assert_allclose(alone.scores, result.scores, atol=1e-5)
    assert np.ptp([result.scores[0] for result in found]) > 1e-4  # the windows differ


def test_scores_are_those_of_the_pipeline(adapter, tmp_path):
    write_tone(tmp_path / "clip.wav", seconds=0.5)
    [result] = classify(load_classifier(adapter), tmp_path / "clip.wav")
    told = tf.pipeline("audio-classification", adapter, feature_extractor=ast_extractor())(
        {"raw": decode_audio(tmp_path / "clip.wav", SAMPLING_RATE), "sampling_rate": SAMPLING_RATE}
    )
    assert dict(zip(NAMES, result.scores.tolist())) == pytest.approx({each["label"]: each["score"] for each in told})
    assert (result.start, result.end) == (0, 0.5)


def test_clips_of_unequal_length_are_not_padded(wave_adapter, tmp_path):
    classifier = load_classifier(wave_adapter)
    windows = []
    for index, seconds in enumerate([0.5, 0.5, 0.3, 0.5]):
        windows.append(next(cut_windows(str(index), [noise(seconds, seed=index)], SAMPLING_RATE, 80_000, 80_000)))
    together = list(classify_windows(classifier, windows, batch_size=4))
    assert [result.name for result in together] == ["0", "1", "2", "3"]
    for result, window in zip(together, windows):
        [alone] = classify_windows(classifier, [window], batch_size=1)
        np.testing.assert_allclose(alone.scores, result.scores, atol=1e-6)


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "make"),
    [
        (None, 3, lambda logits: logits.softmax(-1)),
        (None, 1, lambda logits: logits),
        ("single_label_classification", 3, lambda logits: logits.softmax(-1)),
        ("multi_label_classification", 3, torch.sigmoid),
        ("regression", 3, lambda logits: logits),
    ],
)
def test_scores_by_the_problem_type(tmp_path, problem_type, num_labels, make):
    torch.manual_seed(0)
    model = tf.ASTForAudioClassification(tiny_ast_config(problem_type=problem_type, num_labels=num_labels))
    folder = save_adapter(tmp_path, model, ast_extractor())
    soundfile.write(tmp_path / "clip.wav", noise(0.5), SAMPLING_RATE)
    [result] = classify(load_classifier(folder), tmp_path / "clip.wav")
    [logits] = classify(load_classifier(folder, scores="none"), tmp_path / "clip.wav")
    assert torch.equal(torch.from_numpy(result.scores), make(torch.from_numpy(logits.scores)))


def test_frames(tmp_path):
    model = tiny_wave(tf.Wav2Vec2ForAudioFrameClassification)
    classifier = load_classifier(save_adapter(tmp_path, model, tf.Wav2Vec2FeatureExtractor()))
    soundfile.write(tmp_path / "clip.wav", noise(1.25), SAMPLING_RATE, "FLOAT")
    found = classify(classifier, tmp_path / "clip.wav", 0.5)
    with torch.no_grad():
        inputs = classifier.feature_extractor(noise(1.25)[:8000], sampling_rate=SAMPLING_RATE, return_tensors="pt")
        wanted = classifier.model(**inputs).logits[0].softmax(-1)
    first = [result for result in found if result.end <= 0.5]
    np.testing.assert_allclose(np.stack([result.scores for result in first]), wanted, atol=1e-5)
    assert [result.start for result in found[1:]] == [result.end for result in found[:-1]]
    assert (found[0].start, found[-1].end) == (0, 1.25)
    with pytest.raises(ValueError, match="`overlap` is not for a model that classifies frames"):
        classifier.window(0.5, 0.1)


def test_half_precision_on_a_cpu(tmp_path):
    model = tiny_whisper(tf.WhisperForAudioClassification).half()
    extractor = tf.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    folder = save_adapter(tmp_path, model, extractor)
    classifier = load_classifier(folder, device="cpu")
    assert {weight.dtype for weight in classifier.model.parameters()} == {torch.float32}
    assert classifier.window() == (SAMPLING_RATE, SAMPLING_RATE)
    soundfile.write(tmp_path / "clip.wav", noise(2.5), SAMPLING_RATE)
    found = classify(classifier, tmp_path / "clip.wav")
    rounded = classify(load_classifier(folder, device="cpu", dtype="bfloat16"), tmp_path / "clip.wav")
    assert [result.end for result in found] == [1, 2, 2.5]
    for result, other in zip(found, rounded, strict=True):
        np.testing.assert_allclose(result.scores, other.scores, atol=0.02)


def test_models_that_do_not_classify(tmp_path):
    ctc = save_adapter(tmp_path / "ctc", tiny_wave(tf.Wav2Vec2ForCTC), tf.Wav2Vec2FeatureExtractor())
    with pytest.raises(ValueError, match=r'Wav2Vec2ForCTC, writes text .* pipeline\("automatic-speech-recognition"\)'):
        load_classifier(ctc)
    extractor = tf.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    whisper = save_adapter(tmp_path / "whisper", tiny_whisper(tf.WhisperForConditionalGeneration), extractor)
    with pytest.raises(ValueError, match="WhisperForConditionalGeneration, writes text and has no classes"):
        load_classifier(whisper)
    bare = save_adapter(tmp_path / "bare", tf.ASTModel(tiny_ast_config()), ast_extractor())
    with pytest.raises(ValueError, match="The model of '.*', ASTModel, does not classify audio"):
        load_classifier(bare)


def test_an_adapter_of_another_method(tmp_path):
    torch.manual_seed(0)
    model = tf.ASTForAudioClassification(tiny_ast_config())
    folder = save_adapter(tmp_path, model, ast_extractor(), LoraConfig(target_modules=["q_proj"], r=2))
    soundfile.write(tmp_path / "clip.wav", noise(0.5), SAMPLING_RATE)
    [result] = classify(load_classifier(folder), tmp_path / "clip.wav")
    assert result.scores.sum() == pytest.approx(1)


def test_windows_that_the_model_does_not_take(adapter, wave_adapter, tmp_path):
    classifier = load_classifier(adapter)
    assert classifier.window() == (AST_SAMPLES, AST_SAMPLES)
    assert classifier.window(0.5, 0.125) == (8000, 6000)
    with pytest.raises(ValueError, match="`window_seconds` .* to 0.64: it cuts off what is longer, got 0.7"):
        classifier.window(0.7)
    with pytest.raises(ValueError, match="`window_seconds` of this model must be from "):
        classifier.window(0.0)
    for overlap in (0.5, -0.1):
        with pytest.raises(ValueError, match="`overlap` must be less than the 0.5 s of a window and not negative"):
            classifier.window(0.5, overlap)
    assert load_classifier(wave_adapter).window() == (80_000, 80_000)
    with pytest.raises(ValueError, match="`device` is 'nowhere', which cannot be used"):
        load_classifier(adapter, device="nowhere")
    with pytest.raises(ValueError, match="`batch_size` must be positive, got 0"):
        next(classify_windows(classifier, [], batch_size=0))
    window = next(cut_windows("clip", [noise(1)[:20]], SAMPLING_RATE, 100, 100))
    with pytest.raises(AudioError, match="clip: the model does not take its 0.001 s"):
        next(classify_windows(classifier, [window]))


def test_segments():
    segments = Segments(["dog", "sea\twaves"], 0.5)
    scores = [(0.4, 0.9), (0.5, 0.9), (0.6, 0.1), (0.4, 0.6)]
    ended = []
    for index, each in enumerate(scores):
        ended.append(segments.add(WindowScores("clip", index, index + 1.5, np.array(each))))
    dog, waves = Segment(1, 3.5, "dog"), Segment(0, 2.5, "sea\twaves")
    assert ended == [[], [], [waves], [dog]]
    assert segments.close() == [Segment(3, 4.5, "sea\twaves")] and segments.close() == []
    assert waves.audacity() == "0.000000\t2.500000\tsea waves\n"
    # A window that could not be used lies between these.
    assert segments.add(WindowScores("clip", 0, 1, np.array([1, 0]))) == []
    assert segments.add(WindowScores("clip", 2, 3, np.array([1, 0]))) == [Segment(0, 1, "dog")]


def test_the_command(adapter, tmp_path, capsys):
    soundfile.write(tmp_path / "clip.flac", noise(2), SAMPLING_RATE)
    wanted = classify(load_classifier(adapter), tmp_path / "clip.flac", 0.5, 0.25)
    track = tmp_path / "labels.txt"
    options = ["--window_seconds", "0.5", "--overlap", "50%", "--labels", str(track), "--threshold", "0"]
    main(["classify", adapter, str(tmp_path / "clip.flac"), *options, "--format", "json", "--top_k", "2"])
    written = capsys.readouterr()
    assert written.err.splitlines()[-1].startswith("2.0 s of audio in ")
    found = [json.loads(line) for line in written.out.splitlines()]
    assert [(each["start"], each["end"]) for each in found] == [(0.25 * i, 0.25 * i + 0.5) for i in range(7)]
    for each, result in zip(found, wanted, strict=True):
        assert each["file"] == str(tmp_path / "clip.flac")
        best = sorted(zip(result.scores.tolist(), NAMES), reverse=True)[:2]
        assert [(score["score"], score["label"]) for score in each["scores"]] == [
            (pytest.approx(score), label) for score, label in best
        ]
    assert track.read_text().splitlines() == [f"0.000000\t2.000000\t{name}" for name in NAMES]

    main(["classify", adapter, str(tmp_path / "clip.flac"), "--overlap", "0.04", "--top_k", "1"])
    [first, *others] = capsys.readouterr().out.splitlines()
    assert first.split()[:3] == [str(tmp_path / "clip.flac"), "0.000", "0.640"] and len(others) == 3
    assert first.split()[3] in "dog rain sea"


def test_files_that_cannot_be_used(adapter, tmp_path, capsys):
    folder = tmp_path / "clips"
    folder.mkdir()
    write_tone(folder / "a.wav")
    (folder / "b.wav").write_bytes(b"no audio")
    write_tone(folder / "c.wav", seconds=0.001)
    write_tone(folder / "d.wav", seconds=3)
    (folder / "d.wav").write_bytes((folder / "d.wav").read_bytes()[:-20_000])
    write_tone(folder / "e.wav")
    with pytest.raises(SystemExit) as exit:
        main(["classify", adapter, str(folder), str(tmp_path / "missing.wav"), "--format", "json"])
    assert exit.value.code == 1
    written = capsys.readouterr()
    assert [json.loads(line)["file"][-5:] for line in written.out.splitlines()] == [
        *["a.wav"], *["d.wav"] * 3, *["e.wav"]
    ]  # fmt: skip
    complaints = [line for line in written.err.splitlines() if line.startswith("peft-softmoa classify: ")]
    for name, reason in [
        ("clips/b.wav", "unreadable"),
        ("clips/c.wav", "the model does not take its 0.001 s"),
        ("clips/d.wav", "truncated"),
        ("missing.wav", "unreadable (No such file or directory)"),
    ]:
        [line] = [line for line in complaints if f"{tmp_path / name}: {reason}" in line]
        complaints.remove(line)
    assert not complaints
    assert written.err.endswith("Of 6 clips, 4 could not be used, or not all of it.\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.wav", "-"], "'-' reads a pipe, and no files can be beside it"),
        (["a.wav", "--num_channels", "2"], "--num_channels are for raw PCM from a pipe"),
        (["a.wav", "--batch_size", "0"], "--batch_size must be positive, got 0"),
        (["a.wav", "--threshold", "0.3"], "--threshold is for the segments of --labels, which is not given"),
        (["a.wav", "b.wav", "--labels", "x"], "--labels is a label track of one clip, got 2 clips"),
        (["a.wav", "--overlap", "some"], "--overlap must be seconds, such as 2.5, or a share, such as 50%, got 'some'"),
        (["a.wav", "--overlap", "100%"], "--overlap must be less than the 0.64 s of a window"),
        (["a.wav", "--window_seconds", "1"], "--window_seconds of this model must be from "),
    ],
)
def test_options_that_are_not_allowed(adapter, words, message):
    with pytest.raises(SystemExit, match=f"^peft-softmoa classify: {message}"):
        main(["classify", adapter, *words])


def start(adapter, *options, **streams):
    command = [sys.executable, "-m", "peft_softmoa", "classify", adapter, *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.Popen(command, env=environment, preexec_fn=obey_ctrl_c, **pipes)


def obey_ctrl_c():
    """A shell that runs the tests in the background lets them ignore it, and what they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.timeout(900)  # starts a process
def test_a_pipe_gives_each_window_before_it_ends(adapter, tmp_path):
    samples = noise(1.5)
    soundfile.write(tmp_path / "clip.wav", samples, SAMPLING_RATE, "PCM_16")
    content = soundfile.read(tmp_path / "clip.wav", dtype="int16")[0].astype("<i2").tobytes() + b"\1"
    wanted = classify(load_classifier(adapter), tmp_path / "clip.wav")
    found = []
    with start(adapter, "-", "--format", "json") as process:
        for place in range(0, len(content), 999):
            process.stdin.write(content[place : place + 999])
            process.stdin.flush()
            # The pipe is open; a line that did not come would hang the test.
            if place // 999 in (21, 42):
                found.append(process.stdout.readline())
        process.stdin.close()
        found += process.stdout.readlines()
        errors = process.stderr.read().decode()
    assert process.returncode == 0, errors
    found = [json.loads(line) for line in found]
    assert [each["end"] for each in found] == [0.64, 1.28, 1.5] and {each["file"] for each in found} == {"stdin"}
    for each, result in zip(found, wanted, strict=True):
        scores = {score["label"]: score["score"] for score in each["scores"]}
        assert scores == pytest.approx(dict(zip(NAMES, result.scores.tolist())), abs=1e-5)
    assert "1.5 s of audio in " in errors and "real-time factor" in errors


@pytest.mark.timeout(900)  # starts a process
def test_ctrl_c_ends_with_the_summary(adapter, tmp_path):
    track = tmp_path / "labels.txt"
    with start(adapter, "-", "--labels", str(track), "--threshold", "0", "--num_channels", "2") as process:
        process.stdin.write(bytes(AST_SAMPLES * 4))
        process.stdin.flush()
        assert process.stdout.readline().split()[:3] == [b"stdin", b"0.000", b"0.640"]
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read().decode()
    assert process.returncode == 130
    assert "0.6 s of audio in " in errors and "Traceback" not in errors
    assert track.read_text().splitlines() == [f"0.000000\t0.640000\t{name}" for name in NAMES]


def test_a_reader_that_has_enough(adapter, tmp_path, monkeypatch, capsys):
    soundfile.write(tmp_path / "clip.wav", noise(2), SAMPLING_RATE)
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        main(["classify", adapter, str(tmp_path / "clip.wav"), "--batch_size", "1"])
    assert "s of audio in" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"\0", b"RIFF\0\0\0\0WAVEfmt "])
def test_a_pipe_without_pcm(adapter, monkeypatch, capsys, content):
    read, write = os.pipe()
    os.write(write, content)
    os.close(write)
    with os.fdopen(read) as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        with pytest.raises(SystemExit) as exit:
            main(["classify", adapter, "-"])
    assert exit.value.code == 1
    reason = "it begins like an audio file" if content.startswith(b"RIFF") else "no samples"
    assert f"peft-softmoa classify: stdin: {reason}" in capsys.readouterr().err
