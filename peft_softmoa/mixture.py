"""The mixture: a router and its experts.

One adapter trains both in every block that it adapts. They are two modules, not one that holds the other, because
PEFT names what it saves `<container>.<adapter>.<parameter>`, as in `lora_A.default.weight`: no deeper.

Letters of all shapes: B batch, T tokens, D hidden size of the input and D' of the output, N experts, P slots per
expert, S = N·P slots.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Optional

import torch
from torch import Tensor, nn

from .experts import BottleneckExperts, ConvolutionExperts, PatchGrid, uniform_
from .kernels import add_slots, read_slots, without_autocast
from .routing import (
    dense_routing,
    expert_choice_routing,
    in_full_precision,
    load_balancing_loss,
    soft_routing,
    top_k_routing,
)


class SoftRouter(nn.Module):
    """The slot parameters Φ of one mixture and, if it normalizes, the scale of its logits.

    Args:
        in_features (int): D.
        num_experts (int): N.
        num_slots (int): P, per expert. Default: 1.
        normalize (bool): whether the logits are scaled cosines. Default: False.

    Source: arXiv 2308.00951, section 2.1.
    """

    mixes_tokens = True

    def __init__(self, in_features: int, num_experts: int, num_slots: int = 1, *, normalize: bool = False) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.empty(in_features, num_experts * num_slots))
        self.scale = nn.Parameter(torch.empty(1)) if normalize else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw Φ with standard deviation D^-0.5, which gives unit logits for unit tokens; the scale starts at one."""
        nn.init.normal_(self.slots, std=1 / math.sqrt(self.slots.shape[0]))
        if self.scale is not None:
            nn.init.ones_(self.scale)

    def forward(
        self,
        hidden: Tensor,
        tokens: Tensor,
        experts: BottleneckExperts,
        mask: Optional[Tensor] = None,
        scaling: float = 1.0,
    ) -> tuple[Tensor, Optional[Tensor]]:
        """Let each expert read its slots, and each token all answers.

            X̃ = dispatchᵀ x                               (B, S, D)
            Ỹ[s] = expert_{⌊s/P⌋}(X̃[s])                   (B, S, D')
            output = F(x) + scaling · combine Ỹ           (B, T, D')

        Args:
            hidden (Tensor): F(x), `(B, T, D')`.
            tokens (Tensor): x, `(B, T, D)`.
            experts (BottleneckExperts): N experts for the router's N·P slots.
            mask (Tensor, optional): `(B, T)` boolean, true for real tokens. Default: all are real.
            scaling (float): factor on what the experts add. Default: 1.0.

        Returns:
            tuple[Tensor, None]: output, `(B, T, D')`, in the dtype of F(x); there is no loss.
        """
        if self.scale is None:
            read, _, combine = read_slots(tokens, self.slots, mask)
        else:
            tokens = in_full_precision(tokens)
            dispatch, combine = (weights.mT for weights in soft_routing(tokens, self.slots, mask, self.scale))
            read = dispatch @ tokens
        return add_slots(hidden, combine, scaling * experts(read)), None

    def record(
        self, tokens: Tensor, experts: BottleneckExperts, mask: Optional[Tensor] = None, scaling: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `forward` mixes, for whoever wants to see it.

        Args:
            tokens, experts, mask, scaling: as for `forward`.

        Returns:
            tuple[Tensor, Tensor, Tensor]: dispatch and combine weights, `(B, T, N, P)` each, and the norms over D' of
            what each expert adds to each token, `‖scaling · Σ_p combine[t, n, p] Ỹ[n, p]‖`, `(B, T, N)`.
        """
        tokens = in_full_precision(tokens)
        dispatch, combine = soft_routing(tokens, self.slots, mask, self.scale)
        answers = scaling * experts(dispatch.mT @ tokens)
        by_expert = (len(experts.up_weight), -1)
        answers, combine = answers.unflatten(1, by_expert), combine.unflatten(-1, by_expert)
        # The products of an expert's answers: nothing of size T·N·D'.
        squares = torch.einsum("btnp,bnpq,btnq->btn", combine, answers @ answers.mT, combine)
        return dispatch.unflatten(-1, by_expert), combine, squares.clamp_min(0).sqrt()


class DenseRouter(nn.Module):
    """A router of tokens: every expert reads every token, weighted by a softmax. One expert needs no router.

    Args:
        in_features (int): D.
        num_experts (int): N.

    Source: arXiv 2402.00828, Dense-MoA.
    """

    mixes_tokens = False

    def __init__(self, in_features: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, num_experts)) if num_experts > 1 else None
        self.bias = nn.Parameter(torch.empty(num_experts)) if num_experts > 1 else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as `nn.Linear` does."""
        if self.weight is not None and self.bias is not None:
            uniform_(self.weight, fan_in=self.weight.shape[0])
            uniform_(self.bias, fan_in=self.weight.shape[0])

    def forward(
        self,
        hidden: Tensor,
        tokens: Tensor,
        experts: BottleneckExperts,
        mask: Optional[Tensor] = None,
        scaling: float = 1.0,
    ) -> tuple[Tensor, Optional[Tensor]]:
        """Sum the experts by the weights that each token gives them.

            output[t] = F(x)[t] + scaling · Σ_n weights[t, n] · expert_n(x)[t]

        Args:
            hidden (Tensor): F(x), `(B, T, D')`.
            tokens (Tensor): x, `(B, T, D)`.
            experts (BottleneckExperts): N experts.
            mask (Tensor, optional): `(B, T)` boolean, true for real tokens. Default: all are real.
            scaling (float): factor on what the experts add. Default: 1.0.

        Returns:
            tuple[Tensor, Optional[Tensor]]: output, `(B, T, D')`, in the dtype of F(x), and the loss that balances the
            experts, a scalar, or None.
        """
        tokens = in_full_precision(tokens)
        weights, loss = self._weigh(tokens, mask)
        return experts(tokens, scaling * weights, mask, hidden), loss

    def record(
        self, tokens: Tensor, experts: BottleneckExperts, mask: Optional[Tensor] = None, scaling: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `forward` mixes, for whoever wants to see it.

            combine[t, n] = weights[t, n]
            dispatch[t, n] = weights[t, n] / Σ_u weights[u, n]      over the real tokens u

        Args:
            tokens, experts, mask, scaling: as for `forward`.

        Returns:
            tuple[Tensor, Tensor, Tensor]: dispatch and combine weights, `(B, T, N, 1)` each, and the norms over D' of
            what each expert adds to each token, `‖scaling · weights[t, n] · expert_n(x)[t]‖`, `(B, T, N)`.
        """
        tokens = in_full_precision(tokens)
        weights, _ = self._weigh(tokens, mask)
        real = weights if mask is None else weights.masked_fill(~mask.unsqueeze(-1), 0.0)
        dispatch = real / real.sum(dim=1, keepdim=True).clamp_min(torch.finfo(real.dtype).tiny)
        norms = experts.norms(tokens, scaling * weights, mask)
        return dispatch.unsqueeze(-1), weights.unsqueeze(-1), norms

    def _weigh(self, tokens: Tensor, mask: Optional[Tensor]) -> tuple[Tensor, Optional[Tensor]]:
        """The weights of the experts, `(B, T, N)`, and the loss."""
        if self.weight is None or self.bias is None:
            return tokens.new_ones(*tokens.shape[:2], 1), None
        return self._route(dense_routing(tokens, self.weight, self.bias), mask)

    def _route(self, gates: Tensor, mask: Optional[Tensor]) -> tuple[Tensor, Optional[Tensor]]:
        """From the gates to the weights of the experts, both `(B, T, N)`, and the loss."""
        return gates, None


class TopKRouter(DenseRouter):
    """A router of tokens that counts only the best experts of each.

    Args:
        in_features (int): D.
        num_experts (int): N.
        top_k (int): k, how many experts count.
        router_aux_loss_coef (float): weight of the load-balancing loss, which exists in training only.

    Source: arXiv 1701.06538, section 2.1; the loss arXiv 2101.03961.
    """

    def __init__(self, in_features: int, num_experts: int, *, top_k: int, router_aux_loss_coef: float) -> None:
        super().__init__(in_features, num_experts)
        self.top_k = top_k
        self.router_aux_loss_coef = router_aux_loss_coef

    def _route(self, gates: Tensor, mask: Optional[Tensor]) -> tuple[Tensor, Optional[Tensor]]:
        weights, chosen = top_k_routing(gates, self.top_k)
        if (
            self.training
            and self.router_aux_loss_coef > 0
            and any(weight.requires_grad for weight in self.parameters())
        ):
            return weights, self.router_aux_loss_coef * load_balancing_loss(gates, chosen, mask)
        return weights, None


class ExpertChoiceRouter(DenseRouter):
    """A router of tokens in which each expert chooses its tokens.

    Args:
        in_features (int): D.
        num_experts (int): N.
        capacity_factor (float): how many tokens an expert takes, as a multiple of an equal share.

    Source: arXiv 2202.09368.
    """

    mixes_tokens = True  # its capacity depends on their number, and a token on which others are taken

    def __init__(self, in_features: int, num_experts: int, *, capacity_factor: float) -> None:
        super().__init__(in_features, num_experts)
        self.capacity_factor = capacity_factor

    def _route(self, gates: Tensor, mask: Optional[Tensor]) -> tuple[Tensor, Optional[Tensor]]:
        return expert_choice_routing(gates, self.capacity_factor, mask), None


Router = SoftRouter | DenseRouter

# Which class makes each choice, and which fields of the config it takes besides the common ones.
ROUTERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "soft": (SoftRouter, ("num_slots", "normalize")),
    "dense": (DenseRouter, ()),
    "top_k": (TopKRouter, ("top_k", "router_aux_loss_coef")),
    "expert_choice": (ExpertChoiceRouter, ("capacity_factor",)),
}
EXPERTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "bottleneck": (BottleneckExperts, ()),
    "convolution": (ConvolutionExperts, ("kernel_size",)),
}


def build_mixture(
    config: Any, in_features: int, out_features: int, patch_grid: Optional[PatchGrid] = None
) -> tuple[Router, BottleneckExperts]:
    """Make a router and its experts with fresh weights.

    Args:
        config (SoftMoAConfig): the choices.
        in_features (int): D.
        out_features (int): D'.
        patch_grid (PatchGrid, optional): the grid that convolution experts run over. Default: none.

    Returns:
        tuple[Router, BottleneckExperts]: the parts that `add_mixture` takes.
    """
    router_class, fields = ROUTERS[config.routing]
    router = router_class(in_features, config.num_experts, **{name: getattr(config, name) for name in fields})
    expert_class, fields = EXPERTS[config.expert_type]
    options = {name: getattr(config, name) for name in (*fields, "activation", "dropout")}
    if patch_grid is not None:
        options["patch_grid"] = patch_grid
    experts = expert_class(config.num_experts, in_features, config.r, out_features, **options)
    if not config.init_weights:
        experts.reset_parameters(identity=False)
    return router, experts


def parameter_shapes(
    config: Any, widths: Iterable[tuple[int, int]], patch_grid: Optional[PatchGrid] = None
) -> list[dict[str, tuple[int, ...]]]:
    """Tell which parameters `build_mixture` would make for some blocks, without making them.

    Args:
        config (SoftMoAConfig): the choices.
        widths (iterable of tuple[int, int]): D and D' of each block.
        patch_grid (PatchGrid, optional): the grid that convolution experts run over. Default: none.

    Returns:
        list[dict[str, tuple[int, ...]]]: their shapes, by names that begin with `router` or `experts`, for each block.
    """
    by_block = []
    made: dict[tuple[int, int], dict[str, tuple[int, ...]]] = {}
    for pair in widths:
        if pair not in made:
            with torch.device("meta"):
                parts = dict(zip(("router", "experts"), build_mixture(config, *pair, patch_grid)))
            made[pair] = {
                f"{part}.{name}": tuple(parameter.shape)
                for part, module in parts.items()
                for name, parameter in module.named_parameters()
            }
        by_block.append(made[pair])
    return by_block


def mixes_tokens(config: Any) -> bool:
    """Whether what a mixture adds to a token depends on other tokens, and so on which of them are padded.

    Args:
        config (SoftMoAConfig): the choices.

    Returns:
        bool: false if each token's output depends on that token alone.
    """
    return ROUTERS[config.routing][0].mixes_tokens or EXPERTS[config.expert_type][0].mixes_tokens


def add_mixture(
    hidden: Tensor,
    tokens: Tensor,
    router: Router,
    experts: BottleneckExperts,
    mask: Optional[Tensor] = None,
    scaling: float = 1.0,
) -> tuple[Tensor, Optional[Tensor]]:
    """Add what the experts say to the output of the block F that reads the same tokens.

    What they say is computed in float32, or in float64 if the tokens are, and not under autocast: half-precision
    logits would overflow for large tokens. Only the last product, which sums it up and adds it to F(x), and that
    product's gradients are in the dtype of F(x), as those of the block's own layers are.

    Args:
        hidden (Tensor): F(x), `(B, T, D')`.
        tokens (Tensor): x, `(B, T, D)`.
        router (Router): decides what the experts read and how their answers are summed; its `forward` has the formula.
        experts (BottleneckExperts): N experts.
        mask (Tensor, optional): `(B, T)` boolean, true for real tokens. Default: all are real.
        scaling (float): factor on what the experts add. Default: 1.0.

    Returns:
        tuple[Tensor, Optional[Tensor]]: output, `(B, T, D')`, in the dtype of F(x), and the loss that balances the
        experts, a scalar, or None.

    Raises:
        ValueError: if the mask or F(x) does not fit the tokens.
    """
    if hidden.shape != (*tokens.shape[:2], experts.up_weight.shape[-1]):
        raise ValueError(
            f"For tokens {tuple(tokens.shape)} the block must return {experts.up_weight.shape[-1]} numbers for each "
            f"token, but it returns {tuple(hidden.shape)}. Adapt another block."
        )
    if mask is not None and (mask.shape != tokens.shape[:2] or mask.dtype != torch.bool):
        raise ValueError(
            f"The mask of tokens {tuple(tokens.shape)} must be boolean with shape {tuple(tokens.shape[:2])}, true for "
            f"real tokens, got {mask.dtype} with shape {tuple(mask.shape)}."
        )
    with without_autocast(tokens.device.type):
        return router(hidden, tokens, experts, mask, scaling)
