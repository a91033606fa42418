"""Fields of a config that belong to some choices of another field, and what a mixture is made of by all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Fields that belong to some choices of another field: that field, and their default for each of these choices.
DEPENDENT_FIELDS: dict[str, tuple[str, dict[str, Any]]] = {
    "num_slots": ("routing", {"soft": 1}),
    "normalize": ("routing", {"soft": False}),
    "unit_slots": ("routing", {"soft": False}),
    "chunk_size": ("routing", {"soft": None}),
    "forgetting": ("routing", {"soft": False}),
    "top_k": ("routing", {"top_k": 2}),
    "router_aux_loss_coef": ("routing", {"top_k": 0.01}),
    "capacity_factor": ("routing", {"expert_choice": 1.0}),
    "kernel_size": ("expert_type", {"convolution": 3, "conformer": 31}),
    "patch_grid": ("expert_type", {"convolution": False, "conformer": False}),
}
# The activation of all experts but Conformers, which have their own.
ACTIVATION = "gelu"

# Fields that give single blocks a value of their own, and whose value that is.
PATTERN_FIELDS = {"r_pattern": "r", "num_experts_pattern": "num_experts", "scaling_pattern": "scaling"}

# Those that mean something only in order of time.
CAUSAL_FIELDS = ("chunk_size", "forgetting")
NOT_LINEAR = (
    "a running average for each token is one of what `down` makes of tokens, and a Conformer normalises in front of it"
)


def resolve_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that belong to the choices made, with their defaults where they were left out.

    Args:
        values (mapping): all fields by name.

    Returns:
        dict[str, Any]: the values by the fields' names; the fields of other choices are not in it.
    """
    return {
        name: defaults[values[choice]] if values[name] is None else values[name]
        for name, (choice, defaults) in DEPENDENT_FIELDS.items()
        if values[choice] in defaults
    }


def mixture_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `method.Mixture`, but for its widths, the patch grid and order in time.

    Args:
        values (mapping): all fields by name.

    Returns:
        dict[str, Any]: the arguments by name.
    """
    options: dict[str, dict[str, Any]] = {"routing": {}, "expert_type": {}}
    for name, value in resolve_fields(values).items():
        if name != "patch_grid" and (value or name not in CAUSAL_FIELDS):
            options[DEPENDENT_FIELDS[name][0]][name] = value
    same = ("routing", "num_experts", "r", "expert_type", "num_channels", "channel_embedding")
    own = ("dropout",) if values["expert_type"] == "conformer" else ("activation", "dropout")
    return {
        **{name: values[name] for name in same},
        "router_options": options["routing"],
        "expert_options": {**options["expert_type"], **{name: values[name] for name in own}},
        "identity": values["init_weights"],
    }
