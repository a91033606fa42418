"""The made task in which the order of two sounds is the class."""

import torch
from order_of_sounds import BUDGET, METHODS, main, make_clips, train


def test_only_the_order_tells_the_class():
    clips, labels = make_clips(400, torch.Generator().manual_seed(0))
    loud = clips > 0.6
    low, high = loud[:, :4].any(dim=1), loud[:, 4:].any(dim=1)
    first_low, first_high = (each.int().argmax(dim=1) for each in (low, high))
    assert torch.equal(labels, (first_low < first_high).long()) and 150 < labels.sum() < 250
    # Neither sound is longer, nor the pair elsewhere, in one of the classes.
    for each in (low.sum(dim=1), high.sum(dim=1), torch.minimum(first_low, first_high)):
        means = [each[labels == label].float().mean() for label in (0, 1)]
        assert abs(means[0] - means[1]) < 2


def test_conformers_beat_bottlenecks_of_equal_size():
    """With fewer seeds and steps than the example's own."""
    for seed in range(2):
        found = {name: train(seed, steps=150, **METHODS[name]) for name in ("bottleneck", "conformer")}
        accuracies, sizes = zip(*found.values())
        assert max(sizes) <= BUDGET < 1.08 * min(sizes)
        assert accuracies[1] > accuracies[0] + 0.05 and accuracies[1] > 0.9


def test_it_prints_differences_with_their_intervals(capsys):
    accuracies = main(["--seeds", "2", "--steps", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("seed 0, bottleneck: ") and len(lines) == 6 + 2 + 3
    assert [len(each) for each in accuracies.values()] == [2, 2, 2]
    assert lines[-3].startswith("bottleneck, ") and lines[-3].endswith(", +0.0")
