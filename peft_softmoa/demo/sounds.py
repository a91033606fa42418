"""Procedural sounds: a small labelled set that needs no download.

Six classes that differ in how they sound, each with random pitch, length, level and background noise.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import soundfile

SAMPLING_RATE = 16_000


def hum(time: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    """A steady tone with harmonics."""
    harmonics: np.ndarray = np.sum([np.sin(2 * np.pi * k * pitch * time) / k for k in range(1, 6)], axis=0)
    return harmonics


def rise(time: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    """A tone whose pitch rises by an octave and a half."""
    return np.sin(2 * np.pi * pitch * (time + time**2 / time[-1] * 0.9))


def fall(time: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    """A tone whose pitch falls by an octave and a half."""
    return np.sin(2 * np.pi * 2.8 * pitch * (time - time**2 / time[-1] * 0.32))


def clicks(time: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    """Short pulses at a steady rate."""
    return (np.mod(time * pitch / 30, 1) < 0.02) * rng.standard_normal(len(time)) * 3


def rain(time: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    """Noise."""
    return rng.standard_normal(len(time))


def siren(time: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    """A tone that wavers."""
    return np.sin(2 * np.pi * pitch * 2 * time + 12 * np.sin(2 * np.pi * 5 * time))


SOUNDS = {sound.__name__: sound for sound in (hum, rise, fall, clicks, rain, siren)}


def synthesise(label: str, rng: np.random.Generator) -> np.ndarray:
    """One sound of a class, as `(samples,)` float32 at 16 kHz.

    Args:
        label (str): the class.
        rng (np.random.Generator): draws pitch (200 to 700 Hz), length (2 to 5 s), level and noise.

    Returns:
        np.ndarray: the samples.
    """
    time = np.arange(int(rng.uniform(2, 5) * SAMPLING_RATE)) / SAMPLING_RATE
    sound = SOUNDS[label](time, rng.uniform(200, 700), rng)
    sound = sound / np.abs(sound).max() + rng.uniform(0.005, 0.03) * rng.standard_normal(len(time))
    return (rng.uniform(0.1, 0.5) * sound).astype(np.float32)


def write_dataset(folder: Path, per_class: dict[str, int], seed: int) -> None:
    """Write WAV files and a metadata.csv with the columns file_name, label and part.

    Args:
        folder (Path): where to; it is made.
        per_class (dict[str, int]): for each part, such as "train", the number of clips of each class.
        seed (int): of all random choices.
    """
    rng = np.random.default_rng(seed)
    (folder / "audio").mkdir(parents=True)
    with open(folder / "metadata.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "label", "part"])
        for part, count in per_class.items():
            for label in SOUNDS:
                for index in range(count):
                    name = f"audio/{part}-{label}-{index}.wav"
                    soundfile.write(folder / name, synthesise(label, rng), SAMPLING_RATE)
                    table.writerow([name, label, part])
