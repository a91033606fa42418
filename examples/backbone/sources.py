"""The sources of synthesised scenes: events such as a note, a knock or a gust, and the settings behind them.

A source sounds once, for the whole clip, or again and again. Its event comes out of one of ten generators; envelope,
modulation and repetition are drawn apart from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

SAMPLING_RATE = 16_000
SECONDS = 5.0
NYQUIST = SAMPLING_RATE / 2
TABLE = 2048  # samples of one period of a wave
UNSET = float("nan")  # a setting that a source does not have

PATTERNS = ("continuous", "once", "regular", "irregular")
MODULATIONS = ("none", "amplitude", "frequency")


@dataclass
class Source:
    """Settings of one source. Those that its kind does not have are NaN.

    Args:
        kind (str): one of KINDS.
        frequency (float): pitch of tones, chirps and voices, at the start of an event, or else the centre of the band
            or the lowest resonance, in Hz.
        bandwidth (float): of noise and of resonances, in octaves.
        slope (float): how the spectrum falls or rises, in dB per octave.
        rate (float): pulses per second.
        glide (float): by how much the pitch rises in an event, in octaves.
        modulation (str): one of MODULATIONS.
        modulation_rate (float): in Hz.
        attack (float): time in which an event reaches its full level, in seconds.
        decay (float): time in which it falls to a thousandth of its power, in seconds; NaN if it stays.
        pattern (str): one of PATTERNS.
        length (float): of one event, in seconds.
        starts (tuple[float, ...]): when the events begin, in seconds.
        level (float): root mean square of the source while it sounds, in dB, of which the first source has 0.
    """

    kind: str
    frequency: float
    bandwidth: float = UNSET
    slope: float = UNSET
    rate: float = UNSET
    glide: float = UNSET
    modulation: str = "none"
    modulation_rate: float = UNSET
    attack: float = UNSET
    decay: float = UNSET
    pattern: str = "continuous"
    length: float = SECONDS
    starts: tuple[float, ...] = (0.0,)
    level: float = 0.0


# --- generators: one event each -----------------------------------------------------------------------------------


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def wave(pitch: np.ndarray, amplitudes: np.ndarray) -> np.ndarray:
    """A sound whose harmonics are those of one period, which is read at the speed of the pitch.

    Args:
        pitch (np.ndarray): `(samples,)`, in Hz.
        amplitudes (np.ndarray): `(harmonics,)`; those above half the sampling rate are left out.
    """
    spectrum = np.zeros(TABLE // 2 + 1, np.complex64)
    count = min(len(amplitudes), max(1, int(0.98 * NYQUIST / pitch.max())))
    spectrum[1 : count + 1] = amplitudes[:count]
    table = np.fft.irfft(spectrum).astype(np.float32)
    phase = np.cumsum(pitch / SAMPLING_RATE) * TABLE
    index = phase.astype(np.int64)
    fraction = (phase - index).astype(np.float32)
    index &= TABLE - 1
    return table[index] * (1 - fraction) + table[(index + 1) & (TABLE - 1)] * fraction


@cache
def transform(length: int) -> tuple[int, np.ndarray]:
    """A length for Fourier transforms that is fast, and its frequencies in octaves above 1 kHz."""
    step = 2 ** max(0, int(np.log2(length)) - 3)
    length = -(-length // step) * step
    return length, np.log2(np.maximum(np.fft.rfftfreq(length, 1 / SAMPLING_RATE), 10.0) / 1000).astype(np.float32)


def band_response(octaves: np.ndarray, source: Source) -> np.ndarray:
    """A band with Gaussian flanks around the source's frequency, with the source's slope."""
    away = octaves - np.float32(np.log2(source.frequency / 1000))
    # A bell in dB: 12 dB down at the edges of the band, and never more than 60.
    bell = np.maximum(-12 * (2 * away / source.bandwidth) ** 2, -60)
    return gain(bell + source.slope * np.clip(away, -3, 3))


def gain(decibels: np.ndarray) -> np.ndarray:
    """Factors of amplitude."""
    return np.exp2(decibels * np.float32(np.log2(10) / 20))


def shaped_noise(samples: int, source: Source, rng: np.random.Generator) -> np.ndarray:
    length, octaves = transform(samples)
    noise = rng.standard_normal((2, len(octaves)), dtype=np.float32)
    spectrum = (noise[0] + 1j * noise[1]) * band_response(octaves, source)
    return np.fft.irfft(spectrum, length)[:samples].astype(np.float32)


def convolve(signal: np.ndarray, response: np.ndarray) -> np.ndarray:
    """The beginning of a convolution, as long as the signal."""
    length, _ = transform(len(signal) + len(response))
    spectrum = np.fft.rfft(signal, length) * np.fft.rfft(response, length)
    return np.fft.irfft(spectrum, length)[: len(signal)].astype(np.float32)


def formants(octaves: np.ndarray, source: Source, rng: np.random.Generator) -> np.ndarray:
    """Three to four resonances, as of a throat, with the source's slope above 500 Hz."""
    response = np.full(len(octaves), 0.02, np.float32)
    centre = log_uniform(rng, 250, 1000)
    for _ in range(rng.integers(3, 5)):
        width = rng.uniform(0.1, 0.4)
        response += rng.uniform(0.3, 1) * np.exp(-(((octaves - np.log2(centre / 1000)) / width) ** 2))
        centre *= rng.uniform(1.4, 2.6)
    return response * gain(source.slope * np.clip(octaves + 1, 0, 4))


