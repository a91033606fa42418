"""An endless supply of labelled sounds: scenes of one to three synthesised sources, and their settings as labels.

The room, the microphone and the background noise belong to the scene.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .sources import (
    KINDS,
    MODULATIONS,
    NYQUIST,
    PATTERNS,
    SAMPLING_RATE,
    SECONDS,
    UNSET,
    Source,
    draw_source,
    gain,
    log_uniform,
    render_source,
    shaped_noise,
    transform,
)

COLUMN, BANDS = 0.16, 8  # a patch of the transformer: in seconds, and of an equal number of mel bins


@dataclass
class Scene:
    """Settings of a clip.

    Args:
        sources (list[Source]): one to three, of different kinds.
        reverberation (float): time in which an echo falls to a millionth of its power, in seconds; 0 in the open.
        background (float): level of the background noise, in dB, of which the sources have 0; NaN if there is none.
        cutoff (float): highest frequency that was recorded, in Hz.
        end (float): when the recording ends; digital silence follows to the end of the clip, in seconds.
        active (np.ndarray): `(kinds, columns)` bool, which kinds sound when, without their echo.
        loudest (np.ndarray): `(bands, columns)` int64, the kind that is loudest in each patch, without its echo; the
            number of kinds where the background, an echo or silence is.
    """

    sources: list[Source]
    reverberation: float
    background: float
    cutoff: float
    end: float
    active: np.ndarray
    loudest: np.ndarray


def draw_scene(rng: np.random.Generator, seconds: float = SECONDS) -> tuple[np.ndarray, Scene]:
    """Draw a scene and make its sound.

    Args:
        rng (np.random.Generator): draws everything.
        seconds (float): length of the clip. Default: SECONDS.

    Returns:
        tuple: `(samples,)` float32 at 16 kHz, between -1 and 1, and the Scene.
    """
    samples = int(seconds * SAMPLING_RATE)
    columns = int(np.ceil(seconds / COLUMN))
    mixture, anywhere = np.zeros(samples, np.float32), np.zeros(samples, bool)
    active = np.zeros((len(KINDS), columns), bool)
    energies = np.zeros((len(KINDS) + 1, BANDS, columns), np.float32)
    sources = []
    kinds = rng.choice(len(KINDS), rng.choice([1, 2, 3], p=[0.45, 0.35, 0.2]), replace=False)
    for index in kinds:
        source = draw_source(KINDS[index], rng, seconds)
        source.level = rng.uniform(-18, 0) if sources else 0.0
        sound, where = render_source(source, rng, seconds)
        sound *= np.float32(10 ** (source.level / 20))
        mixture += sound
        energies[index] = band_energies(sound, columns)
        padded = np.zeros(columns * int(COLUMN * SAMPLING_RATE), bool)
        padded[:samples] = where
        active[index] = padded.reshape(columns, -1).any(1)
        anywhere |= where
        sources.append(source)
    reverberation = log_uniform(rng, 0.1, 3) if rng.random() < 0.4 else 0.0
    cutoff = log_uniform(rng, 2000, NYQUIST) if rng.random() < 0.35 else NYQUIST
    tilt = rng.normal(0, 2)  # dB per octave, of the microphone
    mixture = _record(mixture, reverberation, cutoff, tilt, rng)
    mixture /= np.sqrt(np.mean(mixture[anywhere] ** 2)) + 1e-9
    level = UNSET
    if rng.random() < 0.75:
        level = rng.uniform(-60, -6)
        colour = Source("noise", 1000, bandwidth=40, slope=rng.uniform(-6, 0))
        background = np.float32(10 ** (level / 20)) * _level(shaped_noise(samples, colour, rng))
        energies[-1] = band_energies(background, columns)
        mixture += background
    end = seconds
    if rng.random() < 0.3:
        end = rng.uniform(0.1, 1) * seconds
        last = int(max(end, min(source.starts[0] for source in sources) + 0.1) * SAMPLING_RATE)
        end = min(last / SAMPLING_RATE, seconds)
        mixture[last:] = 0
    energies[-1] += 1e-6 * energies.max()  # what cannot be heard is as good as silence
    loudest = energies.argmax(0)
    silent = int(np.ceil(end / COLUMN))
    active[:, silent:], loudest[:, silent:] = False, len(KINDS)
    # A peak of -30 to 0 dB, more often loud, as it is in recordings that were normalised.
    peak = 10 ** (-30 * rng.beta(1, 3) / 20)
    audio = (mixture * (peak / (np.abs(mixture).max() + 1e-9))).astype(np.float32)
    return audio, Scene(sources, reverberation, level, cutoff, end, active, loudest)


def band_energies(sound: np.ndarray, columns: int) -> np.ndarray:
    """Energy in each patch. `(bands, columns)`."""
    samples = int(COLUMN * SAMPLING_RATE)
    padded = np.zeros(columns * samples, np.float32)
    padded[: len(sound)] = sound
    spectrum = np.fft.rfft(padded.reshape(columns, samples))
    return np.add.reduceat(spectrum.real**2 + spectrum.imag**2, band_edges(samples), axis=1).T


def band_edges(samples: int) -> np.ndarray:
    """The lowest bin of each band in a Fourier transform of so many samples, the bands being equally wide in mel."""
    low, high = 1127 * np.log(1 + np.array([20, NYQUIST]) / 700)
    edges = 700 * (np.exp(np.linspace(low, high, BANDS + 1)[:-1] / 1127) - 1)
    return (edges * samples / SAMPLING_RATE).astype(int)


def _level(sound: np.ndarray) -> np.ndarray:
    return sound / (np.sqrt(np.mean(sound**2)) + 1e-9)


def _record(
    mixture: np.ndarray, reverberation: float, cutoff: float, tilt: float, rng: np.random.Generator
) -> np.ndarray:
    """Put the room and the microphone around a mixture."""
    echo = np.zeros(0, np.float32)
    if reverberation:
        samples = int(min(reverberation, 1.0) * SAMPLING_RATE)
        time = np.arange(samples, dtype=np.float32) / SAMPLING_RATE
        echo = rng.standard_normal(samples, dtype=np.float32) * np.exp(np.float32(-6.9 / reverberation) * time)
        echo *= np.float32(log_uniform(rng, 0.1, 2)) / np.sqrt(np.sum(echo**2))
        echo[0] += 1
    length, octaves = transform(len(mixture) + len(echo))
    response = gain(tilt * np.clip(octaves, -3, 3))
    if cutoff < NYQUIST:
        response = response * gain(-120 * np.clip(octaves - np.float32(np.log2(cutoff / 1000)), 0, 0.5))
    if len(echo):
        response = response * np.fft.rfft(echo, length)
    return np.fft.irfft(np.fft.rfft(mixture, length) * response, length)[: len(mixture)].astype(np.float32)


# --- labels -------------------------------------------------------------------------------------------------------


def log_edges(low: float, high: float, bins: int) -> np.ndarray:
    """Edges between bins that are equally wide on a logarithmic scale."""
    return np.geomspace(low, high, bins + 1)[1:-1]


# What is asked of each source, and the edges between the answers' bins.
SOURCE_BINS: dict[str, np.ndarray] = {
    "frequency": log_edges(60, 7000, 24),
    "bandwidth": log_edges(0.3, 8, 6),
    "slope": np.linspace(-12, 3, 7)[1:-1],
    "rate": log_edges(0.1, 400, 16),
    "glide": np.array([-1.0, -0.3, 0.0, 0.3, 1.0]),
    "modulation": np.array([0.5, 1.5]),
    "modulation_rate": log_edges(1.5, 40, 6),
    "attack": log_edges(0.002, 0.3, 4),
    "decay": log_edges(0.03, 4, 6),
    "pattern": np.array([0.5, 1.5, 2.5]),
    "length": log_edges(0.06, 5, 7),
    "events": np.array([1.5, 2.5, 4.5, 8.5]),
    "level": np.array([-12.0, -6.0, -0.01]),
}
# The same of the whole scene. Where there is no background noise, it is below all levels.
SCENE_BINS: dict[str, np.ndarray] = {
    "sources": np.array([1.5, 2.5]),
    "reverberation": np.array([0.05, 0.2, 0.5, 1.2]),
    "background": np.array([-60.0, -46.5, -33.0, -19.5]),
    "cutoff": np.array([2900.0, 4500.0, 7999.0]),
    "end": np.array([1.0, 2.0, 3.0, 4.0, 4.99]),
}


def labels(scene: Scene) -> dict[str, np.ndarray]:
    """A scene's settings as targets of classification.

    Returns:
        dict[str, np.ndarray]: `kinds`, `(kinds,)`, and `active`, `(kinds, columns)`, both float32 0 or 1; `loudest`,
        `(bands, columns)` int64, as in the scene; for each name in SOURCE_BINS `(kinds,)` int64, the bin, or -100
        where no source of that kind has that setting; for each name in SCENE_BINS the bin, int64.
    """
    answers: dict[str, Any] = {name: np.full(len(KINDS), -100) for name in SOURCE_BINS}
    present = np.zeros(len(KINDS), np.float32)
    for source in scene.sources:
        kind = KINDS.index(source.kind)
        present[kind] = 1
        values = vars(source) | {
            "modulation": MODULATIONS.index(source.modulation),
            "pattern": PATTERNS.index(source.pattern),
            "events": len(source.starts),
        }
        for name, edges in SOURCE_BINS.items():
            if not np.isnan(values[name]):
                answers[name][kind] = np.digitize(values[name], edges)
    values = vars(scene) | {"sources": len(scene.sources)}
    values["background"] = -100.0 if np.isnan(scene.background) else scene.background
    for name, edges in SCENE_BINS.items():
        answers[name] = np.digitize(values[name], edges)
    return {**answers, "kinds": present, "active": scene.active.astype(np.float32), "loudest": scene.loudest}
