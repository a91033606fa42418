"""Clips of several channels in mono models: every family, every head, and what belongs to a call."""

import pytest
import torch
import transformers as tf
from families import CONFORMER, FAMILIES, MASKED_WAVE, WHISPER, build
from peft import get_peft_model

from peft_softmoa import SoftMoAConfig

# Models that take audio alone. Of CLAP it is the part that does.
AUDIO_ALONE = [
    name
    for name in FAMILIES
    if name.startswith("Whisper, c") or FAMILIES[name].onnx in ("any length", "fixed length", "one length")
]
OTHERS = [name for name in FAMILIES if name not in AUDIO_ALONE and name not in ("CLAP", "Qwen2.5-Omni")]
CHANNELS = 3


def clap():
    torch.manual_seed(0)
    config = FAMILIES["CLAP"].config()[1].audio_config
    return tf.ClapAudioModelWithProjection._from_config(config).eval()


def model_of(name):
    return clap() if name == "CLAP" else build(name, "eager")


def inputs_of(name, batch=2, channels=CHANNELS):
    """A batch of clips `(B, C, …)` that all differ, and their masks, the same for all channels of a clip."""
    family = FAMILIES[name]
    short, long = family.lengths
    batch = family.inputs([short, *[long] * (batch - 1)])
    batch.pop("input_ids", None)
    generator = torch.Generator().manual_seed(5)
    stacked = {}
    for key, value in batch.items():
        by_channel = value.unsqueeze(1).repeat(1, channels, *[1] * (value.ndim - 1))
        if value.is_floating_point():
            gains = torch.rand(by_channel.shape[:2], generator=generator) + 0.5
            by_channel = by_channel.roll(3, dims=1) * gains.reshape(*gains.shape, *[1] * (value.ndim - 1))
        stacked[key] = by_channel
    return stacked


def mono(batch):
    return {key: value.flatten(0, 1) for key, value in batch.items()}


def adapt(model, channels=CHANNELS, seed=0, **options):
    torch.manual_seed(seed)
    config = SoftMoAConfig(num_channels=channels, **{"num_experts": 3, "r": 2, **options})
    return get_peft_model(model, config).eval()


def outputs(model, batch):
    with torch.no_grad():
        return model(**batch)


def tensors(output):
    """All tensors that a model returns, with those in tuples."""
    found = {}
    for key, value in output.items():
        for index, each in enumerate(value if isinstance(value, tuple) else [value]):
            if isinstance(each, torch.Tensor):
                found[f"{key}.{index}"] = each
    return found


@pytest.mark.parametrize("name", [*AUDIO_ALONE, "CLAP"])
def test_a_fresh_adapter_gives_the_mean_of_the_frozen_model(name):
    model, batch = model_of(name), inputs_of(name)
    extra = {} if name in ("Granite Speech", "Fun-ASR-Nano") else {"output_hidden_states": True}
    before = tensors(outputs(model, {**mono(batch), **extra}))
    after = tensors(outputs(adapt(model, placement="both"), {**batch, **extra}))
    assert after.keys() == before.keys()
    for key, value in before.items():
        by_channel = value.unflatten(0, (2, CHANNELS, *([-1] if len(value) > 2 * CHANNELS else [])))
        wanted = by_channel.mean(dim=1) if key.startswith("logits") else by_channel
        assert torch.equal(after[key], wanted), key


@pytest.mark.parametrize("placement", ["attention", "ffn"])
@pytest.mark.parametrize("name", [*AUDIO_ALONE, "CLAP"])
def test_one_channel_is_mono(name, placement):
    batch = inputs_of(name, channels=1)
    models = [
        adapt(model_of(name), channels, placement=placement, init_weights=False, channel_embedding=False)
        if channels
        else get_peft_model(
            model_of(name), SoftMoAConfig(placement=placement, init_weights=False, num_experts=3, r=2)
        ).eval()
        for channels in (1, None)
    ]
    models[1].load_state_dict(models[0].state_dict())
    given, wanted = tensors(outputs(models[0], batch)), tensors(outputs(models[1], mono(batch)))
    for key, value in wanted.items():
        one = given[key] if key.startswith("logits") else given[key].flatten(0, 1)
        assert torch.equal(one.reshape(value.shape), value), key


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_take_more_than_audio_are_refused(name):
    model = build(name)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="`num_channels` is for models that take audio alone"):
        get_peft_model(model, SoftMoAConfig(num_channels=2))
    assert [type(module) for module in model.modules()] == before


