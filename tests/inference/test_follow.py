"""Audio that comes in: what is read of it, and when its scores come."""

import json
import os
import signal
import struct
import threading
import time

import numpy as np
import pytest
import soundfile
import torch
import transformers as tf
from conftest import SAMPLING_RATE
from test_classify import NAMES, noise, save_adapter, start, tiny_wave, tiny_whisper
from test_classify import adapter as adapter
from test_classify import wave_adapter as wave_adapter

from peft_softmoa import SoftMoAConfig, stream_routing
from peft_softmoa.cli import main
from peft_softmoa.inference import (
    PCM,
    IncomingAudio,
    classify_windows,
    cut_windows,
    follow,
    following_window,
    load_classifier,
)
from peft_softmoa.inference.incoming import incoming_blocks
from peft_softmoa.training import AudioError, decode_audio

CAUSAL = {"num_experts": 2, "r": 2, "init_weights": False, "scaling": 4.0, "causal": True, "forgetting": True}
SECONDS = 0.5


@pytest.fixture(scope="module")
def streaming_adapter(tmp_path_factory):
    """An adapter whose mixtures are causal, on a tiny wav2vec 2.0."""
    model = tiny_wave(tf.Wav2Vec2ForSequenceClassification)
    # So that small differences of tokens are large differences of scores.
    torch.nn.init.normal_(model.projector.weight), torch.nn.init.normal_(model.classifier.weight)
    folder = tmp_path_factory.mktemp("streaming")
    return save_adapter(folder, model, tf.Wav2Vec2FeatureExtractor(), SoftMoAConfig(**CAUSAL))


def scores(results):
    return np.stack([result.scores for result in results])


def in_windows(classifier, samples, overlap=0.0):
    length, step = classifier.window(SECONDS, overlap)
    return list(classify_windows(classifier, cut_windows("clip", [samples], SAMPLING_RATE, length, step), 1))


@pytest.mark.parametrize("rate", [SAMPLING_RATE, 44_100])
@pytest.mark.parametrize(("kind", "overlap"), [("streaming", 0.0), ("plain", 0.0), ("plain", 0.2)])
def test_pieces_give_what_the_whole_gives(streaming_adapter, wave_adapter, kind, overlap, rate):
    classifier = load_classifier(streaming_adapter if kind == "streaming" else wave_adapter)
    samples = noise(2.3, rate)
    options = {"sampling_rate": rate, "window_seconds": SECONDS, "overlap_seconds": overlap}
    whole = list(follow(classifier, [samples], **options))
    assert [result.name for result in whole] == ["stream"] * len(whole) and whole[-1].end == 2.3
    for seed in range(3):
        cuts = np.sort(np.random.default_rng(seed).integers(0, len(samples) + 1, 9))
        pieces = list(follow(classifier, np.split(samples, cuts), **options))
        assert [result[:3] for result in pieces] == [result[:3] for result in whole]
        assert np.array_equal(scores(pieces), scores(whole))


def test_routing_goes_on_from_window_to_window(streaming_adapter):
    classifier = load_classifier(streaming_adapter, scores="none")
    samples = np.concatenate([np.sin(np.arange(8000) * step, dtype="f4") for step in (0.05, 0.2, 0.6, 1.5)])
    given = scores(follow(classifier, [samples], window_seconds=SECONDS))
    alone = scores(in_windows(classifier, samples))
    np.testing.assert_allclose(given[0], alone[0], atol=1e-4)
    assert (np.abs(given - alone)[1:].max(axis=1) > 1e-2).all()
    # As the model itself gives it for one window after another; whoever reads the results may use it in between.
    expected, results = [], follow(classifier, [samples], window_seconds=SECONDS)
    with stream_routing(classifier.model):
        for window in samples.reshape(4, -1):
            inputs = classifier.feature_extractor(window, sampling_rate=SAMPLING_RATE, return_tensors="pt")
            with torch.no_grad():
                expected.append(classifier.model(**inputs).logits[0].numpy())
    for row in range(4):
        np.testing.assert_allclose(next(results).scores, expected[row], atol=1e-4)
        in_windows(classifier, samples[:8000])