def tonal_pitch(samples: int, source: Source, rng: np.random.Generator, bend: float = 0.0) -> np.ndarray:
    """The course of a pitch: glide, bend in the middle, and vibrato. `(samples,)`, in Hz."""
    position = np.linspace(0, 1, samples, dtype=np.float32)
    octaves = np.float32(0 if np.isnan(source.glide) else source.glide) * position
    if bend:
        octaves = octaves + np.float32(bend) * np.sin(np.pi * position)
    if source.modulation == "frequency":
        time = np.arange(samples, dtype=np.float32) / SAMPLING_RATE
        depth = np.float32(log_uniform(rng, 0.03, 0.4))
        octaves = octaves + depth * np.sin(np.float32(2 * np.pi * source.modulation_rate) * time)
    return np.clip(source.frequency * np.exp2(octaves), 20, 0.95 * NYQUIST)


def tone(samples: int, source: Source, rng: np.random.Generator) -> np.ndarray:
    """A harmonic stack; one in four has odd harmonics only, as a clarinet."""
    amplitudes = np.arange(1, 65.0) ** (source.slope / 6.02) * rng.uniform(0.3, 1, 64)
    amplitudes[0] = 1
    if rng.random() < 0.25:
        amplitudes[1::2] = 0
    return wave(tonal_pitch(samples, source, rng), amplitudes)


def chirp(samples: int, source: Source, rng: np.random.Generator) -> np.ndarray:
    """A tone with few harmonics, which glides."""
    amplitudes = np.arange(1, rng.integers(2, 6)) ** (source.slope / 6.02)
    return wave(tonal_pitch(samples, source, rng), amplitudes)


def voice(samples: int, source: Source, rng: np.random.Generator) -> np.ndarray:
    """Pulses of a throat, whose pitch bends, and breath, through resonances."""
    pitch = tonal_pitch(samples, source, rng, bend=rng.normal(0, 0.3))
    sound = wave(pitch, np.arange(1, 129.0) ** -0.5)
    sound /= np.sqrt(np.mean(sound**2))
    sound += log_uniform(rng, 0.01, 1) * rng.standard_normal(samples, dtype=np.float32)
    length, octaves = transform(samples)
    spectrum = np.fft.rfft(sound, length) * formants(octaves, source, rng)
    return np.fft.irfft(spectrum, length)[:samples].astype(np.float32)


