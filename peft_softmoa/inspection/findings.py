"""Notable facts about experts, in words, and what may be done about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch

from .blocks import BlockReport

# An expert prefers a class if its load there is this many times its mean load in other classes, over at least this many
# clips.
PREFERENCE, PREFERENCE_CLIPS = 2.0, 5

# What each kind of problem is, in the words of a heading, and what may be done.
ADVICE = {
    "silent": (
        "Experts that add nothing",
        "They cost parameters and change hardly anything. An adapter that has hardly been trained looks like this, "
        "too: train it longer or with a greater learning rate, or with fewer experts (`num_experts`).",
    ),
    "idle": (
        "Idle experts",
        "Hardly any token reads them. Train with fewer experts (`num_experts`, or `num_experts_pattern` for these "
        "blocks alone); with `routing='top_k'`, a greater `router_aux_loss_coef` spreads the load.",
    ),
    "similar": (
        "Experts that read the same",
        "What they read cannot tell them apart, though they may do different things with it. Fewer experts "
        "(`num_experts`), each with a greater `r`, have as many parameters.",
    ),
    "uniform": (
        "Experts that read all tokens alike",
        "They read the mean of the clip: their routing chooses nothing. Train longer, or compare with one adapter "
        "without a router (`routing='dense', num_experts=1`).",
    ),
}


class Finding(NamedTuple):
    """A notable fact about one or more experts."""

    kind: Literal["silent", "idle", "similar", "uniform", "class"]
    block: str  # name of the block in the base model
    adapter: str
    experts: tuple[int, ...]  # from 0
    text: str


def find_problems(block: BlockReport, name: str) -> list[Finding]:
    """Find the experts of a block that are of little use.

    Args:
        block (BlockReport): the metrics of the block.
        name (str): what the block is called.

    Returns:
        list[Finding]: the problems, as sentences.
    """
    number = block.num_experts
    if number == 1:
        return []
    found: list[Finding] = []

    def say(kind: Any, experts: Sequence[int], text: str) -> None:
        found.append(Finding(kind, block.block, block.adapter, tuple(experts), f"{name}: {text}"))

    if not block.output_share.any():
        say("silent", range(number), "no expert adds anything.")
        return found
    if block.silent:
        shares = ", ".join(f"{block.output_share[expert].item():.1%}" for expert in block.silent)
        say("silent", block.silent, f"{_say(block.silent, 'adds', 'add')} next to nothing ({shares} of the output).")
    if block.idle:
        shares = ", ".join(f"{block.load[expert].item():.1%}" for expert in block.idle)
        equal = f"equal were {1 / number:.1%}"
        say("idle", block.idle, f"{_say(block.idle, 'is', 'are')} idle ({shares} of the load; {equal}).")
    for group in block.similar:
        similarity = block.expert_similarity[list(group)][:, list(group)].min().item()
        same = "read the same tokens" if block.has_slots else "have the same weights for all tokens"
        say("similar", group, f"{_say(group, same, same)} (similarity {similarity:.2f}).")
    spare = len(block.idle) + sum(len(group) - 1 for group in block.similar)
    if spare:
        found[-1] = found[-1]._replace(text=f"{found[-1].text} {number - spare} of {number} would do.")
    if block.uniform:
        share = block.effective_tokens[block.uniform].mean().item() / block.num_tokens
        say(
            "uniform",
            block.uniform,
            f"{_say(block.uniform, 'reads', 'read')} all tokens nearly alike (as if {share:.0%} of them).",
        )
    return found


def find_preferences(
    blocks: Iterable[BlockReport], names: Mapping[tuple[str, str], str], label_names: Sequence[str]
) -> list[Finding]:
    """Find the classes that experts prefer.

    Args:
        blocks (iterable of BlockReport): the metrics of the blocks.
        names (mapping): what the blocks are called, by block and adapter.
        label_names (sequence of str): names of the classes.

    Returns:
        list[Finding]: the preferences, as sentences, the strongest first.
    """
    found = []
    for block in blocks:
        if block.class_loads is None or block.class_clips is None:
            continue
        present = torch.nonzero(block.class_clips).flatten().tolist()
        for expert in set(range(block.num_experts)) - set(block.idle):
            loads = block.class_loads[present, expert]
            if len(present) < 2:
                continue
            label = present[int(loads.argmax())]
            load = loads.max().item()
            others = (loads.sum().item() - load) / (len(present) - 1)
            if block.class_clips[label] >= PREFERENCE_CLIPS and load >= PREFERENCE * others:
                text = (
                    f"{names[block.block, block.adapter]}: expert {expert} prefers the class "
                    f"'{label_names[label]}', with {load:.0%} of the load in its {block.class_clips[label]} "
                    f"clips and {others:.0%} in those of other classes."
                )
                found.append((others / load, Finding("class", block.block, block.adapter, (expert,), text)))
    return [finding for _, finding in sorted(found, key=lambda pair: pair[0])]


def _say(experts: Sequence[int], singular: str, plural: str) -> str:
    """Experts as the subject of a verb."""
    if len(experts) == 1:
        return f"expert {experts[0]} {singular}"
    return f"experts {', '.join(map(str, experts[:-1]))} and {experts[-1]} {plural}"
