"""What is varied of Soft-MoA, one thing at a time, at the same budget."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional


class Claim(NamedTuple):
    """What the paper says of the values.

    Args:
        text (str): the claim.
        better (tuple of str): labels of values that are better by it.
        worse (tuple of str): labels of values that are worse.
    """

    text: str
    better: tuple[str, ...]
    worse: tuple[str, ...]


class Axis(NamedTuple):
    """One thing that is varied.

    Args:
        title (str): what it is.
        values (dict): the options of each value, by its label; without options it is Soft-MoA as in the main table.
        reference (str): label of the value with which the others are compared.
        claim (Claim, optional): what the paper says of it.
    """

    title: str
    values: dict[str, dict[str, Any]]
    reference: str
    claim: Optional[Claim] = None


EXPERTS = Axis(
    "experts N",
    {str(number): {} if number == 7 else {"num_experts": number} for number in (1, 2, 4, 7, 16, 32)},
    "7",
    # With one expert and one slot there is nothing to choose from, for which there are other reasons to be worse.
    Claim("Gains from more, smaller experts (with as many more slots)", ("16", "32"), ("2", "4")),
)
AXES = (
    EXPERTS,
    Axis(
        "slots per expert P",
        {str(number): {} if number == 1 else {"num_slots": number} for number in range(1, 5)},
        "1",
        Claim("One or two slots for each expert are best", ("1", "2"), ("3", "4")),
    ),
    Axis("placement", {"attention": {}, "ffn": {"placement": "ffn"}, "both": {"placement": "both"}}, "attention"),
    Axis(
        "expert, at P = 4",
        {"bottleneck": {"num_slots": 4}, "convolution": {"num_slots": 4, "expert_type": "convolution"}},
        "bottleneck",
    ),
    Axis("normalised logits", {"no": {}, "yes": {"normalize": True}}, "no"),
    Axis("scaling", {"0.25": {"scaling": 0.25}, "1": {}, "4": {"scaling": 4.0}}, "1"),
    Axis(
        "initial slot parameters, times",
        {"0.25": {"slot_std": 0.25}, "1": {}, "4": {"slot_std": 4.0}},
        "1",
    ),
    Axis("trained norms in front of the mixtures", {"no": {}, "yes": {"train_norms": True}}, "no"),
    Axis("weight decay of slot parameters", {"yes": {}, "no": {"decays_slots": False}}, "yes"),
    Axis(
        "initial weights",
        {
            "up at zero": {},
            "down and up at zero": {"init": "down and up at zero"},
            "nothing at zero": {"init": "nothing at zero"},
        },
        "up at zero",
    ),
)


def variants() -> list[dict[str, Any]]:
    """The options of all variants, each once, without Soft-MoA as it is."""
    found: list[dict[str, Any]] = []
    for axis in AXES:
        for options in axis.values.values():
            if options and options not in found:
                found.append(options)
    return found
