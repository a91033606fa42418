"""The mixture: a router and its experts.

Letters of all shapes: B batch, T tokens, D hidden size of the input and D' of the output, N experts, P slots per
expert, S = N·P slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

import torch
from torch import Tensor, nn

from .causal import CausalSoftRouter
from .channels import STANDARD_DEVIATION, apart, embed_channels, together
from .choices import CAUSAL_ROUTERS, EXPERTS, ROUTERS
from .kernels import add_slots, without_autocast
from .past import Past
from .routers import SoftRouter
from .routing import in_full_precision


class Mixture(nn.Module):
    """A mixture of experts, in parallel to a block F of the base model.

    Args:
        in_features (int): D.
        out_features (int): D'.
        routing (str): a name from `ROUTERS`. Default: `"soft"`.
        num_experts (int): N. Default: 7.
        r (int): R, the width of each expert's bottleneck. Default: 6.
        expert_type (str): a name from `EXPERTS`. Default: `"bottleneck"`.
        router_options (mapping, optional): other arguments of the router. Default: none.
        expert_options (mapping, optional): other arguments of the experts. Default: none.
        identity (bool): whether the fresh mixture adds exactly zero. Default: True.
        causal (bool): whether no token sees those after it, but for those of its chunk. Not with expert choice.
            Default: False.
        num_channels (int, optional): C, how many channels a clip has whose tokens meet in the mixture. Default: clips
            have one.
        channel_embedding (bool): whether an embedding of its channel is added to each token that the mixture reads.
            Without it the mixture takes any number of channels, in any order. Default: True.

    Raises:
        ValueError: if the experts do not begin with `down`, as causal soft routing needs.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        routing: str = "soft",
        num_experts: int = 7,
        r: int = 6,
        expert_type: str = "bottleneck",
        router_options: Optional[Mapping[str, Any]] = None,
        expert_options: Optional[Mapping[str, Any]] = None,
        identity: bool = True,
        causal: bool = False,
        num_channels: Optional[int] = None,
        channel_embedding: bool = True,
    ) -> None:
        super().__init__()
        self.out_features = out_features
        self.num_channels = num_channels
        self.causal = causal
        routers, experts = CAUSAL_ROUTERS if causal else ROUTERS, EXPERTS[expert_type]
        self.router = routers[routing](in_features, num_experts, **router_options or {})
        if isinstance(self.router, CausalSoftRouter) and not experts.begins_linearly:
            raise ValueError(
                "Causal soft routing averages what `down` makes of tokens, so that nothing but `down` may come before "
                f"the average, and expert_type='{expert_type}' normalises there. Take another one, or another routing."
            )
        options = {**(expert_options or {}), **({"causal": causal} if experts.mixes_tokens else {})}
        self.experts = experts(num_experts, in_features, r, out_features, **options)
        if not identity:
            self.experts.reset_parameters(identity=False)
        self.channel_embedding: Optional[nn.Parameter] = None
        if num_channels is not None and channel_embedding:
            # At zero, as `up` is, it would learn too slowly.
            self.channel_embedding = nn.Parameter(torch.empty(num_channels, in_features))
            nn.init.normal_(self.channel_embedding, std=STANDARD_DEVIATION)

    @property
    def mixes_tokens(self) -> bool:
        """Whether what the mixture adds to a token depends on other tokens, and so on which of them are padded."""
        return self.router.mixes_tokens or self.experts.mixes_tokens

    @property
    def reads_in_time(self) -> bool:
        """Whether what the mixture adds to a token depends on the tokens before it, and not on all."""
        return self.causal and self.mixes_tokens

    @property
    def has_router_loss(self) -> bool:
        """Whether training has a load-balancing loss."""
        return bool(getattr(self.router, "router_aux_loss_coef", 0))

    def forward(
        self,
        tokens: Tensor,
        mask: Optional[Tensor] = None,
        *,
        added_to: Tensor,
        scaling: float = 1.0,
        past: Optional[Past] = None,
        channels: int = 1,
    ) -> tuple[Tensor, Optional[Tensor]]:
        """Add the mixture of the expert outputs to the output of F, which reads the same tokens.

            soft         X̃ = dispatchᵀ x                                                    (B, S, D)
                         Ỹ[s] = expert_{⌊s/P⌋}(X̃[s])                                        (B, S, D')
                         output = F(x) + scaling · combine Ỹ                                (B, T, D')
            causal soft  output[t] = F(x)[t] + scaling · Σ_s combine[t, s] · up(act(read[t, s]))    with what down makes
                         of the slots so far, `CausalSoftRouter.read`
            token-wise   output[t] = F(x)[t] + scaling · Σ_n weights[t, n] · expert_n(x)[t]

        Everything runs in float32, or in float64 if the tokens are, and not under autocast: half-precision logits
        would overflow for large tokens. Only the last product, which sums up the expert outputs and adds them to F(x),
        and that product's gradients are in the dtype of F(x), as those of the block's own layers are. Whatever padding
        holds counts as zero.

        The T tokens may be those of C channels, one channel after the other. Slots read all of them, in order of time
        all channels up to a time; x[t] is then what the block reads, with the embedding of the token's channel.
        Convolutions over tokens run within a channel.

        Args:
            tokens (Tensor): x, `(B, T, D)`.
            mask (Tensor, optional): `(B, T)` boolean, true for real tokens. Default: all are real.
            added_to (Tensor): F(x), `(B, T, D')`.
            scaling (float): the factor on what is added. Default: 1.0.
            past (Past, optional): what came before these tokens, where they are read in time; it goes on with them.
                Default: nothing.
            channels (int): C. Default: 1.

        Returns:
            tuple[Tensor, Optional[Tensor]]: output, `(B, T, D')`, in the dtype of F(x), and the loss that balances the
            experts, a scalar, or None.

        Raises:
            ValueError: if the mask, F(x), what came before or the number of channels does not fit the tokens.
        """
        self._check(tokens, mask, added_to)
        if past is not None:
            if channels > 1 and not isinstance(self.router, SoftRouter):
                raise ValueError("Convolutions over the tokens of several channels do not go on from earlier ones.")
            past.check(tokens, channels)
        tokens = _without_padding(embed_channels(tokens, self.channel_embedding, channels), mask)
        with without_autocast(tokens.device.type):
            if isinstance(self.router, CausalSoftRouter):
                read, combine = self._read(tokens, mask, past, channels)
                return self.experts.add_read(added_to, read, scaling * combine), None
            if isinstance(self.router, SoftRouter):
                slots, combine = self.router(tokens, mask)
                return add_slots(added_to, combine, scaling * self.experts(slots)), None
            weights, loss = self.router(tokens, mask)
            own_mask = None if mask is None else apart(mask, channels)
            given = [apart(each, channels) for each in (added_to, in_full_precision(tokens), scaling * weights)]
            output = self.experts.add_weighted(given[0], given[1], given[2], own_mask, past)
            return together(output, channels), loss

    def record(
        self,
        tokens: Tensor,
        mask: Optional[Tensor] = None,
        scaling: float = 1.0,
        past: Optional[Past] = None,
        channels: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The weights of `forward`, and how much each expert adds without dropout.

            soft         norms[t, n] = ‖scaling · Σ_p combine[t, n, p] Ỹ[n, p]‖
            causal soft  the same for what each token reads; dispatch is what the last one reads of these tokens
            token-wise   dispatch[t, n] = weights[t, n] / Σ_u weights[u, n]    over the real tokens u
                         norms[t, n] = ‖scaling · weights[t, n] · expert_n(x)[t]‖

        Args:
            tokens (Tensor): x, `(B, T, D)`.
            mask (Tensor, optional): `(B, T)` boolean, true for real tokens. Default: all are real.
            scaling (float): the factor on what is added. Default: 1.0.
            past (Past, optional): what came before these tokens; it stays as it is. Default: nothing.
            channels (int): C. Default: 1.

        Returns:
            tuple[Tensor, Tensor, Tensor]: dispatch and combine weights, `(B, T, N, P)` each, with P = 1 if token-wise,
            and the norms over D' of what each expert adds to each token, `(B, T, N)`.
        """
        past = None if past is None else past.copy()
        with without_autocast(tokens.device.type):
            tokens = embed_channels(tokens, self.channel_embedding, channels)
            tokens = in_full_precision(_without_padding(tokens, mask))
            if isinstance(self.router, SoftRouter):
                if isinstance(self.router, CausalSoftRouter):
                    dispatch, combine = self.router.weights(tokens, mask, channels)
                    read, _ = self._read(tokens, mask, past, channels)
                    norms = self.experts.read_norms(read, scaling * combine)
                    by_expert = (norms.shape[-1], -1)
                    return dispatch.unflatten(-1, by_expert), combine.unflatten(-1, by_expert), norms
                dispatch, combine = self.router.weights(tokens, mask)
                outputs = scaling * self.experts(dispatch.mT @ tokens, dropout=False)
                by_expert = (len(self.experts.up_weight), -1)
                outputs, combine = outputs.unflatten(1, by_expert), combine.unflatten(-1, by_expert)
                # The products of an expert's outputs: nothing of size T·N·D'.
                squares = torch.einsum("btnp,bnpq,btnq->btn", combine, outputs @ outputs.mT, combine)
                return dispatch.unflatten(-1, by_expert), combine, squares.clamp_min(0).sqrt()
            weights, _ = self.router(tokens, mask)
            real = weights if mask is None else weights.masked_fill(~mask.unsqueeze(-1), 0.0)
            dispatch = real / real.sum(dim=1, keepdim=True).clamp_min(torch.finfo(real.dtype).tiny)
            own_mask = None if mask is None else apart(mask, channels)
            norms = self.experts.norms(apart(tokens, channels), apart(scaling * weights, channels), own_mask, past)
            norms = together(norms, channels)
            return dispatch.unsqueeze(-1), weights.unsqueeze(-1), norms

    @torch.no_grad()
    def record_reading(
        self, tokens: Tensor, mask: Optional[Tensor] = None, past: Optional[Past] = None, channels: int = 1
    ) -> Optional[tuple[Tensor, Tensor]]:
        """Where in the past the slots read, if routing is soft and in order of time: `CausalSoftRouter.reading`.

        Args:
            tokens (Tensor): x, `(B, T, D)`.
            mask (Tensor, optional): `(B, T)` boolean, true for real tokens. Default: all are real.
            past (Past, optional): what came before these tokens. Default: nothing.
            channels (int): C. Default: 1.

        Returns:
            tuple[Tensor, Tensor], optional: mean age in tokens and effective number of tokens of what each token reads
            in each slot, `(B, T, N, P)` each; None if there is no such order, there are several channels, or it was
            not called with what came before.

        Raises:
            ValueError: if what came before is of another number of samples.
        """
        if past is not None:
            past.check_batch(tokens)
        if channels > 1 or not isinstance(self.router, CausalSoftRouter):
            return None
        with without_autocast(tokens.device.type):
            logits = self.router.logits(in_full_precision(_without_padding(tokens, mask)))
            reading = self.router.reading(logits, mask, past)
        if reading is None:
            return None
        age, effective = (each.unflatten(-1, (len(self.experts.up_weight), -1)) for each in reading)
        return age, effective

    def _read(
        self, tokens: Tensor, mask: Optional[Tensor], past: Optional[Past], channels: int
    ) -> tuple[Tensor, Tensor]:
        tokens = in_full_precision(tokens)
        router: CausalSoftRouter = self.router  # type: ignore[assignment]
        if router.scale is None:
            projected, logits = self.experts.project_beside(tokens, router.phi)
        else:
            projected, logits = self.experts.project(tokens), router.logits(tokens)
        return router.read(logits, projected, mask, past, channels)

    def _check(self, tokens: Tensor, mask: Optional[Tensor], added_to: Tensor) -> None:
        if added_to.shape != (*tokens.shape[:2], self.out_features):
            raise ValueError(
                f"For tokens {tuple(tokens.shape)} the block must return {self.out_features} numbers for each token, "
                f"but it returns {tuple(added_to.shape)}. Adapt another block."
            )
        if mask is not None and (mask.shape != tokens.shape[:2] or mask.dtype != torch.bool):
            raise ValueError(
                f"The mask of tokens {tuple(tokens.shape)} must be boolean with shape {tuple(tokens.shape[:2])}, true "
                f"for real tokens, got {mask.dtype} with shape {tuple(mask.shape)}."
            )


def _without_padding(tokens: Tensor, mask: Optional[Tensor]) -> Tensor:
    # A weight of zero is not enough: padded tokens may hold anything, and 0 · NaN is NaN.
    return tokens if mask is None else tokens.masked_fill(~mask.unsqueeze(-1), 0.0)


def parameter_shapes(in_features: int, out_features: int, **options: Any) -> dict[str, tuple[int, ...]]:
    """The parameters that a mixture would have, without making them.

    Args:
        in_features (int): D.
        out_features (int): D'.
        options (Any): the other arguments of `Mixture`.

    Returns:
        dict[str, tuple[int, ...]]: their shapes, by name.
    """
    with torch.device("meta"):
        mixture = Mixture(in_features, out_features, **options)
    return {name: tuple(parameter.shape) for name, parameter in mixture.named_parameters()}
