"""A model as it was before an adapter that could not be added."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


class Snapshot:
    """What adding an adapter changes in a model: its modules, hooks, attributes, flags and config; as they are now.

    Values of parameters and buffers are not kept: nothing that is added changes them.

    Args:
        model (nn.Module): the model.
        adapter_name (str): name of the adapter.
    """

    def __init__(self, model: nn.Module, adapter_name: str) -> None:
        self.adapter_name = adapter_name
        modules = list(model.modules())
        # Parts of a model may have configs of their own.
        configs = {id(config): config for config in (getattr(module, "config", None) for module in modules)}
        owners: list[Any] = [*modules, *configs.values()]
        self._states = [(vars(owner), _contents(vars(owner))) for owner in owners if hasattr(owner, "__dict__")]
        self._gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # it is about this model, not about a copy

    def restore(self) -> None:
        """Make the model what it was."""
        for now, before in self._states:
            for name in now.keys() - before.keys():
                del now[name]
            for name, (value, content) in before.items():
                now[name] = value
                if content is not None:  # in place: others hold it, too, such as the handles of hooks
                    value.clear()
                    value.update(content)
        for parameter, requires_grad in self._gradients:
            parameter.requires_grad_(requires_grad)


def _contents(state: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each value and, if it is a container that changes in place, a copy of it."""
    return {
        name: (value, copy.copy(value) if isinstance(value, (dict, set)) else None) for name, value in state.items()
    }
