"""Where in the past slots read: held to loops, whole and in pieces."""

import oracle
import pytest
import torch
from test_causal import DENSE_CONVOLUTION, MASKS, SOFT, make, name_of, relative_error
from test_past import LENGTH, cut, draw

from peft_softmoa.method.past import Past

KINDS = [
    SOFT,
    SOFT | {"normalize": True, "num_slots": 2},
    SOFT | {"forgetting": True, "num_slots": 2},
    SOFT | {"chunk_size": 3},
    SOFT | {"chunk_size": 2, "forgetting": True},
]


def expected_reading(mixture, tokens, mask, options):
    router = mixture.router
    tokens = tokens if mask is None else tokens * mask.unsqueeze(-1)
    expected = oracle.reading_in_time(router.logits(tokens), mask, options.get("chunk_size", 1), router._rates(tokens))
    return [each.unflatten(-1, (3, -1)) for each in expected]


def record(mixture, tokens, mask=None, past=None):
    """What is recorded of a call, and then the call."""
    reading = mixture.record_reading(tokens, mask, past)
    mixture(tokens, mask, added_to=tokens, past=past)
    return reading


@torch.no_grad()
@pytest.mark.parametrize("mask", [None, *MASKS], ids=str)
@pytest.mark.parametrize("options", KINDS, ids=name_of)
def test_agrees_with_loops(options, mask):
    mixture, tokens = make(5, **options), draw(2, 7, 5)
    mask = None if mask is None else torch.tensor(MASKS[mask]).bool()
    real = torch.ones(2, 7).bool() if mask is None else mask
    for given, expected in zip(mixture.record_reading(tokens, mask), expected_reading(mixture, tokens, mask, options)):
        assert given.shape == (2, 7, 3, options.get("num_slots", 1))
        assert relative_error(given[real], expected[real]) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize("options", KINDS, ids=name_of)
def test_pieces_give_what_the_whole_gives(options, history):
    mixture, tokens = make(9, **options), draw(2, LENGTH, 9)
    expected = expected_reading(mixture, tokens, None, options)
    for seed in range(3):
        past = Past(skips_padding=not history, history=history)
        pieces = cut(torch.Generator().manual_seed(seed), options.get("chunk_size", 1))
        given = [record(mixture, tokens[:, piece], past=past) for piece in pieces]
        for one, other in zip(zip(*given), expected):
            assert relative_error(torch.cat(one, dim=1), other) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("options", KINDS[:3], ids=name_of)
def test_streams_of_a_batch_begin_and_end_apart(options):
    mixture, tokens = make(9, **options), draw(2, 12, 9)
    expected = expected_reading(mixture, tokens, None, options)
    past, places, given = Past(), [0, 0], [[], []]
    for counts, starts in [((0, 3), (0, 2)), ((5, 4), (0, 0)), ((0, 0), (0, 0)), ((7, 5), (1, 3))]:
        piece = draw(2, 8, 9, seed=1)
        mask = torch.zeros(2, 8, dtype=torch.bool)
        for row, (count, start) in enumerate(zip(counts, starts)):
            piece[row, start : start + count] = tokens[row, places[row] : places[row] + count]
            mask[row, start : start + count] = True
            places[row] += count
        reading = record(mixture, piece, mask, past)
        for row in range(2):
            given[row].append([each[row, mask[row]] for each in reading])
    assert places == [12, 12]
    for row in range(2):
        for one, other in zip(zip(*given[row]), expected):
            assert relative_error(torch.cat(one), other[row]) < 1e-10


@torch.no_grad()
def test_resets_selections_and_crops():
    mixture, tokens = make(9, **KINDS[2]), draw(2, 8, 9)
    expected = expected_reading(mixture, tokens, None, KINDS[2])
    past = Past()
    record(mixture, tokens[:, :4], past=past)
    other = past.copy()
    past.reset(torch.tensor([1]))
    mixed = torch.stack([tokens[0, 4:], tokens[1, :4]])
    given = record(mixture, mixed, past=past)
    for one, whole in zip(given, expected):
        assert relative_error(one, torch.stack([whole[0, 4:], whole[1, :4]])) < 1e-10
    other.select(torch.tensor([1, 1, 0]))
    for one, whole in zip(record(mixture, tokens[[1, 1, 0], 4:], past=other), expected):
        assert relative_error(one, whole[[1, 1, 0], 4:]) < 1e-10
    past.reset()
    for one, whole in zip(record(mixture, tokens, past=past), expected):
        assert relative_error(one, whole) < 1e-10
    past = Past(skips_padding=False, history=True)
    record(mixture, tokens[:, :6], past=past)
    past.crop(3)
    for one, whole in zip(record(mixture, tokens[:, 3:], past=past), expected):
        assert relative_error(one, whole[:, 3:]) < 1e-10


@torch.no_grad()
def test_tokens_that_were_not_recorded():
    mixture, tokens = make(9), draw(2, 8, 9)
    past = Past()
    mixture(tokens[:, :3], added_to=tokens[:, :3], past=past)
    assert record(mixture, tokens[:, 3:], past=past) is None
    past.reset()
    assert record(mixture, tokens[:, :3], past=past) is not None
    mixture(tokens[:, 3:5], added_to=tokens[:, 3:5], past=past)
    assert record(mixture, tokens[:, 5:], past=past) is None
    for other in (make(9, causal=None), make(9, **DENSE_CONVOLUTION)):
        assert other.record_reading(tokens) is None
    with pytest.raises(ValueError, match="of 2 samples, but there are 1 now"):
        mixture.record_reading(tokens[:1], past=past)


@torch.no_grad()
def test_large_logits_in_single_precision():
    mixture, tokens = make(9, forgetting=True), 1e4 * draw(1, 3000, 9)
    exact = mixture.record_reading(tokens)
    given = mixture.float().record_reading(tokens.float())
    # Where one token has all the weight, and no other is near, both say which.
    clear = (exact[1] - 1).abs() < 1e-9
    assert clear.double().mean() > 0.9
    assert all(each.isfinite().all() for each in given)
    torch.testing.assert_close(given[0][clear].double(), exact[0][clear], rtol=1e-3, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("options", [*KINDS, DENSE_CONVOLUTION], ids=name_of)
def test_recorded_norms_of_pieces_are_those_of_the_whole(options):
    mixture, tokens = make(9, **options), draw(2, 12, 9)
    _, _, whole = mixture.record(tokens)
    past, given = Past(), []
    for piece in tokens.split(6, dim=1):
        given.append(mixture.record(piece, past=past)[2])
        mixture(piece, added_to=piece, past=past)
    assert relative_error(torch.cat(given, dim=1), whole) < 1e-12
