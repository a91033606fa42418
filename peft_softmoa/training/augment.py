"""Augmentation of a batch, on its device: SpecAugment and mixup."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

import torch
from torch import Tensor


def spec_augment(
    spectrograms: Tensor, mask_frequencies: int, mask_frames: int, generator: Optional[torch.Generator] = None
) -> Tensor:
    """Set a band of frequencies and a span of time to zero, in each spectrogram others.

    On an axis of size n with maximum m these are the w places from s on, with w uniform in 0, …, min(m, n), and s
    uniform in 0, …, n - w. Zero is the mean of normalized features. Source: SpecAugment
    ([1904.08779](https://arxiv.org/abs/1904.08779), section 2), without time warping.

    Args:
        spectrograms (Tensor): `(B, T, F)`.
        mask_frequencies (int): greatest width of the band in mel bins; 0 leaves all frequencies.
        mask_frames (int): greatest length of the span in frames; 0 leaves all time.
        generator (torch.Generator, optional): draws the masks. Default: that of the spectrograms' device.

    Returns:
        Tensor: `(B, T, F)`, a new tensor.

    Raises:
        ValueError: if the input is no batch of spectrograms, or a maximum is negative.
    """
    if spectrograms.ndim != 3 or min(mask_frequencies, mask_frames) < 0:
        raise ValueError(
            "SpecAugment takes spectrograms (batch, frames, mel bins) and maxima of at least 0, got shape "
            f"{tuple(spectrograms.shape)}, {mask_frequencies} mel bins and {mask_frames} frames."
        )
    batch, *sizes = spectrograms.shape
    masks = []
    for size, most in zip(sizes, (mask_frames, mask_frequencies)):
        shares = torch.rand(2, batch, 1, device=spectrograms.device, generator=generator)
        width = (shares[0] * (min(most, size) + 1)).floor()
        first = (shares[1] * (size - width + 1)).floor()
        positions = torch.arange(size, device=spectrograms.device)
        masks.append((positions >= first) & (positions < first + width))
    in_time, in_frequency = masks
    return spectrograms.masked_fill(in_time[:, :, None] | in_frequency[:, None, :], 0.0)


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
