"""Mixtures in order of time: held to loops over all prefixes, and to what no token may see."""

import oracle
import pytest
import torch
from operations import Operations
from torch.autograd import gradcheck, gradgradcheck

from peft_softmoa import SoftMoAConfig
from peft_softmoa.method import Mixture
from peft_softmoa.method.routing import chunk_ends
from peft_softmoa.method.scan import PIECE, running_average

SOFT = {"routing": "soft"}
CONVOLUTION = {"expert_type": "convolution"}
CONFORMER = {"expert_type": "conformer", "kernel_size": 5}
DENSE_CONVOLUTION = {"routing": "dense"} | CONVOLUTION
KINDS = [
    SOFT,
    SOFT | {"normalize": True, "num_slots": 2},
    SOFT | {"forgetting": True},
    SOFT | {"chunk_size": 3},
    SOFT | CONVOLUTION | {"num_slots": 3, "forgetting": True, "chunk_size": 2},
    SOFT | {"unit_slots": True},
    SOFT | {"unit_slots": True, "normalize": True},
]
TOKEN_WISE = [DENSE_CONVOLUTION, DENSE_CONVOLUTION | {"kernel_size": 5}, {"routing": "top_k"} | CONVOLUTION]
TOKEN_WISE += [{"routing": "dense"} | CONFORMER, {"routing": "top_k"} | CONFORMER | {"kernel_size": 31, "r": 1}]
MASKS = {
    "all": [[1, 1, 1, 1, 1, 1, 1]] * 2,
    "right": [[1, 1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1]],
    "holes": [[0, 1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0, 0]],
}


def name_of(options):
    return "-".join(str(value) for value in options.values())


def make(width, out_width=None, dtype=torch.float64, causal=True, **options):
    torch.manual_seed(0)
    config = SoftMoAConfig(init_weights=False, causal=causal, **{"num_experts": 3, "r": 2, **options})
    made = Mixture(width, out_width or width, **config.mixture_options(), causal=causal is True)
    if config.normalize:
        torch.nn.init.constant_(made.router.scale, 2.5)
    if config.forgetting:
        torch.nn.init.normal_(made.router.forgetting, mean=3.0)  # rates around 0.2
    return made.to(dtype)


def mix(tokens, mixture, mask=None):
    return mixture(tokens, mask, added_to=tokens.new_zeros(*tokens.shape[:2], mixture.out_features))[0]


def relative_error(given, expected):
    return ((given - expected).abs().max() / expected.abs().max().clamp_min(1e-3)).item()


def expected_output(x, mixture, options, mask=None):
    x = x if mask is None else x * mask.unsqueeze(-1)
    weights = oracle.weights_of(mixture.experts, options.get("expert_type", "bottleneck"))
    router = mixture.router
    if options["routing"] == "soft":
        rates = None if router.forgetting is None else router.forgetting.exp() / 100
        chunk_size = options.get("chunk_size", 1)
        slots, scale = oracle.slots_of(router)
        return oracle.causal_soft_mixture(x, slots, weights, mask, scale, chunk_size, rates)
    gates = oracle.gates(x, router.weight, router.bias)
    if options["routing"] == "top_k":
        gates, _ = oracle.top_k_weights(gates, 2)
    return oracle.token_mixture(x, gates, weights, mask, causal=True)


def assert_agrees(x, mixture, options, mask=None):
    given, expected = mix(x, mixture, mask), expected_output(x, mixture, options, mask)
    assert relative_error(given, expected) < 1e-10
    upstream = torch.randn_like(expected)
    inputs = [x, *mixture.parameters()]
    gradients = [torch.autograd.grad((output * upstream).sum(), inputs) for output in (given, expected)]
    for one, other in zip(*gradients, strict=True):
        assert relative_error(one, other) < 1e-10


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("options", [*KINDS, *TOKEN_WISE], ids=name_of)
def test_output_and_gradients_agree_with_the_oracle(options, padding):
    mask = torch.tensor(MASKS[padding]).bool()
    x = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    assert_agrees(x, make(5, 4, **options), options, None if padding == "all" else mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "batch, num_tokens, width, out_width, num_experts, num_slots, r, chunk_size",
    [(2, 1, 3, 3, 2, 2, 1, 1), (1, 19, 4, 3, 2, 1, 3, 1), (3, 5, 5, 2, 1, 3, 2, 4), (1, 33, 2, 2, 2, 1, 1, 10)],
)
def test_any_sizes(batch, num_tokens, width, out_width, num_experts, num_slots, r, chunk_size, masked):
    options = {**SOFT, "num_experts": num_experts, "num_slots": num_slots, "chunk_size": chunk_size}
    options["forgetting"] = True
    mixture = make(width, out_width, r=r, **options)
    x = torch.randn(batch, num_tokens, width, dtype=torch.float64, requires_grad=True)
    assert_agrees(x, mixture, options, torch.rand(batch, num_tokens) < 0.6 if masked else None)


