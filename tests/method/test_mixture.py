from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from operations import Operations

from peft_softmoa import SoftMoAConfig
from peft_softmoa.method import Mixture, PatchGrid

REFERENCE = sorted((Path(__file__).parents[1] / "data" / "reference").glob("*.npz"))

SOFT = {"routing": "soft"}
DENSE = {"routing": "dense"}
TOP_K = {"routing": "top_k", "top_k": 2}
CHOICE = {"routing": "expert_choice"}
CONVOLUTION = {"expert_type": "convolution"}
CONFORMER = {"expert_type": "conformer", "kernel_size": 3}
ROUTINGS = [
    SOFT,
    SOFT | {"normalize": True, "num_slots": 2},
    DENSE,
    DENSE | {"num_experts": 1},
    TOP_K,
    TOP_K | {"top_k": 1},
    TOP_K | {"top_k": 3},
    CHOICE,
    CHOICE | {"capacity_factor": 0.5},
    CHOICE | {"capacity_factor": 2.2},
    SOFT | {"unit_slots": True},
    SOFT | {"unit_slots": True, "normalize": True},
]
EXPERTS = [
    {},
    CONVOLUTION,
    CONVOLUTION | {"kernel_size": 5},
    CONVOLUTION | {"kernel_size": 1},
    CONFORMER,
    CONFORMER | {"kernel_size": 31},
    CONFORMER | {"r": 1},
]


def name_of(options):
    return "-".join(str(value) for value in options.values()) or "default"


def make(width, out_width=None, grid=None, dtype=torch.float64, **options):
    torch.manual_seed(0)
    config = SoftMoAConfig(init_weights=False, **{"num_experts": 3, "r": 2, **options})
    arguments = config.mixture_options()
    if grid is not None:
        arguments["expert_options"]["patch_grid"] = grid
    made = Mixture(width, out_width or width, **arguments)
    if config.normalize:
        torch.nn.init.constant_(made.router.scale, 2.5)
    return made.to(dtype)


def mix(tokens, mixture, mask=None, dtype=None):
    """What a mixture adds, alone, for a block whose output has some dtype."""
    dtype = dtype or torch.promote_types(tokens.dtype, torch.float32)
    return mixture(tokens, mask, added_to=torch.zeros(*tokens.shape[:2], mixture.out_features, dtype=dtype))


def relative_error(given, expected):
    return ((given - expected).abs().max() / expected.abs().max()).item()


def expected_output(x, mixture, options, mask=None, grid=None):
    """Output and loss by the oracle, for which padding is zero."""
    x = x if mask is None else x * mask.unsqueeze(-1)
    weights = oracle.weights_of(mixture.experts, options.get("expert_type", "bottleneck"))
    if options["routing"] == "soft":
        slots, scale = oracle.slots_of(mixture.router)
        return oracle.soft_mixture(x, slots, weights, mask, scale), None
    if options.get("num_experts") == 1:
        return oracle.token_mixture(x, x.new_ones(*x.shape[:2], 1), weights, mask, grid), None
    gates = oracle.gates(x, mixture.router.weight, mixture.router.bias)
    loss = None
    if options["routing"] == "top_k":
        mixing, chosen = oracle.top_k_weights(gates, options["top_k"])
        loss = 0.01 * oracle.load_balancing(gates, chosen, mask)
    elif options["routing"] == "expert_choice":
        mixing = oracle.expert_choice_weights(gates, options.get("capacity_factor", 1.0), mask)
    else:
        mixing = gates
    return oracle.token_mixture(x, mixing, weights, mask, grid), loss


def assert_agrees(x, mixture, options, mask=None, grid=None):
    inputs = [x, *mixture.parameters()]
    given, given_loss = mix(x, mixture, mask)
    expected, expected_loss = expected_output(x, mixture, options, mask, grid)
    assert relative_error(given, expected) < 1e-10
    upstream = torch.randn_like(expected)
    given, expected = (given * upstream).sum(), (expected * upstream).sum()
    assert (given_loss is None) == (expected_loss is None)
    if given_loss is not None:
        assert relative_error(given_loss, expected_loss) < 1e-10
        given, expected = given + 100 * given_loss, expected + 100 * expected_loss
    for one, other in zip(torch.autograd.grad(given, inputs), torch.autograd.grad(expected, inputs), strict=True):
        # Where the true gradient is zero, as for the only slot of all, there is nothing to be relative to.
        assert (one - other).abs().max() < 1e-10 * max(other.abs().max(), 1e-3)


