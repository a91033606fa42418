"""SoftMoALayer: one adapted block and the mixtures of its adapters, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional, TypeGuard

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .calls.caches import find_past
from .calls.channels import Channels, check_channels
from .calls.forward_pass import ForwardPasses, in_backward
from .calls.masks import (
    CUMULATIVE_LENGTHS,
    Mask,
    argument_names,
    find_mask,
    find_tokens,
    is_mask,
    past_horizon,
    token_mask,
    unpack,
)
from .calls.one_pass import Call, CallKey, ForwardPass
from .method import Mixture
from .method.past import Past
from .targets.choice import Target

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
        target (Target): where it is in the model, D and D', and whether it is causal.
        options (mapping): the other arguments of `Mixture`.
        scaling (float): the factor on what the mixture adds.
        forward_passes (ForwardPasses): the passes of the model.
    """

    # All names of layers that may contain adapter (trainable) weights
    adapter_layer_names = ("softmoa_mixture",)
    # All names of other parameters that may contain adapter-related parameters
    other_param_names = ("scaling", "initial_scaling", "softmoa_targets", "softmoa_hooks")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        target: Target,
        options: Mapping[str, Any],
        scaling: float,
        forward_passes: ForwardPasses,
    ) -> None:
        super().__init__()
        self.name = target.name
        # D and D', under the names that linear layers and PEFT's own tuner layers have for them.
        self.in_features, self.out_features = target.in_features, target.out_features
        self.base_layer = base_layer
        self.forward_passes = forward_passes
        self._arguments, self._past = argument_names(base_layer), past_horizon(base_layer)
        self.takes_mask = any(map(is_mask, self._arguments))
        self.softmoa_mixture = nn.ModuleDict()
        # The strength of each adapter, as LoRA's layers have it, and what its config says.
        self.scaling: dict[str, float] = {}
        self.initial_scaling: dict[str, float] = {}
        self.softmoa_targets: dict[str, Target] = {}
        # What removes the adapters' hooks, also those of an adapter as a whole.
        self.softmoa_hooks: dict[str, list[RemovableHandle]] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # flag to enable/disable casting of input to weight dtype during forward call, which PEFT's helper sets
        self.cast_input_dtype_enabled = True
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, target, options, scaling)

    def update_layer(self, adapter_name: str, target: Target, options: Mapping[str, Any], scaling: float) -> None:
        """Add an adapter to the block; the arguments are those of the class."""
        widths = target.in_features, target.out_features
        self.softmoa_mixture[adapter_name] = Mixture(*widths, **options, causal=target.causal)
        self.scaling[adapter_name] = self.initial_scaling[adapter_name] = scaling
        self.softmoa_targets[adapter_name] = target
        self.softmoa_hooks[adapter_name] = []
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the strength of an adapter, if the block has it, as a multiple of its config's `scaling`."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.initial_scaling[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of the active adapters."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: Optional[float] = None) -> None:
        """Divide the strength of the active adapters or, without a divisor, take it from their configs again."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = self.initial_scaling[name] if scale is None else self.scaling[name] / scale

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block and add the active mixtures.

        Args:
            *args (Any): what the block takes. The tokens, `(B, T, D)` or `(B, D)`, are the first positional argument,
                or `hidden_states` or `input`.
            **kwargs (Any): the same, by name.

        Returns:
            Tensor or tuple: what the block returns, `(B, T, D')` or `(B, D')`, in the block's dtype.

        Raises:
            ValueError: if there are no tokens or their shape is wrong.
        """
        current = self.forward_passes.current
        batch = current.mixed_batch
        names = self.active_adapters if batch is None else dict.fromkeys(batch.adapter_names)
        active = [name for name in names if name in self.softmoa_mixture]
        active = [] if self.disable_adapters else active
        if self.disable_adapters and self.forward_passes.stream is not None:
            self.forward_passes.stream.check_off(self.name)
        tokens = find_tokens(args, kwargs)
        inputs = {
            name: self._check_tokens(name, tokens, args, kwargs)
            for name in active
            if self.softmoa_targets[name].entry is None
        }
        if batch is not None and not any(target.layer for target in self.softmoa_targets.values()):
            batch.check_call(self.name, tokens)
        output = self.base_layer(*args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        for name in active:
            read = inputs[name] if name in inputs else self._take_tokens(name, hidden)
            hidden = self._add(current, name, hidden, read, args, kwargs)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _add(
        self,
        current: ForwardPass,
        adapter_name: str,
        hidden: Tensor,
        tokens: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        shape = hidden.shape
        mask: Optional[Tensor]
        mixture: Mixture = self.softmoa_mixture[adapter_name]  # type: ignore[assignment]
        try:
            cache = self.forward_passes.find_cache(self._call_key(adapter_name))
            given = self._find_mask(adapter_name, args, kwargs)
            is_packed = given is not None and given.name in CUMULATIVE_LENGTHS
            channels = self.forward_passes.find_channels()
            channels = check_channels(channels, mixture.num_channels, is_packed, in_backward())
            if given is not None and is_packed:
                mask, hidden, tokens = unpack(given.value, hidden.flatten(0, -2), tokens.flatten(0, -2))
            else:
                hidden, tokens = _by_sample(hidden), _by_sample(tokens)
                mask = token_mask(given, tokens.shape[0], tokens.shape[1], getattr(cache, "num_tokens", None))
            stream, key = self.forward_passes.stream, (self.name, adapter_name)
            past = find_past(mixture, key, stream, current.of_model, cache, is_packed, self.training)
            if current.mixed_batch is None:
                output = self._mix(current, adapter_name, hidden, tokens, mask, past, channels)
            else:
                rows = current.mixed_batch.rows_of(adapter_name, len(hidden), hidden.device)
                # What is kept is of all samples, whichever adapter they have.
                own = rows if past is None else slice(None)
                own_mask = None if mask is None else mask[own]
                if channels is not None and past is None:
                    channels = channels.select(current.mixed_batch.samples_of(adapter_name))
                added = self._mix(current, adapter_name, hidden[own], tokens[own], own_mask, past, channels)
                output = hidden.index_copy(0, rows, added if past is None else added[rows])
        except ValueError as error:
            raise ValueError(f"In the adapted block '{self.name}': {error}") from error
        return (output[mask] if is_packed else output).reshape(shape)

    def _mix(
        self,
        current: ForwardPass,
        adapter_name: str,
        hidden: Tensor,
        tokens: Tensor,
        mask: Optional[Tensor],
        past: Optional[Past],
        channels: Optional[Channels],
    ) -> Tensor:
        mixture: Any = self.softmoa_mixture[adapter_name]
        count = 1 if channels is None else channels.count
        if channels is not None:
            hidden, tokens, mask = channels.join_all(hidden, tokens, mask)
        if self._is_recorded():
            call = Call(tokens, mask, past, mixture.record_reading(tokens, mask, past, count))
            for recorder in self.forward_passes.recorders:
                recorder(self, adapter_name, call)
        # The same mask when a checkpoint runs the block again, which is not recorded.
        mask = mask if self._reads_mask(adapter_name) else None
        scaling = self.scaling[adapter_name]
        output, loss = mixture(tokens, mask, added_to=hidden, scaling=scaling, past=past, channels=count)
        if loss is not None and current.router_losses is not None:
            current.router_losses.append(loss)
        return output if channels is None else channels.split(output)

    def _reads_mask(self, adapter_name: str) -> bool:
        mixture: Mixture = self.softmoa_mixture[adapter_name]  # type: ignore[assignment]
        return mixture.mixes_tokens or (mixture.has_router_loss and self.training)

    def _is_recorded(self) -> bool:
        return bool(self.forward_passes.recorders) and not in_backward()

    def _find_mask(self, adapter_name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Optional[Mask]:
        if not (self._reads_mask(adapter_name) or self._is_recorded()):
            return None
        if self.takes_mask:
            return find_mask(self._arguments, args, kwargs, self._past)
        target = self.softmoa_targets[adapter_name]
        return self.forward_passes.read_mask(self._call_key(adapter_name), self.name) if target.masks else None

    def _call_key(self, adapter_name: str) -> CallKey:
        return CallKey(adapter_name, self.softmoa_targets[adapter_name].scope)

    def _take_tokens(self, adapter_name: str, output: Tensor) -> Tensor:
        entry = str(self.softmoa_targets[adapter_name].entry)
        tokens = self.forward_passes.take_tokens(self._call_key(adapter_name), entry)
        if tokens is None:
            raise ValueError(
                f"The adapted block '{self.name}' begins in '{entry}', which was not called before it. Adapt another "
                "module."
            )
        tokens = self._check_tokens(adapter_name, tokens, (tokens,), {})
        # Some blocks pad their tokens inside, at the end.
        return tokens[:, : output.shape[1]] if tokens.ndim == 3 else tokens

    def _check_tokens(self, adapter_name: str, tokens: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        width = self.softmoa_targets[adapter_name].in_features
        if not isinstance(tokens, Tensor):
            raise ValueError(
                f"The adapted block '{self.name}' was called without tokens: they are its first positional argument, "
                f"`hidden_states` or `input`, but it got {len(args)} positional arguments and {sorted(kwargs)}."
            )
        # More dimensions make no difference where each token is read alone.
        wrong = tokens.ndim < 2 or (tokens.ndim > 3 and self.softmoa_mixture[adapter_name].mixes_tokens)
        if wrong or tokens.shape[-1] != width:
            raise ValueError(
                f"The adapted block '{self.name}' takes tokens of shape (batch, tokens, {width}) or "
                f"(batch, {width}), got {tuple(tokens.shape)}. Name it in `exclude_modules`, or adapt another one."
            )
        return tokens

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter and its hooks."""
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
        return super()._get_base_layer_device_and_dtype(base_layer)  # type: ignore[no-untyped-call]

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        """Impossible: a ValueError that says why."""
        raise ValueError(CANNOT_MERGE)

    def unmerge(self) -> None:
        """Impossible: a ValueError that says why."""
        raise ValueError(CANNOT_MERGE)

    def __repr__(self) -> str:
        return "softmoa." + super().__repr__()


def _by_sample(tokens: Tensor) -> Tensor:
    """Tokens `(B, D)` or `(B, …, D)` as `(B, T, D)`."""
    return tokens.unsqueeze(1) if tokens.ndim == 2 else tokens.flatten(1, -2)


def is_adapted(module: nn.Module) -> TypeGuard[SoftMoALayer]:
    """Whether a module is a block with mixtures, also one that an earlier import of this package has made."""
    return isinstance(module, BaseTunerLayer) and module.adapter_layer_names == SoftMoALayer.adapter_layer_names