def test_packed_clips_are_refused():
    model = adapt(build("Qwen2.5-Omni"), 2)
    batch = FAMILIES["Qwen2.5-Omni"].inputs([36, 56])
    batch["input_features"] = batch["input_features"].expand(1, 2, -1, -1)
    with pytest.raises(ValueError, match="`feature_lens` .* does not say which channels it is about"):
        model(**batch)


def wave():
    return tf.Wav2Vec2Config(
        **MASKED_WAVE, tdnn_dim=(8, 8), tdnn_kernel=(2, 1), tdnn_dilation=(1, 1), xvector_output_dim=5
    )


def bert():
    return tf.Wav2Vec2BertConfig(
        **CONFORMER, feature_projection_input_dim=8, conv_depthwise_kernel_size=3, mask_time_prob=0.0
    )


def ast_with(problem_type):
    def make():
        config = FAMILIES["AST"].config()[1]
        config.problem_type = problem_type
        return config

    return make


HEADS = {
    "AST": (tf.ASTForAudioClassification, ast_with(None), "AST", "classes"),
    "AST, several labels": (tf.ASTForAudioClassification, ast_with("multi_label_classification"), "AST", "labels"),
    "AST, numbers": (tf.ASTForAudioClassification, ast_with("regression"), "AST", "numbers"),
    "wav2vec 2.0": (tf.Wav2Vec2ForSequenceClassification, wave, "Wav2Vec2", "classes"),
    "wav2vec 2.0, frames": (tf.Wav2Vec2ForAudioFrameClassification, wave, "Wav2Vec2", "frames"),
    "wav2vec 2.0, CTC": (tf.Wav2Vec2ForCTC, wave, "Wav2Vec2", "ctc"),
    "wav2vec 2.0, x-vectors": (tf.Wav2Vec2ForXVector, wave, "Wav2Vec2", "speakers"),
    "W2V-BERT": (tf.Wav2Vec2BertForSequenceClassification, bert, "Wav2Vec2-BERT", "classes"),
    "W2V-BERT, CTC": (tf.Wav2Vec2BertForCTC, bert, "Wav2Vec2-BERT", "ctc"),
    "W2V-BERT, frames": (tf.Wav2Vec2BertForAudioFrameClassification, bert, "Wav2Vec2-BERT", "frames"),
    "Whisper": (
        tf.WhisperForAudioClassification, lambda: tf.WhisperConfig(**WHISPER), "Whisper, classification", "classes"
    ),
    **{
        name: (FAMILIES[name].config()[0], lambda name=name: FAMILIES[name].config()[1], name, "ctc")
        for name in ("Parakeet-CTC", "LASR-CTC")
    },
}  # fmt: skip


def with_head(name, **changes):
    kind, config, *_ = HEADS[name]
    torch.manual_seed(0)
    config = config()
    for key, value in changes.items():
        setattr(config, key, value)
    return kind._from_config(config, attn_implementation="eager").eval()


def labels_for(kind, logits):
    """Labels of two clips."""
    if kind in ("classes", "speakers"):
        return torch.tensor([3, 1])
    if kind == "labels":
        return torch.tensor([[1.0, 0, 0, 1, 0], [0, 1.0, 1, 0, 1]])
    if kind == "numbers":
        return torch.linspace(-1, 1, 10).reshape(2, 5)
    if kind == "frames":
        return torch.nn.functional.one_hot(torch.arange(logits.shape[1]) % 5, 5).float().expand(2, -1, -1)
    return torch.tensor([[3, 1, 4], [5, -100, -100]])


