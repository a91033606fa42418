"""`peft-softmoa classify`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Literal, Optional

from tqdm.auto import tqdm

from ..inference.classify import WindowScores, classify_windows, load_classifier
from ..inference.follow import classify_following, following_window
from ..inference.incoming import PCM, incoming_blocks
from ..inference.segments import Segments
from ..inference.windows import Meter, Window, cut_windows, find_clips, pcm_blocks
from ..training.audio import AudioError, audio_blocks, resample_blocks
from ..training.audio_file import Samples
from ..training.channels import parse_channels
from ..training.features import mask_channels
from ..training.options import flag_names, name_flags, option
from .following import FollowArguments, check_following
from .parser import CommandParser

PIPE_NAME = "stdin"
# What shells report of a command that Ctrl-C has ended.
INTERRUPTED = 130


@dataclass
class WindowArguments:
    """How clips are cut."""

    window_seconds: Optional[float] = field(
        default=None,
        metadata={
            "help": "Length of a window; a clip that is not longer is one window. The last window of a clip may be "
            "shorter, and is padded as a short clip is. A rest at the end that gives the model no token, of some "
            "hundredths of a second, is left out. Default: the length to which the model's clips are padded, such as "
            "10.24 for an AST and 30 for Whisper, or 5 for a model that takes any length."
        },
    )
    overlap: str = field(
        default="0", metadata={"help": "How much of a window is in the next one too: seconds, or a share such as 50%%."}
    )


@dataclass
class ChannelArguments:
    """What is read of clips with several channels."""

    channels: Optional[list[str]] = option("channels")


@dataclass
class OutputArguments:
    """What is written."""

    format: Literal["table", "json"] = field(
        default="table",
        metadata={"help": "A table, or a JSON object in each line with file, start, end, and scores from the best on."},
    )
    top_k: int = field(default=5, metadata={"help": "Number of classes that are shown of each window."})
    scores: Optional[Literal["softmax", "sigmoid", "none"]] = field(
        default=None,
        metadata={
            "help": "How scores are made of the model's outputs. Default: by the model's problem_type, sigmoid for "
            "several labels, none for regression or a single output, otherwise softmax."
        },
    )
    labels: Optional[str] = field(
        default=None,
        metadata={
            "help": "File for an Audacity label track with a segment wherever the score of a class is at least "
            "--threshold, over neighbouring windows; for one clip or a pipe."
        },
    )
    threshold: Optional[float] = field(default=None, metadata={"help": "Threshold of --labels. Default: 0.5."})


@dataclass
class PipeArguments:
    """What comes through a pipe."""

    sampling_rate: Optional[int] = field(
        default=None,
        metadata={
            "help": "Its sampling rate in Hz. Default: the one of the model, such as 16000; with --follow, WAV is read "
            "unless it is given."
        },
    )
    sample_format: Optional[Literal["s16le", "f32le"]] = field(
        default=None, metadata={"help": "16-bit integers or 32-bit floats. Default: s16le."}
    )
    num_channels: Optional[int] = field(default=None, metadata={"help": "Its number of channels. Default: 1."})


@dataclass
class ModelArguments:
    """How the model runs."""

    revision: Optional[str] = field(default=None, metadata={"help": "Branch, tag or commit of the adapter."})
    batch_size: Optional[int] = field(
        default=None,
        metadata={
            "help": "Number of windows in a batch, whose results come together. Default: 8, or 1 for a pipe, so that "
            "each result comes as soon as its window is there."
        },
    )
    device: Optional[str] = field(
        default=None, metadata={"help": "Where the model runs, such as cpu or cuda:1. Default: a GPU if there is one."}
    )
    dtype: Optional[Literal["float32", "float16", "bfloat16"]] = field(
        default=None,
        metadata={"help": "Dtype of the base model. Default: float32 on a CPU, elsewhere the one it is stored in."},
    )


GROUPS = {
    "Windows": WindowArguments,
    "Channels": ChannelArguments,
    "Audio that comes in": FollowArguments,
    "Output": OutputArguments,
    "Raw PCM from a pipe": PipeArguments,
    "Model": ModelArguments,
}


def make_parser() -> CommandParser:
    """The arguments of the verb.

    Returns:
        CommandParser: its parser.
    """
    parser = CommandParser("classify", GROUPS)
    parser.add_argument("adapter", help="Id on the Hub or folder of the adapter.")
    parser.add_argument(
        "clips",
        nargs="+",
        metavar="FILE",
        help="Files, URLs or folders with audio of any length; or a single -, for raw PCM from a pipe: ffmpeg -i FILE "
        "-f s16le -ar 16000 -ac 1 - | peft-softmoa classify ADAPTER -",
    )
    return parser


def main(arguments: list[str]) -> None:
    """Print what a classifier hears in each window of audio, and at the end the real-time factor.

    Args:
        arguments (list[str]): the words after the verb.

    Raises:
        ValueError: for options that are not allowed.
        SystemExit: with status 1 if a clip cannot be used, with 130 after Ctrl-C.
    """
    cutting, reading, following, output, pipe, running, rest = make_parser().parse(arguments)
    with name_flags(flag_names(*GROUPS.values())):
        is_pipe = rest.clips == ["-"]
        check_following(following, rest.clips, asdict(pipe), running.batch_size)
        clips = [PIPE_NAME] if is_pipe else rest.clips if following.follow else list(find_clips(rest.clips))
        _check(rest.clips, clips, output, pipe, running.batch_size, following.follow)
        classifier = load_classifier(
            rest.adapter,
            running.revision,
            scores=output.scores,
            channels=parse_channels(reading.channels),
            device=running.device,
            dtype=running.dtype,
        )
        rate = classifier.sampling_rate
        length, _ = classifier.window(cutting.window_seconds)
        overlap = parse_overlap(cutting.overlap, length / rate)
        if following.follow:
            length, step = following_window(classifier, cutting.window_seconds, overlap)
        else:
            length, step = classifier.window(cutting.window_seconds, overlap)
        meter = Meter(rate)
        failed: list[str] = []

        def complain(error: AudioError) -> None:
            failed.append(error.name)
            print(f"peft-softmoa classify: {' '.join(str(error).split())}", file=sys.stderr)

        def checked(clip: str, blocks: Iterable[Samples]) -> Iterator[Samples]:
            for block in blocks:
                if block.ndim > 1:
                    mask_channels(clip, len(block), classifier.num_channels)
                yield block

        def windows() -> Iterator[Window]:
            for clip in clips:
                try:
                    form = pipe.sample_format or "s16le", pipe.num_channels or 1
                    if following.follow:
                        raw = PCM(pipe.sampling_rate, *form) if pipe.sampling_rate else None
                        read = classifier.channels
                        blocks = incoming_blocks(rest.clips[0], clip, rate, raw, following.idle, meter, read)
                    elif is_pipe:
                        pcm = pcm_blocks(sys.stdin.buffer, clip, *form, classifier.channels)
                        blocks = resample_blocks(clip, meter.wait(pcm), pipe.sampling_rate or rate, rate)
                    else:
                        blocks = audio_blocks(clip, rate, classifier.channels)
                    blocks = checked(clip, meter.count(blocks))
                    yield from cut_windows(clip, blocks, rate, length, step, classifier.min_samples)
                except AudioError as error:
                    complain(error)
                except OSError as error:
                    complain(AudioError(clip, error.strerror or str(error)))

        segments = Segments(classifier.label_names, 0.5 if output.threshold is None else output.threshold)
        # Where the results are shown, they are the progress.
        shown = tqdm(windows(), "Classifying", unit=" windows", disable=sys.stdout.isatty() or None)
        status = 0
        with open(output.labels, "w", encoding="utf-8") if output.labels else nullcontext() as track:
            try:
                if following.follow:
                    results = classify_following(classifier, shown, complain)
                else:
                    results = classify_windows(classifier, shown, running.batch_size or (1 if is_pipe else 8), complain)
                for result in results:
                    if track:
                        track.writelines(segment.audacity() for segment in segments.add(result))
                    best = [(classifier.label_names[i], float(result.scores[i])) for i in (-result.scores).argsort()]
                    line = _json_line if output.format == "json" else _row
                    print(line(result, best[: output.top_k]), flush=True)
            except KeyboardInterrupt:
                status = INTERRUPTED
            except BrokenPipeError:
                # Whoever read the results has enough; Python would complain once more when it ends.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if track:
                track.writelines(segment.audacity() for segment in segments.close())
        shown.close()
        print(meter.summary(), file=sys.stderr)
    if failed:
        print(f"Of {len(clips)} clips, {len(set(failed))} could not be used, or not all of it.", file=sys.stderr)
    if status or failed:
        sys.exit(status or 1)


def parse_overlap(text: str, window_seconds: float) -> float:
    """Read the overlap of windows.

    Args:
        text (str): seconds, such as `"2.5"`, or a share of a window, such as `"50%"`.
        window_seconds (float): length of a window.

    Returns:
        float: the overlap in seconds.

    Raises:
        ValueError: if it is neither.
    """
    try:
        return float(text[:-1]) / 100 * window_seconds if text.endswith("%") else float(text)
    except ValueError:
        raise ValueError(f"`overlap` must be seconds, such as 2.5, or a share, such as 50%, got '{text}'.") from None


def _check(
    words: list[str],
    clips: list[str],
    output: OutputArguments,
    pipe: PipeArguments,
    batch_size: Optional[int],
    is_followed: bool,
) -> None:
    """Refuse options that do not fit together, before a model is loaded."""
    if words == ["-"]:
        if sys.stdin.isatty():
            raise ValueError("'-' reads raw PCM from a pipe, and there is none: see the example of --help.")
    elif "-" in words:
        raise ValueError("'-' reads a pipe, and no files can be beside it.")
    elif not is_followed:
        given = [f"`{name}`" for name, value in asdict(pipe).items() if value is not None]
        if given:
            raise ValueError(f"{', '.join(given)} are for raw PCM from a pipe: a file says it itself.")
    numbers = {"top_k": output.top_k, "sampling_rate": pipe.sampling_rate, "num_channels": pipe.num_channels}
    for name, value in {**numbers, "batch_size": batch_size}.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be positive, got {value}.")
    if output.labels and len(clips) > 1:
        raise ValueError(f"`labels` is a label track of one clip, got {len(clips)} clips: give them one by one.")
    if output.threshold is not None and not output.labels:
        raise ValueError("`threshold` is for the segments of `labels`, which is not given.")


def _json_line(result: WindowScores, best: list[tuple[str, float]]) -> str:
    scores = [{"label": label, "score": score} for label, score in best]
    times = {"start": round(result.start, 6), "end": round(result.end, 6)}
    return json.dumps({"file": result.name, **times, "scores": scores}, ensure_ascii=False)


def _row(result: WindowScores, best: list[tuple[str, float]]) -> str:
    scores = "  ".join(f"{label} {score:.3f}" for label, score in best)
    return f"{result.name}  {result.start:10.3f} {result.end:10.3f}  {scores}"
