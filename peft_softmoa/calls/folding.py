"""The hooks by which a mono model takes clips of several channels: each channel is a sample, and logits are the mean.

Letters of all shapes: B batch, C channels, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, Optional

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .channels import Channels, Folded, keep_channels
from .forward_pass import ForwardPasses
from .masks import CUMULATIVE_LENGTHS, argument_names, is_mask

# The argument that says which channels are there.
CHANNEL_MASK = "channel_mask"
# Heads of models for CTC, whose loss may be a sum over samples.
CTC_HEADS = ("lm_head", "ctc_head")


class Reader(NamedTuple):
    """How a model and one adapter in it take clips of several channels.

    Args:
        adapter_name (str): name of the adapter.
        num_channels (int, optional): C. None: any number.
        audio (str): the argument with the clips.
        dimensions (int): how many dimensions it has in the model itself, with that of the batch.
        arguments (tuple[str, ...]): all arguments of the model, in their order.
        head (str, optional): name of the module that makes the logits; None if there is none.
    """

    adapter_name: str
    num_channels: Optional[int]
    audio: str
    dimensions: int
    arguments: tuple[str, ...]
    head: Optional[str]


def make_reader(
    model: nn.Module, adapter_name: str, num_channels: Optional[int], dimensions: Optional[int] = None
) -> Reader:
    """Find out how a model takes clips of several channels.

    Args:
        model (nn.Module): the base model, with or without adapters.
        adapter_name (str): name of the adapter.
        num_channels (int, optional): C. Default: any number.
        dimensions (int, optional): dimensions of the model's own inputs. Default: 2 for `input_values`, else 3.

    Returns:
        Reader: what the hooks need.

    Raises:
        ValueError: if the model writes text, or takes anything beside audio.
    """
    arguments = argument_names(model)
    other = [name for name in arguments if name.startswith("decoder_") or name.endswith(("input_ids", "pixel_values"))]
    # A model for CTC may have inherited what others generate with.
    generates = hasattr(model, "prepare_inputs_for_generation") and not any(hasattr(model, name) for name in CTC_HEADS)
    if generates or other:
        beside = f", which takes {other[0]!r}" if other else ", which generates"
        raise ValueError(
            "`num_channels` is for models that take audio alone: classifiers of clips and of frames, CTC, and their "
            f"encoders. Leave it out for {type(model).__name__}{beside}, or adapt its audio encoder as a model."
        )
    audio = next((name for name in ("input_values", "input_features") if name in arguments), arguments[0])
    head = next((name for name in (*SEQ_CLS_HEAD_NAMES, *CTC_HEADS) if hasattr(model, name)), None)
    own = dimensions or (2 if audio == "input_values" else 3)
    return Reader(adapter_name, num_channels, audio, own, arguments, head)


def follow_channels(
    model: nn.Module, passes: ForwardPasses, block: BaseTunerLayer, reader: Reader
) -> list[RemovableHandle]:
    """Let a model take clips of several channels while an adapter is in use.

        logits = Σ_c present[c] · head(encoder(x[c])) / Σ_c present[c]

    Its loss is that of these logits. What else it returns has a row for each channel, `(B, C, …)`.

    Args:
        model (nn.Module): the base model, with the adapter.
        passes (ForwardPasses): its passes.
        block (BaseTunerLayer): a block that the adapter adapts, which tells whether it is in use.
        reader (Reader): as from `make_reader`.

    Returns:
        list[RemovableHandle]: they remove the hooks. Those that close a pass have to be added after them.
    """
    return [
        model.register_forward_pre_hook(partial(_fold, passes, block, reader), with_kwargs=True),
        model.register_forward_hook(partial(_unfold, passes, reader)),
    ]


def average_logits(model: nn.Module, passes: ForwardPasses, reader: Reader) -> list[RemovableHandle]:
    """Let the head of a model make the mean over the channels of a clip, the same for all of them.

    Args:
        model (nn.Module): the base model, with the adapter.
        passes (ForwardPasses): its passes.
        reader (Reader): as from `make_reader`.

    Returns:
        list[RemovableHandle]: they remove the hooks. Those that mix heads have to be added before them.
    """
    if reader.head is None:
        return []
    # Without the model, of which a copy of the head would make a copy.
    return [getattr(model, reader.head).register_forward_hook(partial(_average, passes))]


def _fold(
    passes: ForwardPasses,
    block: BaseTunerLayer,
    reader: Reader,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Optional[tuple[tuple[Any, ...], dict[str, Any]]]:
    current = passes.current
    batch = current.mixed_batch
    names = block.active_adapters if batch is None else batch.adapter_names
    # Another adapter's hook may have done it in the same call.
    if block.disable_adapters or reader.adapter_name not in names or current.folded is not None:
        return None
    given = {**dict(zip(reader.arguments, args)), **kwargs}
    channels = _read_channels(reader, given)
    own = [name for name, value in given.items() if isinstance(value, Tensor) and is_mask(name) and value.ndim == 3]
    head = None if reader.head is None else getattr(model, reader.head)
    if batch is not None:
        current.mixed_batch = batch._replace(beams=batch.beams * channels.count)
    rows = channels.rows()
    folded = {name: _fold_argument(reader, channels, rows, name, value) for name, value in given.items()}
    current.folded = Folded(channels, reader.adapter_name, head, [folded[name] for name in own])
    return tuple(folded[name] for name, _ in zip(reader.arguments, args)), {
        name: folded[name] for name in kwargs if name != CHANNEL_MASK
    }


def _read_channels(reader: Reader, given: Mapping[str, Any]) -> Channels:
    """The channels of the clips with which the model is called."""
    clips, wanted = given.get(reader.audio), reader.num_channels
    if not isinstance(clips, Tensor) or clips.ndim != reader.dimensions + 1:
        found = f"of shape {tuple(clips.shape)}" if isinstance(clips, Tensor) else type(clips).__name__
        raise ValueError(
            f"The adapter '{reader.adapter_name}' is for clips of several channels: `{reader.audio}` must have "
            f"{reader.dimensions + 1} dimensions, the first two (batch, {wanted or 'channels'}), got {found}. Stack "
            "the channels of each clip, also if it has one only."
        )
    batch, count = clips.shape[:2]
    if wanted is not None and count != wanted:
        raise ValueError(
            f"The adapter '{reader.adapter_name}' has num_channels={wanted}, but `{reader.audio}` of shape "
            f"{tuple(clips.shape)} has {count}. Fill up missing channels, and name them in `{CHANNEL_MASK}`; an "
            "adapter with channel_embedding=False takes any number."
        )
    present = given.get(CHANNEL_MASK)
    if present is None:
        return Channels(batch, count)
    if not isinstance(present, Tensor) or present.dtype != torch.bool or present.shape != (batch, count):
        found = f"{present.dtype} {tuple(present.shape)}" if isinstance(present, Tensor) else type(present).__name__
        raise ValueError(
            f"`{CHANNEL_MASK}` must be boolean of shape ({batch}, {count}), true for channels that are there, got "
            f"{found}."
        )
    present = present.to(clips.device)
    # A compiled model gives no numbers for a clip without channels.
    if not torch.compiler.is_compiling() and not bool(present.any(dim=1).all()):
        raise ValueError(f"`{CHANNEL_MASK}` must be true for at least one channel of each clip.")
    return Channels(batch, count, present)


def _is_even(channels: Channels, mask: Tensor) -> bool:
    """Whether a mask `(B·C, T)` is known to be the same for all channels of a clip."""
    by_channel = mask.unflatten(0, (channels.batch, channels.count))
    return not torch.compiler.is_compiling() and bool((by_channel == by_channel[:, :1]).all())


def _fold_argument(reader: Reader, channels: Channels, rows: Optional[Tensor], name: str, value: Any) -> Any:
    """From `(B, C, …)` to `(B·C, …)`, with what another channel holds in place of a missing one."""
    if name == "num_items_in_batch" and value is not None:
        return value * channels.count  # as there are so many labels
    if not isinstance(value, Tensor) or name == CHANNEL_MASK:
        return value
    if name == "labels":
        return value.repeat_interleave(channels.count, dim=0)
    leading = (channels.batch, channels.count)
    is_known = name == reader.audio or (is_mask(name) and name not in CUMULATIVE_LENGTHS)
    if is_known and value.ndim == 2 and value.shape[0] == channels.batch and name != reader.audio:
        return value.repeat_interleave(channels.count, dim=0)
    if not is_known or value.shape[:2] != leading:
        raise ValueError(
            f"`{name}` of shape {tuple(value.shape)} does not say which channels it is about. With `num_channels`, a "
            f"model takes `{reader.audio}`, masks of tokens of shape {leading} + (time,) or ({channels.batch}, time), "
            f"`labels` and `{CHANNEL_MASK}`. Leave it out."
        )
    samples = value.flatten(0, 1)
    return samples if rows is None else samples[rows.to(value.device)]


def _average(passes: ForwardPasses, head: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    current = passes.current
    folded = current.folded
    if folded is None or folded.averaged is not None:
        return output
    # In a mixed batch, a copy of the head that belongs to an adapter runs on some of the clips.
    if current.mixed_batch is not None and head is not folded.head:
        return output
    if output.ndim > 2 and not all(_is_even(folded.channels, mask) for mask in folded.masks):
        raise ValueError(
            "The masks of a clip's channels differ, so that the mean over them is not that of the same frames. Give a "
            "mask (batch, time), for all channels."
        )
    folded.averaged = folded.channels.average(output)
    return folded.averaged


def _unfold(passes: ForwardPasses, reader: Reader, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    current = passes.current
    folded = current.folded
    if folded is None or folded.adapter_name != reader.adapter_name:
        return output
    channels, is_compiling = folded.channels, torch.compiler.is_compiling()
    if isinstance(output, dict):
        values: dict[Any, Any] = dict(output)
    elif isinstance(output, tuple):
        # The loss comes first, if there is one, then the logits.
        has_loss = isinstance(output[0], Tensor) and output[0].ndim == 0
        names = [*(["loss"] if has_loss else []), *(["logits"] if folded.head is not None else [])]
        values = dict(enumerate(output))
        values = {names[index] if index < len(names) else index: value for index, value in values.items()}
    else:
        values = {"logits" if folded.head is not None else 0: output}
    for name, value in values.items():
        if name == "loss":
            is_sum = reader.head in CTC_HEADS and getattr(model.config, "ctc_loss_reduction", None) == "sum"
            values[name] = value / channels.count if is_sum and value is not None else value
        elif name == "logits":
            if not is_compiling:
                _check_logits(model, folded, value)
            values[name] = value.unflatten(0, (channels.batch, channels.count))[:, 0]
        else:
            values[name] = _by_clip(channels, value)
    if torch.is_grad_enabled() and not is_compiling:
        keep_channels(passes.kept_channels, channels, values.values())
    if isinstance(output, dict):
        for name, value in values.items():
            if value is not None:
                output[name] = value
        return output
    return tuple(values.values()) if isinstance(output, tuple) else next(iter(values.values()))


def _by_clip(channels: Channels, value: Any) -> Any:
    if isinstance(value, Tensor):
        return channels.by_clip(value)
    if type(value) in (tuple, list):
        return type(value)(_by_clip(channels, each) for each in value)
    return value


def _check_logits(model: nn.Module, folded: Folded, logits: Tensor) -> None:
    """Check that the model's logits are the mean that the head has given, or are made of it row by row."""
    averaged = folded.averaged
    if averaged is not None:
        if logits.untyped_storage().data_ptr() == averaged.untyped_storage().data_ptr():
            return
        by_channel = logits.unflatten(0, (folded.channels.batch, folded.channels.count))
        if torch.equal(by_channel, by_channel[:, :1].expand_as(by_channel)):
            return
    raise ValueError(
        f"The module of {type(model).__name__} that makes its logits was not found, so that the loss would not be that "
        f"of the mean over channels: it must be called {', '.join((*SEQ_CLS_HEAD_NAMES, *CTC_HEADS))}."
    )