def plain_loss(model, kind, logits, labels, lengths, reduction):
    """The loss of the mean logits as PyTorch computes it."""
    functional = torch.nn.functional
    if kind == "classes":
        return functional.cross_entropy(logits, labels)
    if kind == "labels":
        return functional.binary_cross_entropy_with_logits(logits, labels)
    if kind == "numbers":
        return functional.mse_loss(logits, labels)
    if kind == "frames":
        return functional.cross_entropy(logits.flatten(0, 1), labels.argmax(-1).flatten())
    if kind == "speakers":
        return model.get_base_model().objective(logits, labels)
    blank = model.get_base_model().config.pad_token_id
    return functional.ctc_loss(
        logits.log_softmax(-1).transpose(0, 1), labels.clamp_min(0), lengths, (labels > 0).sum(1), blank, reduction
    )


def gradients(model, loss):
    """By name, of all that is trained."""
    model.zero_grad()
    loss.backward()
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    assert found
    return found


def assert_same(given, wanted, tolerance=1e-5):
    assert given.keys() == wanted.keys()
    scale = max(value.abs().max() for value in wanted.values())
    for name, value in wanted.items():
        assert (given[name] - value).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize(
    "name, reduction",
    [
        (name, reduction)
        for name, (_, _, _, kind) in HEADS.items()
        for reduction in (["sum", "mean"] if kind == "ctc" else ["mean"])
    ],
)
def test_the_loss_is_that_of_the_mean(name, reduction, missing):
    kind = HEADS[name][3]
    base = with_head(name, ctc_loss_reduction=reduction)
    head = next(each for each in ("ctc_head", "lm_head", "classifier") if hasattr(base, each))
    model = adapt(base, init_weights=False, modules_to_save=[head])
    batch = inputs_of(HEADS[name][2])
    if missing:
        batch["channel_mask"] = torch.tensor([[True, False, True], [True, True, True]])
    logits = model(**batch).logits
    labels = labels_for(kind, logits)
    lengths = None
    if kind == "ctc":
        encoder, mask = getattr(base, "encoder", base), batch["attention_mask"][:, 0]
        lengths = encoder._get_feat_extract_output_lengths(mask.sum(-1)) if head == "lm_head" else None
        lengths = encoder._get_output_attention_mask(mask).sum(-1) if lengths is None else lengths
    wanted = plain_loss(model, kind, logits, labels, lengths, reduction)
    output = model(**batch, labels=labels)
    assert torch.equal(output.logits, logits)
    torch.testing.assert_close(output.loss, wanted)
    given = gradients(model, output.loss)
    assert_same(given, gradients(model, plain_loss(model, kind, model(**batch).logits, labels, lengths, reduction)))
    assert any("channel_embedding" in key for key in given)


def test_the_loss_counts_the_labels_of_a_step():
    """As the Trainer has the model do, which tells how many labels all batches of the step have."""
    model, batch, labels = adapt(with_head("AST"), init_weights=False), inputs_of("AST"), torch.tensor([3, 1])
    logits = model(**batch).logits
    wanted = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / 8
    for count in (8, torch.tensor(8)):
        torch.testing.assert_close(model(**batch, labels=labels, num_items_in_batch=count).loss, wanted)


def test_the_load_balancing_loss_counts_once():
    model = adapt(with_head("AST"), init_weights=False, routing="top_k", router_aux_loss_coef=0.5)
    batch, labels = inputs_of("AST"), torch.tensor([3, 1])
    present = torch.tensor([[True, False, True], [True, True, True]])
    plain = model(**batch, channel_mask=present, labels=labels).loss
    model.train()
    trained = model(**batch, channel_mask=present, labels=labels).loss
    added = trained - plain
    assert added > 0.5
    part = model(**batch, channel_mask=present, labels=labels, num_items_in_batch=8).loss - 2 / 8 * plain
    torch.testing.assert_close(part, 2 / 8 * added)


