"""Classes of streams and of a model, which mean the same by the same number."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from torch import nn

from .rows import name_some
from .streams import AudioStream

# What transformers calls the classes of a model that has no names for them.
GENERIC = re.compile(r"LABEL_\d+")


def check_classes(streams: Mapping[str, Any], model: Optional[nn.Module] = None) -> None:
    """Check that streams, and the model that reads them, have the same classes in the same order.

    A label is the index of a class: where the lists differ, it means one class here and another one there. A model
    whose classes have no names, only LABEL_0, LABEL_1, …, must have as many.

    Args:
        streams (mapping): what is read, by the name of its use; only what is an `AudioStream` with labels is compared.
        model (nn.Module, optional): the model, with its active adapter. Default: the streams are compared with each
            other only.

    Raises:
        ValueError: if the classes differ; the message says how.
    """
    names: dict[str, Sequence[str]] = {
        use: stream.label_names
        for use, stream in streams.items()
        if isinstance(stream, AudioStream) and stream.label_names
    }
    if not names:
        return
    first, *others = names
    for other in others:
        difference = _difference(names[first], names[other])
        if difference:
            raise ValueError(
                f"The {other} stream has other classes than the {first} stream: {difference}. Load it with "
                f"`label_names` of the {first} stream, as in `load_stream(..., label_names=stream.label_names)`."
            )
    labels: Optional[dict[int, str]] = getattr(getattr(model, "config", None), "id2label", None)
    if not labels:
        return
    expected = [labels[index] for index in sorted(labels)]
    difference = _difference(expected, names[first])
    if difference and all(map(GENERIC.fullmatch, expected)):
        counts = len(expected), len(names[first])
        # A model with a head of its own may have the config of its encoder, which knows nothing of the classes.
        modules = model.modules() if model is not None else ()
        has_head = any(getattr(module, "out_features", None) == counts[0] for module in modules)
        differs = has_head and counts[0] != counts[1]
        difference = f"the model has {counts[0]}, the stream {counts[1]}" if differs else ""
    if difference:
        raise ValueError(
            f"The {first} stream has other classes than the model: {difference}. Give the adapter the classes of the "
            "stream, `SoftMoAConfig(label_names=stream.label_names)` with its head in `modules_to_save`, or load the "
            "stream with `label_names` of the model."
        )


def _difference(expected: Sequence[str], given: Sequence[str]) -> str:
    """How two lists of classes differ, in words; empty if they do not."""
    lacking = [name for name in expected if name not in given]
    more = [name for name in given if name not in expected]
    parts = [f"it lacks {name_some(map(repr, lacking), 5)}"] * bool(lacking) + [
        f"it has {name_some(map(repr, more), 5)} besides"
    ] * bool(more)
    if not parts and list(expected) != list(given):
        index = next(index for index, pair in enumerate(zip(expected, given)) if pair[0] != pair[1])
        parts = [f"class {index} is {given[index]!r} and not {expected[index]!r}"]
    return ", ".join(parts)
