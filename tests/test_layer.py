import pytest
import torch
from operations import Operations
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_softmoa import SoftMoAConfig, SoftMoALayer, rescale_adapter_scale
from peft_softmoa.calls.forward_pass import make_passes
from peft_softmoa.layer import is_adapted
from peft_softmoa.method import PatchGrid
from peft_softmoa.targets.choice import Target
from peft_softmoa.targets.probes import block_widths

CONFIG = SoftMoAConfig(num_experts=3, num_slots=2, r=4, scaling=0.5, init_weights=False)


class Attention(nn.Module):
    """Returns a tuple, as attention blocks do."""

    def __init__(self):
        super().__init__()
        self.projection = nn.Linear(6, 6)

    def forward(self, hidden_states, attention_mask=None, scale=1.0):
        return scale * self.projection(hidden_states), "weights", 3


def make(base_layer, config=CONFIG, where=None, grid=None):
    torch.manual_seed(0)
    options = config.mixture_options()
    if grid is not None:
        options["expert_options"]["patch_grid"] = grid
    where = where or target(base_layer)
    return SoftMoALayer(base_layer, "default", where, options, config.scaling, make_passes())


def target(base_layer):
    return Target("encoder.block", None, *block_widths("encoder.block", base_layer))


def mixture(layer, tokens, adapter_name="default"):
    """What the mixture adds, alone and unscaled."""
    nothing = torch.zeros(*tokens.shape[:2], layer.out_features)
    return layer.softmoa_mixture[adapter_name](tokens, added_to=nothing)[0]


def test_adds_the_scaled_mixture_to_a_linear_layer():
    layer = make(nn.Linear(6, 9))
    tokens = torch.randn(2, 5, 6)
    expected = layer.base_layer(tokens) + 0.5 * mixture(layer, tokens)
    torch.testing.assert_close(layer(tokens), expected)
    torch.testing.assert_close(layer(input=tokens), expected)


def test_adds_it_to_the_first_item_of_a_tuple_and_passes_the_rest_on():
    layer = make(Attention())
    tokens = torch.randn(2, 5, 6)
    expected = 2.0 * layer.base_layer.projection(tokens) + 0.5 * mixture(layer, tokens)
    for output in (layer(tokens, None, scale=2.0), layer(hidden_states=tokens, scale=2.0)):
        assert isinstance(output, tuple) and output[1:] == ("weights", 3)
        torch.testing.assert_close(output[0], expected)


def test_plain_rows_are_one_token_per_sample():
    layer = make(nn.Linear(6, 9))
    rows = torch.randn(4, 6)
    assert torch.equal(layer(rows), layer(rows.unsqueeze(1)).squeeze(1))
    assert layer(rows).shape == (4, 9)


def test_active_adapters_add_up():
    layer = make(Attention())
    options = SoftMoAConfig(num_experts=2, r=3, init_weights=False).mixture_options()
    layer.update_layer("other", target(layer.base_layer), options, 1.0)
    tokens = torch.randn(2, 5, 6)
    base = layer.base_layer(tokens)[0]
    first, second = 0.5 * mixture(layer, tokens), mixture(layer, tokens, "other")
    torch.testing.assert_close(layer(tokens)[0], base + first)
    layer.set_adapter(["default", "other"])
    torch.testing.assert_close(layer(tokens)[0], base + first + second)
    layer.set_adapter("other")
    torch.testing.assert_close(layer(tokens)[0], base + second)
    layer.set_adapter([])
    assert torch.equal(layer(tokens)[0], base)


def test_disabled_adapters_change_nothing():
    layer = make(Attention())
    layer.enable_adapters(False)
    tokens = torch.randn(2, 5, 6)
    assert torch.equal(layer(tokens)[0], layer.base_layer(tokens)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_and_output_have_the_dtype_of_the_block(dtype):
    layer = make(nn.Linear(6, 9).to(dtype))
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    assert layer(torch.randn(2, 5, 6, dtype=dtype)).dtype == dtype


def test_weights_are_on_the_device_of_the_block():
    with torch.device("meta"):
        layer = make(Attention())
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
    layer = make(Attention().to("meta"))
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}


@pytest.mark.parametrize("shape", [(2, 5, 7), (2, 7), (6,), (2, 1, 5, 6)])
def test_tokens_of_the_wrong_shape(shape):
    layer = make(Attention())
    with pytest.raises(ValueError, match=r"'encoder.block' takes tokens of shape \(batch, tokens, 6\).*got \("):
        layer(torch.randn(shape))


def test_what_the_mixture_refuses_names_the_block():
    config = SoftMoAConfig(routing="dense", expert_type="convolution", patch_grid=True)
    layer = make(nn.Linear(6, 6), config, grid=PatchGrid(2, 3, 4))
    with pytest.raises(ValueError, match="^In the adapted block 'encoder.block': `patch_grid` takes 14 tokens.*got 5"):
        layer(torch.randn(2, 5, 6))


