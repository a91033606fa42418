"""Which routers and experts there are, by the names that configs have for them."""

from __future__ import annotations

from .causal import CausalSoftRouter
from .conformer import ConformerExperts
from .convolution import ConvolutionExperts
from .experts import BottleneckExperts
from .routers import DenseRouter, ExpertChoiceRouter, SoftRouter, TopKRouter

# Which class makes each choice.
ROUTERS: dict[str, type[SoftRouter] | type[DenseRouter]] = {
    "soft": SoftRouter,
    "dense": DenseRouter,
    "top_k": TopKRouter,
    "expert_choice": ExpertChoiceRouter,
}
# Where no token sees those after it. Expert choice is impossible there: which tokens an expert takes depends on all.
CAUSAL_ROUTERS: dict[str, type[SoftRouter] | type[DenseRouter]] = {
    "soft": CausalSoftRouter,
    "dense": DenseRouter,
    "top_k": TopKRouter,
}
EXPERTS: dict[str, type[BottleneckExperts]] = {
    "bottleneck": BottleneckExperts,
    "convolution": ConvolutionExperts,
    "conformer": ConformerExperts,
}


def mixes_tokens(routing: str, expert_type: str) -> bool:
    """Whether what a mixture adds to a token depends on other tokens, and so on which of them are padded.

    Args:
        routing (str): a name from `ROUTERS`.
        expert_type (str): a name from `EXPERTS`.

    Returns:
        bool: false if the output for each token depends on that token alone.
    """
    return ROUTERS[routing].mixes_tokens or EXPERTS[expert_type].mixes_tokens
