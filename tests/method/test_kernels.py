import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from peft_softmoa.method.kernels import add_slots, read_slots
from peft_softmoa.method.routing import soft_routing


def draw(batch=2, num_tokens=5, width=4, num_slots=3, dtype=torch.float64, masked=True):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(batch, num_tokens, width, dtype=dtype, generator=generator)
    slots = torch.randn(width, num_slots, dtype=dtype, generator=generator)
    mask = torch.rand(batch, num_tokens, generator=generator) < 0.6 if masked else None
    if masked:
        mask[:, 0] = True
        mask[-1] = False  # a sample without tokens
    return tokens.requires_grad_(), slots.requires_grad_(), mask


def plainly(tokens, slots, mask=None):
    """The formula that the kernel is a fast form of."""
    dispatch, combine = soft_routing(tokens, slots, mask)
    return dispatch.mT @ tokens, dispatch.mT, combine.mT


def plainly_added(hidden, combine, answers):
    return hidden + combine.mT @ answers


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", [(2, 5, 4, 3), (1, 1, 3, 2), (3, 1, 2, 5), (2, 7, 3, 1)])
def test_agrees_with_the_plain_formula(sizes, masked):
    tokens, slots, mask = draw(*sizes, masked=masked)
    given, expected = read_slots(tokens, slots, mask), plainly(tokens, slots, mask)
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    # Through each output alone, and through all.
    upstream = [torch.randn_like(tensor) for tensor in given]
    for parts in ([0], [1], [2], [0, 1, 2]):
        gradients = [
            torch.autograd.grad(sum((run[i] * upstream[i]).sum() for i in parts), [tokens, slots], retain_graph=True)
            for run in (given, expected)
        ]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def draw_added():
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(size, dtype=torch.float64, generator=generator, requires_grad=True)
        for size in ((2, 5, 4), (2, 3, 5), (2, 3, 4))
    ]


def test_adding_agrees_with_the_plain_formula():
    inputs = draw_added()
    given, expected = add_slots(*inputs), plainly_added(*inputs)
    torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-14)
    upstream = torch.randn_like(given)
    gradients = [torch.autograd.grad((output * upstream).sum(), inputs) for output in (given, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert gradcheck(add_slots, inputs) and gradgradcheck(add_slots, inputs)


@pytest.mark.parametrize("masked", [False, True])
def test_its_gradients_have_gradients(masked):
    tokens, slots, mask = draw(masked=masked)

    def run(tokens, slots):
        return read_slots(tokens, slots, mask)

    assert gradcheck(run, (tokens, slots)) and gradgradcheck(run, (tokens, slots))


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_single_samples(masked):
    """As in differentially private training: `torch.func` differentiates each sample by itself."""
    tokens, slots, mask = draw(batch=3, masked=masked)
    mask = torch.ones(3, 5, dtype=torch.bool) if mask is None else mask

    def loss(slots, tokens, mask, run):
        read, _, combine = run(tokens[None], slots, mask[None] if masked else None)
        add = add_slots if run is read_slots else plainly_added
        return add(tokens[None], combine, read).square().sum() + combine.square().sum()

    in_dims = (None, 0, 0, None)

    def total(slots, tokens, mask, run):
        return torch.func.vmap(loss, in_dims=in_dims)(slots, tokens, mask, run).sum()

    gradients = [torch.func.vmap(torch.func.grad(loss, (0, 1)), in_dims=in_dims), torch.func.grad(total, (0, 1))]
    if torch.__version__ < "2.7":
        gradients.pop()  # torch 2.6 itself fails there, where a function has an input without gradient
    for gradient in gradients:
        given, expected = (gradient(slots, tokens, mask, run) for run in (read_slots, plainly))
        assert given[0].shape[-2:] == slots.shape and given[1].shape == tokens.shape
        torch.testing.assert_close(given, expected)


def test_it_is_traced_as_plain_operations():
    tokens, slots, _ = draw()
    with torch.no_grad():
        traced = torch.jit.trace(read_slots, (tokens, slots))
        torch.testing.assert_close(traced(2 * tokens, slots), read_slots(2 * tokens, slots))
        added = torch.jit.trace(add_slots, tuple(draw_added()))
    assert "PythonOp" not in f"{traced.graph}{added.graph}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_kept_as_it_is(dtype):
    tokens, slots, mask = draw(num_tokens=50, dtype=dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        given = read_slots(tokens, slots, mask)
    assert {tensor.dtype for tensor in kept if tensor.shape == tokens.shape} == {dtype}
    in_float32 = [tensor.detach().float().requires_grad_() for tensor in (tokens, slots)]
    expected = read_slots(*in_float32, mask)
    for one, other in zip(given, expected, strict=True):
        assert torch.equal(one, other) and one.dtype == torch.float32
    sum(tensor.square().sum() for tensor in given).backward()
    sum(tensor.square().sum() for tensor in expected).backward()
    for one, other in zip((tokens, slots), in_float32, strict=True):
        assert torch.equal(one.grad, other.grad.to(dtype))


def test_autocast_does_not_change_the_backward_pass():
    tokens, slots, mask = draw(num_tokens=50, dtype=torch.float32)
    gradients = []
    for enabled in (False, True):
        read, _, combine = read_slots(tokens, slots, mask)
        loss = add_slots(tokens, combine, read).square().sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            gradients.append(torch.autograd.grad(loss, [tokens, slots]))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(frozen):
    inputs = list(draw()[:2])
    inputs[frozen] = inputs[frozen].detach()
    sum(tensor.square().sum() for tensor in read_slots(*inputs)).backward()
    assert inputs[frozen].grad is None and inputs[1 - frozen].grad is not None