def plainly(values, logits, mask, rates):
    """The formula of `running_average` for all pairs of tokens."""
    places = torch.arange(logits.shape[1], dtype=logits.dtype)
    ages = (places[:, None] - places)[:, :, None]
    seen = (ages >= 0) & (True if mask is None else mask[:, None, :, None])
    weights = logits[:, None] - (0 if rates is None else ages * rates)
    weights = weights.masked_fill(~seen, torch.finfo(weights.dtype).min).softmax(dim=2) * seen
    return torch.einsum("btus,busr->btsr", weights, values.repeat_interleave(weights.shape[3] // values.shape[2], 2))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("forgets", [False, True])
@pytest.mark.parametrize("num_slots", [1, 2])
@pytest.mark.parametrize("num_tokens", [1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5, PIECE**2 + 3])
def test_the_scan_agrees_with_all_pairs(num_tokens, num_slots, forgets, masked):
    """Also over several levels of pieces, and where weights differ by e^100."""
    generator = torch.Generator().manual_seed(num_tokens)
    draw = {"dtype": torch.float64, "generator": generator}
    values = torch.randn(2, num_tokens, 2, 3, **draw).requires_grad_()
    logits = (30 * torch.randn(2, num_tokens, 2 * num_slots, **draw)).requires_grad_()
    mask = torch.rand(2, num_tokens, generator=generator) < 0.5 if masked else None
    rates = torch.rand(2 * num_slots, **draw).requires_grad_() if forgets else None
    inputs = [values, logits, *([rates] if forgets else [])]
    results = []
    for run in (lambda *given: running_average(*given).average, plainly):
        output = run(values, logits, mask, rates)
        upstream = torch.cos(torch.arange(output.numel(), dtype=torch.float64)).view_as(output)
        results.append([output, *torch.autograd.grad((output * upstream).sum(), inputs)])
    for given, expected in zip(*results, strict=True):
        assert relative_error(given, expected) < 1e-10


@pytest.mark.parametrize("masked", [False, True])
def test_the_gradients_of_the_scan_have_gradients(masked):
    values = torch.randn(2, 5, 2, 2, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    rates = torch.rand(4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1]]).bool() if masked else None

    def run(values, logits, rates):
        return running_average(values, logits, mask, rates).average

    assert gradcheck(run, (values, logits, rates)) and gradgradcheck(run, (values, logits, rates))


def test_gradients_of_single_samples():
    """As in differentially private training: `torch.func` differentiates each sample by itself."""
    mixture = make(4, forgetting=True)
    tokens = torch.randn(3, 20, 4, dtype=torch.float64)

    def loss(parameters, sample):
        added_to = torch.zeros(1, 20, 4, dtype=torch.float64)
        output, _ = torch.func.functional_call(mixture, parameters, (sample[None],), {"added_to": added_to})
        return output.square().sum()

    parameters = dict(mixture.named_parameters())
    given = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, tokens)
    for index, sample in enumerate(tokens):
        expected = torch.autograd.grad(loss(parameters, sample), list(parameters.values()))
        for name, each in zip(parameters, expected, strict=True):
            torch.testing.assert_close(given[name][index], each)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [*KINDS, *TOKEN_WISE], ids=name_of)
