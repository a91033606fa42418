"""Mixtures in which the channels of a clip meet: held to plain loops, to mono, and to the order of the channels."""

import oracle
import pytest
import torch

from peft_softmoa import SoftMoAConfig
from peft_softmoa.method import Mixture, PatchGrid

SOFT, DENSE, CHOICE = {"routing": "soft"}, {"routing": "dense"}, {"routing": "expert_choice"}
TOP_K = {"routing": "top_k", "top_k": 2}
CONVOLUTION = {"expert_type": "convolution"}
CAUSAL = {"causal": True}
WHOLE = [
    SOFT,
    SOFT | CONVOLUTION | {"normalize": True, "num_slots": 3},
    DENSE,
    DENSE | {"num_experts": 1},
    DENSE | CONVOLUTION,
    TOP_K,
    TOP_K | CONVOLUTION,
    CHOICE,
    CHOICE | CONVOLUTION | {"capacity_factor": 1.7},
]
IN_TIME = [
    SOFT | CAUSAL,
    SOFT | CAUSAL | {"normalize": True, "num_slots": 2},
    SOFT | CAUSAL | {"forgetting": True},
    SOFT | CAUSAL | {"chunk_size": 3},
    SOFT | CAUSAL | CONVOLUTION | {"num_slots": 3, "forgetting": True, "chunk_size": 2},
    DENSE | CAUSAL | CONVOLUTION,
]
# A clip whose second channel is missing, and one of fewer tokens; one that begins late, in one channel later still.
MASKS = {
    "all": None,
    "missing": [[[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], [[1, 1, 1, 0, 0]] * 3],
    "left": [[[0, 0, 0, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]], [[0, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 0, 1, 1]]],
    "none": [[[0] * 5] * 3, [[0] * 5, [1] * 5, [0] * 5]],
}  # fmt: skip


def name_of(options):
    return "-".join(str(value) for value in options.values())


def make(width, out_width=None, channels=3, grid=None, dtype=torch.float64, **options):
    torch.manual_seed(0)
    config = SoftMoAConfig(init_weights=False, num_channels=channels, **{"num_experts": 3, "r": 2, **options})
    arguments = config.mixture_options()
    if grid is not None:
        arguments["expert_options"]["patch_grid"] = grid
    made = Mixture(width, out_width or width, **arguments, causal=config.causal is True)
    if config.normalize:
        torch.nn.init.constant_(made.router.scale, 2.5)
    if config.forgetting:
        torch.nn.init.normal_(made.router.forgetting, mean=3.0)  # rates around 0.2
    return made.to(dtype).train()


def mix(x, mixture, mask=None):
    """What is added to tokens x `(B, C, T, D)`, in the same form, and the loss."""
    tokens = x.flatten(1, 2)
    added_to = x.new_zeros(*tokens.shape[:2], mixture.out_features)
    mask = None if mask is None else mask.flatten(1)
    output, loss = mixture(tokens, mask, added_to=added_to, channels=x.shape[1])
    return output.unflatten(1, x.shape[1:3]), loss


def expected_output(x, mixture, options, mask=None, grid=None):
    channels = x.shape[1]
    names = ["down_weight", "down_bias", "up_weight", "up_bias"]
    if options.get("expert_type") == "convolution":
        names += ["conv_weight", "conv_bias"]
    weights = list(zip(*(getattr(mixture.experts, name) for name in names), strict=True))
    router, causal = mixture.router, options.get("causal", False)
    tokens = oracle.with_channels(x, mixture.channel_embedding, mask)
    flat_mask = None if mask is None else mask.flatten(1)
    if options["routing"] == "soft":
        slots, scale = oracle.slots_of(router)
    if options["routing"] == "soft" and causal:
        rates = None if router.forgetting is None else router.forgetting.exp() / 100
        return oracle.causal_soft_mixture_of_channels(
            tokens.unflatten(1, x.shape[1:3]), slots, weights, mask, scale,
            options.get("chunk_size", 1), rates,
        ), None  # fmt: skip
    if options["routing"] == "soft":
        output = oracle.soft_mixture(tokens, slots, weights, flat_mask, scale)
        return output.unflatten(1, x.shape[1:3]), None
    loss = None
    if options.get("num_experts") == 1:
        gates = tokens.new_ones(*tokens.shape[:2], 1)
    else:
        gates = oracle.gates(tokens, router.weight, router.bias)
    if options["routing"] == "top_k":
        weighed, chosen = oracle.top_k_weights(gates, 2)
        loss, gates = 0.01 * oracle.load_balancing(gates, chosen, flat_mask), weighed
    elif options["routing"] == "expert_choice":
        gates = oracle.expert_choice_weights(gates, options.get("capacity_factor", 1.0), flat_mask)
    outputs = []
    for b in range(len(x)):
        for c in range(channels):
            own = slice(c * x.shape[2], (c + 1) * x.shape[2])
            valid = None if mask is None else mask[b : b + 1, c]
            outputs.append(
                oracle.token_mixture(tokens[b : b + 1, own], gates[b : b + 1, own], weights, valid, grid, causal)
            )
    return torch.cat(outputs).unflatten(0, x.shape[:2]), loss


def assert_agrees(x, mixture, options, mask=None, grid=None):
    given, given_loss = mix(x, mixture, mask)
    expected, expected_loss = expected_output(x, mixture, options, mask, grid)
    assert (given - expected).abs().max() < 1e-10 * expected.abs().max()
    assert (given_loss is None) == (expected_loss is None)
    upstream = torch.randn_like(expected)
    given, expected = (given * upstream).sum(), (expected * upstream).sum()
    if given_loss is not None:
        assert (given_loss - expected_loss).abs() < 1e-10 * expected_loss
        given, expected = given + 100 * given_loss, expected + 100 * expected_loss
    inputs = [x, *mixture.parameters()]
    for one, other in zip(torch.autograd.grad(given, inputs), torch.autograd.grad(expected, inputs), strict=True):
        assert (one - other).abs().max() < 1e-10 * max(other.abs().max(), 1e-3)


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("options", [*WHOLE, *IN_TIME], ids=name_of)
def test_output_and_gradients_agree_with_the_oracle(options, padding):
    mask = None if MASKS[padding] is None else torch.tensor(MASKS[padding]).bool()
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    assert_agrees(x, make(4, 3, **options), options, mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch, channels, times, width", [(1, 2, 1, 3), (2, 5, 3, 2), (3, 1, 7, 3), (1, 2, 17, 2)])
@pytest.mark.parametrize("options", [SOFT, SOFT | CAUSAL | {"forgetting": True, "chunk_size": 2}], ids=name_of)
def test_any_sizes(options, batch, channels, times, width, masked):
    x = torch.randn(batch, channels, times, width, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(batch, channels, times) < 0.6 if masked else None
    assert_agrees(x, make(width, channels=channels, **options), options, mask)


def test_convolutions_over_patches_stay_in_a_channel():
    options, grid = DENSE | CONVOLUTION | {"patch_grid": True}, PatchGrid(1, 2, 3)
    x = torch.randn(2, 3, 7, 4, dtype=torch.float64, requires_grad=True)
    assert_agrees(x, make(4, grid=grid, **options), options, None, (1, 2, 3))


@pytest.mark.parametrize("options", [*WHOLE, *IN_TIME], ids=name_of)
@pytest.mark.parametrize("masked", [False, True])
def test_one_channel_is_mono(options, masked):
    """Bit for bit, but for what the embedding adds; with that as part of the input, too."""
    x, mask = torch.randn(2, 1, 6, 4), (torch.rand(2, 1, 6) < 0.7) if masked else None
    mono = make(4, 3, channels=None, dtype=torch.float32, **options)
    for channel_embedding in (False, True):
        one = make(4, 3, channels=1, dtype=torch.float32, channel_embedding=channel_embedding, **options)
        same = {name: value for name, value in one.state_dict().items() if name != "channel_embedding"}
        mono.load_state_dict(same)
        read = x + one.channel_embedding if channel_embedding else x
        flat_mask = None if mask is None else mask[:, 0]
        wanted, wanted_loss = mono(read[:, 0], flat_mask, added_to=torch.zeros(2, 6, 3))
        given, given_loss = mix(x, one, mask)
        assert torch.equal(given[:, 0], wanted) and given_loss == wanted_loss


@pytest.mark.parametrize("options", [*WHOLE, *IN_TIME], ids=name_of)
def test_without_embedding_the_order_of_channels_does_not_matter(options):
    mixture = make(4, channel_embedding=False, **options)
    x, mask = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.tensor(MASKS["left"]).bool()
    order = torch.tensor([2, 0, 1])
    given, swapped = mix(x, mixture, mask)[0], mix(x[:, order], mixture, mask[:, order])[0]
    torch.testing.assert_close(swapped, given[:, order], rtol=1e-10, atol=1e-12)
    with_embedding = make(4, **options)
    assert (mix(x[:, order], with_embedding)[0] - mix(x, with_embedding)[0][:, order]).abs().max() > 1e-3


@pytest.mark.parametrize("options", [SOFT, SOFT | CAUSAL, CHOICE], ids=name_of)
def test_channels_meet(options):
    """What one channel holds reaches the others; in order of time, only those of its own time and later."""
    mixture = make(4, **options)
    x = torch.randn(1, 3, 6, 4, dtype=torch.float64)
    changed = x.clone()
    changed[0, 2, 3] += 1
    changes = (mix(changed, mixture)[0] - mix(x, mixture)[0]).abs().amax(dim=(0, 3)) > 1e-12
    assert changes[2, 3] and changes[:2].any()
    if options.get("causal"):
        assert changes[:2, 3:].all() and not changes[:, :3].any()


def test_what_a_missing_channel_holds_does_not_matter():
    mixture, mask = make(4, **SOFT), torch.tensor(MASKS["missing"]).bool()
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    loud = x.masked_fill(~mask.unsqueeze(-1), float("nan"))
    assert torch.equal(mix(loud, mixture, mask)[0][mask], mix(x, mixture, mask)[0][mask])


@pytest.mark.parametrize("options", [*WHOLE, *IN_TIME], ids=name_of)
@pytest.mark.parametrize("padding", MASKS)
def test_records_are_of_the_same_weights(options, padding):
    """The norms of a record are those of what the experts add; dispatch weights sum to one over all channels."""
    mixture = make(4, 4, **options).eval()
    mask = None if MASKS[padding] is None else torch.tensor(MASKS[padding]).bool()
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    flat_mask = None if mask is None else mask.flatten(1)
    dispatch, combine, norms = mixture.record(x.flatten(1, 2), flat_mask, 2.0, channels=3)
    assert dispatch.shape == combine.shape and norms.shape == (2, 15, combine.shape[2])
    sums = dispatch.sum(dim=1)
    assert ((sums - 1).abs() < 1e-9).logical_or(sums == 0).all()
    if options.get("num_experts") == 1:
        real = torch.ones(2, 3, 5, dtype=torch.bool) if mask is None else mask
        added = 2.0 * mix(x, mixture, mask)[0].flatten(1, 2).norm(dim=-1)
        torch.testing.assert_close(norms[..., 0][real.flatten(1)], added[real.flatten(1)])


def test_the_last_time_reads_what_a_record_says():
    """Its dispatch weights give what the experts read at the last time, with channels that are as old as each other."""
    mixture = make(4, **SOFT, **CAUSAL, forgetting=True).eval()
    x = torch.randn(1, 3, 5, 4, dtype=torch.float64)
    dispatch, combine, _ = mixture.record(x.flatten(1, 2), None, 1.0, channels=3)
    tokens = oracle.with_channels(x, mixture.channel_embedding)
    slots = dispatch.flatten(2).mT @ tokens
    expected = combine.flatten(2) @ mixture.experts(slots)
    given = mix(x, mixture)[0]
    torch.testing.assert_close(given[:, :, -1], expected.unflatten(1, (3, 5))[:, :, -1], rtol=1e-10, atol=1e-12)


def test_a_fresh_mixture_adds_nothing_and_tells_channels_apart():
    mixture = Mixture(6, 6, num_channels=2)
    x = torch.randn(2, 2, 5, 6)
    assert not mix(x, mixture)[0].any()
    assert mixture.channel_embedding.shape == (2, 6) and mixture.channel_embedding.std() > 0.3
    assert Mixture(6, 6, num_channels=2, channel_embedding=False).channel_embedding is None


def test_half_precision_keeps_its_dtype():
    mixture = make(4, dtype=torch.float32, **SOFT)
    x = torch.randn(2, 3, 5, 4)
    given, wanted = mix(x.bfloat16(), mixture)[0], mix(x, mixture)[0]
    assert given.dtype == torch.bfloat16
    assert (given.float() - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_another_number_of_channels_is_an_error():
    with pytest.raises(ValueError, match=r"embeddings for 3 channels, got 2.*channel_embedding=False"):
        mix(torch.randn(2, 2, 5, 4, dtype=torch.float64), make(4, **SOFT))
