"""Classify audio while it comes in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Optional

import numpy as np

from ..calls.streaming import RoutingStream, reads_streams, stream_routing
from ..training.audio import AudioError, resample_blocks
from ..training.audio_file import Samples
from .classify import Classifier, WindowScores, classify_windows
from .windows import Window, cut_windows


def follow(
    classifier: Classifier,
    pieces: Iterable[Samples],
    *,
    name: str = "stream",
    sampling_rate: Optional[int] = None,
    window_seconds: Optional[float] = None,
    overlap_seconds: float = 0.0,
) -> Iterator[WindowScores]:
    """Classify a stream while it comes in, window by window.

        for result in follow(classifier, microphone):
            ...

    The pieces may have any lengths: they give what the whole gives at once. If the adapter's mixtures are causal,
    routing goes on from window to window, so that the scores of each depend on the stream so far; `classify_following`
    says how.

    Args:
        classifier (Classifier): the classifier.
        pieces (iterable of np.ndarray): the samples as they come, floats with full scale at 1, `(samples,)` each or,
            for an adapter with `num_channels`, `(C, samples)`.
        name (str): the stream, for results and errors. Default: `"stream"`.
        sampling_rate (int, optional): of the pieces, in Hz. Default: the one of the model.
        window_seconds (float, optional): length of a window, as for `Classifier.window`.
        overlap_seconds (float): how much of a window is in the next one too. Default: 0.

    Yields:
        WindowScores: the result of each window or, if the model classifies frames, of each frame, as soon as its last
        sample is there.

    Raises:
        AudioError: if there are no samples, some are not finite, or a piece is of another shape or no floats.
        ValueError: if the windows are not allowed, as for `following_window`.
    """
    rate = classifier.sampling_rate
    length, step = following_window(classifier, window_seconds, overlap_seconds)
    blocks = (_check_piece(classifier, name, piece) for piece in pieces)
    resampled = resample_blocks(name, blocks, sampling_rate or rate, rate)
    yield from classify_following(classifier, cut_windows(name, resampled, rate, length, step, classifier.min_samples))


def _check_piece(classifier: Classifier, name: str, piece: Any) -> Samples:
    samples = np.asarray(piece)
    shape = "(samples,)" if classifier.channels == "mono" else "(channels, samples)"
    if samples.dtype.kind != "f" or samples.ndim != (1 if classifier.channels == "mono" else 2):
        raise AudioError(name, f"a piece must be floats of shape {shape}, got {samples.dtype} of shape {samples.shape}")
    return samples.astype(np.float32)


def following_window(
    classifier: Classifier, seconds: Optional[float] = None, overlap_seconds: float = 0.0
) -> tuple[int, int]:
    """Length and step of windows of a stream.

    Args:
        classifier (Classifier): the classifier.
        seconds (float, optional): length of a window, as for `Classifier.window`.
        overlap_seconds (float): how much of a window is in the next one too. Default: 0.

    Returns:
        tuple[int, int]: both as numbers of samples.

    Raises:
        ValueError: if the model does not take them or, where routing goes on from window to window, if they overlap or
            are padded.
    """
    length, step = classifier.window(seconds, overlap_seconds)
    if not reads_streams(classifier.model):
        return length, step
    if any((getattr(module, "chunk_size", None) or 1) > 1 for module in classifier.model.modules()):
        raise ValueError(
            "An adapter with `chunk_size` does not go on from window to window, which may end within a chunk. Train it "
            "with `causal=True` alone."
        )
    if step < length:
        raise ValueError(
            f"`overlap` must be 0 for this adapter, got {overlap_seconds:.4g} s: its routing goes on from window to "
            "window, and what is in two of them would count twice."
        )
    if classifier.max_samples is not None and length < classifier.max_samples:
        most = classifier.max_samples / classifier.sampling_rate
        raise ValueError(
            f"`window_seconds` must be {most:.4g} for this adapter, got {length / classifier.sampling_rate:.4g}: its "
            "routing goes on from window to window, and the silence to which shorter ones are padded would be part of "
            "the stream. Leave it out, or train with `max_length_seconds`."
        )
    return length, step


def classify_following(
    classifier: Classifier, windows: Iterable[Window], on_bad_audio: Optional[Callable[[AudioError], None]] = None
) -> Iterator[WindowScores]:
    """Classify the windows of one stream, each as soon as it is there.

    If the adapter's mixtures are causal, each window goes on from those before: its slots are averages over the stream
    so far, in `stream_routing`. The layers of the base model see the window alone. Other adapters see it alone, too.

    Args:
        classifier (Classifier): the classifier.
        windows (iterable of Window): the windows, at its sampling rate; one after another if mixtures are causal.
        on_bad_audio (callable, optional): as for `classify_windows`.

    Yields:
        WindowScores: as for `classify_windows`.

    Raises:
        AudioError: if a window cannot be used.
        ValueError: if a score is not finite.
    """
    if not reads_streams(classifier.model):
        yield from classify_windows(classifier, windows, 1, on_bad_audio)
        return
    stream = RoutingStream()
    for window in windows:
        # Between windows, whoever reads the results may call the model for something else.
        with stream_routing(classifier.model, stream):
            results = list(classify_windows(classifier, [window], 1, on_bad_audio))
        yield from results
