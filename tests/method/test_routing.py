import oracle
import pytest
import torch

from peft_softmoa.method.routers import DenseRouter, SoftRouter
from peft_softmoa.method.routing import expert_choice_routing, load_balancing_loss, soft_routing, top_k_routing

SIZES = [(2, 5, 4, 3), (1, 1, 3, 2), (3, 7, 5, 1)]  # B, T, D, S


def draw(sizes, dtype=torch.float64):
    batch, num_tokens, width, num_slots = sizes
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(batch, num_tokens, width, dtype=dtype, generator=generator)
    slots = torch.randn(width, num_slots, dtype=dtype, generator=generator)
    mask = torch.rand(batch, num_tokens, generator=generator) < 0.6
    mask[:, 0] = True
    return tokens, slots, mask


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
def test_agrees_with_the_oracle(sizes, masked, normalized):
    tokens, slots, mask = draw(sizes)
    mask = mask if masked else None
    scale = torch.tensor([1.7], dtype=torch.float64) if normalized else None
    for given, expected in zip(
        soft_routing(tokens, slots, mask, scale), oracle.soft_weights(tokens, slots, mask, scale), strict=True
    ):
        torch.testing.assert_close(given, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("normalized", [False, True])
def test_weights_are_convex(normalized):
    tokens, slots, mask = draw((2, 9, 6, 4))
    scale = torch.ones(1, dtype=torch.float64) if normalized else None
    for given_mask in (None, mask):
        dispatch, combine = soft_routing(tokens, slots, given_mask, scale)
        assert (dispatch >= 0).all() and (combine >= 0).all()
        torch.testing.assert_close(dispatch.sum(dim=1), torch.ones(2, 4, dtype=torch.float64))
        torch.testing.assert_close(combine.sum(dim=2), torch.ones(2, 9, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    tokens, slots, mask = draw((2, 500, 8, 4), torch.float32)
    tokens, slots = (10 * tokens).to(dtype), slots.to(dtype)
    for given, expected in zip(
        soft_routing(tokens, slots, mask), soft_routing(tokens.float(), slots.float(), mask), strict=True
    ):
        assert given.dtype == dtype and torch.equal(given, expected.to(dtype))


def test_padding_is_not_read():
    tokens, slots, mask = draw((3, 7, 5, 4))
    dispatch, combine = soft_routing(tokens, slots, mask)
    assert (dispatch[~mask] == 0).all()
    changed = torch.where(mask.unsqueeze(-1), tokens, torch.full_like(tokens, 100.0))
    dispatch_of_changed, combine_of_changed = soft_routing(changed, slots, mask)
    assert torch.equal(dispatch, dispatch_of_changed)
    assert torch.equal(combine[mask], combine_of_changed[mask])


def test_sample_without_tokens_stays_finite():
    tokens, slots, _ = draw((2, 3, 4, 2))
    tokens.requires_grad_(), slots.requires_grad_()
    mask = torch.tensor([[True, True, False], [False, False, False]])
    dispatch, combine = soft_routing(tokens, slots, mask)
    assert (dispatch[1] == 0).all()
    (dispatch.sum() + combine.pow(2).sum()).backward()
    assert tokens.grad.isfinite().all() and slots.grad.isfinite().all()


def test_zero_tokens_can_be_normalized():
    tokens = torch.zeros(1, 2, 3, requires_grad=True)
    slots = torch.zeros(3, 2, requires_grad=True)
    dispatch, combine = soft_routing(tokens, slots, scale=torch.ones(1))
    (dispatch.pow(2).sum() + combine.pow(2).sum()).backward()
    assert dispatch.isfinite().all()
    assert tokens.grad.isfinite().all() and slots.grad.isfinite().all()


@pytest.mark.parametrize(
    "num_tokens, num_experts, capacity_factor, expected",
    [
        (9, 3, 1.0, 3),
        (9, 3, 2 / 3, 2),
        (9, 3, 5 / 3, 5),
        (10, 3, 1.0, 4),
        (5, 4, 4.0, 5),
        (1, 4, 0.001, 1),
        (8, 4, 0.1, 1),
    ],
)
def test_capacity_of_expert_choice(num_tokens, num_experts, capacity_factor, expected):
    gates = torch.rand(2, num_tokens, num_experts, dtype=torch.float64)
    for mask in (None, torch.ones(2, num_tokens).bool()):
        taken = (expert_choice_routing(gates, capacity_factor, mask) > 0).sum(dim=1)
        assert (taken == expected).all()
    longer = torch.cat([gates, torch.rand(2, 7, num_experts, dtype=torch.float64)], dim=1)
    mask = torch.arange(num_tokens + 7).expand(2, -1) < num_tokens
    weights = expert_choice_routing(longer, capacity_factor, mask)
    assert torch.equal(weights[:, :num_tokens], expert_choice_routing(gates, capacity_factor))
    assert (weights[:, num_tokens:] == 0).all()


def test_expert_choice_takes_the_largest_gates():
    gates = torch.tensor([[[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]]])
    expected = torch.tensor([[[0.9, 0.0], [0.0, 0.8], [0.6, 0.0], [0.0, 0.7]]])
    assert torch.equal(expert_choice_routing(gates, 1.0), expected)


def test_top_k_weights_sum_to_one():
    gates = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]])
    weights, chosen = top_k_routing(gates, 2)
    assert chosen[0, 0].tolist() == [0, 1] and chosen[0, 1, 0] == 2
    torch.testing.assert_close(weights[0, 0], torch.tensor([0.625, 0.375, 0.0]))
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(1, 2))


