import io
import logging

import numpy as np
import pytest
import soundfile
import torch
from conftest import FRAMES, MEL_BINS, SAMPLING_RATE, write_parquet, write_tone
from datasets import IterableDataset
from torch.utils.data import DataLoader
from transformers import ASTFeatureExtractor

from peft_softmoa.training import (
    AudioError,
    AudioStream,
    ExtractFeatures,
    Survey,
    class_names,
    decode_audio,
    load_rows,
    network,
    parse_selection,
    select_rows,
    survey_rows,
)


@pytest.fixture
def feature_extractor():
    return ASTFeatureExtractor(max_length=FRAMES, num_mel_bins=MEL_BINS)


# --- decoding -----------------------------------------------------------------------------------------------------

FORMATS = [
    ("wav", "PCM_16"),
    ("wav", "FLOAT"),
    ("flac", "PCM_16"),
    ("ogg", "VORBIS"),
    ("mp3", "MPEG_LAYER_III"),
    ("aiff", "PCM_16"),
]


@pytest.mark.parametrize("extension, subtype", FORMATS)
def test_decodes_paths_bytes_and_rows(tmp_path, extension, subtype):
    path = tmp_path / f"tone.{extension}"
    samples = write_tone(path, subtype=subtype, format=extension.upper())
    for audio in (
        path,
        str(path),
        path.read_bytes(),
        {"path": str(path), "bytes": None},
        {"path": None, "bytes": path.read_bytes()},
    ):
        decoded = decode_audio(audio, SAMPLING_RATE)
        assert decoded.dtype == np.float32 and decoded.ndim == 1
        assert np.sqrt(np.mean((decoded[500:7500] - samples[500:7500]) ** 2)) < 0.03


def test_mixes_channels_and_resamples(tmp_path):
    time = np.arange(44_100) / 44_100
    left, right = np.sin(2 * np.pi * 300 * time), np.zeros(44_100)
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, right], axis=1), 44_100)
    decoded = decode_audio(tmp_path / "stereo.wav", SAMPLING_RATE)
    assert len(decoded) == SAMPLING_RATE
    expected = 0.5 * np.sin(2 * np.pi * 300 * np.arange(SAMPLING_RATE) / SAMPLING_RATE)
    assert np.abs(decoded - expected)[200:-200].max() < 2e-3


def test_silence_is_valid(tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros(800), SAMPLING_RATE)
    assert (decode_audio(tmp_path / "silence.wav", SAMPLING_RATE) == 0).all()


@pytest.mark.parametrize("extension, subtype", FORMATS)
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.95])
def test_truncated_files_are_errors(tmp_path, extension, subtype, kept):
    path = tmp_path / f"tone.{extension}"
    # Noise: a tone is so easily compressed that the end of some formats is empty.
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 16_000).astype("f4")
    soundfile.write(path, noise, SAMPLING_RATE, subtype=subtype, format=extension.upper())
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(AudioError, match=f"tone.{extension}: (truncated|unreadable|no samples)"):
        decode_audio(path, SAMPLING_RATE)


@pytest.mark.parametrize("declared", [b"\xff\xff\xff\xff", b"\x00\xf0\xff\x7f"])
def test_files_of_writers_that_do_not_know_the_length_are_valid(tmp_path, declared):
    write_tone(tmp_path / "tone.wav")
    content = bytearray((tmp_path / "tone.wav").read_bytes())
    at = content.index(b"data") + 4
    content[4:8] = content[at : at + 4] = declared
    assert len(decode_audio(bytes(content), SAMPLING_RATE)) == 8000


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("noise.wav", b"this is no audio", "unreadable"),
        ("empty.wav", b"", "unreadable"),
        ("missing.wav", None, "unreadable"),
        ("short.wav", np.zeros(0), "no samples"),
        ("nan.wav", np.array([0.0, np.nan, 0.1]), "samples that are not finite"),
        ("inf.wav", np.array([0.0, np.inf]), "samples that are not finite"),
    ],
)
def test_bad_files_are_named_with_the_reason(tmp_path, name, content, reason):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        soundfile.write(tmp_path / name, content, SAMPLING_RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match=f"{name}: {reason}") as error:
        decode_audio(tmp_path / name, SAMPLING_RATE)
    assert error.value.name == str(tmp_path / name) and error.value.reason.startswith(reason)


