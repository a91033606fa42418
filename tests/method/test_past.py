"""Streams of tokens: pieces, one after another, give what the whole gives."""

import copy

import pytest
import torch
from test_causal import CONVOLUTION, KINDS, TOKEN_WISE, make, name_of, relative_error
from torch.autograd import gradcheck, gradgradcheck

from peft_softmoa.method.past import Past
from peft_softmoa.method.scan import Averages, running_average

LENGTH = 37


def mix(tokens, mixture, mask=None, past=None):
    added_to = tokens.new_zeros(*tokens.shape[:2], mixture.out_features)
    return mixture(tokens, mask, added_to=added_to, past=past)[0]


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cut(generator, step):
    """Random pieces of the tokens, that end at multiples of a number."""
    place = 0
    while place < LENGTH:
        end = min(LENGTH, place + step * int(torch.randint(1, 6, (), generator=generator)))
        yield slice(place, end)
        place = end


@torch.no_grad()
@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize("options", KINDS + TOKEN_WISE, ids=name_of)
def test_pieces_give_what_the_whole_gives(options, history):
    mixture, tokens = make(9, **options), draw(2, LENGTH, 9)
    expected = mix(tokens, mixture)
    for seed in range(5):
        past = Past(skips_padding=not history, history=history)
        pieces = cut(torch.Generator().manual_seed(seed), options.get("chunk_size", 1))
        given = torch.cat([mix(tokens[:, piece], mixture, past=past) for piece in pieces], dim=1)
        assert relative_error(given, expected) < 1e-12
        assert past.num_tokens == LENGTH
        if not history:
            kept = {"maximum": 1, "total": 1, "average": 1, "count": 1, "hidden": options.get("kernel_size", 3) - 1}
            assert all(tensor.shape[1] == kept[name] for name, tensor in past.tensors.items())


@torch.no_grad()
@pytest.mark.parametrize("options", KINDS + TOKEN_WISE, ids=name_of)
def test_streams_of_a_batch_begin_and_end_apart(options):
    mixture, tokens, step = make(9, **options), draw(3, LENGTH, 9), options.get("chunk_size", 1)
    expected = mix(tokens, mixture)
    generator, past, places = torch.Generator().manual_seed(1), Past(), [0, 0, 0]
    given = [[], [], []]
    while min(places) < LENGTH:
        # Of each stream some tokens, perhaps none, anywhere in a piece that holds nothing else.
        counts = [min(LENGTH - place, step * int(torch.randint(0, 4, (), generator=generator))) for place in places]
        length = max(counts) + int(torch.randint(1, 4, (), generator=generator))
        piece, mask = torch.full((3, length, 9), torch.nan, dtype=torch.float64), torch.zeros(3, length, dtype=bool)
        where = []
        for row, (place, count) in enumerate(zip(places, counts)):
            start = int(torch.randint(0, length - count + 1, (), generator=generator))
            where.append(slice(start, start + count))
            piece[row, where[-1]], mask[row, where[-1]] = tokens[row, place : place + count], True
        output = mix(piece, mixture, mask, past)
        for row, count in enumerate(counts):
            given[row].append(output[row, where[row]])
            places[row] += count
    assert relative_error(torch.stack([torch.cat(parts) for parts in given]), expected) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("options", KINDS[:3] + TOKEN_WISE[:1], ids=name_of)
def test_padded_tokens_have_a_place_where_padding_is_not_skipped(options):
    mixture, tokens = make(9, **options), draw(2, LENGTH, 9)
    mask = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(2)) > 0.4
    expected = mix(tokens, mixture, mask)
    past = Past(skips_padding=False)
    pieces = list(cut(torch.Generator().manual_seed(3), 1))
    given = torch.cat([mix(tokens[:, piece], mixture, mask[:, piece], past) for piece in pieces], dim=1)
    assert relative_error(given[mask], expected[mask]) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("options", [KINDS[2], TOKEN_WISE[1]], ids=name_of)
def test_tokens_are_taken_back(options):
    mixture, tokens = make(9, **options), draw(2, LENGTH, 9)
    past = Past(skips_padding=False, history=True)
    for piece, back in [(slice(0, 9), 3), (slice(6, 20), 14), (slice(6, 30), 1)]:
        mix(tokens[:, piece], mixture, past=past)
        past.crop(back)
    assert past.num_tokens == 29
    given = mix(tokens[:, 29:], mixture, past=past)
    assert relative_error(given, mix(tokens, mixture)[:, 29:]) < 1e-12
    with pytest.raises(ValueError, match="keeps only its latest state, so that no tokens can be taken back"):
        Past().crop(1)
    with pytest.raises(ValueError, match="`history` must be False"):
        Past(history=True)


