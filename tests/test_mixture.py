from pathlib import Path

import numpy as np
import oracle
import pytest
import torch

from peft_softmoa.experts import BottleneckExperts
from peft_softmoa.mixture import SoftRouter, soft_mixture

REFERENCE = sorted((Path(__file__).parent / "data" / "reference").glob("soft_*.npz"))


def make(num_experts, num_slots, r, width, out_width=None, normalize=False, dtype=torch.float64):
    torch.manual_seed(0)
    router = SoftRouter(width, num_experts, num_slots, normalize=normalize).to(dtype)
    experts = BottleneckExperts(num_experts, width, r, out_width or width).to(dtype)
    experts.reset_parameters(identity=False)
    if normalize:
        torch.nn.init.constant_(router.scale, 2.5)
    return router, experts


def relative_error(given, expected):
    return ((given - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("path", REFERENCE, ids=lambda path: path.stem)
def test_agrees_with_the_reference_code(path):
    data = {name: torch.from_numpy(array) for name, array in np.load(path).items()}
    width, num_experts, num_slots = data["slots"].shape
    router, experts = make(num_experts, num_slots, data["down_bias"].shape[1], width)
    router.slots.data = data["slots"].flatten(1)
    for name in ("down_weight", "down_bias", "up_weight", "up_bias"):
        getattr(experts, name).data = data[name]
    x = data["x"].requires_grad_()
    y = soft_mixture(x, router, experts)
    y.backward(data["grad_y"])
    assert relative_error(y, data["y"]) < 1e-10
    assert relative_error(x.grad, data["grad_x"]) < 1e-10
    for name in ("down_weight", "up_weight"):
        assert relative_error(getattr(experts, name).grad, data[f"grad_{name}"]) < 1e-10
    assert relative_error(router.slots.grad, data["grad_slots"].flatten(1)) < 1e-10


def test_there_are_reference_outputs():
    assert len(REFERENCE) == 3


@pytest.mark.parametrize(
    "batch, num_tokens, width, out_width, num_experts, num_slots, r",
    [(2, 5, 6, 6, 3, 1, 2), (1, 1, 4, 4, 2, 3, 3), (3, 4, 5, 7, 1, 2, 1), (2, 3, 4, 3, 2, 2, 5), (1, 6, 3, 3, 1, 1, 1)],
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_output_and_gradients_agree_with_the_oracle(
    batch, num_tokens, width, out_width, num_experts, num_slots, r, masked, normalize
):
    router, experts = make(num_experts, num_slots, r, width, out_width, normalize)
    x = torch.randn(batch, num_tokens, width, dtype=torch.float64, requires_grad=True)
    mask = None
    if masked:
        mask = torch.rand(batch, num_tokens) < 0.5
        mask[:, -1] = True
    inputs = [x, *router.parameters(), *experts.parameters()]
    given = soft_mixture(x, router, experts, mask)
    weights = list(zip(experts.down_weight, experts.down_bias, experts.up_weight, experts.up_bias, strict=True))
    expected = oracle.soft_mixture(x, router.slots, weights, mask, router.scale)
    assert relative_error(given, expected) < 1e-10
    upstream = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(given, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        # Where the true gradient is zero, as for the only slot of all, there is nothing to be relative to.
        assert (one - other).abs().max() < 1e-10 * max(other.abs().max(), 1e-3)


def test_permuted_tokens_permute_the_output():
    router, experts = make(3, 2, 4, 6)
    x = torch.randn(2, 8, 6, dtype=torch.float64)
    mask = torch.rand(2, 8) < 0.7
    order = torch.randperm(8)
    torch.testing.assert_close(
        soft_mixture(x[:, order], router, experts, mask[:, order]), soft_mixture(x, router, experts, mask)[:, order]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("magnitude", [1.0, 1e4])
def test_finite_under_autocast(dtype, normalize, magnitude):
    router, experts = make(4, 2, 6, 64, normalize=normalize, dtype=torch.float32)
    x = (magnitude * torch.randn(2, 33, 64)).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        output = soft_mixture(x, router, experts)
    output.float().pow(2).mean().backward()
    assert output.dtype == torch.float32
    for tensor in (output, x.grad, *(parameter.grad for parameter in [*router.parameters(), *experts.parameters()])):
        assert tensor.isfinite().all()


def test_autocast_does_not_change_the_result():
    router, experts = make(4, 2, 6, 16, dtype=torch.float32)
    x = torch.randn(2, 9, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = soft_mixture(x, router, experts)
    assert torch.equal(under_autocast, soft_mixture(x, router, experts))


def test_half_precision_weights_are_used_in_float32():
    router, experts = make(4, 2, 6, 16, dtype=torch.bfloat16)
    x = torch.randn(2, 9, 16, dtype=torch.bfloat16)
    given = soft_mixture(x, router, experts)
    expected = soft_mixture(x.float(), router.float(), experts.float())
    assert torch.equal(given, expected)
