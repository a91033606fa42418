"""Causal mixtures in whole models: no token sees more of what comes after it than it does without them."""

import copy

import numpy as np
import onnxruntime
import pytest
import torch
import transformers as tf
from families import FAMILIES, build
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from transformers.cache_utils import DynamicCache
from transformers.models.moonshine_streaming.modeling_moonshine_streaming import MoonshineStreamingEncoder

from peft_softmoa import SoftMoAConfig, count_parameters, describe_targets
from peft_softmoa.inference.tracing import compare, find_audio_part, trace
from peft_softmoa.inspection import record_routing
from peft_softmoa.layer import is_adapted

SPEECH = "Whisper, speech to text"
DECODER = r".*decoder.*self_attn"
OF_NEIGHBOURS = [{"routing": "dense", "expert_type": "convolution"}, {"routing": "dense", "expert_type": "conformer"}]


def nemotron():
    config = tf.NemotronAsrStreamingEncoderConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_kernel_size=3,
        subsampling_factor=4, subsampling_conv_channels=4, num_mel_bins=8, layerdrop=0.0, dropout=0.0,
        activation_dropout=0.0, attention_dropout=0.0, sliding_window=9, default_num_lookahead_tokens=2,
    )  # fmt: skip
    return tf.NemotronAsrStreamingEncoder._from_config(config)


def moonshine():
    config = MoonshineStreamingEncoder.config_class(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32,
        sliding_windows=[[4, 2], [4, 0]],
    )  # fmt: skip
    return MoonshineStreamingEncoder._from_config(config)


def gemma3n():
    config = tf.Gemma3nAudioConfig(
        hidden_size=16, input_feat_size=8, conf_num_hidden_layers=2, conf_num_attention_heads=2,
        conf_attention_chunk_size=4, conf_attention_context_left=5, conf_reduction_factor=1, conf_conv_kernel_size=3,
        sscp_conv_channel_size=(4, 4),
    )  # fmt: skip
    return tf.Gemma3nAudioEncoder._from_config(config)


def gemma4():
    config = tf.Gemma4AudioConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, attention_chunk_size=4, attention_context_left=5,
        conv_kernel_size=3, subsampling_conv_channels=(128, 4), output_proj_dims=16,
    )  # fmt: skip
    return tf.Gemma4AudioModel._from_config(config)


ENCODERS = {"Nemotron": nemotron, "Moonshine": moonshine, "Gemma 3n": gemma3n, "Gemma 4": gemma4}


def streaming(name):
    torch.manual_seed(0)
    return ENCODERS[name]().eval()


def encode(name, model, audio, lengths=None):
    """Tokens of spectrograms `(B, F, 8)`, or of waves `(B, L)`."""
    lengths = [audio.shape[1]] * len(audio) if lengths is None else lengths
    real = torch.arange(audio.shape[1]) < torch.tensor(lengths)[:, None]
    if name == "Gemma 3n":
        return model(audio, ~real).last_hidden_state
    return model(audio, attention_mask=real.long()).last_hidden_state


def own_mask(name, model, audio, lengths):
    """Which tokens are real, as the model itself says."""
    real = torch.arange(audio.shape[1]) < torch.tensor(lengths)[:, None]
    if name == "Gemma 3n":
        return ~model(audio, ~real).audio_mel_mask
    return model(audio, attention_mask=real.long()).attention_mask.bool()


def draw(name, batch=1):
    generator = torch.Generator().manual_seed(0)
    if name == "Moonshine":
        return torch.randn(batch, 80 * 96, generator=generator)
    return torch.randn(batch, 96, 128 if name == "Gemma 4" else 8, generator=generator)


def adapt(model, **options):
    torch.manual_seed(1)
    config = SoftMoAConfig(**{"placement": "both", "init_weights": False, "scaling": 4.0, **options})
    return get_peft_model(model, config).eval()