# --- rows ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["csv", "parquet with classes", "parquet with strings", "downloaded parquet"])
def dataset(request, tones_folder, tmp_path):
    """The same tones in every form, and whether they are streamed."""
    if request.param == "csv":
        return tones_folder, True
    folder = write_parquet(tmp_path / "parquet", tones_folder, class_label=request.param != "parquet with strings")
    return folder, request.param != "downloaded parquet"


def test_rows_become_model_inputs(dataset, feature_extractor, tmp_path):
    folder, streaming = dataset
    rows = load_rows(str(folder), "train", streaming=streaming, cache_dir=str(tmp_path / "cache"))
    survey = survey_rows(rows, "label")
    assert survey == (16, ("high", "low"), (16,))
    extract = ExtractFeatures(feature_extractor, survey.labels, class_names=class_names(rows, "label"))
    examples = list(AudioStream(rows, extract))
    assert [example["labels"] for example in examples] == [1] * 4 + [0] * 4 + [1] * 4 + [0] * 4
    expected = feature_extractor(decode_audio(tones_of(folder, rows), SAMPLING_RATE), sampling_rate=SAMPLING_RATE)
    assert np.array_equal(examples[0]["input_values"], expected["input_values"][0])
    assert set(examples[0]) == {"input_values", "labels"}


def tones_of(folder, rows):
    return next(iter(rows))["audio"]


def test_folds_are_chosen_by_the_values_of_a_column(dataset):
    folder, streaming = dataset
    rows = load_rows(str(folder), "train", streaming=streaming)
    assert [str(row["fold"]) for row in select_rows(rows, "fold=2")] == ["2"] * 8
    assert len(list(select_rows(rows, "label=low"))) == 8
    assert len(list(select_rows(rows, "fold = 1, 2"))) == 16
    with pytest.raises(ValueError, match="No rows are left"):
        survey_rows(select_rows(rows, "fold=3"), "label")
    with pytest.raises(ValueError, match="no column 'part'; its columns are: .*label.*fold"):
        select_rows(rows, "part=1")


@pytest.mark.parametrize("selection", ["fold", "fold=", "=1", "fold=,"])
def test_selections_of_another_form(selection):
    with pytest.raises(ValueError, match=f"column=value,value.*got '{selection}'"):
        parse_selection(selection)


def test_only_the_columns_that_are_asked_for(dataset):
    folder, streaming = dataset
    rows = load_rows(str(folder), "train", columns=["label", "fold"], streaming=streaming)
    assert set(next(iter(rows))) == {"label", "fold"}
    for columns in (["label", "nothing"], ["nothing"]):
        with pytest.raises(ValueError, match="no column 'nothing'; its columns are: .*label"):
            load_rows(str(folder), "train", columns=columns, streaming=streaming)


def test_missing_audio_or_label_column(dataset, feature_extractor):
    folder, streaming = dataset
    rows = load_rows(str(folder), "train", streaming=streaming)
    with pytest.raises(ValueError, match="no column 'sound'; its columns are: .*label"):
        AudioStream(rows, ExtractFeatures(feature_extractor, ["a"], audio_column="sound"))
    with pytest.raises(ValueError, match="no column 'genre'; its columns are: .*label"):
        survey_rows(rows, "genre")


