import oracle
import pytest
import torch

from peft_softmoa.experts import BottleneckExperts


@pytest.mark.parametrize("num_experts, num_slots", [(1, 1), (3, 2), (4, 1)])
def test_each_slot_goes_to_its_expert(num_experts, num_slots):
    experts = BottleneckExperts(num_experts, 5, 3, 7).double()
    experts.reset_parameters(identity=False)
    slots = torch.randn(2, num_experts * num_slots, 5, dtype=torch.float64)
    outputs = experts(slots)
    assert outputs.shape == (2, num_experts * num_slots, 7)
    for b in range(2):
        for s in range(num_experts * num_slots):
            n = s // num_slots
            weights = (experts.down_weight[n], experts.down_bias[n], experts.up_weight[n], experts.up_bias[n])
            torch.testing.assert_close(outputs[b, s], oracle.bottleneck(slots[b, s], *weights), rtol=1e-10, atol=1e-12)


def test_fresh_experts_give_zero_and_can_learn():
    experts = BottleneckExperts(2, 4, 3, 4)
    slots = torch.randn(1, 2, 4)
    output = experts(slots)
    assert (output == 0).all()
    (output - 1).pow(2).sum().backward()
    assert (experts.up_weight.grad != 0).any() and (experts.up_bias.grad != 0).any()


def test_both_projections_at_zero_are_a_dead_point():
    """Why `down` starts at random: with the reference code's start, only the bias of `up` ever learns."""
    experts = BottleneckExperts(2, 4, 3, 4)
    torch.nn.init.zeros_(experts.down_weight)
    optimizer = torch.optim.SGD(experts.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (experts(torch.randn(1, 2, 4)) - 1).pow(2).sum().backward()
        optimizer.step()
    assert (experts.down_weight == 0).all() and (experts.up_weight == 0).all()
    assert (experts.up_bias != 0).all()


def test_random_experts_have_no_zeros():
    experts = BottleneckExperts(2, 4, 3, 4)
    experts.reset_parameters(identity=False)
    assert all((parameter != 0).all() for parameter in experts.parameters())


def test_dropout_acts_in_training_only():
    experts = BottleneckExperts(2, 8, 6, 4, dropout=0.5)
    experts.reset_parameters(identity=False)
    slots = torch.randn(1, 2, 8)
    assert not torch.equal(experts(slots), experts(slots))
    experts.eval()
    assert torch.equal(experts(slots), experts(slots))


def test_activation_is_the_chosen_one():
    torch.manual_seed(0)
    slots = torch.randn(1, 2, 8)
    relu, gelu = (BottleneckExperts(2, 8, 6, 4, activation=name) for name in ("relu", "gelu"))
    gelu.reset_parameters(identity=False)
    relu.load_state_dict(gelu.state_dict())
    hidden = torch.einsum("bnd,ndr->bnr", slots, relu.down_weight) + relu.down_bias
    expected = torch.einsum("bnr,nrd->bnd", hidden.clamp(min=0), relu.up_weight) + relu.up_bias
    torch.testing.assert_close(relu(slots), expected)
    assert not torch.allclose(relu(slots), gelu(slots))