def reach(run, audio, step):
    """For each place in the audio, the first token that a change of it changes."""
    before = run(audio)
    first = []
    for place in range(0, audio.shape[1], step):
        changed = audio.clone()
        changed[:, place : place + step] += torch.randn(changed[:, place : place + step].shape)
        moved = (run(changed) - before).abs().amax(dim=-1)[0] > 0
        first.append(int(moved.int().argmax()) if moved.any() else len(moved))
    return first


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"forgetting": True, "num_slots": 2}, *OF_NEIGHBOURS], ids=str)
@pytest.mark.parametrize("name", ENCODERS)
def test_streaming_encoders_see_no_further_ahead(name, options):
    audio = draw(name)
    step = 80 * 4 if name == "Moonshine" else 4
    base = streaming(name)
    without = reach(lambda given: encode(name, base, given), audio, step)
    plain = encode(name, base, audio)
    model = adapt(base, **options)
    assert reach(lambda given: encode(name, model, given), audio, step) == without
    assert not torch.allclose(encode(name, model, audio), plain, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ENCODERS)
def test_streaming_encoders_read_which_tokens_are_real(name):
    """Each mixture, in the attention and in the feed-forward."""
    audio = draw(name, batch=2)
    model = adapt(streaming(name))
    length = audio.shape[1]
    with record_routing(model) as records:
        wanted = own_mask(name, model, audio, [length, length // 2])
    assert len(records) == 4
    for record in records:
        assert torch.equal(record.mask, wanted) and wanted[0].all() and 0 < wanted[1].sum() < wanted.shape[1]
        torch.testing.assert_close(record.dispatch.sum(dim=1), torch.ones_like(record.dispatch[:, 0]))


def test_a_mask_that_is_true_for_padding():
    with pytest.raises(
        ValueError, match=r"'conformer.0.attention.attn' is called with a mask that is true for padding"
    ):
        describe_targets(streaming("Gemma 3n"), SoftMoAConfig(target_modules=["conformer.0.attention.attn"]))


@torch.no_grad()
@pytest.mark.parametrize("placement", ["attention", "ffn"])
@pytest.mark.parametrize("name", ["Wav2Vec2", "Wav2Vec2-BERT", "HuBERT", "Parakeet-CTC", "Speech2Text"])
def test_any_encoder_can_be_causal(name, placement):
    """The mixtures are; padding changes nothing; and with chunks as long as the clip, they are what they are today."""
    family = FAMILIES[name]
    short, long = family.lengths
    outputs = {}
    for options in ({}, {"causal": True}, {"causal": True, "chunk_size": 1000}, {"causal": True, "chunk_size": 2}):
        model = build(name)
        if family.prepare is not None:
            family.prepare(model)
        model = adapt(model, placement=placement, **options).get_base_model()
        causal = {layer.softmoa_mixture["default"].causal for layer in model.modules() if is_adapted(layer)}
        assert causal == {bool(options)}
        alone, together = family.inputs([short]), family.inputs([short, long])
        given = family.encode(model, alone)
        padded = family.encode(model, together)[:1, : given.shape[1]]
        torch.testing.assert_close(padded, given, rtol=0, atol=2e-5)
        outputs[str(options)] = given
    today, causal, whole, chunks = outputs.values()
    torch.testing.assert_close(whole, today, rtol=0, atol=2e-5)
    assert not torch.allclose(causal, today, atol=1e-3) and not torch.allclose(causal, chunks, atol=1e-3)


def test_patches_have_no_order_in_time():
    for name in ("AST", "CLAP"):
        with pytest.raises(
            ValueError, match="`causal=True` needs tokens in order of time, but those of .* are patches"
        ):
            describe_targets(build(name), SoftMoAConfig(causal=True))


@pytest.mark.parametrize("options", [{"chunk_size": 2}, {"forgetting": True}])
def test_what_needs_order_in_time_says_so(options):
    with pytest.raises(ValueError, match="is for order in time, and .* see whole clips. Set `causal=True`"):
        describe_targets(build("Wav2Vec2"), SoftMoAConfig(**options))
    with pytest.raises(ValueError, match="left out with causal=False"):
        SoftMoAConfig(causal=False, **options)
    with pytest.raises(ValueError, match="left out unless routing='soft'"):
        SoftMoAConfig(routing="dense", causal=True, **options)


def test_encoder_and_decoder_each_have_their_order():
    config = SoftMoAConfig(target_modules=r".*(encoder|decoder).layers.*self_attn")
    targets = describe_targets(build(SPEECH), config).targets
    assert {(target.name.split(".")[1], target.causal) for target in targets} == {("encoder", False), ("decoder", True)}


def whisper(**options):
    return adapt(build(SPEECH, "eager"), target_modules=DECODER, **options)


@torch.no_grad()
def test_the_language_model_of_an_audio_model():
    """Qwen2-Audio's: what a token adds depends on nothing after it, audio or text."""
    name = "Qwen2-Audio"
    model = adapt(build(name), target_modules=r".*language_model.layers.\d+.self_attn")
    batch = FAMILIES[name].inputs([400])
    before = model(**batch).logits
    batch["input_ids"] = batch["input_ids"].clone()
    batch["input_ids"][:, -1] = 9
    after = model(**batch).logits
    assert torch.equal(after[:, :-1], before[:, :-1]) and not torch.equal(after[:, -1], before[:, -1])


@torch.no_grad()
def test_left_padding_in_a_decoder():
    base = tf.GPT2Model._from_config(tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20)).eval()
    model = adapt(base, target_modules=["attn", "mlp"], forgetting=True)
    ids, mask = torch.tensor([[7, 7, 1, 4, 5], [2, 3, 4, 5, 6]]), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    padded = model(ids, attention_mask=mask, position_ids=positions)[0]
    alone = model(ids[:1, 2:], attention_mask=mask[:1, 2:])[0]
    torch.testing.assert_close(padded[:1, 2:], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_packed_samples():
    """Samples packed one after another do not see each other."""
    family = FAMILIES["Qwen2.5-Omni"]
    model = adapt(build("Qwen2.5-Omni", "eager"), causal=True, forgetting=True).get_base_model()
    alone, both = (family.encode(model, family.inputs(lengths)) for lengths in ([36], [36, 56]))
    torch.testing.assert_close(both[: len(alone)], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_mixed_batches():
    name = "Wav2Vec2"
    model = adapt(build(name), causal=True, forgetting=True)
    torch.manual_seed(2)
    model.add_adapter("whole", SoftMoAConfig(placement="ffn", init_weights=False, scaling=4.0))
    model.eval()
    batch = FAMILIES[name].inputs([204, 204, 204])
    mixed = model(**batch, adapter_names=["default", "whole", "__base__"])[0]
    for index, adapter in enumerate(["default", "whole"]):
        model.set_adapter(adapter)
        alone = model(**{key: value[index : index + 1] for key, value in batch.items()})[0]
        torch.testing.assert_close(mixed[index : index + 1], alone, rtol=0, atol=1e-5)


def gradients(model, run):
    model.zero_grad()
    run().square().sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["Nemotron", "Wav2Vec2"])
def test_gradient_checkpointing(name, reentrant):
    causal = {} if name == "Nemotron" else {"causal": True, "chunk_size": 3}
    base = streaming(name) if name == "Nemotron" else build(name)
    model = adapt(base, **causal).double().train()  # their gradients are differences of large numbers

    def run():
        torch.manual_seed(3)
        np.random.seed(3)  # draws what SpecAugment masks
        if name == "Nemotron":
            return encode(name, model, draw(name, 2).double(), [96, 60])
        batch = FAMILIES[name].inputs([204, 404])
        return model(batch["input_values"].double(), attention_mask=batch["attention_mask"])[0]

    expected = gradients(model, run)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for one, other in zip(gradients(model, run), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_compiles_in_one_graph(backend):
    name = "Wav2Vec2"
    model = adapt(build(name), causal=True, forgetting=True, chunk_size=2)
    batch = FAMILIES[name].inputs([204, 404])
    expected = gradients(model, lambda: model(**batch)[0])
    base = model.get_base_model()
    torch._dynamo.reset()
    compiled = torch.compile(base, backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch)[0], base(**batch)[0], rtol=0, atol=1e-5)
    for one, other in zip(gradients(model, lambda: compiled(**batch)[0]), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = adapt(build("Wav2Vec2"), causal=True, forgetting=True, scaling=1.0)
    batch = FAMILIES["Wav2Vec2"].inputs([204, 404])
    with torch.autocast("cpu", dtype=dtype):
        given = model(**batch)[0]
    given.float().square().sum().backward()
    assert all(each.grad.isfinite().all() for each in model.parameters() if each.grad is not None)
    torch.testing.assert_close(given.float(), model(**batch)[0], rtol=0, atol=0.1)


def test_counts_and_budgets():
    base = build("Wav2Vec2")
    for options in ({}, {"forgetting": True, "num_slots": 2}, {"expert_type": "convolution", "num_slots": 2}):
        config = SoftMoAConfig(causal=True, num_experts=3, r=2, **options)
        counted = count_parameters(base, config)
        model = get_peft_model(copy.deepcopy(base), config)
        assert counted == sum(each.numel() for each in model.parameters() if each.requires_grad)
    forgetful = SoftMoAConfig(causal=True, num_experts=3, r=2, forgetting=True)
    plain = SoftMoAConfig(causal=True, num_experts=3, r=2)
    assert count_parameters(base, forgetful) - count_parameters(base, plain) == 2 * 3  # layers and slots
    config = SoftMoAConfig.for_budget(base, 5000, causal=True, forgetting=True, num_experts=3)
    assert (
        count_parameters(base, config)
        <= 5000
        < count_parameters(base, SoftMoAConfig(**{**vars_of(config), "r": config.r + 1}))
    )
    assert [target["causal"] for target in describe_targets(base, plain).to_dict()["blocks"]] == [True, True]


def vars_of(config):
    return {"causal": True, "forgetting": True, "num_experts": config.num_experts}


@torch.no_grad()
def test_survives_saving(tmp_path):
    model = adapt(build("Wav2Vec2"), causal=True, forgetting=True, chunk_size=3)
    for name, parameter in model.named_parameters():
        if name.endswith("forgetting"):
            torch.nn.init.normal_(parameter)
    batch = FAMILIES["Wav2Vec2"].inputs([204])
    expected = model(**batch)[0]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("Wav2Vec2"), tmp_path).eval()
    config = loaded.peft_config["default"]
    assert (config.causal, config.forgetting, config.chunk_size) == (True, True, 3)
    assert torch.equal(loaded(**batch)[0], expected)


def test_export(tmp_path):
    """A causal encoder as an ONNX file: the length of its clips is free, and its padding changes nothing."""
    name = "Wav2Vec2-BERT"
    model = adapt(build(name), num_experts=3, r=2, causal=True, forgetting=True, chunk_size=2, scaling=1.0)
    base = model.get_base_model()
    batches = [FAMILIES[name].inputs(lengths) for lengths in ([40, 20], [20], [30, 20, 20])]
    part = find_audio_part(base, batches[0])
    program, chosen = trace(part, batches)
    program.save(tmp_path / "model.onnx")
    comparisons = compare(part, tmp_path / "model.onnx", chosen)
    assert all(each.largest_difference <= 1e-4 for each in comparisons)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert "length" in session.get_inputs()[0].shape
    found = session.run(None, {key: value.numpy() for key, value in chosen[0].items()})[0]
    with torch.no_grad():
        assert not np.allclose(found, build(name)(**chosen[0])[0].numpy(), atol=1e-3)


def test_a_cache_that_is_empty_is_no_error():
    model = whisper()
    features = FAMILIES[SPEECH].inputs([40])["input_features"]
    cache = tf.EncoderDecoderCache(DynamicCache(), DynamicCache())
    ids = torch.tensor([[1, 4, 5]])
    with torch.no_grad():
        given = model(input_features=features, decoder_input_ids=ids, past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(given, model(input_features=features, decoder_input_ids=ids).logits)


def test_blocks_that_peft_finds_by_a_state_dict_follow_their_layer():
    """Names of tensors decide there, not the config: a decoder's block is causal all the same."""
    adapted = adapt(build(SPEECH), target_modules=r".*decoder.layers.1.self_attn")
    state = {name.removeprefix("base_model.model."): each for name, each in get_peft_model_state_dict(adapted).items()}
    config = SoftMoAConfig(target_modules=["encoder.layers.0.self_attn"])
    with pytest.warns(RuntimeWarning, match="inconsistency"):
        model = inject_adapter_in_model(config, build(SPEECH), state_dict=state)
    layers = {layer.name: layer.softmoa_mixture["default"].causal for layer in model.modules() if is_adapted(layer)}
    assert layers == {"model.decoder.layers.1.self_attn": True}
