"""What the experts of a trained mixture do, in numbers."""

from .metrics import (
    class_information,
    coefficient_of_variation,
    combine_similarity,
    effective_number,
    effective_tokens,
    expert_load,
    idle_experts,
    normalized_entropy,
    output_share,
    slot_similarity,
)

__all__ = [
    "class_information",
    "coefficient_of_variation",
    "combine_similarity",
    "effective_number",
    "effective_tokens",
    "expert_load",
    "idle_experts",
    "normalized_entropy",
    "output_share",
    "slot_similarity",
]