@pytest.mark.parametrize("top_k", [1, 2])
def test_load_balancing_loss_is_one_when_balanced_and_most_when_collapsed(top_k):
    gates = torch.full((1, 4, 4), 0.0)
    chosen = torch.tensor([[[(token + k) % 4 for k in range(top_k)] for token in range(4)]])
    gates.scatter_(-1, chosen, 1 / top_k)
    assert load_balancing_loss(gates, chosen) == 1
    collapsed = torch.zeros(1, 4, 4).index_fill(-1, torch.arange(top_k), 1 / top_k)
    assert load_balancing_loss(collapsed, torch.arange(top_k).expand(1, 4, -1)) == 4 / top_k


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4)])
def test_load_balancing_loss_of_nothing_is_zero(shape):
    gates = torch.rand(shape)
    for mask in (None, torch.ones(shape[:2]).bool()):
        assert load_balancing_loss(gates, gates.topk(2).indices, mask) == 0


@pytest.mark.parametrize("unit_slots", [False, True])
def test_fresh_slots_give_unit_logits_for_unit_tokens(unit_slots):
    torch.manual_seed(0)
    router = SoftRouter(1024, 40, num_slots=2, normalize=True, unit_slots=unit_slots)
    assert router.slots.std().item() == pytest.approx(1.0 if unit_slots else 1024**-0.5, rel=0.02)
    assert router.phi.std().item() == pytest.approx(1024**-0.5, rel=0.02)
    assert router.phi.mean().abs() < 0.01 * 1024**-0.5
    logits = torch.randn(500, 1024) @ router.phi
    assert logits.std().item() == pytest.approx(1.0, rel=0.05)
    assert router.scale.tolist() == [1.0] and router.logit_scale.tolist() == [32.0 if unit_slots else 1.0]


def test_steps_of_adam_move_unit_slots_less():
    """Both routers begin alike, and a step changes the logits of one √D times less."""
    routers = [SoftRouter(64, 3, unit_slots=unit_slots) for unit_slots in (False, True)]
    with torch.no_grad():
        routers[1].slots.copy_(8 * routers[0].slots)
    tokens, moved = torch.randn(2, 9, 64), []
    for router in routers:
        before = router.phi.detach().clone()
        optimizer = torch.optim.Adam(router.parameters(), lr=1e-3)
        read, _ = router(tokens)
        read.square().sum().backward()
        optimizer.step()
        moved.append((router.phi - before).abs().median().item())
    assert moved[0] == pytest.approx(1e-3, rel=0.01) and moved[1] == pytest.approx(1e-3 / 8, rel=0.01)


def test_fresh_routers_of_tokens_are_drawn_as_linear_layers():
    torch.manual_seed(0)
    router = DenseRouter(400, 2000)
    for parameter in (router.weight, router.bias):
        assert 0.98 / 20 <= parameter.abs().max().item() <= 1 / 20