def test_other_adapters_see_windows_alone(wave_adapter, adapter):
    for folder, overlap in ((wave_adapter, 0.1), (adapter, 0.0)):
        classifier = load_classifier(folder)
        given = follow(classifier, [noise(2)], window_seconds=SECONDS, overlap_seconds=overlap)
        np.testing.assert_array_equal(scores(given), scores(in_windows(classifier, noise(2), overlap)))


def test_frames_of_a_stream(tmp_path):
    model = tiny_wave(tf.Wav2Vec2ForAudioFrameClassification)
    folder = save_adapter(tmp_path, model, tf.Wav2Vec2FeatureExtractor(), SoftMoAConfig(**CAUSAL))
    classifier = load_classifier(folder)
    found = list(follow(classifier, [noise(1)], window_seconds=SECONDS))
    assert [result.start for result in found[1:]] == [result.end for result in found[:-1]]
    alone = in_windows(classifier, noise(1))
    first = sum(result.end <= SECONDS for result in found)
    assert len(found) == len(alone) == 2 * first
    np.testing.assert_allclose(scores(found[:first]), scores(alone[:first]), atol=1e-6)
    assert np.abs(scores(found) - scores(alone))[first:].max() > 1e-4


def test_windows_of_streams_that_are_not_allowed(streaming_adapter, tmp_path):
    with pytest.raises(ValueError, match="`overlap` must be 0 for this adapter, got 0.1 s: its routing goes on"):
        following_window(load_classifier(streaming_adapter), SECONDS, 0.1)
    extractor = tf.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    model = tiny_whisper(tf.WhisperForAudioClassification)
    whisper = load_classifier(save_adapter(tmp_path, model, extractor, SoftMoAConfig(**CAUSAL)))
    assert following_window(whisper) == (SAMPLING_RATE, SAMPLING_RATE)
    with pytest.raises(ValueError, match="`window_seconds` must be 1 for this adapter, got 0.5: .*silence"):
        following_window(whisper, 0.5)
    with pytest.raises(AudioError, match="stream: no samples"):
        next(follow(whisper, []))
    with pytest.raises(AudioError, match="stream: samples that are not finite"):
        next(follow(whisper, [np.array([0.0, np.nan])]))


def read(path, raw=None, idle_seconds=0.0):
    with open(path, "rb") as file:
        audio = IncomingAudio(file, str(path), raw, idle_seconds)
        return audio.sampling_rate, np.concatenate(list(audio.blocks()))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("container", ["WAV", "WAVEX"])
@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_wav(tmp_path, subtype, container, channels):
    samples = np.random.default_rng(0).uniform(-0.9, 0.9, (70_001, channels))
    soundfile.write(tmp_path / "clip.wav", samples, 44_100, subtype, format=container)
    with open(tmp_path / "clip.wav", "ab") as file:
        file.write(b"LIST\4\0\0\0INFO")  # which are no samples
    rate, found = read(tmp_path / "clip.wav")
    expected = soundfile.read(tmp_path / "clip.wav", dtype="float32", always_2d=True)[0].mean(axis=1)
    assert rate == 44_100 and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-7)


@pytest.mark.parametrize("size", [0, 2**32 - 1, 2**31 - 1])
def test_wav_of_unknown_length(tmp_path, size):
    soundfile.write(tmp_path / "clip.wav", noise(0.1), SAMPLING_RATE, "PCM_16")
    content = bytearray((tmp_path / "clip.wav").read_bytes())
    content[40:44] = struct.pack("<I", size)
    expected = decode_audio(tmp_path / "clip.wav", SAMPLING_RATE)
    (tmp_path / "clip.wav").write_bytes(content)
    assert np.array_equal(read(tmp_path / "clip.wav")[1], expected)


