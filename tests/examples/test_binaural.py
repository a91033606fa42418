"""Mono clips become binaural ones whose direction can be heard."""

import csv

import h5py
import numpy as np
import pytest
import soundfile

from examples.binaural import DIRECTIONS, SAMPLING_RATE, SECONDS, VIEWS, loudest, main, read_responses, render


def write_sofa(path, directions=DIRECTIONS):
    """Responses of a head that only attenuates what comes from the other side."""
    responses = np.zeros((len(directions), 2, 64))
    for row, direction in enumerate(directions):
        side = np.sin(np.deg2rad(direction))
        responses[row, :, 8] = 1 + 0.9 * side, 1 - 0.9 * side
    with h5py.File(path, "w") as file:
        file["Data.IR"] = responses
        file["SourcePosition"] = [(direction, 0.0, 1.4) for direction in directions]
        file["Data.SamplingRate"] = [44_100.0]
    return path


@pytest.fixture
def clips(tmp_path):
    generator = np.random.default_rng(0)
    with (tmp_path / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "label", "fold"])
        for index in range(10):
            noise = generator.normal(size=3 * SAMPLING_RATE) * np.repeat([0.001, 0.1, 0.001], SAMPLING_RATE)
            soundfile.write(tmp_path / f"{index}.wav", noise, SAMPLING_RATE)
            writer.writerow([f"{index}.wav", "noise", 1 + index % 5])
    return tmp_path


def test_clips_are_louder_at_the_ear_they_come_from(clips, tmp_path):
    render(clips, write_sofa(tmp_path / "head.sofa"), tmp_path / "binaural", seed=0)
    rows = list(csv.DictReader((tmp_path / "binaural" / "metadata.csv").open()))
    assert len(rows) == 10 * VIEWS
    for start in range(0, len(rows), VIEWS):
        assert len({row["direction"] for row in rows[start : start + VIEWS]}) == VIEWS
    for row in rows:
        samples, rate = soundfile.read(tmp_path / "binaural" / row["file_name"])
        assert samples.shape == (SECONDS * rate, 2) and rate == SAMPLING_RATE
        left, right = np.square(samples).mean(axis=0)
        side = np.sin(np.deg2rad(int(row["direction"])))
        assert np.sign(np.round(np.log(left / right), 6)) == np.sign(np.round(side, 6))
        assert 0.1 < np.abs(samples).max() < 0.6
    assert [row["fold"] for row in rows[:: 5 * VIEWS]] == ["1", "1"]


def test_the_loudest_part_is_taken(clips):
    samples, _ = soundfile.read(clips / "0.wav")
    taken = loudest(samples, SAMPLING_RATE)
    assert np.square(taken).sum() > 0.99 * np.square(samples[SAMPLING_RATE : 2 * SAMPLING_RATE]).sum()
    assert len(loudest(samples[:10], 16)) == 16


def test_a_direction_that_was_not_measured_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"'.*head.sofa' has no response of 315 degrees"):
        read_responses(write_sofa(tmp_path / "head.sofa", DIRECTIONS[:-1]))


def test_trains_with_two_channels(clips, tmp_path, capsys):
    sofa = write_sofa(tmp_path / "head.sofa")
    given = ["--clips", str(clips), "--sofa", str(sofa), "--output_dir", str(tmp_path / "out"), "--epochs", "1"]
    assert 0 <= main(given) <= 1
    assert "Directions of sounds of fold 1 that are right" in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