@pytest.mark.parametrize("path", REFERENCE, ids=lambda path: path.stem)
def test_agrees_with_the_reference_code(path):
    data = {name: torch.from_numpy(array) for name, array in np.load(path).items()}
    soft = "slots" in data
    num_experts, width, r = data["down_weight"].shape
    options = {"num_slots": data["slots"].shape[2]} if soft else DENSE
    mixture = make(width, num_experts=num_experts, r=r, **options)
    assert soft or (mixture.router.weight is None) == (num_experts == 1)
    if soft:
        mixture.router.slots.data = data["slots"].flatten(1)
    elif num_experts > 1:
        mixture.router.weight.data, mixture.router.bias.data = data["router_weight"], data["router_bias"]
    for name in ("down_weight", "down_bias", "up_weight", "up_bias"):
        getattr(mixture.experts, name).data = data[name]
    x = data["x"].requires_grad_()
    y, _ = mix(x, mixture)
    y.backward(data["grad_y"])
    assert relative_error(y, data["y"]) < 1e-10
    assert relative_error(x.grad, data["grad_x"]) < 1e-10
    for name in ("down_weight", "up_weight"):
        assert relative_error(getattr(mixture.experts, name).grad, data[f"grad_{name}"]) < 1e-10
    if soft:
        assert relative_error(mixture.router.slots.grad, data["grad_slots"].flatten(1)) < 1e-10
    elif num_experts > 1:
        assert relative_error(mixture.router.weight.grad, data["grad_router_weight"]) < 1e-10


def test_there_are_reference_outputs():
    assert len(REFERENCE) == 5


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("expert", EXPERTS, ids=name_of)
@pytest.mark.parametrize("routing", ROUTINGS, ids=name_of)
def test_output_and_gradients_agree_with_the_oracle(routing, expert, masked):
    options = routing | expert
    mixture = make(5, 4, **options)
    x = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0]]).bool() if masked else None
    assert_agrees(x, mixture, options, mask)


