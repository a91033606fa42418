"""The studies: what is compared on what, as data."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Optional

from peft_softmoa.demo.run import BASE_MODEL

from .methods import FULL, LORA, METHODS, PROBE, RATES, SINGLE, SOFT

WHISPER = os.environ.get("SOFTMOA_WHISPER", "openai/whisper-tiny.en")
MAIN = (LORA, SINGLE, SOFT, "Soft-MoA, P=2")
COMPARED = (PROBE, FULL, *MAIN, "Dense-MoA", "convolution", "Conformer")
Options = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """What is compared, and how it is trained.

    Args:
        title (str): of its page.
        variants (list of pairs): a method and its options each: fields of SoftMoAConfig, the options of
            `methods.train_mixture`, `slots_rate` and `decays_slots` of the optimizer, `budget`, and `clips_per_class`,
            `speakers` and `channels` of the data.
        dataset (str, optional): name of the environment variable with its folder.
        model (str): folder or id.
        task (str): `"audio-classification"` or `"speech-seq2seq"`.
        label_column (str): name of the column with the labels or texts.
        speaker_column (str, optional): name of the column with the speakers.
        num_channels (int, optional): C, for recordings whose channels are read.
        seconds (float, optional): to which clips and model are cut. Default: the model's own length.
        folds (int, optional): how many folds are tested. Default: all.
        seeds (int): how many; the first chooses the learning rates.
        epochs (int): passes over the training clips.
        epochs_of (dict): other numbers of epochs, by method.
        head_epochs (int): passes over the training clips in which the head is trained alone first, on what the
            pretrained model gives, for all methods but the linear probe, which trains nothing else anyway.
        batch_size (int): clips in a step.
        precision (str): `"float32"`, or `"bfloat16"`: what torch.autocast computes in it, with weights in float32.
        clips_per_class (int, optional): how many training clips of each class are drawn. Default: all.
        validation_per_class (int, optional): the same of the validation fold.
        test_per_class (int, optional): the same of the tested fold.
        validate_every (int): epochs between validations; the last epoch is always followed by one.
        trace (tuple of int): steps before which the use of experts is recorded, besides the end.
        budget (int, optional): parameters besides the head. Default: those of the paper's Soft-MoA on the model.
        rates (dict): the grid of learning rates of each method.
        rate_folds (int): how many folds choose the rate, each for itself; the other folds take that of the first.
        reference (int): index of the variant that the others are compared with.
        axis (str, optional): the option along which the picture is drawn.
        groups (dict): groups of some labels, by label; of clips with these labels, it is also told how often the group
            is right.
    """

    title: str
    variants: list[tuple[str, Options]]
    dataset: Optional[str] = None
    model: str = WHISPER
    task: str = "audio-classification"
    label_column: str = "label"
    speaker_column: Optional[str] = None
    num_channels: Optional[int] = None
    seconds: Optional[float] = None
    folds: Optional[int] = None
    seeds: int = 1
    epochs: int = 10
    epochs_of: dict[str, int] = field(default_factory=lambda: {PROBE: 60})
    head_epochs: int = 0
    batch_size: int = 16
    precision: str = "float32"
    clips_per_class: Optional[int] = None
    validation_per_class: Optional[int] = None
    test_per_class: Optional[int] = None
    validate_every: int = 1
    trace: tuple[int, ...] = ()
    budget: Optional[int] = None
    rates: dict[str, list[float]] = field(default_factory=lambda: dict(RATES))
    rate_folds: int = 1
    reference: int = 0
    axis: Optional[str] = None
    groups: dict[str, str] = field(default_factory=dict)


def label(method: str, options: Options) -> str:
    """A method with its options, as tables and pictures name it."""
    return ", ".join([method, *(f"{name}={value}" for name, value in options.items())])


def over(methods: Any, name: str, values: Any) -> list[tuple[str, Options]]:
    """Methods with each value of an option."""
    return [(method, {name: value}) for value, method in product(values, methods)]


def plain(methods: Any) -> list[tuple[str, Options]]:
    """Methods as they are."""
    return [(method, {}) for method in methods]


ESC50 = {"dataset": "SOFTMOA_ESC50", "seconds": 5.0, "precision": "bfloat16"}
EIGHT_CLIPS = {
    **ESC50,
    "folds": 3,
    "clips_per_class": 8,
    "epochs": 4,
    "head_epochs": 10,
    "batch_size": 8,
    "validation_per_class": 4,
    "validate_every": 2,
}
COMMANDS = {
    "dataset": "SOFTMOA_COMMANDS",
    "seconds": 1.0,
    "speaker_column": "speaker",
    "precision": "bfloat16",
}
TRACE = (0, 5, 10, 20, 50, 100, 200)
PAPERS_RATE = dict.fromkeys(METHODS, [5e-3])
BOTH = {"num_slots": 2, "placement": "both"}
BINAURAL = [(SOFT, {"channels": way, **BOTH}) for way in ("mono", "apart", "joined")]

STUDIES: dict[str, Study] = {
    "esc50": Study(
        "ESC-50 on Whisper tiny.en",
        plain(COMPARED),
        **ESC50,
        epochs=3,
        head_epochs=10,
        batch_size=8,
        validate_every=3,
        trace=TRACE,
        reference=COMPARED.index(SINGLE),
    ),
    "esc50-eight-clips": Study(
        "ESC-50 with eight clips of each class",
        plain(COMPARED),
        **EIGHT_CLIPS,
        trace=TRACE,
        reference=COMPARED.index(SINGLE),
    ),
    "esc50-few-shot": Study(
        "ESC-50 with few clips of each class",
        over(MAIN, "clips_per_class", (1, 2, 4)),
        **EIGHT_CLIPS | {"clips_per_class": None, "epochs": 8, "validate_every": 8},
        # What is chosen with eight clips.
        rates={**PAPERS_RATE, SINGLE: [1e-3]},
        reference=MAIN.index(SINGLE),
        axis="clips_per_class",
    ),
    "commands": Study(
        "Spoken words of few speakers",
        over((PROBE, *MAIN, "Dense-MoA", "Conformer"), "speakers", (2, 4, 8)),
        **COMMANDS,
        folds=3,
        epochs=6,
        head_epochs=10,
        batch_size=8,
        validation_per_class=6,
        validate_every=6,
        reference=1 + MAIN.index(SINGLE),
        axis="speakers",
    ),
    "recognition": Study(
        "Whisper as a recogniser of foreign words",
        [
            *over((LORA, SINGLE, SOFT, "Conformer"), "budget", (45_000, 86_100, 260_000)),
            (SOFT, {"budget": 86_100, "unit_slots": True}),
        ],
        **COMMANDS,
        task="speech-seq2seq",
        folds=3,
        epochs=6,
        batch_size=8,
        clips_per_class=12,
        validation_per_class=4,
        validate_every=6,
        rates=dict.fromkeys(METHODS, [2e-3, 5e-3]),
        reference=1,
        axis="budget",
    ),
    "binaural": Study(
        "Directions heard with two ears",
        [*BINAURAL, (LORA, {"channels": "apart"})],
        model=str(BASE_MODEL),
        dataset="SOFTMOA_BINAURAL",
        label_column="direction",
        num_channels=2,
        seeds=2,
        seconds=1.0,
        epochs=8,
        validate_every=8,
        budget=162_000,
        reference=1,
        groups={**dict.fromkeys(("45", "90", "135"), "left"), **dict.fromkeys(("225", "270", "315"), "right")},
    ),
    "scaling": Study(
        "Soft-MoA at one budget: experts, slots, routers and forms",
        [
            (SOFT, {}),
            *over([SOFT], "num_experts", (1, 2, 4, 16, 32, 64)),
            *over([SOFT], "num_slots", (2, 3, 4)),
            *plain((SINGLE, "Dense-MoA", "top-k", "expert choice", "convolution", "Conformer")),
            *[(SOFT, {"num_slots": 4, "expert_type": form}) for form in ("convolution", "conformer")],
        ],
        **COMMANDS,
        budget=400_000,
        folds=3,
        clips_per_class=8,
        epochs=6,
        head_epochs=10,
        batch_size=8,
        validation_per_class=6,
        validate_every=6,
        rates=PAPERS_RATE,
    ),
    "router": Study(
        "Why routing saturates, and what helps",
        [
            (SOFT, {}),
            (SOFT, {"slots_rate": 0.03}),
            (SOFT, {"unit_slots": True}),
            (SOFT, {"decays_slots": False}),
            (SOFT, {"temperature": 4.0}),
            (SOFT, {"slot_std": 4.0}),
            (SOFT, {"normalize": True}),
            (SOFT, {"normalize": True, "unit_slots": True}),
            (SINGLE, {}),
        ],
        **EIGHT_CLIPS,
        trace=TRACE,
        # At which routing saturates.
        rates=PAPERS_RATE,
    ),
    "efficiency": Study(
        "Efficiency to convergence",
        plain(COMPARED),
        **COMMANDS,
        clips_per_class=12,
        epochs=10,
        validation_per_class=6,
        folds=2,
        rates={**PAPERS_RATE, FULL: [2e-4]},
        reference=COMPARED.index(SINGLE),
    ),
    "demo": Study(
        "Methods on the backbone of the demo",
        plain(METHODS),
        model=str(BASE_MODEL),
        dataset="SOFTMOA_ESC10",
        batch_size=8,
        epochs=6,
        epochs_of={},
        reference=list(METHODS).index(SINGLE),
    ),
}

# What `--quick` changes: enough to see that all works, and nothing to learn from.
QUICK = {
    "folds": 1,
    "seeds": 1,
    "epochs": 2,
    "head_epochs": 0,
    "epochs_of": {},
    "clips_per_class": 2,
    "validation_per_class": 1,
    "test_per_class": 1,
    "validate_every": 2,
    "rates": {name: rates[-1:] for name, rates in RATES.items()},
}
QUICK_VARIANTS = 4