def test_what_comes_later_changes_nothing_before(options, dtype):
    """Not a bit of it; before its chunk, where there are chunks."""
    mixture = make(6, dtype=dtype, **options)
    chunk_size = options.get("chunk_size", 1)
    x = torch.randn(2, 40, 6, dtype=dtype)
    before = mix(x, mixture)
    for place in (0, 1, 7, 16, 17, 31, 39):
        changed = x.clone()
        changed[:, place] = 1e3 * torch.randn(2, 6, dtype=dtype)
        after = mix(changed, mixture)
        begin = place // chunk_size * chunk_size
        assert torch.equal(after[:, :begin], before[:, :begin])
        assert not torch.equal(after[:, begin:], before[:, begin:])


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("options", [{}, {"num_slots": 2, "normalize": True}, CONVOLUTION | {"num_slots": 3}])
def test_the_last_token_gets_what_it_gets_without_order(options, padding):
    """And with chunks as long as the clip, all do."""
    causal, whole = make(5, **options), make(5, causal=None, **options)
    whole.load_state_dict(causal.state_dict())
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    mask = torch.tensor(MASKS[padding]).bool()
    expected = mix(x, whole, mask)[mask]
    for chunk_size in (7, 8, 100):
        causal.router.chunk_size = chunk_size
        torch.testing.assert_close(mix(x, causal, mask)[mask], expected, rtol=1e-12, atol=1e-13)
    causal.router.chunk_size = None
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    torch.testing.assert_close(mix(x, causal, mask)[last], mix(x, whole, mask)[last], rtol=1e-12, atol=1e-13)
    assert not torch.allclose(mix(x, causal, mask)[mask], expected)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 5, 6, 7])
def test_a_chunk_sees_what_a_clip_that_ends_with_it_sees(chunk_size):
    mixture = make(5, chunk_size=chunk_size)
    whole = make(5, causal=None)
    whole.load_state_dict(mixture.state_dict())
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    given = mix(x, mixture)
    for begin in range(0, 7, chunk_size):
        seen = x[:, : begin + chunk_size]
        torch.testing.assert_close(given[:, begin : begin + chunk_size], mix(seen, whole)[:, begin:])


def test_chunks_begin_with_the_first_real_token():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]]).bool()
    assert chunk_ends(2, 7, mask).tolist() == [[1, 1, 3, 3, 5, 5, 6], [1, 1, 3, 3, 5, 5, 6]]
    assert chunk_ends(3, 7, mask).tolist() == [[1, 1, 4, 4, 4, 6, 6], [2, 2, 2, 5, 5, 5, 6]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [*KINDS, *TOKEN_WISE], ids=name_of)
