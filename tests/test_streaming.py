"""Models that go on from what they have read: pieces, one after another, give what the whole gives."""

import copy
import pickle
import threading

import pytest
import torch
import transformers as tf
from families import FAMILIES, build
from test_order_in_time import DECODER, SPEECH, adapt, draw, streaming
from torch import nn
from transformers.cache_utils import DynamicCache

from peft_softmoa import RoutingStream, SoftMoAConfig, stream_routing
from peft_softmoa.calls.caches import find_cache

KINDS = [{}, {"forgetting": True, "num_slots": 2}, {"routing": "dense", "expert_type": "convolution"}]
CLOSE = {"rtol": 0, "atol": 1e-5}


def whisper(attention="sdpa", target=DECODER, **options):
    return adapt(build(SPEECH, attention), target_modules=target, **options)


def gpt2(name="GPT2Model", **options):
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 20, "bos_token_id": None, "eos_token_id": None}
    base = getattr(tf, name)._from_config(tf.GPT2Config(**sizes)).eval()
    return adapt(base, target_modules=["attn", "mlp"], **options)


def mamba(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 20}
    return adapt(tf.MambaModel._from_config(tf.MambaConfig(**sizes)).eval(), target_modules=["mixer"], **options)


@torch.no_grad()
@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True}, {"cache_implementation": "static"}]
)
@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_generation_with_a_cache_gives_what_it_gives_without(attention, options, how):
    model = whisper(attention, **options)
    features = FAMILIES[SPEECH].inputs([40, 30])["input_features"]
    results = []
    for use_cache in (False, True):
        given = {name: value for name, value in how.items() if use_cache or name != "cache_implementation"}
        torch.manual_seed(3)
        results.append(
            model.generate(
                input_features=features, max_new_tokens=12, min_new_tokens=12, return_dict_in_generate=True,
                output_logits=True, use_cache=use_cache, **given,
            )
        )  # fmt: skip
    without, cached = results
    assert torch.equal(without.sequences, cached.sequences)
    assert len(cached.logits) == 12
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(without.logits), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("target", [DECODER, ["decoder.layers.1.fc1->decoder.layers.1.fc2"]])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_token_by_token(options, target):
    model = whisper(target=target, **options)
    features, ids = FAMILIES[SPEECH].inputs([40])["input_features"], torch.tensor([[1, 4, 5, 9, 3, 2]])
    whole = model(input_features=features, decoder_input_ids=ids, use_cache=False).logits
    cache, given = None, []
    for piece in ids.split([2, 1, 1, 2], dim=1):
        output = model(input_features=features, decoder_input_ids=piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        given.append(output.logits)
    torch.testing.assert_close(torch.cat(given, dim=1), whole, **CLOSE)
    with model.disable_adapter():
        plain = model(input_features=features, decoder_input_ids=ids).logits
    assert (plain - whole)[:, 2:].abs().amax(dim=(0, 2)).min() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("make", [gpt2, mamba])
def test_caches_of_decoders(make):
    model = make(forgetting=True)
    ids = torch.tensor([[1, 4, 5, 6, 2, 3]])
    whole, name = model(ids, use_cache=False)[0], "cache_params" if make is mamba else "past_key_values"
    first = model(ids[:, :3], use_cache=True)
    copies = [copy.deepcopy(first[name]), pickle.loads(pickle.dumps(first[name])), first[name]]
    for cache in copies:
        for place in (3, 4, 5):
            given = model(ids[:, place : place + 1], **{name: cache}, use_cache=True)[0]
            torch.testing.assert_close(given, whole[:, place : place + 1], **CLOSE)


@torch.no_grad()
def test_caches_that_are_cropped_selected_repeated_and_reset():
    model = gpt2(forgetting=True)
    ids = torch.tensor([[1, 4, 5, 6, 2, 3, 7], [8, 2, 1, 1, 9, 6, 3]])
    whole = model(ids, use_cache=False)[0]
    cache = model(ids[:, :5], use_cache=True).past_key_values
    cache.crop(-2)
    torch.testing.assert_close(model(ids[:, 3:5], past_key_values=cache)[0], whole[:, 3:5], **CLOSE)
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(3)
    cache.reorder_cache(torch.tensor([2, 0]))
    given = model(ids[[1, 1], 5:], past_key_values=cache)[0]
    torch.testing.assert_close(given, whole[[1, 1], 5:], **CLOSE)
    cache.reset()
    torch.testing.assert_close(model(ids, past_key_values=cache)[0], whole, **CLOSE)
    # Another cache of the same kind is as transformers makes it.
    assert type(cache.layers[0]) is not type(DynamicCache(config=model.config).layers[0])


@torch.no_grad()
def test_tokens_that_are_guessed_and_taken_back():
    model = gpt2("GPT2LMHeadModel", forgetting=True)
    ids = torch.tensor([[1, 4, 5, 1, 4, 5, 1, 4]])
    how = {"max_new_tokens": 15, "min_new_tokens": 15, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, use_cache=False, **how)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **how), expected)


