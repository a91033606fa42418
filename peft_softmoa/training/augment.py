"""Augmentation of a batch, on its device: SpecAugment, mixup, and channels in reverse order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union

import torch
from torch import Tensor


def spec_augment(
    spectrograms: Tensor, mask_frequencies: int, mask_frames: int, generator: Optional[torch.Generator] = None
) -> Tensor:
    """Set a band of frequencies and a span of time to zero, in each clip others, in its channels the same.

    On an axis of size n with maximum m these are the w places from s on, with w uniform in 0, …, min(m, n), and s
    uniform in 0, …, n - w. Zero is the mean of normalized features. Source: SpecAugment
    ([1904.08779](https://arxiv.org/abs/1904.08779), section 2), without time warping.

    Args:
        spectrograms (Tensor): `(B, T, F)` or `(B, C, T, F)`.
        mask_frequencies (int): greatest width of the band in mel bins; 0 leaves all frequencies.
        mask_frames (int): greatest length of the span in frames; 0 leaves all time.
        generator (torch.Generator, optional): draws the masks. Default: that of the spectrograms' device.

    Returns:
        Tensor: of the same shape, a new tensor.

    Raises:
        ValueError: if the input is no batch of spectrograms, or a maximum is negative.
    """
    if spectrograms.ndim not in (3, 4) or min(mask_frequencies, mask_frames) < 0:
        raise ValueError(
            "SpecAugment takes spectrograms (batch, frames, mel bins), with channels after the batch or without, and "
            "maxima of at least 0, got shape "
            f"{tuple(spectrograms.shape)}, {mask_frequencies} mel bins and {mask_frames} frames."
        )
    batch, *_, frames, bins = spectrograms.shape
    masks = []
    for size, most in zip((frames, bins), (mask_frames, mask_frequencies)):
        shares = torch.rand(2, batch, 1, device=spectrograms.device, generator=generator)
        width = (shares[0] * (min(most, size) + 1)).floor()
        first = (shares[1] * (size - width + 1)).floor()
        positions = torch.arange(size, device=spectrograms.device)
        masks.append((positions >= first) & (positions < first + width))
    in_time, in_frequency = masks
    masked = in_time[:, :, None] | in_frequency[:, None, :]
    return spectrograms.masked_fill(masked if spectrograms.ndim == 3 else masked[:, None], 0.0)


def mixup(inputs: Mapping[str, Any], labels: Tensor, alpha: float) -> dict[str, Any]:
    """Mix each clip of a batch with another one (arXiv 1710.09412), waveforms or spectrograms, and their labels.

        x' = λ x_i + (1 - λ) x_j,  y' = λ y_i + (1 - λ) y_j,  λ ~ Beta(α, α)

    j goes through the batch in random order; λ is drawn for each clip, from torch's generator. Where one of the two
    clips is padded, the other one is heard; labels of frames count as far as those of the first clip do.

    Args:
        inputs (mapping): the model's inputs by name; those of floating dtypes are mixed, masks are joined.
        labels (Tensor): `(B, ...)`, as numbers that can be mixed.
        alpha (float): α, positive; the smaller it is, the more of one of the two clips is left.

    Returns:
        dict[str, Any]: the inputs, with the mixed `labels`; those that are -100 stay so.

    Raises:
        ValueError: if α is not positive.
    """
    if not alpha > 0:
        raise ValueError(f"`mixup_alpha` must be positive, or 0 for no mixup, got {alpha}.")
    others = torch.randperm(len(labels)).to(labels.device)
    shares = torch.distributions.Beta(alpha, alpha).sample((len(labels),)).to(labels.device)

    def mixed(value: Tensor) -> Tensor:
        share = shares.to(value.dtype).view(-1, *[1] * (value.ndim - 1))
        return share * value + (1 - share) * value[others]

    result = dict(inputs)
    for name, value in inputs.items():
        if name != "labels" and isinstance(value, Tensor):
            result[name] = mixed(value) if value.is_floating_point() else torch.maximum(value, value[others])
    padded = labels == -100
    result["labels"] = mixed(labels.masked_fill(padded, 0)).masked_fill(padded, -100)
    return result


def parse_mirror(given: Union[Mapping[str, str], Sequence[str], None]) -> dict[str, str]:
    """Read which classes mirror each other, as Python or a command line give it.

    Args:
        given (mapping, sequence of str, or None): classes by the class that mirrors them, or words such as
            `"left=right"`; one direction is enough.

    Returns:
        dict[str, str]: both directions; empty if nothing is given.

    Raises:
        ValueError: if a word has another form, or a class is mirrored by two.
    """
    pairs = given.items() if isinstance(given, Mapping) else [_pair(word) for word in given or ()]
    mirror: dict[str, str] = {}
    for pair in pairs:
        for name, other in (pair, pair[::-1]):
            if mirror.setdefault(name, other) != other:
                raise ValueError(
                    f"`mirror_labels` says that '{name}' is mirrored by '{mirror[name]}' and by '{other}'."
                )
    return mirror


def _pair(word: str) -> tuple[str, str]:
    name, _, other = word.partition("=")
    if not name or not other:
        raise ValueError(f"`mirror_labels` are pairs of classes, such as left=right, got '{word}'.")
    return name, other


def swap_channels(
    inputs: Mapping[str, Any], mirrored: Tensor, generator: Optional[torch.Generator] = None
) -> dict[str, Any]:
    """Reverse the order of the channels of each clip with probability 0.5, and take its mirrored labels then.

        x'_c = x_{C-1-c},  y' = mirror(y)

    Clips that lack a channel stay as they are: which side of them is missing is not known.

    Args:
        inputs (mapping): the model's inputs by name, `(B, C, ...)`, with `labels` and `channel_mask` `(B, C)`. Inputs
            without channels stay.
        mirrored (Tensor): the labels that clips have when they are mirrored, from `Task.mirrored`.
        generator (torch.Generator, optional): draws the clips, on the CPU. Default: torch's.

    Returns:
        dict[str, Any]: the inputs.

    Raises:
        ValueError: if there is no `channel_mask`, as with clips that are read as mono.
    """
    labels, mask = inputs["labels"], inputs.get("channel_mask")
    if mask is None:
        raise ValueError("`mirror_labels` reverses the order of channels, but clips are read as mono: leave it out.")
    swapped = (torch.rand(len(labels), generator=generator) < 0.5).to(labels.device) & mask.all(1)
    if mask.shape[1] == 1:
        return dict(inputs)  # a single channel has no sides

    def chosen(reversed: Tensor, value: Tensor) -> Tensor:
        return torch.where(swapped.view(-1, *[1] * (value.ndim - 1)), reversed, value)

    result = {**inputs, "labels": chosen(mirrored, labels)}
    for name, value in inputs.items():
        if name != "labels" and isinstance(value, Tensor) and value.ndim > 2:
            result[name] = chosen(value.flip(1), value)
    return result