# Class tokens and silent patches of two channels are alike at first: which of them an expert takes is not determined.
@pytest.mark.parametrize(
    "name, routing",
    [
        *((name, routing) for name in ("AST", "Wav2Vec2", "CLAP") for routing in ("soft", "dense", "top_k")),
        ("Wav2Vec2", "expert_choice"),
    ],
)
def test_a_missing_channel_is_as_if_it_were_not_there(name, routing):
    """Whatever it holds: without an embedding, a clip with a missing channel is one with a channel less."""
    model = adapt(model_of(name), init_weights=False, channel_embedding=False, routing=routing, placement="both")
    batch = inputs_of(name)
    audio = next(key for key in batch if key.startswith("input_"))
    wanted = tensors(outputs(model, {key: value[:, [0, 2]] for key, value in batch.items()}))
    present = torch.tensor([True, False, True]).expand(2, -1)
    batch[audio][:, 1] = float("nan")
    if "attention_mask" in batch:
        batch["attention_mask"][:, 1] = 0
    given = tensors(outputs(model, {**batch, "channel_mask": present}))
    for key, value in wanted.items():
        own = given[key] if key.startswith("logits") else given[key][:, [0, 2]]
        torch.testing.assert_close(own, value, rtol=1e-4, atol=1e-5)
    with_all = tensors(outputs(model, {**inputs_of(name), "channel_mask": torch.ones(2, 3, dtype=torch.bool)}))
    for key, value in tensors(outputs(model, inputs_of(name))).items():
        torch.testing.assert_close(with_all[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*AUDIO_ALONE, "CLAP"])
def test_without_embedding_the_order_of_channels_does_not_matter(name):
    model = adapt(model_of(name), init_weights=False, channel_embedding=False, placement="both")
    batch, order = inputs_of(name), torch.tensor([2, 0, 1])
    given = tensors(outputs(model, batch))
    swapped = tensors(outputs(model, {key: value[:, order] for key, value in batch.items()}))
    for key, value in given.items():
        wanted = value if key.startswith("logits") else value[:, order]
        torch.testing.assert_close(swapped[key], wanted, rtol=1e-4, atol=1e-5)
    two = tensors(outputs(model, {key: value[:, :2] for key, value in batch.items()}))
    assert two.keys() == given.keys() and all(value.isfinite().all() for value in two.values())


@pytest.mark.parametrize("options", [{}, {"routing": "top_k"}, {"causal": True, "forgetting": True}], ids=str)
def test_channels_meet(options):
    """What one channel holds reaches the others through slots, and not where each token is read alone."""
    model = adapt(build("Wav2Vec2", "eager"), init_weights=False, scaling=4.0, **options)
    batch = inputs_of("Wav2Vec2")
    changed = {**batch, "input_values": batch["input_values"].clone()}
    changed["input_values"][:, 2] *= -1
    difference = (outputs(model, changed)[0] - outputs(model, batch)[0]).abs()
    assert (difference[:, :2].max() > 1e-3) == (options.get("routing") != "top_k")
    assert difference[:, 2].max() > 1e-3


MASKED = [name for name in AUDIO_ALONE if FAMILIES[name].masked]


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("placement", ["attention", "ffn"])
def test_padding(name, placement):
    """A clip's logits and tokens are the same alone and beside a longer one; one mask may do for all channels."""
    base = build(name, "eager")
    FAMILIES[name].prepare(base)
    model = adapt(base, init_weights=False, scaling=4.0, placement=placement)
    batch, (short, _) = inputs_of(name), FAMILIES[name].lengths
    key = next(key for key in batch if key.startswith("input_"))
    alone = tensors(outputs(model, {name: value[:1, :, :short] for name, value in batch.items()}))
    audio = batch[key].clone()
    audio[0, :, short:] = 0
    beside = tensors(outputs(model, {**batch, key: audio}))
    for part, value in alone.items():
        tokens = FAMILIES[name].read(value.shape[-2])
        wanted = value[0].narrow(-2, 0, tokens)
        difference = (beside[part][0].narrow(-2, 0, tokens) - wanted).abs().max()
        assert difference < 1e-5 * wanted.abs().max(), part
    masks = {name: value[:, 0] for name, value in batch.items() if "mask" in name}
    for part, value in tensors(outputs(model, {**batch, key: audio, **masks})).items():
        assert torch.equal(value, beside[part])


