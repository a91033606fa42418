"""Features that are the same in each epoch are made once, if the data is not streamed."""

import importlib
import logging
import os
import random
import shutil
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers as tf
from conftest import SAMPLING_RATE, write_parquet
from safetensors import SafetensorError
from torch.utils.data import DataLoader

from peft_softmoa.training import AudioError, DataOptions, features, load_stream
from peft_softmoa.training.cached_features import cache_folder

CLIPS = 10


@pytest.fixture
def folder(tmp_path):
    """Ten clips, of which the third cannot be used."""
    folder = tmp_path / "data"
    folder.mkdir()
    for index in range(CLIPS):
        write_clip(folder / f"{index}.wav", seed=index)
    (folder / "2.wav").write_bytes(b"no audio")
    lines = [f"{index}.wav,{'ab'[index % 2]}" for index in range(CLIPS)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    return folder


def write_clip(path, seed, length=3200):
    soundfile.write(path, 0.1 * np.random.default_rng(seed).standard_normal(length), SAMPLING_RATE)


@pytest.fixture
def options(tmp_path):
    def make(**changes):
        return DataOptions(**{"streaming": False, "cache_dir": str(tmp_path / "cache"), **changes})

    return make


@pytest.fixture
def decoded(monkeypatch):
    """The clips that are decoded."""
    names = []
    decoders = {name: getattr(features, name) for name in ("decode_audio", "decode_crop")}

    def counted(function, audio, *arguments):
        names.append(os.path.basename(audio["path"]))
        return decoders[function](audio, *arguments)

    for name in decoders:
        monkeypatch.setattr(features, name, partial(counted, name))
    return names


def read(folder, options, extractor=None, epoch=0, **arguments):
    stream = load_stream(str(folder), "train", extractor or tf.ASTFeatureExtractor(max_length=16), options, **arguments)
    stream.set_epoch(epoch)
    return list(stream)


def assert_same(examples, expected):
    assert len(examples) == len(expected) > 0
    for example, other in zip(examples, expected, strict=True):
        assert list(example) == list(other)
        for name, value in example.items():
            assert type(value) is type(other[name])
            assert np.array_equal(value, other[name])
            assert getattr(value, "dtype", None) == getattr(other[name], "dtype", None)


def files(options):
    return sorted(path for path in cache_folder(options).rglob("*") if path.is_file())


EXTRACTORS = {
    "AST": lambda: tf.ASTFeatureExtractor(max_length=16),
    "Whisper": lambda: tf.WhisperFeatureExtractor(chunk_length=1),
    "Wav2Vec2": lambda: tf.Wav2Vec2FeatureExtractor(return_attention_mask=True),
    "SeamlessM4T": lambda: tf.SeamlessM4TFeatureExtractor(),
}


@pytest.mark.parametrize("name", EXTRACTORS)
@pytest.mark.parametrize("training", [True, False])
def test_a_second_epoch_decodes_nothing(folder, options, decoded, name, training):
    extractor = EXTRACTORS[name]()
    expected = [read(folder, options(streaming=True), extractor, epoch, training=training) for epoch in (0, 1)]
    decoded.clear()
    assert_same(read(folder, options(), extractor, training=training), expected[0])
    assert sorted(decoded) == [f"{index}.wav" for index in range(CLIPS)]
    decoded.clear()
    # Another object and another stream, as in another run.
    assert_same(read(folder, options(), EXTRACTORS[name](), 1, training=training), expected[1])
    assert decoded == ["2.wav"]  # which may be mended


def test_a_second_epoch_opens_no_audio(folder, options, monkeypatch):
    expected = read(folder, options())
    opened, real = [], open

    def counted(file, *arguments, **more):
        opened.append(str(file))
        return real(file, *arguments, **more)

    monkeypatch.setattr("builtins.open", counted)
    assert_same(read(folder, options()), expected)
    assert [path for path in opened if path.endswith(".wav")] == [str(folder / "2.wav")]


def test_workers_share_the_features(folder, options, decoded):
    stream = load_stream(str(folder), "train", tf.ASTFeatureExtractor(max_length=16), options())

    def epoch(workers):
        loader = DataLoader(stream, batch_size=None, num_workers=workers)
        return sorted((example["input_values"].sum().item(), example["labels"]) for example in loader)

    first = epoch(2)
    assert len(files(options())) == CLIPS - 1
    assert epoch(2) == epoch(0) == first
    assert decoded == ["2.wav"]


def test_skipped_clips_are_named_in_each_epoch(folder, options, caplog):
    stream = load_stream(str(folder), "train", tf.ASTFeatureExtractor(max_length=16), options())
    for _ in range(2):
        stream.extract._warned.clear()  # as in another process
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert len(list(stream)) == CLIPS - 1
        assert f"Skipped 1 of {CLIPS} audio files that cannot be used: {folder}/2.wav: " in caplog.text
        assert len(stream.extract.skipped) == 1
    for _ in range(2):
        with pytest.raises(AudioError, match="2.wav"):
            read(folder, options(on_bad_audio="raise"))


def test_a_clip_that_is_mended(folder, options):
    assert len(read(folder, options())) == CLIPS - 1
    write_clip(folder / "2.wav", seed=2)
    assert len(read(folder, options())) == CLIPS


def test_cached_clips_that_are_too_short_for_a_model(folder, options):
    write_clip(folder / "2.wav", 2, length=1600)
    extractor = tf.ASTFeatureExtractor(max_length=16)
    assert len(read(folder, options(), extractor)) == CLIPS
    stream = load_stream(str(folder), "train", extractor, options())
    stream.extract.min_samples = 1601
    assert len(list(stream)) == CLIPS - 1
    assert [skipped.name for skipped in stream.extract.skipped] == [str(folder / "2.wav")]


def test_a_changed_file(folder, options, decoded):
    before = read(folder, options(), training=False)
    kept = (folder / "5.wav").stat()
    write_clip(folder / "5.wav", seed=50)
    # Of the same size and time, as after unpacking another archive.
    os.utime(folder / "5.wav", ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert (folder / "5.wav").stat().st_size == kept.st_size
    decoded.clear()
    after = read(folder, options(), training=False)
    assert decoded == ["2.wav", "5.wav"]
    assert_same(after, read(folder, options(streaming=True), training=False))
    changed = [not np.array_equal(one["input_values"], other["input_values"]) for one, other in zip(before, after)]
    assert changed == [index == 4 for index in range(CLIPS - 1)]  # without the clip that cannot be used


def test_files_of_one_name(tmp_path, options):
    """They lie in different folders, and have the same size and times."""
    for index, name in enumerate("ab"):
        (tmp_path / "data" / name).mkdir(parents=True)
        write_clip(tmp_path / "data" / name / "0.wav", seed=index)
        os.utime(tmp_path / "data" / name / "0.wav", ns=(0, 0))
    expected = read(tmp_path / "data", options(streaming=True), training=False)
    for _ in range(2):
        assert_same(read(tmp_path / "data", options(), training=False), expected)


@pytest.mark.parametrize(
    "extractor",
    [
        tf.ASTFeatureExtractor(max_length=17),
        tf.ASTFeatureExtractor(max_length=16, mean=0.0),
        tf.Wav2Vec2FeatureExtractor(),
    ],
    ids=["max_length", "mean", "class"],
)
def test_another_extractor(folder, options, decoded, extractor):
    read(folder, options())
    decoded.clear()
    assert_same(read(folder, options(), extractor), read(folder, options(streaming=True), extractor))
    assert len(decoded) == 2 * CLIPS


def test_an_extractor_that_is_changed(folder, options):
    extractor = tf.ASTFeatureExtractor(max_length=16)
    stream = load_stream(str(folder), "train", extractor, options(), training=False)
    list(stream)
    extractor.mean = 0.0
    assert_same(list(stream), read(folder, options(streaming=True), extractor, training=False))


def test_an_extractor_of_ones_own_whose_code_changes(folder, options, decoded, tmp_path, monkeypatch):
    code = """
        import transformers

        class Base(transformers.Wav2Vec2FeatureExtractor):
            def __call__(self, waveform, **options):
                return super().__call__({factor} * waveform, **options)

        class Own(Base):
            pass
    """
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for index, factor in enumerate((1, 1, 100.0)):
        (tmp_path / "own_extractor.py").write_text(textwrap.dedent(code).replace("{factor}", str(factor)))
        importlib.invalidate_caches()
        sys.modules.pop("own_extractor", None)
        extractor = importlib.import_module("own_extractor").Own(do_normalize=False)
        decoded.clear()
        found.append(read(folder, options(), extractor, training=False))
        assert len(decoded) == (1 if index == 1 else CLIPS)
    assert_same(found[1], found[0])
    np.testing.assert_allclose(found[2][0]["input_values"], 100 * found[0][0]["input_values"], rtol=1e-5)


def test_an_extractor_without_source_code(folder, options, caplog):
    extractor = type("Typed", (tf.Wav2Vec2FeatureExtractor,), {"__module__": "nowhere"})()
    with caplog.at_level(logging.WARNING):
        assert len(read(folder, options(), extractor)) == CLIPS - 1
    assert "or has no source code (" in caplog.text and not files(options())


def test_another_greatest_length(folder, options):
    for seconds in (None, 0.1, 0.05, None, 0.1):
        given = {"max_length_seconds": seconds}
        expected = read(folder, options(streaming=True, **given), training=False)
        assert_same(read(folder, options(**given), training=False), expected)


def test_another_version_of_a_library(folder, options, decoded, monkeypatch):
    read(folder, options())
    decoded.clear()
    monkeypatch.setattr("peft_softmoa.training.cached_features._versions", lambda: ["another"])
    read(folder, options())
    assert len(decoded) == CLIPS


def test_random_crops_and_streams_are_read_anew(folder, options, decoded):
    for given in ({"max_length_seconds": 0.1}, {"streaming": True}):
        for epoch in range(2):
            decoded.clear()
            expected = read(folder, options(**{**given, "streaming": True}), epoch=epoch)
            assert_same(read(folder, options(**given), epoch=epoch), expected)
            assert len(decoded) == 2 * CLIPS
        assert not files(options())


class Dither(tf.Wav2Vec2FeatureExtractor):
    """Adds random numbers to each clip."""

    draw = staticmethod(np.random.standard_normal)

    def __call__(self, waveform, **options):
        return super().__call__(waveform + np.float32(self.draw()), **options)


class OwnGenerator(Dither):
    """Adds those of a generator of its own."""

    def __init__(self):
        super().__init__()
        self.generator = np.random.default_rng(0)

    def draw(self):
        return self.generator.standard_normal()


@pytest.mark.parametrize(
    "draw", [np.random.standard_normal, random.random, lambda: torch.rand(()).item(), "its own generator"]
)
def test_features_with_random_numbers_are_made_anew(folder, options, decoded, monkeypatch, draw):
    monkeypatch.setattr(Dither, "draw", staticmethod(draw))
    extractor = OwnGenerator() if isinstance(draw, str) else Dither(do_normalize=False)
    first, second = read(folder, options(), extractor), read(folder, options(), extractor)
    assert len(decoded) == 2 * CLIPS and not files(options())
    assert not any(np.array_equal(one["input_values"], other["input_values"]) for one, other in zip(first, second))


def test_an_extractor_that_cannot_be_pickled(folder, options, decoded, caplog):
    extractor = tf.ASTFeatureExtractor(max_length=16)
    extractor.stream = (number for number in range(3))
    with caplog.at_level(logging.WARNING):
        assert_same(read(folder, options(), extractor), read(folder, options(streaming=True), extractor))
    assert "the feature extractor cannot be pickled" in caplog.text


OTHER_PROCESS = """
import sys, transformers
from peft_softmoa.training import DataOptions, load_stream
options = DataOptions(streaming=False, cache_dir=sys.argv[2])
extractor = transformers.ASTFeatureExtractor(max_length=16)
stream = load_stream(sys.argv[1], "train", extractor, options, training=False)
print("ready", flush=True), input()
for epoch in range(3):
    print([float(each["input_values"].sum(dtype=float)) for each in stream], flush=True)
"""


def test_two_processes_at_once(folder, options):
    def sums(options):
        return str([float(each["input_values"].sum(dtype=float)) for each in read(folder, options, training=False)])

    expected = sums(options(streaming=True))
    command = [sys.executable, "-c", OTHER_PROCESS, str(folder), options().cache_dir]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("\n")
        process.stdin.flush()
        assert [sums(options()) for _ in range(3)] == [expected] * 3
        assert process.communicate()[0].splitlines() == [expected] * 3
    # Each clip once: the fingerprints are the same in each process.
    assert len(files(options())) == CLIPS - 1
    assert all(path.suffix == ".safetensors" for path in files(options()))


def test_damaged_files_are_made_anew(folder, options, decoded):
    expected = read(folder, options(), training=False)
    paths = files(options())
    for path, content in zip(paths, (b"", b"\0" * 4096, paths[2].read_bytes()[:-1])):
        path.write_bytes(content)
    decoded.clear()
    assert_same(read(folder, options(), training=False), expected)
    assert len(decoded) == 3 + 1
    decoded.clear()
    assert_same(read(folder, options(), training=False), expected)
    assert decoded == ["2.wav"]


def test_the_folder_may_be_removed(folder, options):
    stream = load_stream(str(folder), "train", tf.ASTFeatureExtractor(max_length=16), options(), training=False)
    expected = list(stream)
    shutil.rmtree(cache_folder(options()))
    assert_same(list(stream), expected)
    assert len(files(options())) == CLIPS - 1


def test_a_folder_that_cannot_be_written(folder, options, caplog):
    Path(options().cache_dir).write_text("a file")
    with caplog.at_level(logging.WARNING):
        assert_same(read(folder, options()), read(folder, options(streaming=True)))
    assert caplog.text.count(f"Features are not kept for the next epoch, as {cache_folder(options())}") == 1


def test_a_full_disk(folder, options, caplog, monkeypatch):
    def full(*arguments):
        raise SafetensorError("Error while serializing: No space left on device (os error 28)")

    monkeypatch.setattr("peft_softmoa.training.cached_features.save_file", full)
    with caplog.at_level(logging.WARNING):
        assert_same(read(folder, options()), read(folder, options(streaming=True)))
    assert f"{cache_folder(options())}" in caplog.text and "(Error while serializing: No space left" in caplog.text
    assert not files(options())


def test_audio_in_the_table(folder, tmp_path, options, decoded):
    """It is known by its content."""
    table = folder / "metadata.csv"
    header, *lines = table.read_text().split()
    table.write_text("\n".join([f"{header},fold", *(f"{line},1" for line in lines)]))
    dataset = write_parquet(tmp_path / "table", folder)
    expected = read(dataset, options(streaming=True), training=False)
    decoded.clear()
    for _ in range(2):
        assert_same(read(dataset, options(), training=False), expected)
    assert sorted(decoded) == sorted([f"{index}.wav" for index in range(CLIPS)] + ["2.wav"])