def test_padding_changes_nothing(options, side):
    mixture = make(5, **options)
    short, padding = torch.randn(2, 6, 5, dtype=torch.float64), 100 * torch.randn(2, 3, 5, dtype=torch.float64)
    real, padded = torch.ones(2, 6).bool(), torch.zeros(2, 3).bool()
    order = slice(None, None, -1 if side == "left" else 1)
    mask = torch.cat([real, padded][order], dim=1)
    given = mix(torch.cat([short, padding][order], dim=1), mixture, mask)
    torch.testing.assert_close(given[mask], mix(short, mixture).flatten(0, 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [*KINDS, *TOKEN_WISE], ids=name_of)
def test_what_padding_holds_does_not_matter(options, value):
    mixture = make(8, **options)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    mask = torch.tensor([[True] * 6, [False] * 2 + [True] * 3 + [False]])
    results = []
    for padding in (0.0, value):
        tokens = x.masked_fill(~mask.unsqueeze(-1), padding).requires_grad_()
        output = mix(tokens, mixture, mask)
        results.append(
            [output[mask], *torch.autograd.grad(output[mask].square().sum(), [tokens, *mixture.parameters()])]
        )
        results[-1] += [each[mask] for each in mixture.record(tokens, mask)]
    for expected, given in zip(*results):
        assert torch.equal(given, expected)


@pytest.mark.parametrize("forgets", [False, True])
@pytest.mark.parametrize("magnitude", [1.0, 1e2, 1e4])
def test_logits_of_any_size(magnitude, forgets):
    """In float32, against float64 of the same logits: what is far below the largest weight so far counts as zero."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 500, 3, 4, generator=generator)
    logits = magnitude * (2 * torch.rand(2, 500, 3, generator=generator) - 1)
    rates = torch.tensor([0.0, 0.01, 2.0]) if forgets else None
    upstream = torch.randn(2, 500, 3, 4, generator=generator)
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = [each.to(dtype).requires_grad_() for each in (values, logits)]
        output = running_average(*inputs, None, None if rates is None else rates.to(dtype)).average
        results.append([output, *torch.autograd.grad((output * upstream.to(dtype)).sum(), inputs)])
    for given, expected in zip(*results, strict=True):
        assert given.isfinite().all()
        assert relative_error(given.double(), expected) < (1e-4 if magnitude == 1e4 else 1e-5)


def test_steps_between_extreme_logits():
    """Each token whose logit is far above all before it is all that is read from then on."""
    logits = torch.tensor([-1e4, -1e4, 1e4, -1e4, 1e4, 9.9e3]).view(1, 6, 1).repeat(1, 7, 1)
    values = torch.arange(42.0).view(1, 42, 1, 1)
    read = running_average(values, logits).average.flatten().tolist()
    assert read[:5] == [0.0, 0.5, 2.0, 2.0, 3.0] and read[5] == 3.0


@pytest.mark.parametrize("magnitude", [1.0, 1e4])
def test_a_long_clip_stays_exact(magnitude):
    """100,000 tokens in float32."""
    generator = torch.Generator().manual_seed(0)
    values, logits = torch.randn(1, 100_000, 1, 2, generator=generator), torch.randn(1, 100_000, 2, generator=generator)
    logits *= magnitude
    rates = torch.tensor([0.0, 1e-3])
    given = running_average(values, logits, None, rates).average
    expected = running_average(values.double(), logits.double(), None, rates.double()).average
    assert relative_error(given.double(), expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", KINDS, ids=name_of)
@pytest.mark.parametrize("magnitude", [1.0, 1e4])
def test_half_precision_under_autocast(dtype, options, magnitude):
    mixture = make(32, dtype=torch.float32, **options)
    x = (magnitude * torch.randn(2, 33, 32)).to(dtype).requires_grad_()
    upstream = torch.randn(2, 33, 32) / magnitude
    parameters = list(mixture.parameters())
    with torch.autocast("cpu", dtype=dtype):
        given, _ = mixture(x, added_to=torch.zeros(2, 33, 32))
    gradients = torch.autograd.grad((given * upstream).sum(), [x, *parameters])
    in_float32 = x.detach().float().requires_grad_()
    expected = mix(in_float32, mixture)
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), [in_float32, *parameters])
    assert torch.equal(given, expected)
    for one, other in zip(gradients, expected_gradients, strict=True):
        assert one.isfinite().all() and torch.equal(one, other.to(one.dtype))


@pytest.mark.parametrize("options", [SOFT, SOFT | {"forgetting": True}], ids=name_of)
def test_a_long_clip_of_extreme_logits_under_autocast(options):
    """Beside float64: what the logits are rounded by, one in 10⁷ of 10⁴, is an error of the weights."""
    mixture = make(16, dtype=torch.float32, **options)
    x = torch.randn(1, 100_000, 16)
    x = (1e4 / (x @ mixture.router.slots).abs().max().detach() * x).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given, _ = mixture(x, added_to=torch.zeros(1, 100_000, 16))
    gradients = torch.autograd.grad(given.square().mean(), [x, *mixture.parameters()])
    assert all(each.isfinite().all() for each in (given, *gradients))
    assert relative_error(given.detach().double(), mix(x.detach().double(), mixture.double())) < 1e-3


def test_no_tensor_grows_with_experts_times_tokens_times_width():
    num_tokens, width = 40, 512
    mixture = make(width, num_experts=15)
    x = torch.randn(2, num_tokens, width, dtype=torch.float64, requires_grad=True)
    with Operations() as operations:
        mix(x, mixture).sum().backward()
    assert operations.numel == 2 * num_tokens * width


def test_what_is_kept_for_the_backward_pass():
    """No more than a few numbers of the size T·S·R, beside the tokens."""
    num_tokens, width, r = 400, 16, 6
    x = torch.randn(1, num_tokens, width, dtype=torch.float64, requires_grad=True)
    kept = {}
    for num_experts in (4, 12):
        mixture = make(width, num_experts=num_experts, r=r)
        storages = {}

        def note(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 8
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = mix(x, mixture)
        weights = sum(parameter.numel() for parameter in mixture.parameters())
        kept[num_experts] = sum(storages.values()) - 2 * weights
        del output
    assert kept[12] - kept[4] < 5 * 8 * num_tokens * r


def test_the_work_is_linear_in_the_number_of_tokens():
    sizes = []
    for num_tokens in (512, 4096):
        with Operations() as operations, torch.no_grad():
            mix(torch.randn(1, num_tokens, 4), make(4, dtype=torch.float32))
        sizes.append((operations.numel, len(operations.kernels())))
    assert sizes[1][0] == 8 * sizes[0][0]
    assert sizes[1][1] < 2 * sizes[0][1]  # a level more


def test_it_is_exported_for_any_number_of_tokens():
    """One graph of plain operations, whatever the number of tokens that it was made with."""
    mixture = make(4, dtype=torch.float32, forgetting=True, chunk_size=3)

    class Adding(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mixture = mixture

        def forward(self, tokens, mask):
            return self.mixture(tokens, mask, added_to=tokens)[0]

    with torch.no_grad():
        lengths = {"tokens": {1: torch.export.Dim("T", max=9000)}, "mask": {1: torch.export.Dim("T", max=9000)}}
        example = torch.randn(2, 50, 4), torch.ones(2, 50, dtype=torch.bool)
        program = torch.export.export(Adding(), example, dynamic_shapes=lengths)
        for num_tokens in (2, 16, 40, 700, 8000):
            tokens, mask = torch.randn(2, num_tokens, 4), torch.rand(2, num_tokens) < 0.7
            given, expected = program.module()(tokens, mask), mixture(tokens, mask, added_to=tokens)[0]
            torch.testing.assert_close(given, expected, rtol=0, atol=1e-4)


def test_record_says_what_the_last_token_reads():
    mixture = make(5, 4, num_slots=2, forgetting=True)
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]).bool()
    dispatch, combine, norms = mixture.record(x, mask, scaling=0.5)
    assert dispatch.shape == combine.shape == (2, 6, 3, 2) and norms.shape == (2, 6, 3)
    torch.testing.assert_close(dispatch.sum(dim=1), torch.ones(2, 3, 2, dtype=torch.float64))
    assert not dispatch[~mask].any()
    read = torch.einsum("btnp,btd->bnpd", dispatch, x * mask.unsqueeze(-1))
    outputs = mixture.experts(read.flatten(1, 2)).unflatten(1, (3, 2))
    last = torch.tensor([4, 5])
    added = torch.einsum("bnp,bnpd->bnd", combine[[0, 1], last], outputs)
    torch.testing.assert_close(0.5 * added.norm(dim=-1), norms[[0, 1], last])
    torch.testing.assert_close(added.sum(dim=1), mix(x, mixture, mask)[[0, 1], last])


def test_causal_soft_routing_has_no_conformers():
    """A running average is exact if `down` comes first; a normalisation in front of it is not linear."""
    for options in ({"causal": True}, {"causal": True, "chunk_size": 2}, {"forgetting": True}):
        with pytest.raises(ValueError, match="^`expert_type` must be 'bottleneck' or 'convolution' .* got 'conformer'"):
            SoftMoAConfig(expert_type="conformer", num_slots=16, **options)
    with pytest.raises(ValueError, match="Causal soft routing averages what `down` makes.*expert_type='conformer'"):
        Mixture(4, 4, expert_type="conformer", causal=True)


def test_expert_choice_has_no_order_in_time():
    with pytest.raises(ValueError, match="`routing` must be .* depends on the tokens after it, got 'expert_choice'"):
        SoftMoAConfig(routing="expert_choice", causal=True)
    with pytest.raises(KeyError):
        Mixture(4, 4, routing="expert_choice", router_options={"capacity_factor": 1.0}, causal=True)