def noise(samples: int, source: Source, rng: np.random.Generator) -> np.ndarray:
    """Noise in a band."""
    return shaped_noise(samples, source, rng)


def swell(samples: int, source: Source, rng: np.random.Generator) -> np.ndarray:
    """Noise that comes and goes, as waves and wind do, at the source's rate."""
    time = np.arange(samples, dtype=np.float32) / SAMPLING_RATE
    phase = np.float32(2 * np.pi) * (np.float32(source.rate) * time + np.float32(rng.random()))
    phase += np.float32(rng.uniform(0, 1)) * np.sin(np.float32(0.37) * phase)
    depth = np.float32(rng.uniform(1, 3))
    return shaped_noise(samples, source, rng) * np.exp(depth * (np.sin(phase) - 1))


def pulse_response(source: Source, rng: np.random.Generator, duration: float) -> np.ndarray:
    """Decaying noise in the source's band."""
    samples = max(32, int(duration * SAMPLING_RATE))
    decay = np.exp(-6.9 * np.arange(samples, dtype=np.float32) / samples)
    return shaped_noise(samples, source, rng) * decay


def clicks(samples: int, source: Source, rng: np.random.Generator) -> np.ndarray:
    """Pulses at a steady rate, all alike, or as tick and tock."""
    pulses = np.zeros(samples, np.float32)
    places = (np.arange(0, samples / SAMPLING_RATE, 1 / source.rate) * SAMPLING_RATE).astype(int)
    pulses[places] = 1
    pulses[places[1::2]] = rng.choice([1.0, rng.uniform(0.2, 1)])
    return convolve(pulses, pulse_response(source, rng, min(log_uniform(rng, 0.004, 0.1), 1 / source.rate)))


def crackle(samples: int, source: Source, rng: np.random.Generator) -> np.ndarray:
    """Pulses at random times, of which few are loud."""
    pulses = np.zeros(samples, np.float32)
    count = max(1, rng.poisson(source.rate * samples / SAMPLING_RATE))
    pulses[rng.integers(0, samples, count)] = rng.choice([-1, 1], count) * rng.pareto(rng.uniform(1, 3), count)
    return convolve(np.clip(pulses, -30, 30), pulse_response(source, rng, log_uniform(rng, 0.002, 0.05)))


def engine(samples: int, source: Source, rng: np.random.Generator) -> np.ndarray:
    """Pulses that come so fast that they are a tone or a flutter, none quite like the other."""
    count = int(1.3 * source.rate * samples / SAMPLING_RATE) + 2
    drift = 1 + rng.uniform(0, 0.2) * np.sin(rng.uniform(0.1, 1) * 2 * np.pi * np.arange(count) / source.rate)
    periods = drift * (1 + rng.uniform(0, 0.08) * rng.standard_normal(count)) / source.rate
    places = (np.cumsum(periods) * SAMPLING_RATE).astype(int)
    places = places[(places >= 0) & (places < samples)]
    pulses = np.zeros(samples, np.float32)
    pulses[places] = 1 + rng.uniform(0, 0.5) * rng.standard_normal(len(places))
    sound = convolve(pulses, pulse_response(source, rng, min(log_uniform(rng, 0.5, 3) / source.rate, 0.2)))
    hiss = log_uniform(rng, 0.01, 0.5) * np.sqrt(np.mean(sound**2))
    return sound + np.float32(hiss) * rng.standard_normal(samples, dtype=np.float32)