@torch.no_grad()
def test_left_padding_with_a_cache():
    model = gpt2("GPT2LMHeadModel", forgetting=True)
    ids, mask = torch.tensor([[7, 7, 1, 4, 5], [2, 3, 4, 5, 6]]), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for more in ({}, {"cache_implementation": "static"}):
        both = model.generate(ids, attention_mask=mask, **how, **more)
        alone = model.generate(ids[:1, 2:], use_cache=False, **how)
        assert torch.equal(both[0, 2:], alone[0])


@torch.no_grad()
def test_mixed_batches_with_a_cache():
    model = gpt2("GPT2LMHeadModel", forgetting=True)
    torch.manual_seed(2)
    model.add_adapter("other", SoftMoAConfig(target_modules=["attn"], init_weights=False, scaling=4.0))
    model.eval()
    ids = torch.tensor([[1, 4, 5], [1, 4, 5], [1, 4, 5]])
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    mixed = model.generate(ids, adapter_names=["default", "other", "__base__"], **how)
    for row, adapter in enumerate(["default", "other"]):
        model.set_adapter(adapter)
        assert torch.equal(mixed[row], model.generate(ids[:1], use_cache=False, **how)[0])
    with model.disable_adapter():
        assert torch.equal(mixed[2], model.generate(ids[:1], use_cache=False, **how)[0])


@torch.no_grad()
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_streaming_encoders_stream_with_their_own_cache(options):
    model = adapt(streaming("Nemotron"), **options)
    audio = draw("Nemotron", batch=2)[:, :93]
    whole = model(audio).last_hidden_state
    caches, given = {}, []
    # Its attention sees chunks of three tokens, of four frames each, and the first token has one frame only.
    for piece in audio.split([9, 12, 24, 12, 36], dim=1):
        output = model(piece, use_cache=True, **caches)
        caches = {name: output[name] for name in ("past_key_values", "padding_cache")}
        given.append(output.last_hidden_state)
    torch.testing.assert_close(torch.cat(given, dim=1), whole, **CLOSE)
    # Its cache is a window that slides: of what is before, one state is kept.
    pasts = output.past_key_values.layers[0].softmoa_pasts.values()
    assert all(len(tensor[0]) <= 2 for past in pasts for tensor in past.tensors.values())


