"""What reading audio costs: by format, for crops of long files, and in epochs whose features lie on disk."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Optional

import numpy as np
import soundfile
import soxr
from datasets import Dataset
from transformers import ASTFeatureExtractor, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

from peft_softmoa.training import AudioStream, DataOptions, load_stream

from .measure import in_turn, note

FORMATS = {"WAV": "wav", "FLAC": "flac", "MP3": "mp3", "Ogg": "ogg"}
RATE, FILE_RATE = 16_000, 44_100
CLIPS, CLIP_SECONDS = 32, 5
# Crops of one long file in stereo.
CROPS, CROP_SECONDS, LONG_SECONDS = 4, 10, 600
EXTRACTORS: dict[str, Callable[[], Any]] = {"AST": ASTFeatureExtractor, "Whisper": WhisperFeatureExtractor}
OURS, PLAIN = "load_stream", "map with soundfile"


def measure_formats(rounds: int, arguments: Any) -> list[dict[str, Any]]:
    """Read clips of 5 s, and random crops of 10 s of files of 10 minutes, as waveforms at 16 kHz.

    Beside `load_stream` runs what one writes without it: a function with soundfile and soxr, in the `map` of a dataset.
    It reads nothing but the crop of a long file, and does not check that files are whole.

    Args:
        rounds (int): how often each is timed.
        arguments (Namespace): of the command line; not used.

    Returns:
        list[dict[str, Any]]: one row for each kind of clip and format, with the processor's seconds of both ways.
    """
    functions: dict[str, Callable[[], Any]] = {}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as root:
        for kind, count, files, seconds, channels, crop in (
            ("clips of 5 s, mono", CLIPS, CLIPS, CLIP_SECONDS, 1, None),
            ("10 s of 10 min, stereo", CROPS, 1, LONG_SECONDS, 2, CROP_SECONDS),
        ):
            for name, ending in FORMATS.items():
                note(f"writing {kind}, {name}")
                folder = Path(root, f"{ending}-{channels}")
                paths = write_clips(folder, ending, files, seconds, channels)
                listed = [paths[index % files] for index in range(count)]
                Path(folder, "metadata.csv").write_text(
                    "\n".join(["file_name,label", *(f"{p.name},x" for p in listed)])
                )
                functions[f"{kind}, {name}, {OURS}"] = partial(read_all, stream_of(folder, crop), count)
                functions[f"{kind}, {name}, {PLAIN}"] = partial(read_all, map_of(listed, crop), count)
                rows.append({"kind": kind, "format": name, "clips": count})
        seconds_of = in_turn(functions, rounds, "cpu", note, clock=time.process_time)
    for row in rows:
        row["processor_seconds"] = {way: seconds_of[f"{row['kind']}, {row['format']}, {way}"] for way in (OURS, PLAIN)}
    return rows


def write_clips(folder: Path, ending: str, count: int, seconds: int, channels: int) -> list[Path]:
    """Write tones with some noise, each clip another one; they are the same every five seconds.

    Args:
        folder (Path): where to; it is made.
        ending (str): of the files' names, which is their format.
        count (int): number of clips.
        seconds (int): length of each.
        channels (int): number of channels.

    Returns:
        list[Path]: the files.
    """
    folder.mkdir()
    generator = np.random.default_rng(0)
    paths = [folder / f"{index}.{ending}" for index in range(count)]
    times = np.arange(CLIP_SECONDS * FILE_RATE)[:, None] / FILE_RATE
    for path in paths:
        pitches = generator.uniform(100, 4000, (4, channels))
        tones = sum(np.sin(2 * np.pi * pitch * times) for pitch in pitches)
        samples = (0.1 * tones + 0.02 * generator.standard_normal(tones.shape)).astype("f4")
        with soundfile.SoundFile(path, "w", FILE_RATE, channels) as file:
            # libsndfile's encoder of Ogg overflows its stack with a long clip at once.
            for _ in range(seconds // CLIP_SECONDS):
                file.write(samples)
    return paths


def stream_of(folder: Path, crop: Optional[int]) -> AudioStream:
    """The clips of a folder as waveforms, as for training.

    Args:
        folder (Path): with a metadata.csv.
        crop (int, optional): seconds of random crops. Default: whole clips.

    Returns:
        AudioStream: the stream.
    """
    return load_stream(str(folder), "train", _waveforms(), DataOptions(max_length_seconds=crop))


def map_of(paths: list[Path], crop: Optional[int]) -> Any:
    """The same clips by a plain `map` with soundfile and soxr.

    Args:
        paths (list[Path]): the clips.
        crop (int, optional): seconds of random crops. Default: whole clips.

    Returns:
        IterableDataset: the rows.
    """
    extractor, generator = _waveforms(), np.random.default_rng(0)

    def decode(row: dict[str, Any]) -> dict[str, Any]:
        with soundfile.SoundFile(row["audio"]) as file:
            length = -1 if crop is None else crop * file.samplerate
            if crop is not None and file.frames > length:
                file.seek(int(generator.integers(file.frames - length + 1)))
            samples = file.read(length, dtype="float32", always_2d=True).mean(axis=1)
            waveform = soxr.resample(samples, file.samplerate, RATE)
        return {"input_values": extractor(waveform, sampling_rate=RATE, return_tensors="np")["input_values"][0]}

    rows = Dataset.from_dict({"audio": [str(path) for path in paths], "label": [0] * len(paths)})
    return rows.to_iterable_dataset().map(decode, remove_columns="audio")


def _waveforms() -> Any:
    return Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=False)


def read_all(rows: Any, count: int) -> None:
    """Read all rows.

    Args:
        rows (iterable): the rows.
        count (int): how many there are.

    Raises:
        RuntimeError: if there are fewer, as what was skipped would seem fast.
    """
    found = sum(1 for _ in rows)
    if found != count:
        raise RuntimeError(f"{found} of {count} clips were read.")


def measure_epochs(rounds: int, arguments: Any) -> list[dict[str, Any]]:
    """Extract features of a dataset while streaming, and in the first and second epoch without streaming.

    Args:
        rounds (int): how often each is timed, each time with an empty cache.
        arguments (Namespace): of the command line; `audio_folder` has the clips. Default: made ones, as WAV.

    Returns:
        list[dict[str, Any]]: one row for each feature extractor, with seconds on the clock and of the processor.
    """
    rows = []
    with tempfile.TemporaryDirectory() as root:
        folder = arguments.audio_folder
        if folder is None:
            folder = Path(root, "clips")
            paths = write_clips(folder, "wav", CLIPS, CLIP_SECONDS, 1)
            (folder / "metadata.csv").write_text("\n".join(["file_name,label", *(f"{path.name},x" for path in paths)]))
        for name, make in EXTRACTORS.items():
            row: dict[str, Any] = {"extractor": name, "seconds": {}, "processor_seconds": {}}
            for turn in range(rounds):
                with tempfile.TemporaryDirectory() as cache, warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that the extractor's defaults leave some mel bins empty
                    kept = DataOptions(streaming=False, cache_dir=cache)
                    streamed, first = (
                        load_stream(str(folder), "train", make(), each) for each in (DataOptions(), kept)
                    )
                    row["clips"] = len(streamed)
                    passes = [("streamed", streamed), ("first epoch", first)]
                    for what, stream in [*passes[:: -1 if turn % 2 else 1], ("second epoch", first)]:
                        note(f"{name}, {what}")
                        start = time.perf_counter(), time.process_time()
                        read_all(stream, len(streamed))
                        row["seconds"].setdefault(what, []).append(time.perf_counter() - start[0])
                        row["processor_seconds"].setdefault(what, []).append(time.process_time() - start[1])
                    row["cache_bytes"] = sum(path.stat().st_size for path in Path(cache).rglob("*.safetensors"))
            rows.append(row)
    return rows
