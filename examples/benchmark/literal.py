"""The mixtures of adapters as their formulas are first written down: a loop over the experts, and large tensors.

Letters of all shapes: B batch, T tokens, D hidden size, N experts, P slots per expert, R bottleneck.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_softmoa import SoftMoALayer
from peft_softmoa.calls.masks import find_tokens


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A linear layer with a copy of a weight, inputs first, and a bias."""
    layer = nn.Linear(*weight.shape)
    layer.load_state_dict({"weight": weight.detach().T, "bias": bias.detach()})
    return layer


def as_modules(experts: nn.Module) -> nn.ModuleList:
    """Experts as modules of their own, with the same weights."""
    return nn.ModuleList(
        nn.Sequential(
            linear(experts.down_weight[n], experts.down_bias[n]),
            experts.activation,
            linear(experts.up_weight[n], experts.up_bias[n]),
        )
        for n in range(len(experts.down_weight))
    )


class LiteralSoft(nn.Module):
    """Soft-MoA, with slot parameters `(D, N, P)` and one module for each expert.

    Args:
        router (SoftRouter), experts (BottleneckExperts): the mixture whose weights it takes.
    """

    def __init__(self, router: nn.Module, experts: nn.Module) -> None:
        super().__init__()
        self.experts = as_modules(experts)
        self.slots = nn.Parameter(router.phi.detach().unflatten(1, (len(self.experts), -1)).clone())

    def forward(self, tokens: Tensor) -> Tensor:
        logits = torch.einsum("btd,dnp->btnp", tokens, self.slots)
        dispatch = logits.softmax(dim=1)
        combine = logits.flatten(2).softmax(dim=-1).view_as(logits)
        read = torch.einsum("btd,btnp->bnpd", tokens, dispatch)
        expert_outputs = torch.stack([expert(read[:, n]) for n, expert in enumerate(self.experts)], dim=1)
        return torch.einsum("bnpd,btnp->btd", expert_outputs, combine)


class LiteralDense(nn.Module):
    """Dense-MoA, with the outputs of all experts for all tokens, `(B, T, D, N)`, in one tensor.

    Args:
        router (DenseRouter), experts (BottleneckExperts): the mixture whose weights it takes.
    """

    def __init__(self, router: nn.Module, experts: nn.Module) -> None:
        super().__init__()
        self.experts = as_modules(experts)
        self.router = None if router.weight is None else linear(router.weight, router.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        expert_outputs = torch.stack([expert(tokens) for expert in self.experts], dim=-1)
        if self.router is None:
            return expert_outputs.squeeze(-1)
        return (expert_outputs * self.router(tokens).softmax(dim=-1).unsqueeze(2)).sum(dim=-1)


LITERAL = {"soft": LiteralSoft, "dense": LiteralDense}


class LiteralBlock(nn.Module):
    """A block of the base model and a literal mixture of what it reads.

    Args:
        block (nn.Module): the frozen block.
        mixture (nn.Module): maps tokens `(B, T, D)` to what is added to the block's output.
    """

    def __init__(self, block: nn.Module, mixture: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.mixture = mixture

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.block(*args, **kwargs)
        return (output[0] + self.mixture(find_tokens(args, kwargs)), *output[1:])


def write_literally(model: nn.Module, routing: str) -> None:
    """Put literal mixtures in place of a model's adapted blocks.

    They know no padding, and nothing of a config but its routing and its sizes.

    Args:
        model (nn.Module): a base model with one adapter on blocks that return tuples; it is changed.
        routing (str): the adapter's routing, `"soft"` or `"dense"`.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SoftMoALayer):
            mixture = layer.softmoa_mixture["default"]
            literal = LITERAL[routing](mixture.router, mixture.experts)
            model.set_submodule(name, LiteralBlock(layer.base_layer, literal))