def test_what_is_not_read_while_it_comes_in(tmp_path):
    wave, flac, law, text = (tmp_path / name for name in ("a.wav", "a.flac", "law.wav", "a.txt"))
    soundfile.write(wave, noise(0.1), SAMPLING_RATE, "PCM_16")
    soundfile.write(flac, noise(0.1), SAMPLING_RATE)
    soundfile.write(law, noise(0.1), SAMPLING_RATE, "ALAW")
    text.write_text("no sound at all")
    content = wave.read_bytes()
    cases = [
        (flac, None, "it begins like an audio file that is not WAV"),
        (flac, PCM(8000), "it begins like an audio file that is not WAV"),
        (law, None, "its samples are of the format 6 of WAV with 8 bits, but only integers"),
        (text, None, "it has no header of WAV: if it is raw PCM, say its `sampling_rate`"),
        (wave, PCM(8000), "it is WAV, which says itself what it holds"),
        (b"", None, "no samples"),
        (content[:30], None, "its header of WAV is damaged or ends too early"),
        (content[:12] + content[36:], None, "its header of WAV does not say what its samples are"),
        (content[:22] + b"\0\0" + content[24:], None, "0 channels; from 1 to 256 are allowed"),
    ]
    for file, raw, message in cases:
        path = file
        if isinstance(file, bytes):
            path = tmp_path / "damaged.wav"
            path.write_bytes(file)
        with pytest.raises(AudioError, match=message):
            read(path, raw)
    (tmp_path / "empty.wav").write_bytes(content[:44])
    with pytest.raises(AudioError, match="no samples"):
        list(incoming_blocks(str(tmp_path / "empty.wav"), "clip", SAMPLING_RATE, idle_seconds=0.0))


def grow(path, content, step, pause=0.02):
    def write():
        with open(path, "ab") as file:
            for place in range(0, len(content), step):
                file.write(content[place : place + step])
                file.flush()
                time.sleep(pause)

    thread = threading.Thread(target=write)
    thread.start()
    return thread


@pytest.mark.parametrize("is_raw", [True, False])
def test_a_file_that_grows(tmp_path, is_raw):
    soundfile.write(tmp_path / "whole.wav", noise(1), SAMPLING_RATE, "PCM_16")
    content, raw = (tmp_path / "whole.wav").read_bytes(), PCM(SAMPLING_RATE) if is_raw else None
    content = content[44:] if is_raw else content
    (tmp_path / "grows").write_bytes(b"")
    thread = grow(tmp_path / "grows", content, 3001)
    rate, found = read(tmp_path / "grows", raw, idle_seconds=5.0 if is_raw else 2.0)
    thread.join()
    assert rate == SAMPLING_RATE and np.array_equal(found, decode_audio(tmp_path / "whole.wav", SAMPLING_RATE))


def test_a_length_that_is_written_at_the_end(tmp_path):
    """Recorders write the length when they stop, and what comes after the samples before that."""
    with soundfile.SoundFile(tmp_path / "clip.wav", "w", SAMPLING_RATE, 1, "PCM_16") as file:
        file.write(noise(0.2))
        file.flush()
        opened = open(tmp_path / "clip.wav", "rb")  # noqa: SIM115 - closed below
        blocks = IncomingAudio(opened, "clip", idle_seconds=0.3).blocks()
        found = [next(blocks)]
        file.write(noise(0.3, seed=1))
    with open(tmp_path / "clip.wav", "ab") as file:
        file.write(b"LIST\4\0\0\0INFO")
    with opened:
        found += blocks
    expected = decode_audio(tmp_path / "clip.wav", SAMPLING_RATE)
    assert len(expected) == 8000 and np.array_equal(np.concatenate(found), expected)


def test_a_file_that_becomes_shorter(tmp_path):
    path = tmp_path / "clip.raw"
    path.write_bytes(bytes(4000))
    with open(path, "rb") as file:
        blocks = IncomingAudio(file, "clip", PCM(SAMPLING_RATE)).blocks()
        next(blocks), next(blocks)
        os.truncate(path, 100)
        with pytest.raises(AudioError, match="clip: it has become shorter while it was read"):
            next(blocks)


