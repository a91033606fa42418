"""SoftMoALayer: one adapted block and the mixtures of its adapters, by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Optional, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .config import SoftMoAConfig
from .experts import BottleneckExperts, PatchGrid
from .masking import LIMITS, LayerCall, Mask, argument_names, find_mask, in_backward, is_mask, token_mask, unpack
from .mixed_batch import MixedBatch
from .mixture import Router, add_mixture, build_mixture, mixes_tokens
from .placement import Target
from .shapes import find_tokens
from .structure import find_module

# Why a mixture cannot be merged; PEFT asks on the model and on each layer.
CANNOT_MERGE = (
    "A soft mixture of adapters cannot be merged into the base model: what it adds depends on the input, so no change "
    "of the weights equals it. Keep the adapter apart; `unload()` gives the base model back."
)


class SoftMoALayer(nn.Module, BaseTunerLayer):
    """A block F of the base model with mixtures in parallel: `F(x) + Σ scaling · mixture(x)` over active adapters.

    F is a linear layer or any block that maps tokens `(B, T, D)` to `(B, T, D')`; it takes them by position, or as
    `hidden_states` or `input`, and returns a tensor, or a tuple that begins with it. Tokens `(B, D)` are one token per
    sample. F may also be the last part of a block that begins in another module; x is then what that one reads.

    Padded tokens take no part in routing. Their mask is what F is called with or, if F takes none, the layer of the
    model around it.

    Args:
        base_layer (nn.Module): F.
        adapter_name (str): name of the first adapter.
        config (SoftMoAConfig): its configuration.
        target (Target): where it is in the model, and D and D'.
        patch_grid (PatchGrid, optional): how its tokens lie in time and frequency. Default: unknown.
    """

    # All names of layers that may contain adapter (trainable) weights
    adapter_layer_names = ("softmoa_router", "softmoa_experts")
    # All names of other parameters that may contain adapter-related parameters
    other_param_names = ("softmoa_scaling", "softmoa_targets", "softmoa_calls", "softmoa_hooks")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: SoftMoAConfig,
        target: Target,
        patch_grid: Optional[PatchGrid] = None,
    ) -> None:
        super().__init__()
        self.name = target.name
        # D and D', under the names that linear layers and PEFT's own tuner layers have for them.
        self.in_features, self.out_features = target.in_features, target.out_features
        self.base_layer = base_layer
        self._arguments = argument_names(base_layer)
        self._takes_mask = any(map(is_mask, self._arguments))
        self.softmoa_router = nn.ModuleDict()
        self.softmoa_experts = nn.ModuleDict()
        self.softmoa_scaling: dict[str, float] = {}
        self.softmoa_targets: dict[str, Target] = {}
        # What the adapters' hooks keep for them, and what removes the hooks, also those of an adapter as a whole.
        self.softmoa_calls: dict[str, LayerCall] = {}
        self.softmoa_hooks: dict[str, list[Any]] = {}
        # The losses of its routers, while a forward pass of the model collects them.
        self.router_losses: Optional[list[Tensor]] = None
        # They are told what each mixture reads, while routing is recorded.
        self.recorders: list[Callable[[str, Tensor, Optional[Tensor]], None]] = []
        # The adapters of the samples, while a forward pass of the model mixes them.
        self.mixed_batch: Optional[MixedBatch] = None
        self._disable_adapters = False
        self.merged_adapters = []
        # flag to enable/disable casting of input to weight dtype during forward call, which PEFT's helper sets
        self.cast_input_dtype_enabled = True
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, target, patch_grid)

    def update_layer(
        self, adapter_name: str, config: SoftMoAConfig, target: Target, patch_grid: Optional[PatchGrid] = None
    ) -> None:
        """Add an adapter to the block.

        Args:
            adapter_name (str): name of the new adapter.
            config (SoftMoAConfig): its configuration.
            target (Target): where it reads and adds, and D and D'.
            patch_grid (PatchGrid, optional): how the tokens lie in time and frequency. Default: unknown.
        """
        router, experts = build_mixture(config, target.in_features, target.out_features, patch_grid)
        self.softmoa_router[adapter_name] = router
        self.softmoa_experts[adapter_name] = experts
        self.softmoa_scaling[adapter_name] = config.scaling
        self.softmoa_targets[adapter_name] = target
        self.softmoa_calls[adapter_name] = LayerCall(mixes_tokens(config), bool(config.router_aux_loss_coef))
        self.softmoa_hooks[adapter_name] = []
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def connect(self, adapter_name: str, model: nn.Module) -> None:
        """Let an adapter know what the layer around its block is called with, if the block itself is not.

        Args:
            adapter_name (str): name of the adapter.
            model (nn.Module): the base model.
        """
        target, call = self.softmoa_targets[adapter_name], self.softmoa_calls[adapter_name]
        entry = find_module(model, target.entry) if target.entry else None
        masked, layer = self._around(target, model)
        self.softmoa_hooks[adapter_name] += call.hook(entry, masked if call.reads_mask else [], layer)

    def _around(self, target: Target, model: nn.Module) -> tuple[list[nn.Module], Optional[nn.Module]]:
        """The modules that get the mask of a block that gets none itself, and the layer around the block."""
        masked = [] if self._takes_mask else [find_module(model, name) for name in target.masks]
        return masked, find_module(model, target.layer) if target.layer else None

    @contextlib.contextmanager
    def recording(self, model: nn.Module, recorder: Callable[[str, Tensor, Optional[Tensor]], None]) -> Iterator[None]:
        """A context in which a function is told what the mixtures read.

        Args:
            model (nn.Module): the base model.
            recorder (callable): is called with an adapter's name, the tokens `(B, T, D)`, and their mask `(B, T)`, true
                for real tokens, or None, also where routing needs no mask. It is not called when a backward pass runs
                the block again.
        """
        with contextlib.ExitStack() as stack:
            for adapter_name, call in self.softmoa_calls.items():
                stack.enter_context(call.keeping_mask(*self._around(self.softmoa_targets[adapter_name], model)))
            self.recorders.append(recorder)
            try:
                yield
            finally:
                self.recorders.remove(recorder)

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
        names = dict.fromkeys(self.mixed_batch.adapter_names) if self.mixed_batch else self.active_adapters
        active = [name for name in names if name in self.softmoa_experts]
        active = [] if self.disable_adapters else active
        own = {name for name in active if self.softmoa_targets[name].entry is None}
        inputs = {name: self._check_tokens(name, find_tokens(args, kwargs), args, kwargs) for name in own}
        output = self.base_layer(*args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        for name in active:
            tokens = inputs[name] if name in own else self._take_tokens(name, hidden)
            hidden = self._add(name, hidden, tokens, args, kwargs)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _add(self, adapter_name: str, hidden: Tensor, tokens: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        shape = hidden.shape
        mask: Optional[Tensor]
        try:
            given = self._find_mask(adapter_name, args, kwargs)
            if given is not None and given.name in LIMITS:
                mask, hidden, tokens = unpack(given.value, hidden.flatten(0, -2), tokens.flatten(0, -2))
            else:
                hidden, tokens = _by_sample(hidden), _by_sample(tokens)
                mask = token_mask(given, *tokens.shape[:2])
            if self.mixed_batch is None:
                output, loss = self._mix(adapter_name, hidden, tokens, mask)
            else:
                rows = self.mixed_batch.rows_of(adapter_name, len(hidden), hidden.device)
                own_mask = None if mask is None else mask[rows]
                added, loss = self._mix(adapter_name, hidden[rows], tokens[rows], own_mask)
                output = hidden.index_copy(0, rows, added)
            if given is not None and given.name in LIMITS:
                output = output[mask]
        except ValueError as error:
            raise ValueError(f"In the adapted block '{self.name}': {error}") from error
        if loss is not None and self.router_losses is not None:
            self.router_losses.append(loss)
        return output.reshape(shape)

    def _mix(
        self, adapter_name: str, hidden: Tensor, tokens: Tensor, mask: Optional[Tensor]
    ) -> tuple[Tensor, Optional[Tensor]]:
        for recorder in self.recorders if self._records() else ():
            recorder(adapter_name, tokens, mask)
        router = cast(Router, self.softmoa_router[adapter_name])
        experts = cast(BottleneckExperts, self.softmoa_experts[adapter_name])
        return add_mixture(hidden, tokens, router, experts, mask, self.softmoa_scaling[adapter_name])

    def _records(self) -> bool:
        return bool(self.recorders) and not in_backward()

    def _find_mask(self, adapter_name: str, args: tuple, kwargs: dict[str, Any]) -> Optional[Mask]:
        call = self._kept(adapter_name)
        if not (call.mixes_tokens or (call.reads_mask and self.training) or self._records()):
            return None
        return find_mask(self._arguments, args, kwargs) if self._takes_mask else call.take_mask()

    def _kept(self, adapter_name: str) -> LayerCall:
        call = self.softmoa_calls[adapter_name]
        if call.has_hooks and getattr(self, "_is_replica", False):
            raise ValueError(
                f"The adapted block '{self.name}' does not run under torch.nn.DataParallel, which shares its hooks "
                "between devices. Start one process per device with `accelerate launch` or `torchrun`."
            )
        return call

    def _take_tokens(self, adapter_name: str, output: Tensor) -> Tensor:
        tokens = self._kept(adapter_name).take_tokens()
        if tokens is None:
            raise ValueError(
                f"The adapted block '{self.name}' begins in '{self.softmoa_targets[adapter_name].entry}', which was "
                "not called before it. Adapt another module."
            )
        tokens = self._check_tokens(adapter_name, tokens, (tokens,), {})
        # Some blocks pad their tokens inside, at the end.
        return tokens[:, : output.shape[1]] if tokens.ndim == 3 else tokens

    def _check_tokens(self, adapter_name: str, tokens: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        width = self.softmoa_targets[adapter_name].in_features
        if not isinstance(tokens, Tensor):
            raise ValueError(
                f"The adapted block '{self.name}' was called without tokens: they are its first positional argument, "
                f"`hidden_states` or `input`, but it got {len(args)} positional arguments and {sorted(kwargs)}."
            )
        # More dimensions make no difference where each token is read alone.
        wrong = tokens.ndim < 2 or (tokens.ndim > 3 and self.softmoa_calls[adapter_name].mixes_tokens)
        if wrong or tokens.shape[-1] != width:
            raise ValueError(
                f"The adapted block '{self.name}' takes tokens of shape (batch, tokens, {width}) or "
                f"(batch, {width}), got {tuple(tokens.shape)}. Name it in `exclude_modules`, or adapt another one."
            )
        return tokens

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter and its hooks.

        Args:
            adapter_name (str): its name.
        """
        if adapter_name in self.softmoa_hooks:
            for handle in self.softmoa_hooks[adapter_name]:
                handle.remove()
        super().delete_adapter(adapter_name)

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


def _by_sample(tokens: Tensor) -> Tensor:
    """Tokens `(B, D)` or `(B, …, D)` as `(B, T, D)`."""
    return tokens.unsqueeze(1) if tokens.ndim == 2 else tokens.flatten(1, -2)
