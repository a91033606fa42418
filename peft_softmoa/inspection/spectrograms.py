"""The spectrogram of a clip: what a model of spectrograms reads, and a log-mel spectrogram for a model of waveforms."""

from __future__ import annotations

import math
from typing import Any, Optional

import numpy as np
from transformers.audio_utils import hertz_to_mel, mel_filter_bank, mel_to_hertz, spectrogram, window_function

# Spectrograms of models that read patches are those of Kaldi: from 20 Hz on, with a frame every ten milliseconds.
LOWEST_FREQUENCY, FRAME_SECONDS = 20.0, 0.01
# Of the log-mel spectrogram of a waveform: number of bins, length of the window, greatest number of frames.
MEL_BINS, WINDOW_SECONDS, MAX_FRAMES = 64, 0.025, 1000


def own_spectrogram(feature_extractor: Any, features: np.ndarray) -> Optional[tuple[np.ndarray, np.ndarray]]:
    """Find the spectrogram in what a feature extractor makes of a clip.

    Args:
        feature_extractor (SequenceFeatureExtractor): the model's feature extractor.
        features (np.ndarray): what it makes of the clip, without the batch.

    Returns:
        tuple, optional: the spectrogram `(bins, frames)` and the centre of each bin in Hz, increasing; none if the
        features are not those of the mel filters.
    """
    filters = getattr(feature_extractor, "mel_filters", None)
    if filters is None or features.ndim != 2:
        return None
    bins = np.shape(filters)[1]
    # Some models read several frames at once.
    is_frames_first = features.shape[1] == bins * getattr(feature_extractor, "stride", 1)
    if is_frames_first == (features.shape[0] == bins):  # neither, or a square, which could be either
        return None
    peaks = np.linspace(0, feature_extractor.sampling_rate / 2, len(filters))[np.argmax(filters, axis=0)]
    return features.reshape(-1, bins).T if is_frames_first else features, np.maximum.accumulate(peaks)


def log_mel(samples: np.ndarray, sampling_rate: int, seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """Compute a log-mel spectrogram.

    Args:
        samples (np.ndarray): `(samples,)`, the clip.
        sampling_rate (int): in Hz.
        seconds (float): what it spans in time; silence fills it up.

    Returns:
        tuple: `(64, frames)`, in decibels, the loudest 80 of them, at most 1000 frames; and the centre of each bin in
        Hz.
    """
    length = round(seconds * sampling_rate)
    filled = np.zeros(length, np.float32)
    filled[: len(samples)] = samples[:length]
    window = round(WINDOW_SECONDS * sampling_rate)
    hop = max(round(FRAME_SECONDS * sampling_rate), math.ceil(length / MAX_FRAMES))
    # Wide enough that each of the lowest filters has a frequency.
    size = 2 ** math.ceil(math.log2(2 * window))
    filters = mel_filter_bank(
        size // 2 + 1, MEL_BINS, LOWEST_FREQUENCY, sampling_rate / 2, sampling_rate, mel_scale="kaldi"
    )
    found = spectrogram(
        filled,
        window_function(window, "hann"),
        window,
        hop,
        fft_length=size,
        power=2.0,
        pad_mode="constant",
        mel_filters=filters,
        log_mel="dB",
        db_range=80.0,
    )
    return found[:, :MAX_FRAMES], mel_frequencies(MEL_BINS, sampling_rate)


def mel_frequencies(bins: int, sampling_rate: int) -> np.ndarray:
    """Centres of the bins of a mel spectrogram.

    Args:
        bins (int): number of bins.
        sampling_rate (int): sampling rate of the clip, in Hz.

    Returns:
        np.ndarray: `(bins,)`, in Hz.
    """
    low, high = (hertz_to_mel(frequency, mel_scale="kaldi") for frequency in (LOWEST_FREQUENCY, sampling_rate / 2))
    return np.asarray(mel_to_hertz(np.linspace(low, high, bins + 2)[1:-1], mel_scale="kaldi"))