def test_a_call_without_tokens():
    layer = make(Attention())
    with pytest.raises(ValueError, match=r"'encoder.block' was called without tokens.*\['query'\]"):
        layer(query=torch.randn(2, 5, 6))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("expert_type", ["bottleneck", "convolution", "conformer"])
@pytest.mark.parametrize(
    "routing", [{}, {"normalize": True}, {"routing": "dense"}, {"routing": "top_k"}, {"routing": "expert_choice"}]
)
def test_the_operations_do_not_depend_on_the_number_of_experts(routing, expert_type, masked):
    ran = {}
    for num_experts in (2, 15, 64):
        config = SoftMoAConfig(num_experts=num_experts, r=1, expert_type=expert_type, init_weights=False, **routing)
        layer = make(Attention(), config)
        mask = torch.ones(2, 5, dtype=torch.bool) if masked else None
        with Operations() as operations:
            layer(torch.randn(2, 5, 6, requires_grad=True), mask)[0].sum().backward()
        ran[num_experts] = operations.names
        # None waits for the device to tell a number to Python.
        assert not [name for name in operations.names if "_local_scalar_dense" in name]
    assert ran[2] == ran[15] == ran[64]


def test_soft_routing_takes_few_operations():
    """Each is a kernel to launch on a GPU, where their number is the cost of small batches."""
    layer = make(nn.Linear(6, 6), SoftMoAConfig(init_weights=False))
    layer.base_layer.requires_grad_(False)
    tokens = torch.randn(2, 40, 6, requires_grad=True)
    alone, adapted = Operations(), Operations()
    with alone:
        layer.base_layer(tokens).backward(tokens.detach())
    with adapted:
        layer(tokens).backward(tokens.detach())
    added = len(adapted.kernels()) - len(alone.kernels())
    assert added <= 38, adapted.kernels()


def test_a_block_that_returns_another_number_of_tokens():
    class Pooling(nn.Linear):
        def forward(self, input):
            return super().forward(input[:, ::2])

    layer = make(Pooling(6, 6), where=Target("encoder.block", None, 6, 6))
    with pytest.raises(ValueError, match=r"block 'encoder.block': For tokens \(2, 5, 6\) .* it returns \(2, 3, 6\)"):
        layer(torch.randn(2, 5, 6))


def test_merging_is_refused():
    layer = make(nn.Linear(6, 6))
    weight = layer.base_layer.weight.clone()
    for merge in (layer.merge, layer.unmerge):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge()
    assert torch.equal(layer.base_layer.weight, weight) and not layer.merged


def test_every_choice_of_the_config_reaches_its_part():
    config = SoftMoAConfig(
        num_experts=3, num_slots=2, r=4, normalize=True, activation="relu", dropout=0.25, scaling=0.5
    )
    layer = make(nn.Linear(6, 9), config)
    router, experts = layer.softmoa_mixture["default"].router, layer.softmoa_mixture["default"].experts
    assert router.slots.shape == (6, 3 * 2) and router.scale is not None
    assert experts.down_weight.shape == (3, 6, 4) and experts.up_weight.shape == (3, 4, 9)
    assert isinstance(experts.activation, nn.ReLU) and experts.dropout.p == 0.25
    assert layer.scaling == {"default": 0.5}


def test_fresh_layer_is_an_exact_no_op():
    layer = make(Attention(), SoftMoAConfig(num_experts=3, r=4))
    tokens = torch.randn(2, 5, 6)
    assert torch.equal(layer(tokens)[0], layer.base_layer(tokens)[0])


def test_strength_is_set_and_restored_as_for_lora():
    layer = make(nn.Linear(6, 6))
    tokens = torch.randn(2, 5, 6)
    base, full = layer.base_layer(tokens), layer(tokens)

    def added():
        return (layer(tokens) - base) / (full - base)

    layer.set_scale("default", 0.5)
    torch.testing.assert_close(added().mean(), torch.tensor(0.5), rtol=1e-3, atol=0)
    layer.scale_layer(4.0)
    torch.testing.assert_close(added().mean(), torch.tensor(2.0), rtol=1e-3, atol=0)
    layer.unscale_layer(2.0)
    torch.testing.assert_close(layer(tokens), full)
    layer.scale_layer(3.0)
    layer.unscale_layer()
    assert torch.equal(layer(tokens), full)
    layer.set_scale("no adapter of it", 2.0)
    with rescale_adapter_scale(layer, 0.0):
        assert torch.equal(layer(tokens), base)
    assert torch.equal(layer(tokens), full)
    with pytest.raises(ValueError, match="Linear has no Soft-MoA adapter"), rescale_adapter_scale(nn.Linear(2, 2), 2.0):
        pass


def test_what_is_made_by_another_import_of_the_package_is_known():
    """As after `importlib.reload` in a notebook."""
    layer = make(nn.Linear(6, 6))
    other = type("SoftMoALayer", (nn.Module, BaseTunerLayer), {"adapter_layer_names": layer.adapter_layer_names})()
    assert is_adapted(layer) and is_adapted(other)
    assert not is_adapted(nn.Linear(6, 6))