def test_frames_of_channels_that_are_not_equally_long_are_refused():
    model, batch = adapt(with_head("wav2vec 2.0, CTC")), inputs_of("Wav2Vec2")
    batch["attention_mask"][1, 2, 100:] = 0
    with pytest.raises(ValueError, match="masks of a clip's channels differ"):
        model(**batch)
    assert adapt(with_head("wav2vec 2.0"))(**batch).logits.isfinite().all()


def test_wrong_inputs_are_errors():
    model, batch = adapt(build("AST")), inputs_of("AST")
    x = batch["input_values"]
    with pytest.raises(ValueError, match=r"'default' is for clips of several channels.* 4 dimensions, .*\(batch, 3\)"):
        model(input_values=x[:, 0])
    with pytest.raises(ValueError, match=r"num_channels=3, but `input_values` of shape .* has 2.*channel_mask"):
        model(input_values=x[:, :2])
    with pytest.raises(ValueError, match=r"got NoneType"):
        model(input_values=None)
    for wrong in (torch.ones(2, 3), torch.ones(2, 2, dtype=torch.bool), [[True] * 3] * 2):
        with pytest.raises(ValueError, match=r"`channel_mask` must be boolean of shape \(2, 3\)"):
            model(input_values=x, channel_mask=wrong)
    with pytest.raises(ValueError, match="at least one channel of each clip"):
        model(input_values=x, channel_mask=torch.tensor([[True] * 3, [False] * 3]))
    with pytest.raises(ValueError, match=r"`weights` of shape \(2,\) does not say which channels"):
        model(input_values=x, weights=torch.ones(2))
    with pytest.raises(ValueError, match="Call the model itself, not a part of it"):
        model.get_base_model().audio_spectrogram_transformer(x.flatten(0, 1))
    assert outputs(model, {"input_values": x}).logits.shape == (2, 5)  # errors leave nothing behind


def test_logits_that_no_known_head_makes_are_an_error():
    class Odd(tf.ASTForAudioClassification):
        def forward(self, input_values, **kwargs):
            output = super().forward(input_values, **kwargs)
            output.logits = output.logits * output.hidden_states[-1].mean(dim=(1, 2), keepdim=False).unsqueeze(1)
            return output

    torch.manual_seed(0)
    model = adapt(Odd(FAMILIES["AST"].config()[1]).eval())
    with pytest.raises(ValueError, match="module of Odd that makes its logits was not found"):
        model(**inputs_of("AST"), output_hidden_states=True)


def test_tuples_are_taken_apart_like_outputs():
    for name in ("AST", "wav2vec 2.0, CTC"):
        kind = HEADS[name]
        model, batch = adapt(with_head(name), init_weights=False), inputs_of(kind[2])
        labels = labels_for(kind[3], None)
        wanted = outputs(model, {**batch, "labels": labels, "output_hidden_states": True})
        given = outputs(model, {**batch, "labels": labels, "output_hidden_states": True, "return_dict": False})
        for one, other in zip(given, wanted.to_tuple(), strict=True):
            pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
            assert all(torch.equal(a, b) for a, b in pairs)


def test_inputs_by_position():
    model, batch = adapt(build("AST"), init_weights=False).get_base_model(), inputs_of("AST")
    with torch.no_grad():
        assert torch.equal(model(batch["input_values"]).logits, model(**batch).logits)