def strike(samples: int, source: Source, rng: np.random.Generator) -> np.ndarray:
    """Something that is hit: modes at any ratios, which fade, high ones sooner; the envelope comes on top."""
    time = np.arange(samples, dtype=np.float32) / SAMPLING_RATE
    fade = 6.9 / min(source.decay, 4.0)
    sound = np.zeros(samples, np.float32)
    ratio = 1.0
    for _ in range(rng.integers(2, 7)):
        frequency = source.frequency * ratio
        if frequency > 0.95 * NYQUIST:
            break
        amplitude = np.float32(rng.uniform(0.2, 1) * 10 ** (source.slope * np.log2(ratio) / 20))
        damping = np.float32(fade * ratio ** rng.uniform(0, 1))
        angle = np.float32(2 * np.pi) * ((np.float32(frequency) * time) % np.float32(1))
        sound += amplitude * np.exp(-damping * time) * np.sin(angle)
        ratio *= rng.uniform(1.2, 2.4)
    thud = pulse_response(source, rng, 0.01)[:samples]
    sound[: len(thud)] += np.float32(rng.uniform(0, 1) / (np.abs(thud).max() + 1e-9)) * thud
    return sound


def burst(samples: int, source: Source, rng: np.random.Generator) -> np.ndarray:
    """Noise, with or without a rough tone in it, through resonances, as a bark or a sneeze."""
    sound = rng.standard_normal(samples, dtype=np.float32)
    if rng.random() < 0.6:
        pitch = tonal_pitch(samples, source, rng, bend=rng.normal(0, 0.4))
        buzz = wave(pitch, np.arange(1, 65.0) ** -0.7)
        sound += np.float32(log_uniform(rng, 0.3, 5)) * buzz / np.sqrt(np.mean(buzz**2))
    length, octaves = transform(samples)
    spectrum = np.fft.rfft(sound, length) * formants(octaves, source, rng)
    return np.fft.irfft(spectrum, length)[:samples].astype(np.float32)


GENERATORS: dict[str, Callable[[int, Source, np.random.Generator], np.ndarray]] = {
    each.__name__: each for each in (tone, chirp, voice, noise, swell, clicks, crackle, engine, strike, burst)
}
KINDS = tuple(GENERATORS)


# --- settings -----------------------------------------------------------------------------------------------------


def draw_source(kind: str, rng: np.random.Generator, seconds: float = SECONDS) -> Source:
    """Choose a source's settings; all ranges are log-uniform unless it says otherwise.

    Args:
        kind (str): one of KINDS.
        rng (np.random.Generator): draws.
        seconds (float): length of the clip. Default: SECONDS.
    """
    source = Source(kind, log_uniform(rng, 60, 5000))
    if kind in ("tone", "chirp", "voice"):
        source.slope = rng.uniform(-12, 0)  # dB per octave, uniform
    if kind == "chirp":
        source.glide = rng.choice([-1, 1]) * log_uniform(rng, 0.2, 3)  # octaves
    if kind == "voice":
        source.frequency = log_uniform(rng, 80, 900)  # Hz, from a man's to a baby's or a cock's
        source.glide = rng.normal(0, 0.4)  # octaves, normal
    if kind == "burst":
        source.frequency = log_uniform(rng, 80, 900)
        source.slope = rng.uniform(-12, 3)
    if kind == "strike":
        source.frequency = log_uniform(rng, 100, 4000)
        source.slope, source.bandwidth = rng.uniform(-12, 3), 2.0
    if kind in ("noise", "swell", "clicks", "crackle", "engine"):
        source.frequency = log_uniform(rng, 100, 7000)
        source.bandwidth = log_uniform(rng, 0.3, 8)  # octaves; from 5 on, all that can be heard
        source.slope = rng.uniform(-6, 3)
    ranges = {"swell": (0.1, 1.5), "clicks": (0.8, 20), "crackle": (2, 400), "engine": (8, 150)}
    if kind in ranges:
        source.rate = log_uniform(rng, *ranges[kind])  # per second
    if kind in ("tone", "voice", "noise", "chirp") and rng.random() < 0.4:
        source.modulation = str(rng.choice(MODULATIONS[1:])) if kind != "noise" else "amplitude"
        source.modulation_rate = log_uniform(rng, 1.5, 40)  # Hz
    _draw_events(source, rng, seconds)
    return source