@pytest.mark.parametrize(
    "batch, num_tokens, width, out_width, num_experts, num_slots, r",
    [(2, 5, 6, 6, 3, 1, 2), (1, 1, 4, 4, 2, 3, 3), (3, 4, 5, 7, 1, 2, 1), (2, 3, 4, 3, 2, 2, 5), (1, 6, 3, 3, 1, 1, 1)],
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("expert", [{}, CONVOLUTION, CONFORMER], ids=name_of)
@pytest.mark.parametrize("routing", [SOFT, SOFT | {"normalize": True}, DENSE, TOP_K, CHOICE], ids=name_of)
def test_any_sizes(routing, expert, masked, batch, num_tokens, width, out_width, num_experts, num_slots, r):
    if num_experts == 1 and routing in (TOP_K, CHOICE):
        num_experts = 4
    options = routing | expert | {"num_experts": num_experts}
    if routing["routing"] == "soft":
        options["num_slots"] = num_slots
    mixture = make(width, out_width, r=r, **options)
    x = torch.randn(batch, num_tokens, width, dtype=torch.float64, requires_grad=True)
    mask = None
    if masked:
        mask = torch.rand(batch, num_tokens) < 0.5
        mask[:, -1] = True
    assert_agrees(x, mixture, options, mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("expert", [CONVOLUTION, CONFORMER], ids=name_of)
@pytest.mark.parametrize("routing", [DENSE, DENSE | {"num_experts": 1}, TOP_K, CHOICE], ids=name_of)
def test_convolution_over_the_patch_grid_agrees_with_the_oracle(routing, expert, kernel_size, masked):
    grid = PatchGrid(class_tokens=2, height=3, width=4)
    options = routing | expert | {"kernel_size": kernel_size}
    mixture = make(5, grid=grid, **options)
    x = torch.randn(2, 14, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 14) < 0.7 if masked else None
    assert_agrees(x, mixture, options, mask, grid)


def test_patch_grid_refuses_another_number_of_tokens():
    mixture = make(5, grid=PatchGrid(2, 3, 4), **DENSE, **CONVOLUTION)
    with pytest.raises(ValueError, match=r"takes 14 tokens, 2 class tokens and 3 x 4 patches.*got 15"):
        mix(torch.randn(1, 15, 5, dtype=torch.float64), mixture)


@pytest.mark.parametrize("options", [SOFT | {"num_slots": 2}, DENSE, TOP_K, CHOICE], ids=name_of)
def test_permuted_tokens_permute_the_output(options):
    mixture = make(6, **options)
    x = torch.randn(2, 8, 6, dtype=torch.float64)
    mask = torch.rand(2, 8) < 0.7
    order = torch.randperm(8)
    torch.testing.assert_close(mix(x[:, order], mixture, mask[:, order])[0], mix(x, mixture, mask)[0][:, order])


@pytest.mark.parametrize("expert", [{}, CONVOLUTION, CONFORMER], ids=name_of)
@pytest.mark.parametrize("routing", ROUTINGS, ids=name_of)
def test_padding_changes_nothing(routing, expert):
    mixture = make(5, **routing, **expert)
    short, padding = torch.randn(2, 6, 5, dtype=torch.float64), 100 * torch.randn(2, 3, 5, dtype=torch.float64)
    mask = torch.tensor([[True] * 6 + [False] * 3] * 2)
    expected, expected_loss = mix(short, mixture)
    given, given_loss = mix(torch.cat([short, padding], dim=1), mixture, mask)
    torch.testing.assert_close(given[:, :6], expected)
    torch.testing.assert_close(given_loss, expected_loss)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("expert", [{}, CONVOLUTION, CONFORMER], ids=name_of)
@pytest.mark.parametrize("routing", ROUTINGS, ids=name_of)
def test_what_padding_holds_does_not_matter(routing, expert, value):
    """Neither to the output for real tokens, nor to gradients and losses: 0 · NaN is NaN."""
    mixture = make(8, **routing, **expert).train()
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    results = []
    for padding in (0.0, value):
        tokens = x.masked_fill(~mask.unsqueeze(-1), padding).requires_grad_()
        output, loss = mixture(tokens, mask, added_to=torch.zeros_like(x))
        total = output[mask].square().sum() + (0 if loss is None else loss)
        results.append([output[mask], total, *torch.autograd.grad(total, [tokens, *mixture.parameters()])])
        results[-1] += [each[mask] for each in mixture.record(tokens, mask)]
    for expected, given in zip(*results):
        assert torch.equal(given, expected)


@pytest.mark.parametrize("routing", ROUTINGS, ids=name_of)
@pytest.mark.parametrize("expert", [{}, CONVOLUTION, CONFORMER], ids=name_of)
def test_samples_do_not_depend_on_each_other(routing, expert):
    mixture = make(5, **routing, **expert)
    x = torch.randn(3, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(mix(x[1:2], mixture)[0], mix(x, mixture)[0][1:2])


@pytest.mark.parametrize("routing", ROUTINGS, ids=name_of)
@pytest.mark.parametrize("expert", [CONVOLUTION, CONFORMER], ids=name_of)
def test_a_sample_without_valid_tokens_is_finite(routing, expert):
    mixture = make(5, **routing, **expert)
    x = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    output, loss = mix(x, mixture, torch.tensor([[False] * 6] * 2))
    (output.sum() + (0.0 if loss is None else loss)).backward()
    assert output.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("mask", [torch.ones(2, 5).bool(), torch.ones(6).bool(), torch.ones(2, 6), torch.ones(2, 6, 1)])
def test_a_mask_that_does_not_fit(mask):
    mixture = make(5)
    tokens = torch.randn(2, 6, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"mask of tokens \(2, 6, 5\) must be boolean with shape \(2, 6\)") as error:
        mix(tokens, mixture, mask)
    assert str(tuple(mask.shape)) in str(error.value)


@pytest.mark.parametrize("expert", [{}, CONVOLUTION, CONFORMER], ids=name_of)
@pytest.mark.parametrize("routing", ROUTINGS, ids=name_of)
def test_the_scaled_mixture_is_added_to_the_output_of_the_block(routing, expert):
    mixture = make(5, 4, **routing, **expert)
    x, hidden = torch.randn(2, 6, 5, dtype=torch.float64), torch.randn(2, 6, 4, dtype=torch.float64)
    before = hidden.clone()
    given, _ = mixture(x, added_to=hidden, scaling=0.25)
    torch.testing.assert_close(given, before + 0.25 * mix(x, mixture)[0])
    assert torch.equal(hidden, before)


def test_top_k_of_all_experts_is_dense():
    mixture = make(5, **DENSE)
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    dense, _ = mix(x, mixture)
    for options in (TOP_K | {"top_k": 3}, CHOICE | {"capacity_factor": 3.0}):
        same = make(5, **options)
        same.load_state_dict(mixture.state_dict())
        torch.testing.assert_close(mix(x, same)[0], dense)


def test_the_load_balancing_loss_belongs_to_training():
    mixture = make(5, **TOP_K)
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    assert mix(x, mixture)[1] is not None
    assert mix(x, mixture.eval())[1] is None
    mixture.train().requires_grad_(False)
    assert mix(x, mixture)[1] is None
    mixture = make(5, **TOP_K, router_aux_loss_coef=0.0)
    assert mix(x, mixture)[1] is None


@pytest.mark.parametrize("routing", [SOFT, DENSE, TOP_K, CHOICE], ids=name_of)
@pytest.mark.parametrize("expert", [{}, CONVOLUTION, CONFORMER], ids=name_of)
def test_no_tensor_grows_with_experts_times_tokens_times_width(routing, expert):
    num_experts, num_tokens, width = 15, 40, 64
    mixture = make(width, num_experts=num_experts, **routing, **expert)
    x = torch.randn(2, num_tokens, width, dtype=torch.float64, requires_grad=True)
    with Operations() as operations:
        mix(x, mixture)[0].sum().backward()
    assert operations.numel == 2 * num_tokens * width


@pytest.mark.parametrize("routing", [SOFT, DENSE, TOP_K, CHOICE], ids=name_of)
def test_what_is_kept_for_the_backward_pass_does_not_grow_with_experts_times_tokens_times_width(routing):
    num_tokens, width = 40, 64
    x = torch.randn(2, num_tokens, width, dtype=torch.float64, requires_grad=True)
    kept = {}
    for num_experts in (4, 12):
        mixture = make(width, num_experts=num_experts, r=1, **routing)
        storages = {}

        def note(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 8
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output, _ = mix(x, mixture)
        weights = sum(parameter.numel() for parameter in mixture.parameters())
        kept[num_experts] = sum(storages.values()) - 2 * weights  # as they are, and side by side
        del output
    assert kept[12] - kept[4] < 2 * num_tokens * width


@pytest.mark.parametrize("expert", [{}, CONVOLUTION, CONFORMER], ids=name_of)
@pytest.mark.parametrize("routing", [SOFT, SOFT | {"normalize": True}, DENSE, TOP_K, CHOICE], ids=name_of)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("magnitude", [1.0, 1e4])
@pytest.mark.parametrize("half_output", [False, True])
def test_half_precision_under_autocast(dtype, routing, expert, magnitude, half_output):
    """Finite, and near to what float32 gives, where the block's output is in float32 and where it is not."""
    mixture = make(64, num_experts=4, r=6, dtype=torch.float32, **routing, **expert)
    x = (magnitude * torch.randn(2, 33, 64)).to(dtype).requires_grad_()
    upstream = torch.randn(2, 33, 64) / magnitude
    parameters = list(mixture.parameters())
    output_dtype = dtype if half_output else torch.float32
    with torch.autocast("cpu", dtype=dtype):
        given, _ = mix(x, mixture, dtype=output_dtype)
    assert given.dtype == output_dtype
    gradients = torch.autograd.grad((given.float() * upstream).sum(), [x, *parameters])
    in_float32 = x.detach().float().requires_grad_()
    expected, _ = mix(in_float32, mixture)
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), [in_float32, *parameters])
    scale = max(each.abs().max() for each in expected_gradients)
    for one, other in zip([given, *gradients], [expected, *expected_gradients], strict=True):
        assert one.isfinite().all()
        assert (one.float() - other).abs().max() < 0.03 * max(other.abs().max(), 1e-3 * scale)


@pytest.mark.parametrize("options", [SOFT, TOP_K | CONVOLUTION], ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_change_the_result(options, dtype):
    mixture = make(16, dtype=torch.float32, **options)
    x = torch.randn(2, 9, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast, _ = mix(x, mixture, dtype=dtype)
    assert torch.equal(under_autocast, mix(x, mixture, dtype=dtype)[0])


@pytest.mark.parametrize("options", [SOFT, TOP_K | CONVOLUTION], ids=name_of)
def test_half_precision_weights_are_used_in_float32(options):
    mixture = make(16, dtype=torch.bfloat16, **options)
    x = torch.randn(2, 9, 16, dtype=torch.bfloat16)
    given, _ = mix(x, mixture)
    assert torch.equal(given, mix(x.float(), mixture.float())[0])


@pytest.mark.parametrize("options", [SOFT, DENSE], ids=name_of)
@pytest.mark.parametrize("shape", [(2, 5, 5), (2, 6, 4), (2, 6, 1), (1, 6, 5)])
def test_an_output_of_the_block_that_does_not_fit(options, shape):
    mixture = make(5, **options)
    tokens = torch.randn(2, 6, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"tokens \(2, 6, 5\) the block must return 5 numbers") as error:
        mixture(tokens, added_to=torch.zeros(shape, dtype=torch.float64))
    assert str(shape) in str(error.value)