@pytest.mark.parametrize("kind", ["file", "fifo"])
def test_the_command(streaming_adapter, tmp_path, capsys, kind):
    soundfile.write(tmp_path / "clip.wav", noise(1.2, 8000), 8000, "PCM_16")
    samples = decode_audio(tmp_path / "clip.wav", SAMPLING_RATE)
    wanted = list(follow(load_classifier(streaming_adapter), [samples], window_seconds=SECONDS))
    path = tmp_path / "incoming"
    content = (tmp_path / "clip.wav").read_bytes()
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.write_bytes(b"")
    thread = grow(path, content, 4001)
    options = ["--window_seconds", str(SECONDS), "--format", "json"]
    options += ["--idle_seconds", "2"] if kind == "file" else []
    main(["classify", streaming_adapter, str(path), "--follow", *options])
    thread.join()
    written = capsys.readouterr()
    found = [json.loads(line) for line in written.out.splitlines()]
    assert [(each["file"], each["start"], each["end"]) for each in found] == [
        (str(path), 0, 0.5), (str(path), 0.5, 1), (str(path), 1, 1.2)
    ]  # fmt: skip
    for each, result in zip(found, wanted, strict=True):
        told = {score["label"]: score["score"] for score in each["scores"]}
        assert told == pytest.approx(dict(zip(NAMES, result.scores.tolist())), abs=1e-5)
    assert "1.2 s of audio in " in written.err


@pytest.mark.timeout(900)  # starts a process
def test_lines_come_while_the_pipe_is_open(streaming_adapter, tmp_path):
    soundfile.write(tmp_path / "clip.wav", noise(1.2), SAMPLING_RATE, "FLOAT")
    content = (tmp_path / "clip.wav").read_bytes()
    wanted = list(follow(load_classifier(streaming_adapter), [noise(1.2)], window_seconds=SECONDS))
    found = []
    with start(streaming_adapter, "-", "--follow", "--window_seconds", str(SECONDS), "--format", "json") as process:
        for place in range(0, len(content), 999):
            process.stdin.write(content[place : place + 999])
            process.stdin.flush()
            # The pipe is open; a line that did not come would hang the test.
            if place // 999 in (40, 70):
                found.append(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate()
    assert process.returncode == 130, errors
    assert not rest and b"Traceback" not in errors and b"s of audio in " in errors
    for line, result in zip(found, wanted):
        told = {score["label"]: score["score"] for score in json.loads(line)["scores"]}
        assert told == pytest.approx(dict(zip(NAMES, result.scores.tolist())), abs=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.wav", "b.wav", "--follow"], "--follow reads one file or pipe while it comes in, got a.wav b.wav"),
        (["https://a.b/c.wav", "--follow"], "--follow reads one file or pipe while it comes in, got https"),
        (["a.wav", "--follow", "--batch_size", "2"], "--batch_size is not for --follow"),
        (["a.wav", "--follow", "--idle_seconds", "-1"], "--idle_seconds must not be negative, got -1"),
        (["a.wav", "--idle_seconds", "1"], "--idle_seconds is for audio that comes in, with --follow"),
        (["a.wav", "--follow", "--num_channels", "2"], "With --follow, raw PCM needs its --sampling_rate"),
        (["a.wav", "--follow", "--sampling_rate", "0"], "--sampling_rate must be positive, got 0"),
        (["a.wav", "--follow", "--overlap", "50%"], "--overlap must be 0 for this adapter"),
    ],
)
def test_options_that_are_not_allowed(streaming_adapter, words, message):
    with pytest.raises(SystemExit, match=f"^peft-softmoa classify: {message}"):
        main(["classify", streaming_adapter, *words])


@pytest.mark.parametrize(
    ("name", "reason"),
    [("missing.wav", "No such file or directory"), ("", "Is a directory"), ("a.txt", "it has no header of WAV")],
)
def test_what_cannot_be_read(streaming_adapter, tmp_path, capsys, name, reason):
    (tmp_path / "a.txt").write_text("no sound at all")
    with pytest.raises(SystemExit) as exit:
        main(["classify", streaming_adapter, str(tmp_path / name), "--follow", "--idle_seconds", "0"])
    written = capsys.readouterr()
    assert exit.value.code == 1 and not written.out
    assert f"peft-softmoa classify: {tmp_path / name}".rstrip("/") in written.err and reason in written.err


@pytest.mark.parametrize(
    ("piece", "found"),
    [
        (np.zeros((1024, 1), np.float32), r"float32 of shape \(1024, 1\)"),
        (np.zeros(1024, np.int16), r"int16 of shape \(1024,\)"),
    ],
)
def test_pieces_of_another_kind_are_an_error(streaming_adapter, piece, found):
    classifier = load_classifier(str(streaming_adapter))
    with pytest.raises(AudioError, match=rf"a piece must be floats of shape \(samples,\), got {found}"):
        list(follow(classifier, [piece]))
