"""Metrics of routing against cases that are computed by hand."""

import math

import pytest
import torch

from peft_softmoa.inspection import (
    class_information,
    coefficient_of_variation,
    combine_similarity,
    effective_number,
    effective_tokens,
    expert_load,
    idle_experts,
    normalized_entropy,
    output_share,
    slot_similarity,
)

MASK = torch.tensor([[True, True, False], [True, False, False]])


def weights(rows, num_slots=1):
    """Weights of two samples of three tokens, for two experts; what the mask leaves out is large."""
    return torch.tensor(rows).view(2, 3, -1, num_slots)


COMBINE = weights([[[0.5, 0.5], [1.0, 0.0], [9.0, 9.0]], [[0.0, 1.0], [9.0, 0.0], [7.0, 7.0]]])


def test_load():
    assert expert_load(COMBINE, MASK).tolist() == pytest.approx([1.5 / 3, 1.5 / 3])
    assert expert_load(COMBINE).tolist() == pytest.approx([26.5 / 44, 17.5 / 44])
    assert expert_load(COMBINE, torch.zeros_like(MASK)).tolist() == [0, 0]
    slots = weights([[[0.1, 0.2, 0.3, 0.4]] * 3] * 2, num_slots=2)
    assert expert_load(slots).tolist() == pytest.approx([0.3, 0.7])


def test_share_of_the_output():
    norms = torch.tensor([[[1.0, 3.0], [2.0, 0.0], [50.0, 1.0]], [[0.0, 2.0], [9.0, 9.0], [9.0, 9.0]]])
    assert output_share(norms, MASK).tolist() == pytest.approx([3 / 8, 5 / 8])
    assert output_share(torch.zeros(1, 2, 3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "load, entropy, number, variation",
    [
        ([0.25] * 4, 1.0, 4.0, 0.0),
        ([1.0, 0.0, 0.0, 0.0], 0.0, 1.0, math.sqrt(3)),
        ([0.5, 0.5, 0.0, 0.0], 0.5, 2.0, 1.0),
        ([1.0], 1.0, 1.0, 0.0),
    ],
)
def test_how_evenly_a_load_is_spread(load, entropy, number, variation):
    load = torch.tensor(load, dtype=torch.float64)
    assert float(normalized_entropy(load)) == pytest.approx(entropy)
    assert float(effective_number(load)) == pytest.approx(number)
    assert float(coefficient_of_variation(load)) == pytest.approx(variation)
    assert normalized_entropy(torch.stack([load, load])).tolist() == pytest.approx([entropy] * 2)


def test_idle_experts():
    load = torch.tensor([0.02, 0.5, 0.03, 0.45])
    assert idle_experts(load) == [0] and idle_experts(load, 0.2) == [0, 2] and idle_experts(load, 0.01) == []


def test_from_how_many_tokens_a_slot_reads():
    # The first expert reads two tokens alike, the second one alone; the third row of the mask has nothing.
    dispatch = weights([[[0.5, 1.0], [0.5, 0.0], [5.0, 5.0]], [[1.0, 1.0], [5.0, 5.0], [5.0, 5.0]]])
    assert effective_tokens(dispatch, MASK).flatten().tolist() == pytest.approx([1.5, 1.0])
    none = torch.tensor([[True, True, False], [False] * 3])
    assert effective_tokens(dispatch, none).flatten().tolist() == pytest.approx([2.0, 1.0])
    # Of weights that do not sum to one, as an expert's of chosen tokens.
    assert effective_tokens(3 * dispatch, MASK).flatten().tolist() == pytest.approx([1.5, 1.0])
    idle = dispatch.clone()
    idle[:, :, 0] = 0
    assert effective_tokens(idle, MASK).flatten().tolist() == pytest.approx([0.0, 1.0])


def test_similarity_of_slots():
    dispatch = torch.zeros(1, 3, 3, 1, dtype=torch.float64)
    dispatch[0, :, 0, 0] = dispatch[0, :, 1, 0] = torch.tensor([0.5, 0.5, 0.0])
    dispatch[0, :, 2, 0] = torch.tensor([0.5, 0.0, 0.5])
    expected = torch.tensor([[1, 1, 0.5], [1, 1, 0.5], [0.5, 0.5, 1]], dtype=torch.float64)
    torch.testing.assert_close(slot_similarity(dispatch), expected)
    # Without the first token, the third slot shares none.
    mask = torch.tensor([[False, True, True]])
    twins = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(slot_similarity(dispatch, mask), twins)
    # The mean is over the samples that have something.
    both = torch.cat([dispatch, dispatch])
    torch.testing.assert_close(slot_similarity(both, torch.tensor([[True] * 3, [False] * 3])), expected)


def test_similarity_of_tokens():
    assert float(combine_similarity(COMBINE, MASK)) == pytest.approx(math.sqrt(0.5))  # of the one pair that there is
    assert float(combine_similarity(torch.ones(2, 5, 3, 2))) == pytest.approx(1.0)
    assert math.isnan(combine_similarity(COMBINE, torch.tensor([[True, False, False]] * 2)))


def test_similarity_of_tokens_is_the_mean_over_pairs():
    torch.manual_seed(0)
    combine, mask = torch.rand(3, 6, 4, 2), torch.rand(3, 6) > 0.3
    cosines = [
        torch.nn.functional.cosine_similarity(sample[one].flatten(), sample[other].flatten(), dim=0)
        for sample, real in zip(combine.double(), mask)
        for one in range(6)
        for other in range(one)
        if real[one] and real[other]
    ]
    assert float(combine_similarity(combine, mask)) == pytest.approx(float(torch.stack(cosines).mean()))


def test_information_on_the_class():
    own = torch.eye(2, dtype=torch.float64)
    assert float(class_information(own)) == pytest.approx(1.0)
    assert float(class_information(torch.full((4, 3), 1 / 3, dtype=torch.float64))) == pytest.approx(0.0, abs=1e-12)
    assert float(class_information(torch.cat([own, torch.zeros(2, 2)]))) == pytest.approx(1.0)
    # q = [[3/8, 1/8], [1/8, 3/8]]
    expected = 2 * (3 / 8 * math.log2(3 / 2) + 1 / 8 * math.log2(1 / 2))
    loads = torch.tensor([[0.75, 0.25], [0.25, 0.75]], dtype=torch.float64)
    assert float(class_information(loads)) == pytest.approx(expected)


@pytest.mark.parametrize("metric", [expert_load, effective_tokens, slot_similarity, combine_similarity])
def test_padded_tokens_contribute_nothing(metric):
    torch.manual_seed(0)
    values = torch.rand(2, 5, 3, 2)
    mask = torch.tensor([[True] * 4 + [False], [True] * 2 + [False] * 3])
    other = values.masked_fill(~mask[:, :, None, None], float("nan"))
    assert torch.equal(metric(values, mask), metric(other, mask)) and not metric(other, mask).isnan().any()