def test_splits_are_folders(tones_folder, tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        write_tone(tmp_path / split / "tone.wav")
        (tmp_path / split / "metadata.csv").write_text(f"file_name,label\ntone.wav,{split}\n")
    assert [row["label"] for row in load_rows(str(tmp_path), "test")] == ["test"]
    with pytest.raises(ValueError, match="has no split 'validation', only: test, train"):
        load_rows(str(tmp_path), "validation")
    with pytest.raises(ValueError, match="its only split is 'train', not 'validation'"):
        load_rows(str(tones_folder), "validation")


def test_splits_that_do_not_exist(tones_folder, tmp_path):
    write_parquet(tmp_path / "parquet", tones_folder)
    with pytest.raises(ValueError, match="validation"):
        load_rows(str(tmp_path / "parquet"), "validation")


def test_tables_are_read_as_text(tmp_path, feature_extractor):
    write_tone(tmp_path / "tone.wav")
    (tmp_path / "metadata.csv").write_text("file_name,label,fold\ntone.wav,NA,1\ntone.wav,01,\ntone.wav,null,1\n")
    rows = load_rows(str(tmp_path), "train")
    assert survey_rows(rows, "label") == (3, ("01", "NA", "null"), (3,))
    assert [row["label"] for row in select_rows(rows, "fold=1")] == ["NA", "null"]
    with pytest.raises(ValueError, match="a row has no label"):
        survey_rows(rows, "fold")


def test_tables_of_spreadsheets(tmp_path):
    write_tone(tmp_path / "tone.wav")
    (tmp_path / "metadata.csv").write_text("file_name,label\ntone.wav,x\n", encoding="utf-8-sig")
    rows = list(load_rows(str(tmp_path), "train", columns=["audio", "label"]))
    assert rows == [{"audio": {"path": str(tmp_path / "tone.wav"), "bytes": None}, "label": "x"}]


def test_audio_without_a_table_asks_for_one(tmp_path):
    write_tone(tmp_path / "tone.wav")
    with pytest.raises(ValueError, match="a folder of audio files.*metadata.csv"):
        load_rows(str(tmp_path), "train")


def test_table_without_file_names(tmp_path):
    (tmp_path / "metadata.csv").write_text("path,label\na.wav,x\n")
    with pytest.raises(ValueError, match="no column 'file_name'; its columns are: path, label"):
        load_rows(str(tmp_path), "train")


# --- streams ------------------------------------------------------------------------------------------------------


def bad_folder(folder):
    """Two good files, one of them silent, between bad ones."""
    write_tone(folder / "good.wav")
    soundfile.write(folder / "silent.wav", np.zeros(8000), SAMPLING_RATE)
    (folder / "noise.wav").write_bytes(b"this is no audio")
    soundfile.write(folder / "nan.wav", np.full(800, np.nan), SAMPLING_RATE, subtype="FLOAT")
    soundfile.write(folder / "blip.wav", np.zeros(20), SAMPLING_RATE)
    names = ["noise.wav", "good.wav", "missing.wav", "nan.wav", "silent.wav", "blip.wav"]
    (folder / "metadata.csv").write_text("\n".join(["file_name,label", *(f"{name},x" for name in names)]))
    return folder


def test_bad_audio_is_skipped_counted_and_named_once(tmp_path, feature_extractor, caplog):
    rows = load_rows(str(bad_folder(tmp_path)), "train")
    extract = ExtractFeatures(feature_extractor, ["x"])
    stream = AudioStream(rows, extract, Survey(6, ("x",)))
    with caplog.at_level(logging.WARNING):
        assert len(list(stream)) == 2
        assert len(list(stream)) == 2 and len(extract.skipped) == 4
    messages = [record.message for record in caplog.records if record.name.startswith("peft_softmoa")]
    assert len(messages) == 1 and messages[0].startswith("Skipped 4 of 6 audio files")
    for name in (
        "noise.wav: unreadable",
        "missing.wav: unreadable",
        "nan.wav: samples that are not finite",
        "blip.wav: no features",
    ):
        assert name in messages[0]


def test_every_skipped_clip_counts(tmp_path, tones_folder, feature_extractor, caplog):
    """Also those without a name, and those with the same name; also if the pass does not end."""
    rows = [{"audio": audio, "label": "x"} for audio in [None, b"no audio", {"path": None, "bytes": b""}]]
    rows += [{"audio": str(tones_folder / "1-low-0.wav"), "label": "x"}] * 20
    extract = ExtractFeatures(feature_extractor, ["x"])
    dataset = IterableDataset.from_generator(lambda: iter(rows))
    stream = AudioStream(dataset, extract, Survey(23, ("x",)))
    with caplog.at_level(logging.WARNING):
        examples = iter(stream)
        next(examples)
        examples.close()
    assert "Skipped 3 of 23 audio files" in caplog.text and "<_io" not in caplog.text


def test_nothing_but_bad_audio(tmp_path, feature_extractor):
    (tmp_path / "metadata.csv").write_text("file_name,label\na.wav,x\nb.wav,x\n")
    extract = ExtractFeatures(feature_extractor, ["x"])
    stream = AudioStream(load_rows(str(tmp_path), "train"), extract)
    with pytest.raises(
        ValueError, match="None of the 2 audio files can be used: .*a.wav: unreadable.*b.wav: unreadable"
    ):
        list(stream)


def test_a_column_that_holds_no_audio(tones_folder, feature_extractor, tmp_path):
    rows = load_rows(str(write_parquet(tmp_path / "parquet", tones_folder)), "train")
    extract = ExtractFeatures(feature_extractor, ["high", "low"], audio_column="fold")
    with pytest.raises(ValueError, match="Column 'fold' holds int, but audio is a path"):
        list(AudioStream(rows, extract))


def test_a_header_that_claims_all_memory_is_an_error(tmp_path):
    write_tone(tmp_path / "tone.flac")
    content = bytearray((tmp_path / "tone.flac").read_bytes())
    content[21] |= 0x0F  # the upper bits of the number of samples, in FLAC's first metadata block
    content[22:26] = b"\xff\xff\xff\xff"
    with pytest.raises(AudioError, match="truncated|unreadable"):
        decode_audio(bytes(content), SAMPLING_RATE)


def test_bad_audio_can_be_an_error(tmp_path, feature_extractor):
    rows = load_rows(str(bad_folder(tmp_path)), "train")
    with pytest.raises(AudioError, match="noise.wav: unreadable"):
        list(AudioStream(rows, ExtractFeatures(feature_extractor, ["x"], on_bad_audio="raise")))


def test_labels_that_are_no_classes(tones_folder, feature_extractor, tmp_path):
    rows = load_rows(str(tones_folder), "train")
    with pytest.raises(ValueError, match="1-high-0.wav: label 'high' is none of the classes low, middle"):
        list(AudioStream(rows, ExtractFeatures(feature_extractor, ["low", "middle"])))
    folder = write_parquet(tmp_path / "parquet", tones_folder)
    rows = load_rows(str(folder), "train")
    with pytest.raises(ValueError, match="label 1 is no index of the 1 classes high"):
        list(AudioStream(rows, ExtractFeatures(feature_extractor, ["high"], class_names=["high"])))


def test_shuffling_differs_between_epochs_and_repeats_with_the_seed(tones_folder, feature_extractor):
    rows = load_rows(str(tones_folder), "train")

    def order(seed, epoch):
        extract = ExtractFeatures(feature_extractor, ["high", "low"])
        stream = AudioStream(rows, extract, shuffle_buffer=16, seed=seed)
        stream.set_epoch(epoch)
        return [float(example["input_values"].sum()) for example in stream]

    first = order(0, 0)
    assert first == order(0, 0)
    assert first != order(0, 1) and first != order(1, 0)
    assert sorted(first) == sorted(order(0, 1)) == sorted(order(1, 0))


def test_long_clips_are_cut(tmp_path, feature_extractor):
    time = np.arange(2 * SAMPLING_RATE) / SAMPLING_RATE
    soundfile.write(tmp_path / "long.wav", 0.1 * np.sin(400 * time * (1 + time)), SAMPLING_RATE)
    (tmp_path / "metadata.csv").write_text("file_name,label\nlong.wav,x\n")
    rows = load_rows(str(tmp_path), "train")
    lengths = []

    class Recorder:
        sampling_rate, model_input_names = SAMPLING_RATE, ["input_values"]

        def __call__(self, waveform, **options):
            lengths.append(len(waveform))
            return {"input_values": waveform[None]}

    def cut(random_crop=False):
        extract = ExtractFeatures(Recorder(), ["x"], max_length_seconds=0.25, random_crop=random_crop)
        stream = AudioStream(rows, extract)
        clips = []
        for epoch in range(3):
            stream.set_epoch(epoch)
            clips.append(next(iter(stream))["input_values"])
        return clips

    whole = decode_audio(tmp_path / "long.wav", SAMPLING_RATE)
    assert all(np.array_equal(clip, whole[:4000]) for clip in cut())
    random = cut(random_crop=True)
    assert set(lengths) == {4000}
    assert not np.array_equal(random[0], random[1])
    assert all(np.array_equal(*clips) for clips in zip(random, cut(random_crop=True), strict=True))


@pytest.mark.parametrize(
    "options, field", [({"max_length_seconds": 0}, "max_length_seconds"), ({"on_bad_audio": "ignore"}, "on_bad_audio")]
)
def test_bad_options(feature_extractor, options, field):
    with pytest.raises(ValueError, match=f"`{field}` must be"):
        ExtractFeatures(feature_extractor, ["x"], **options)


def test_streams_go_through_a_data_loader(tones_folder, feature_extractor):
    extract = ExtractFeatures(feature_extractor, ["high", "low"])
    stream = AudioStream(load_rows(str(tones_folder), "train"), extract, Survey(16, ("high", "low")))
    loader = DataLoader(stream, batch_size=6)
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    assert batches[0]["input_values"].shape == (6, FRAMES, MEL_BINS)
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == ([1] * 4 + [0] * 4) * 2


def test_remote_audio_is_read_by_its_url(tmp_path):
    import fsspec

    buffer = io.BytesIO()
    samples = write_tone(buffer, format="WAV", subtype="FLOAT")
    with fsspec.open("memory://clips/tone.wav", "wb") as file:
        file.write(buffer.getvalue())
    assert np.allclose(decode_audio("memory://clips/tone.wav", SAMPLING_RATE), samples)


def test_a_network_that_fails_is_tried_again(monkeypatch):
    """An outage is no bad audio: it must not be skipped."""
    import fsspec

    buffer = io.BytesIO()
    write_tone(buffer, format="WAV")
    with fsspec.open("memory://clips/again.wav", "wb") as file:
        file.write(buffer.getvalue())
    opened, pauses, failures = fsspec.open, [], []
    monkeypatch.setattr(network.time, "sleep", pauses.append)

    def flaky(name, mode):
        if failures:
            raise failures.pop()
        return opened(name, mode)

    monkeypatch.setattr(network.fsspec, "open", flaky)
    failures += [RuntimeError("reset"), TimeoutError()]
    assert len(decode_audio("memory://clips/again.wav", SAMPLING_RATE)) == 8000
    assert pauses == [1.0, 2.0]
    failures += [RuntimeError("reset")] * 6
    with pytest.raises(ConnectionError, match="again.wav could not be read after 6 tries: .*reset"):
        decode_audio("memory://clips/again.wav", SAMPLING_RATE)
    with pytest.raises(AudioError, match="nothing.wav: unreadable"):
        decode_audio("memory://clips/nothing.wav", SAMPLING_RATE)
