import itertools

import pytest
import torch
from torch import nn
from transformers import Wav2Vec2Config
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

from peft_softmoa.calls.masks import Mask, find_mask, takes_mask, token_mask, unpack

REAL = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0]])
BATCH, TOKENS = REAL.shape
LOWEST = torch.finfo(torch.float32).min


def read(value, name="attention_mask", batch=BATCH, tokens=TOKENS):
    return token_mask(Mask(name, value), batch, tokens)


@pytest.mark.parametrize("make", [create_bidirectional_mask, create_causal_mask])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flash_attention_2", "flex_attention"])
def test_what_transformers_makes_of_a_mask(implementation, make):
    config = Wav2Vec2Config()
    config._attn_implementation = implementation
    options = {} if make is create_bidirectional_mask else {"past_key_values": None}
    mask = make(config=config, inputs_embeds=torch.zeros(BATCH, TOKENS, 8), attention_mask=REAL, **options)
    assert torch.equal(read(mask), REAL.bool())


additive = (1.0 - REAL[:, None, None].float()) * LOWEST
every_pair = REAL[:, :, None] * REAL[:, None]
FORMS = {
    "2-D integer": REAL,
    "2-D boolean": REAL.bool(),
    "3-D, one row": REAL[:, None],
    "3-D, every pair": every_pair.bool(),
    "4-D boolean, one row": REAL[:, None, None].bool(),
    "4-D additive, one row": additive,
    "4-D additive": additive.expand(-1, 1, TOKENS, -1),
    "4-D additive in half precision": ((1.0 - REAL[:, None, None].half()) * torch.finfo(torch.float16).min),
    "4-D additive, every head": additive.expand(-1, 3, TOKENS, -1),
    "4-D additive, with what is added to the logits of real tokens": additive + torch.linspace(-9, 9, TOKENS),
    "4-D additive, infinite": torch.zeros(BATCH, 1, 1, TOKENS).masked_fill(~REAL.bool()[:, None, None], -torch.inf),
    "4-D boolean, order in time too": (every_pair.bool() & torch.ones(TOKENS, TOKENS).tril().bool())[:, None],
    "4-D integer, every pair": every_pair[:, None],
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    assert torch.equal(read(FORMS[form]), REAL.bool())


def test_no_mask():
    assert token_mask(None, BATCH, TOKENS) is None


def test_one_mask_for_all_samples():
    assert torch.equal(read(FORMS["4-D additive"][:1]), REAL.bool()[:1].expand(BATCH, -1))


def test_one_mask_for_each_window():
    """As shifted windows have it: two windows in each of three samples, whose halves do not see each other."""
    mask = torch.zeros(2, 4, 4)
    mask[1, :2, 2:] = mask[1, 2:, :2] = -100.0
    assert torch.equal(read(mask, batch=6, tokens=4), torch.ones(6, 4, dtype=torch.bool))
    mask[1, :, 3] = -100.0
    assert torch.equal(read(mask, batch=6, tokens=4), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]] * 3).bool())


def test_masks_of_blocks():
    """Two blocks of three tokens for five, which see two tokens before them and one after them."""
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    value = torch.full((2, 1, 2, 3, 6), -1e9)
    for sample, block, place in itertools.product(range(2), range(2), range(3)):
        token = 3 * block + place
        for key in range(max(0, token - 2), min(5, token + 2)):
            if token < 5 and real[sample, key]:
                value[sample, 0, block, place, key - 3 * block + 2] = 0.0
    assert torch.equal(token_mask(Mask("attention_mask", value, past=2), 2, 5), real)


def test_a_mask_that_is_true_for_padding():
    assert torch.equal(read(REAL == 0, "audio_mel_mask"), REAL == 1)


@pytest.mark.parametrize(
    ("value", "name", "named"),
    [
        (REAL.float(), "attention_mask", r"`attention_mask`, a Tensor torch.float32 of shape \(3, 5\)"),
        (REAL[:, :4], "attention_mask", r"torch.int64 of shape \(3, 4\)"),
        (REAL[:2], "mask", r"`mask`, a Tensor torch.int64 of shape \(2, 5\)"),
        (additive[:2], "attention_mask", r"torch.float32 of shape \(2, 1, 1, 5\)"),
        (torch.ones(3, 1, 4, 5), "attention_mask", r"of shape \(3, 1, 4, 5\)"),
        (torch.ones(3, 1, 1, 4, 5), "attention_mask", r"of shape \(3, 1, 1, 4, 5\)"),
        (torch.ones(3), "attention_mask", r"of shape \(3,\)"),
        (REAL.tolist(), "attention_mask", "`attention_mask`, a list,"),
        (REAL, "key_padding_mask", "`key_padding_mask`, a Tensor"),
    ],
)
def test_forms_that_are_not_understood(value, name, named):
    with pytest.raises(ValueError, match=rf"{named}.* is not understood for 3 samples of 5 tokens\. .*\(3, 5\), boole"):
        read(value, name)


def test_find_mask():
    names = ("hidden_states", "attention_mask", "position_bias")
    assert find_mask(names, (0, REAL), {}) == Mask("attention_mask", REAL)
    assert find_mask(names, (0,), {"attention_mask": REAL}).value is REAL
    assert find_mask(names, (0, None), {"position_bias": REAL}) is None
    assert find_mask(names, (0,), {"encoder_attention_mask": REAL, "head_mask": REAL}) is None
    assert find_mask(names, (0, REAL), {"conv_attention_mask": REAL[:1]}).value is REAL
    assert find_mask(names, (0, None), {"conv_attention_mask": REAL}).name == "conv_attention_mask"
    # One of an unknown name may say what the others do not.
    assert find_mask(names, (0, REAL), {"key_padding_mask": REAL}).name == "key_padding_mask"
    assert find_mask(names, (0, None), {"cu_seq_lens_q": REAL}).name == "cu_seq_lens_q"


def test_takes_mask():
    class Block(nn.Module):
        def __init__(self, forward):
            super().__init__()
            self.forward = forward

    assert takes_mask(Block(lambda hidden_states, attention_mask=None: None))
    assert takes_mask(Block(lambda hidden_states, cu_seqlens: None))
    assert takes_mask(Block(lambda hidden_states, **kwargs: None))
    assert not takes_mask(Block(lambda hidden_states, encoder_attention_mask=None: None))
    assert not takes_mask(nn.Linear(2, 2))


def test_unpack():
    tokens = torch.arange(12.0).reshape(6, 2)
    mask, padded, doubled = unpack(torch.tensor([0, 2, 2, 6], dtype=torch.int32), tokens, 2 * tokens)
    assert mask.tolist() == [[True, True, False, False], [False] * 4, [True] * 4]
    assert torch.equal(padded[mask], tokens) and not padded[~mask].any()
    assert torch.equal(padded[2], tokens[2:])


@pytest.mark.parametrize("lengths", [[0, 2, 5], [0, 2, 7], [[0, 6]], [0.0, 6.0]])
def test_cumulative_lengths_that_do_not_fit(lengths):
    with pytest.raises(ValueError, match=r"cumulative lengths of its packed samples, .*, do not fit 6 tokens"):
        unpack(torch.tensor(lengths), torch.zeros(6, 2))
