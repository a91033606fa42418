"""SoftMoALayer: one adapted block and the mixtures of its adapters, by name."""

from __future__ import annotations

from typing import Any, Optional, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .config import SoftMoAConfig
from .experts import BottleneckExperts, PatchGrid
from .mixture import Router, build_mixture, mixture
from .shapes import find_tokens

# Why a mixture cannot be merged; PEFT asks on the model and on each layer.
CANNOT_MERGE = (
    "A soft mixture of adapters cannot be merged into the base model: what it adds depends on the input, so no change "
    "of the weights equals it. Keep the adapter apart; `unload()` gives the base model back."
)


class SoftMoALayer(nn.Module, BaseTunerLayer):
    """A block F of the base model with mixtures in parallel: `F(x) + Σ scaling · mixture(x)` over active adapters.

    F is a linear layer or any block that maps tokens `(B, T, D)` to `(B, T, D')`; it takes them by position, or as
    `hidden_states` or `input`, and returns a tensor, or a tuple that begins with it. Tokens `(B, D)` are one token per
    sample.

    Args:
        base_layer (nn.Module): F.
        adapter_name (str): name of the first adapter.
        config (SoftMoAConfig): its configuration.
        name (str): name of the block in the model, for errors.
        widths (tuple[int, int]): D and D'.
        patch_grid (PatchGrid, optional): how its tokens lie in time and frequency. Default: unknown.
    """

    # All names of layers that may contain adapter (trainable) weights
    adapter_layer_names = ("softmoa_router", "softmoa_experts")
    # All names of other parameters that may contain adapter-related parameters
    other_param_names = ("softmoa_scaling",)

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: SoftMoAConfig,
        name: str,
        widths: tuple[int, int],
        patch_grid: Optional[PatchGrid] = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.in_features, self.out_features = widths
        self.base_layer = base_layer
        self.softmoa_router = nn.ModuleDict()
        self.softmoa_experts = nn.ModuleDict()
        self.softmoa_scaling: dict[str, float] = {}
        # The losses of its routers, while a forward pass of the model collects them.
        self.router_losses: Optional[list[Tensor]] = None
        self._disable_adapters = False
        self.merged_adapters = []
        # flag to enable/disable casting of input to weight dtype during forward call, which PEFT's helper sets
        self.cast_input_dtype_enabled = True
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, patch_grid)

    def update_layer(self, adapter_name: str, config: SoftMoAConfig, patch_grid: Optional[PatchGrid] = None) -> None:
        """Add an adapter to the block.

        Args:
            adapter_name (str): name of the new adapter.
            config (SoftMoAConfig): its configuration.
            patch_grid (PatchGrid, optional): how the tokens lie in time and frequency. Default: unknown.
        """
        router, experts = build_mixture(config, self.in_features, self.out_features, patch_grid)
        self.softmoa_router[adapter_name] = router
        self.softmoa_experts[adapter_name] = experts
        self.softmoa_scaling[adapter_name] = config.scaling
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block and add the active mixtures.

        Args:
            args, kwargs: what the block takes. The tokens, `(B, T, D)` or `(B, D)`, are the first positional argument,
                or `hidden_states` or `input`.

        Returns:
            Tensor or tuple: what the block returns, `(B, T, D')` or `(B, D')`, in the block's dtype.

        Raises:
            ValueError: if there are no tokens or their shape is wrong.
        """
        tokens = self._find_tokens(args, kwargs)
        output = self.base_layer(*args, **kwargs)
        if self.disable_adapters:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        for adapter_name in self.active_adapters:
            if adapter_name in self.softmoa_experts:
                hidden = hidden + self._mixture(adapter_name, tokens).to(hidden.dtype)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _mixture(self, adapter_name: str, tokens: Tensor) -> Tensor:
        router = cast(Router, self.softmoa_router[adapter_name])
        experts = cast(BottleneckExperts, self.softmoa_experts[adapter_name])
        rows = tokens.ndim == 2
        try:
            output, loss = mixture(tokens.unsqueeze(1) if rows else tokens, router, experts)
        except ValueError as error:
            raise ValueError(f"In the adapted block '{self.name}': {error}") from error
        if loss is not None and self.router_losses is not None:
            self.router_losses.append(loss)
        return self.softmoa_scaling[adapter_name] * (output.squeeze(1) if rows else output)

    def _find_tokens(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        tokens = find_tokens(args, kwargs)
        if not isinstance(tokens, Tensor):
            raise ValueError(
                f"The adapted block '{self.name}' was called without tokens: they are its first positional argument, "
                f"`hidden_states` or `input`, but it got {len(args)} positional arguments and {sorted(kwargs)}."
            )
        if tokens.ndim not in (2, 3) or tokens.shape[-1] != self.in_features:
            raise ValueError(
                f"The adapted block '{self.name}' takes tokens of shape (batch, tokens, {self.in_features}) or "
                f"(batch, {self.in_features}), got {tuple(tokens.shape)}."
            )
        return tokens

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[Optional[torch.device], Optional[torch.dtype]]:
        # A block has no weight of its own; a quantised one has integers among its parameters.
        for parameter in base_layer.parameters():
            if parameter.is_floating_point():
                return parameter.device, parameter.dtype
        return super()._get_base_layer_device_and_dtype(base_layer)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for container in self.adapter_layer_names:
            for name, parameter in getattr(self, container).named_parameters():
                given = state_dict.get(f"{prefix}{container}.{name}")
                if given is not None and given.shape != parameter.shape:
                    raise ValueError(
                        f"The adapter does not fit its config: tensor '{prefix}{container}.{name}' has shape "
                        f"{tuple(given.shape)}, but the config gives {tuple(parameter.shape)}. Load it with the "
                        "adapter_config.json that it was saved with, onto the base model that it was trained on."
                    )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        """Impossible: raises ValueError."""
        raise ValueError(CANNOT_MERGE)

    def unmerge(self) -> None:
        """Impossible: raises ValueError."""
        raise ValueError(CANNOT_MERGE)

    def __repr__(self) -> str:
        return "softmoa." + super().__repr__()
