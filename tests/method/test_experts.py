import oracle
import pytest
import torch

from peft_softmoa.method import BottleneckExperts, ConformerExperts, ConvolutionExperts, PatchGrid


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


MADE = {
    "bottleneck": BottleneckExperts,
    "convolution": ConvolutionExperts,
    "grid": ConvolutionExperts,
    "conformer": ConformerExperts,
    "conformer of R = 1": ConformerExperts,
    "conformer, grid": ConformerExperts,
}


def make(kind, **options):
    if "grid" in kind:
        options["patch_grid"] = PatchGrid(1, 2, 3)
    return MADE[kind](2, 4, 1 if "R = 1" in kind else 3, 4, **options)


def run(experts, tokens, weights=None):
    """What the experts give slots or, with weights, what they add to tokens."""
    return experts(tokens) if weights is None else experts.add_weighted(torch.zeros_like(tokens), tokens, weights)


KINDS = list(MADE)


@pytest.mark.parametrize(
    "kind, by_token",
    [(kind, by_token) for kind in KINDS for by_token in (False, True) if by_token or "grid" not in kind],
)
def test_fresh_experts_give_zero_and_every_tensor_learns(kind, by_token):
    experts = make(kind)
    inputs = (torch.randn(2, 7, 4), torch.rand(2, 7, 2)) if by_token else (torch.randn(2, 6, 4),)
    assert (run(experts, *inputs) == 0).all()
    start = {name: parameter.detach().clone() for name, parameter in experts.named_parameters()}
    optimizer = torch.optim.SGD(experts.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (run(experts, *inputs) - 1).pow(2).sum().backward()
        optimizer.step()
    for name, parameter in experts.named_parameters():
        assert (parameter != start[name]).any(), name


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


@pytest.mark.parametrize("kind", KINDS)
def test_random_experts_have_no_zeros(kind):
    experts = make(kind)
    experts.reset_parameters(identity=False)
    assert all((parameter != 0).all() for parameter in experts.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_acts_in_training_only(kind):
    experts = make(kind, dropout=0.5)
    experts.reset_parameters(identity=False)
    inputs = (torch.randn(1, 7, 4), torch.rand(1, 7, 2))
    assert not torch.equal(run(experts, *inputs), run(experts, *inputs))
    experts.eval()
    assert torch.equal(run(experts, *inputs), run(experts, *inputs))


def test_convolution_acts_twice_with_the_chosen_activation():
    experts = make("convolution", activation="relu", kernel_size=1)
    experts.reset_parameters(identity=False)
    tokens, weights = torch.randn(1, 5, 4), torch.rand(1, 5, 2)
    expected = torch.zeros(1, 5, 4)
    for n in range(2):
        hidden = (tokens @ experts.down_weight[n] + experts.down_bias[n]).clamp(min=0)
        hidden = (hidden * experts.conv_weight[n, :, 0] + experts.conv_bias[n]).clamp(min=0)
        expected += weights[..., n : n + 1] * (hidden @ experts.up_weight[n] + experts.up_bias[n])
    torch.testing.assert_close(run(experts, tokens, weights), expected)


@pytest.mark.parametrize("r", [1, 3])
def test_a_conformer_passes_on_what_it_reads(r):
    """Of one channel, a layer norm would leave nothing, and c / |c| its sign: neither would ever learn."""
    torch.manual_seed(0)
    experts = ConformerExperts(1, 4, r, 4, kernel_size=3).double()
    experts.reset_parameters(identity=False)
    tokens = torch.randn(1, 50, 4, dtype=torch.float64)
    output = run(experts, tokens, torch.ones(1, 50, 1, dtype=torch.float64))
    assert (output.std(dim=1) > 1e-3).all()
    assert output[0, :, 0].unique().numel() == 50
    gradients = torch.autograd.grad(output.square().sum(), list(experts.parameters()))
    assert all((gradient.abs() > 1e-6).any() for gradient in gradients)


def test_a_conformer_has_no_use_for_the_size_of_tokens():
    experts = ConformerExperts(2, 8, 3, 8).double()
    experts.reset_parameters(identity=False)
    tokens, weights = torch.randn(1, 9, 8, dtype=torch.float64), torch.rand(1, 9, 2, dtype=torch.float64)
    torch.testing.assert_close(
        run(experts, 1e4 * tokens + 7, weights), run(experts, tokens, weights), rtol=1e-4, atol=1e-5
    )


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


def largest(parameter):
    return parameter.abs().max().item()


@pytest.mark.parametrize("identity", [True, False])
def test_fresh_weights_are_drawn_as_linear_layers_draw_them(identity):
    """From U(-1/√fan_in, 1/√fan_in): of many, the largest comes close to the bound and stays below it."""
    torch.manual_seed(0)
    width, r = 400, 25
    experts = ConvolutionExperts(50, width, r, 90, kernel_size=9)
    experts.reset_parameters(identity)
    drawn = {"down_weight": width, "conv_weight": 9}
    if not identity:
        drawn |= {"down_bias": width, "up_weight": r, "up_bias": r, "conv_bias": 9}
    for name, parameter in experts.named_parameters():
        bound = drawn[name] ** -0.5 if name in drawn else 0.0
        assert 0.98 * bound <= largest(parameter) <= bound, name
