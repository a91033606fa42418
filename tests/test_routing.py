import oracle
import pytest
import torch

from peft_softmoa.routing import soft_routing

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