def _draw_events(source: Source, rng: np.random.Generator, seconds: float) -> None:
    # Textures go on, hits and cries do not. Chances in the order of PATTERNS; times in seconds.
    lasting = source.kind in ("noise", "swell", "clicks", "crackle", "engine")
    chances = (0.7, 0.1, 0.1, 0.1) if lasting else (0.15, 0.3, 0.3, 0.25)
    if source.kind in ("strike", "burst"):
        chances = (0, 0.35, 0.35, 0.3)
    source.pattern = str(rng.choice(PATTERNS, p=chances))
    longest = {"burst": 0.8, "strike": 2.5, "chirp": 2.0, "tone": 3.0, "voice": 2.0}.get(source.kind, 4.0)
    source.attack = log_uniform(rng, 0.002, 0.3) if source.kind != "strike" else 0.001
    if source.pattern == "continuous":
        source.length = seconds
        return
    source.length = log_uniform(rng, 0.3 if lasting else 0.06, longest)
    source.length = min(source.length, seconds)
    source.attack = min(source.attack, source.length / 3)
    if source.kind in ("strike", "burst") or rng.random() < 0.5:
        source.decay = source.length * log_uniform(rng, 0.4, 2)
    if source.pattern == "once":
        # Half of them come at the beginning, as in recordings that were cut to the event.
        latest = max(seconds - source.length, 0)
        source.starts = (rng.uniform(0, latest if rng.random() < 0.5 else min(0.3, latest)),)
        return
    period = max(source.length * log_uniform(rng, 1.05, 4), 0.12)
    starts = np.arange(rng.uniform(0, period), seconds, period)
    starts = starts[: max(1, rng.integers(2, 30))]
    if source.pattern == "irregular":
        starts = np.sort(np.clip(starts + rng.uniform(-0.5, 0.5, len(starts)) * period, 0, seconds - 0.05))
        starts = starts[rng.random(len(starts)) < 0.7] if len(starts) > 3 else starts
    source.starts = tuple(starts.tolist()) or (0.0,)


def envelope(samples: int, source: Source) -> np.ndarray:
    """Rise in the attack, fall by the decay, and a fade of a tenth of the event at its end. `(samples,)`."""
    time = np.arange(samples, dtype=np.float32) / SAMPLING_RATE
    level = np.minimum(time / np.float32(source.attack) + np.float32(1e-3), 1)
    if not np.isnan(source.decay):
        level *= np.exp(np.float32(-3.45 / source.decay) * np.maximum(time - np.float32(source.attack), 0))
    return level * np.minimum((time[-1] - time) / (np.float32(0.1) * time[-1]), 1)


def render_source(source: Source, rng: np.random.Generator, seconds: float = SECONDS) -> tuple[np.ndarray, np.ndarray]:
    """Make the sound of a source.

    Args:
        source (Source): its settings.
        rng (np.random.Generator): draws what the settings leave open.
        seconds (float): length of the clip. Default: SECONDS.

    Returns:
        tuple: `(samples,)` float32, whose root mean square is 1 where it sounds, and `(samples,)` bool, where that is.
    """
    samples, length = int(seconds * SAMPLING_RATE), int(source.length * SAMPLING_RATE)
    event = GENERATORS[source.kind](length, source, rng)
    if source.modulation == "amplitude":
        time = np.arange(length, dtype=np.float32) / SAMPLING_RATE
        depth = np.float32(rng.uniform(0.4, 1))
        event = event * (1 - depth * (0.5 + 0.5 * np.sin(np.float32(2 * np.pi * source.modulation_rate) * time)))
    event = event * envelope(length, source)
    sound, active = np.zeros(samples, np.float32), np.zeros(samples, bool)
    # Whatever repeats is never quite as loud.
    for start in (np.array(source.starts) * SAMPLING_RATE).astype(int):
        part = event[: samples - start]
        sound[start : start + length] += np.float32(10 ** (rng.normal(0, 2) / 20)) * part
        active[start : start + length] = True
    return sound / (np.sqrt(np.mean(sound[active] ** 2)) + 1e-9), active
