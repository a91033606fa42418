import pytest
import torch

from peft_softmoa.training import spec_augment


def test_bands_and_spans_have_the_sizes_they_may_have():
    torch.manual_seed(0)
    spectrograms = torch.rand(2000, 50, 20) + 1
    given = spec_augment(spectrograms, 8, 30)
    masked = given == 0
    assert torch.equal(given[~masked], spectrograms[~masked]) and (spectrograms > 0).all()
    frames, bins = masked.all(2), masked.all(1)
    assert torch.equal(masked, frames[:, :, None] | bins[:, None, :])
    for rows, most in ((frames, 30), (bins, 8)):
        widths = rows.sum(1)
        counts = torch.bincount(widths, minlength=most + 1).float() / len(rows)
        assert len(counts) == most + 1
        assert (counts - 1 / (most + 1)).abs().max() < 5 * (1 / (most + 1) / len(rows)) ** 0.5  # uniform
        # One run, anywhere.
        edges = rows.int().diff(dim=1, prepend=torch.zeros(len(rows), 1), append=torch.zeros(len(rows), 1))
        assert (edges == 1).sum(1).max() == 1
        assert rows.any(0).all()


def test_no_masks_and_more_than_there_is():
    spectrograms = torch.ones(3, 5, 4)
    assert torch.equal(spec_augment(spectrograms, 0, 0), spectrograms)
    given = spec_augment(spectrograms, 100, 100)
    assert given.shape == spectrograms.shape and (spectrograms == 1).all()


def test_a_generator_repeats_the_masks():
    spectrograms = torch.ones(3, 50, 40)
    first, second, third = (
        spec_augment(spectrograms, 20, 30, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, second) and not torch.equal(first, third)


@pytest.mark.parametrize("shape, mask", [((5, 4), 1), ((1, 1, 2, 5, 4), 1), ((3, 5, 4), -1)])
def test_what_is_refused(shape, mask):
    with pytest.raises(ValueError, match="SpecAugment takes spectrograms"):
        spec_augment(torch.ones(shape), mask, 0)