@torch.no_grad()
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_an_encoder_in_real_time(options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = tf.VoxtralRealtimeEncoderConfig(
        **sizes, intermediate_size=32, num_mel_bins=8, head_dim=8, sliding_window=9
    )
    base = tf.VoxtralRealtimeEncoder._from_config(config).eval()
    model = adapt(base, target_modules=["self_attn", "mlp"], **options)
    audio = torch.randn(2, 8, 96, generator=torch.Generator().manual_seed(0))
    whole = model(audio).last_hidden_state
    caches, given = {}, []
    for piece in audio.split([32, 2, 14, 48], dim=2):
        output = model(piece, use_cache=True, use_padding_cache=True, **caches)
        caches = {name: output[name] for name in ("past_key_values", "padding_cache")}
        given.append(output.last_hidden_state)
    torch.testing.assert_close(torch.cat(given, dim=1), whole, **CLOSE)


@torch.no_grad()
def test_a_cache_that_another_adapter_has_filled_is_an_error():
    model = gpt2()
    torch.manual_seed(2)
    model.add_adapter("other", SoftMoAConfig(target_modules=["attn"], init_weights=False))
    model.eval()
    ids = torch.tensor([[1, 4, 5, 6]])
    message = r"In the adapted block 'h.0.attn': It reads in order of time.*with which this adapter was not called"
    with model.disable_adapter():
        plain = model(ids, use_cache=True).past_key_values
    of_default = model(ids, use_cache=True).past_key_values
    legacy = tuple((layer.keys, layer.values) for layer in of_default.layers)
    missed = copy.deepcopy(of_default)
    with model.disable_adapter():
        model(ids[:, :1], past_key_values=missed)
    for cache in (plain, missed, DynamicCache(legacy)):
        with pytest.raises(ValueError, match=message):
            model(ids[:, :1], past_key_values=cache)
    model.set_adapter("other")
    with pytest.raises(ValueError, match=message):
        model(ids[:, :1], past_key_values=of_default)
    with model.disable_adapter():
        model(ids[:, :1], past_key_values=plain)


def test_a_cache_of_an_unknown_kind_is_an_error():
    """It may have tokens, and could not hold what mixtures keep."""
    assert find_cache(0, ("tokens", "cache"), (None, None), {}) is None
    with pytest.raises(ValueError, match="or which cannot hold its state"):
        find_cache(0, ("tokens", "cache"), (None, object()), {}).past(("layer", "default"))
    for empty in ((), DynamicCache()):
        assert find_cache(0, (), (), {"past_key_values": empty}).past(("layer", "default")).num_tokens == 0


class TokenModel(nn.Module):
    """A model whose layers read each token alone, so that pieces differ from the whole by their routing only."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(9, 9) for _ in range(3))

    def forward(self, tokens, attention_mask=None):
        for layer in self.layers:
            tokens = tokens + layer(tokens).tanh()
        return tokens


def token_model(**options):
    torch.manual_seed(0)
    return adapt(TokenModel().eval(), target_modules=["0", "1", "2"], causal=True, **options)


PIECES = [5, 1, 7, 3, 8]


def feed(model, tokens, stream=None):
    with stream_routing(model, stream):
        return torch.cat([model(piece) for piece in tokens.split(PIECES, dim=1)], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_stream_in_a_context(options):
    model, tokens = token_model(**options), torch.randn(2, sum(PIECES), 9)
    whole = model(tokens)
    assert (torch.cat([model(piece) for piece in tokens.split(PIECES, dim=1)], dim=1) - whole).abs().max() > 1e-2
    stream = RoutingStream()
    torch.testing.assert_close(feed(model, tokens, stream), whole, **CLOSE)
    assert (feed(model, tokens, stream) - whole).abs().max() > 1e-3  # it goes on
    stream.reset()
    torch.testing.assert_close(feed(model, tokens, stream), whole, **CLOSE)
    torch.testing.assert_close(feed(model, tokens), whole, **CLOSE)
    torch.testing.assert_close(model(tokens), whole)  # outside, nothing is kept


@torch.no_grad()
def test_streams_of_a_batch():
    model, tokens = token_model(forgetting=True), torch.randn(3, 12, 9)
    whole = model(tokens)
    with stream_routing(model) as stream:
        torch.testing.assert_close(model(tokens[:, :4]), whole[:, :4], **CLOSE)
        other = stream.copy()
        stream.select([2, 0])
        stream.to("cpu")
        torch.testing.assert_close(model(tokens[[2, 0], 4:]), whole[[2, 0], 4:], **CLOSE)
        stream.reset([1])
        torch.testing.assert_close(model(tokens[[0, 1]])[1], whole[1], **CLOSE)
        with pytest.raises(ValueError, match=r"In the adapted block 'layers.0': .* of 2 samples, but there are 3 now"):
            model(tokens)
    with stream_routing(model, other) as resumed:
        assert resumed is other
        torch.testing.assert_close(model(tokens[:, 4:]), whole[:, 4:], **CLOSE)


@torch.no_grad()
def test_streams_of_threads():
    model, tokens = token_model(), torch.randn(4, 1, sum(PIECES), 9)
    expected, given = [model(each) for each in tokens], [None] * 4
    barrier = threading.Barrier(4)

    def run(index):
        with torch.no_grad(), stream_routing(model):
            parts = []
            for piece in tokens[index].split(PIECES, dim=1):
                barrier.wait()
                parts.append(model(piece))
            given[index] = torch.cat(parts, dim=1)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@torch.no_grad()
def test_what_cannot_stream_says_so():
    with (
        pytest.raises(ValueError, match="for models with a Soft-MoA adapter, but Linear has none"),
        stream_routing(nn.Linear(2, 2)),
    ):
        pass
    whole, batch = adapt(build("Wav2Vec2")), FAMILIES["Wav2Vec2"].inputs([204])
    with stream_routing(whole), pytest.raises(ValueError, match="adapter 'default' reads whole clips.*`causal=True`"):
        whole(**batch)
    token_wise = adapt(build("Wav2Vec2"), routing="dense")
    with stream_routing(token_wise):
        token_wise(**batch)  # a token depends on no other
    model = token_model()
    with stream_routing(model.train()), pytest.raises(ValueError, match="not for training.*`eval\\(\\)`"):
        model(torch.randn(1, 3, 9))
    packed = adapt(build("Qwen2.5-Omni", "eager"), causal=True).get_base_model()
    family = FAMILIES["Qwen2.5-Omni"]
    with stream_routing(packed), pytest.raises(ValueError, match="Packed samples are whole"):
        family.encode(packed, family.inputs([36, 56]))
    decoder = gpt2()
    with stream_routing(decoder), pytest.raises(ValueError, match="called with a cache.*`use_cache=False`"):
        decoder(torch.tensor([[1, 4]]))  # it makes a cache of its own, each time


@torch.no_grad()
def test_rows_may_be_booleans():
    model, tokens = token_model(), torch.randn(2, 12, 9)
    whole = model(tokens)
    with stream_routing(model) as stream:
        model(tokens[:, :4])
        stream.reset(torch.tensor([False, False]))
        torch.testing.assert_close(model(tokens[:, 4:8]), whole[:, 4:8], **CLOSE)
        stream.select([False, True])
        torch.testing.assert_close(model(tokens[1:, 8:]), whole[1:, 8:], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("how", ["off", "another", "joined", "failed"])
def test_a_piece_that_an_adapter_misses_is_an_error(how):
    model, tokens = token_model(), torch.randn(2, 12, 9)
    torch.manual_seed(2)
    config = {"target_modules": ["1"], "causal": True, "init_weights": False}
    model.add_adapter("other", SoftMoAConfig(**config))
    model.eval()
    whole = model(tokens)
    message = "The adapter '.*' in 'layers.*' misses a piece of the stream"
    with stream_routing(model) as stream:
        model(tokens[:, :4])
        before = stream.copy()
        if how == "off":
            with model.disable_adapter(), pytest.raises(ValueError, match=message):
                model(tokens[:, 4:8])
        elif how == "another":
            model.set_adapter("other")
            with pytest.raises(ValueError, match=message):
                model(tokens[:, 4:8])
        elif how == "joined":
            model.base_model.set_adapter(["default", "other"])
            with pytest.raises(ValueError, match=message):
                model(tokens[:, 4:8])
        else:
            handle = model.base_model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(tokens[:, 4:8])
            handle.remove()
            with pytest.raises(ValueError, match=message):
                model(tokens[:, 4:8])
    model.set_adapter("default")
    with stream_routing(model, before):
        torch.testing.assert_close(model(tokens[:, 4:]), whole[:, 4:], **CLOSE)
    stream.reset()
    with stream_routing(model, stream):
        torch.testing.assert_close(model(tokens), whole, **CLOSE)
