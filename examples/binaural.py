#!/usr/bin/env python
"""Learn from which direction a sound comes: a script to copy and edit.

It renders a dataset of mono clips, a folder with a metadata.csv that says their folds, over measured head-related
impulse responses (a SOFA file, such as the MIT KEMAR's), and trains an adapter with two channels on the directions:

    pip install h5py scipy
    python examples/binaural.py --clips path/to/esc10 --sofa path/to/kemar.sofa --output_dir binaural

Each clip comes from one of eight directions, at a level that says nothing: only what differs between the ears tells the
side. Clips stay in their folds; the first one is tested, the others train.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Optional

import h5py
import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray
from scipy.signal import fftconvolve

from peft_softmoa.demo.run import BASE_MODEL
from peft_softmoa.training import decode_audio
from peft_softmoa.training.arguments import make_run
from peft_softmoa.training.run import train

SAMPLING_RATE = 16_000
DIRECTIONS = [0, 45, 90, 135, 180, 225, 270, 315]  # degrees from the front to the left, at the height of the ears
SECONDS = 2.0
PEAKS = (0.05, 0.5)  # of the louder ear

Samples = NDArray[np.float32]


def read_responses(sofa: Path) -> dict[int, Samples]:
    """Read the impulse responses of the two ears.

    Args:
        sofa (Path): the file.

    Returns:
        dict[int, ndarray]: by direction, `(2, samples)` at `SAMPLING_RATE`, the left ear first.

    Raises:
        ValueError: if a direction was not measured.
    """
    with h5py.File(sofa) as file:
        responses, positions = file["Data.IR"][:], file["SourcePosition"][:]
        rate = int(file["Data.SamplingRate"][0])
    found = {}
    for direction in DIRECTIONS:
        where = np.flatnonzero((positions[:, 0] == direction) & (positions[:, 1] == 0))
        if not len(where):
            raise ValueError(f"'{sofa}' has no response of {direction} degrees at the height of the ears.")
        found[direction] = soxr.resample(responses[where[0]].T.astype(np.float32), rate, SAMPLING_RATE).T
    return found


def loudest(samples: Samples, length: int) -> Samples:
    """The part of a clip with most energy, padded if the clip is shorter."""
    if len(samples) <= length:
        return np.pad(samples, (0, length - len(samples)))
    energy = np.cumsum(np.square(samples, dtype=np.float64))
    start = int(np.argmax(energy[length:] - energy[:-length])) + 1
    return samples[start : start + length]


def render(clips: Path, sofa: Path, folder: Path, seed: int = 0) -> None:
    """Render a dataset, each clip from one direction.

    Args:
        clips (Path): a folder with a metadata.csv, with the columns file_name and fold.
        sofa (Path): the responses.
        folder (Path): where stereo files and their metadata.csv go; it is made.
        seed (int): of directions and levels. Default: 0.
    """
    responses, generator = read_responses(sofa), np.random.default_rng(seed)
    with (clips / "metadata.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    folder.mkdir(parents=True, exist_ok=True)
    # As many clips of a fold from each direction, as far as their number allows.
    by_fold: dict[str, list[int]] = {}
    for row in rows:
        if not by_fold.get(row["fold"]):
            by_fold[row["fold"]] = list(generator.permutation(DIRECTIONS))
        row["direction"] = str(by_fold[row["fold"]].pop())
    for index, row in enumerate(rows):
        mono = loudest(decode_audio(clips / row["file_name"], SAMPLING_RATE), round(SECONDS * SAMPLING_RATE))
        stereo = fftconvolve(mono[None], responses[int(row["direction"])], axes=1)[:, : len(mono)]
        low, high = np.log(PEAKS)
        stereo *= np.exp(generator.uniform(low, high)) / max(np.abs(stereo).max(), 1e-9)
        row["file_name"] = f"{index}.wav"
        soundfile.write(folder / row["file_name"], stereo.T, SAMPLING_RATE, subtype="FLOAT")
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["file_name", "direction", "fold"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def main(arguments: Optional[list[str]] = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, required=True, help="folder of mono clips, with a metadata.csv")
    parser.add_argument("--sofa", type=Path, required=True, help="head-related impulse responses")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--model_name_or_path", default=str(BASE_MODEL), help="the small AST of the demo")
    parser.add_argument("--epochs", type=int, default=8)
    given = parser.parse_args(arguments)

    clips = given.output_dir / "clips"
    if not (clips / "metadata.csv").exists():
        render(given.clips, given.sofa, clips)
    trainer = train(
        make_run(
            model_name_or_path=given.model_name_or_path,
            dataset_name=str(clips),
            label_column_name="direction",
            channels="all",
            num_channels=2,
            num_slots=2,
            placement="both",
            max_length_seconds=SECONDS,
            train_rows="fold=2,3,4,5",
            eval_split_name="train",
            eval_rows="fold=1",
            num_train_epochs=given.epochs,
            per_device_train_batch_size=16,
            learning_rate=5e-3,
            report_to="none",
            output_dir=str(given.output_dir / "adapter"),
        )
    )
    accuracy = next(entry["eval_accuracy"] for entry in reversed(trainer.state.log_history) if "eval_accuracy" in entry)
    print(f"Directions of sounds of fold 1 that are right: {accuracy:.0%} (by chance {1 / len(DIRECTIONS):.0%}).")
    return float(accuracy)


if __name__ == "__main__":
    main()