@torch.no_grad()
@pytest.mark.parametrize("options", [KINDS[1], KINDS[2], KINDS[3], TOKEN_WISE[0]], ids=name_of)
def test_streams_are_selected_copied_moved_and_reset(options):
    mixture, tokens = make(9, **options), draw(3, 24, 9)
    expected = mix(tokens, mixture)
    past = Past()
    mix(tokens[:, :12], mixture, past=past)
    kept, deep = past.copy(), copy.deepcopy(past)
    rows = torch.tensor([2, 0, 0, 1])
    past.select(rows)
    past.to("cpu")
    assert relative_error(mix(tokens[rows, 12:], mixture, past=past), expected[rows, 12:]) < 1e-12
    for other in (kept, deep):
        assert relative_error(mix(tokens[:, 12:], mixture, past=other), expected[:, 12:]) < 1e-12
    kept.reset(torch.tensor([1]))
    given = mix(tokens[[0, 2, 1]], mixture, past=(kept.select(torch.tensor([0, 2, 1])), kept)[1])
    assert relative_error(given[2], expected[1]) < 1e-12  # anew
    assert relative_error(given[0], expected[0]) > 1e-3  # and the others not
    kept.reset()
    assert kept.batch is None
    assert relative_error(mix(tokens[:1], mixture, past=kept), expected[:1]) < 1e-12
    with pytest.raises(ValueError, match="of 1 samples, but there are 3 now"):
        mix(tokens, mixture, past=kept)


@torch.no_grad()
def test_pieces_that_cut_chunks_are_an_error():
    mixture, tokens = make(9, **KINDS[3]), draw(2, 10, 9)
    past = Past()
    mix(tokens[:, :4], mixture, past=past)
    with pytest.raises(ValueError, match=r"chunk_size=3.*the \[4, 4\] tokens before these end within one"):
        mix(tokens[:, 4:], mixture, past=past)


def test_gradients_of_a_piece():
    values, logits = draw(2, 5, 2, 3).requires_grad_(), draw(2, 5, 4, seed=1).requires_grad_()
    rates, maximum = draw(4, seed=2).exp().requires_grad_(), draw(2, 1, 4, seed=3).requires_grad_()
    average, total = draw(2, 1, 4, 3, seed=4), draw(2, 1, 4, seed=5).exp()
    mask = torch.tensor([[True, True, False, True, True], [False, True, True, True, False]])

    def run(values, logits, rates, maximum):
        return running_average(values, logits, mask, rates, Averages(average, total, maximum)).average

    assert gradcheck(run, (values, logits, rates, maximum))
    assert gradgradcheck(run, (values, logits, rates, maximum))


@pytest.mark.parametrize("options", KINDS[:3] + TOKEN_WISE[:1], ids=name_of)
def test_a_piece_gets_the_gradients_that_it_has_in_the_whole(options):
    mixture, tokens = make(9, **options), draw(2, 12, 9)
    upstream = draw(2, 5, 9, seed=1)
    whole = tokens.clone().requires_grad_()
    (mix(whole, mixture)[:, 7:] * upstream).sum().backward()
    past, piece = Past(), tokens[:, 7:].clone().requires_grad_()
    mix(tokens[:, :7], mixture, past=past)
    assert not any(tensor.requires_grad for tensor in past.tensors.values())
    (mix(piece, mixture, past=past) * upstream).sum().backward()
    assert relative_error(piece.grad, whole.grad[:, 7:]) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("size", [1e4, 1e2])
def test_long_streams_of_extreme_logits(size):
    generator = torch.Generator().manual_seed(0)
    values, logits = (
        torch.randn(1, 2000, 2, 3, generator=generator),
        torch.randn(1, 2000, 2, generator=generator) * size,
    )
    expected = running_average(values.double(), logits.double(), None, torch.full((2,), 0.1).double()).average
    past, rates, given = Past(), torch.full((2,), 0.1), []
    for place in range(0, 2000, 8):
        piece = slice(place, place + 8)
        first, last = past.ends(logits[:, piece], None)
        averages = running_average(values[:, piece], logits[:, piece], None, rates, past.running(first, rates))
        past.keep_averages(averages, last)
        given.append(averages.average)
    # A logit has some error of its own, and a weight is its exponential.
    assert (torch.cat(given, dim=1) - expected).abs().max() < 10 * torch.finfo().eps * logits.abs().max()


def test_the_state_is_small():
    mixture, past = make(768, num_experts=7, r=6, routing="soft"), Past()
    mix(draw(1, 3, 768), mixture, past=past)
    assert sum(tensor.numel() for tensor in past.tensors.values()) == 7 * (6 + 2)
    mixture, past = make(768, num_experts=7, r=6, routing="dense", **CONVOLUTION), Past()
    mix(draw(1, 3, 768), mixture, past=past)
    assert sum(tensor.numel() for tensor in past.tensors.values()) == 2 * 7 * 6
