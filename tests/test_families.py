"""Every family of audio transformers with every placement. The table of models is made from these tests."""

import copy

import pytest
import torch
from families import FAMILIES, build
from peft import PeftModel, get_peft_model
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from peft_softmoa import SoftMoAConfig, SoftMoALayer
from peft_softmoa import layer as layer_module

PLACEMENTS = ("attention", "ffn", "both")
WAVE_LAYERS = ["encoder.layers.0", "encoder.layers.1"]
DENSE = ("feed_forward.intermediate_dense", "feed_forward.output_dense")
# For each family, its layers, and in a layer where the attention and the feed-forward begin and end.
PLACES = {
    "AST": (
        [f"audio_spectrogram_transformer.layers.{index}" for index in range(2)], ("attention",) * 2, ("mlp",) * 2
    ),
    **dict.fromkeys(
        ("Wav2Vec2", "HuBERT", "WavLM", "UniSpeech", "UniSpeech-SAT", "SEW", "Data2VecAudio"),
        (WAVE_LAYERS, ("attention",) * 2, DENSE),
    ),
    **dict.fromkeys(
        ("Wav2Vec2-BERT", "Wav2Vec2-Conformer"),
        (WAVE_LAYERS, ("self_attn",) * 2, ("ffn2.intermediate_dense", "ffn2.output_dense")),
    ),
    "SEW-D": (
        ["encoder.encoder.layer.0", "encoder.encoder.layer.1"], ("attention", "attention.output.dense"),
        ("intermediate.dense", "output.dense"),
    ),
    "Whisper, classification": (WAVE_LAYERS, ("self_attn",) * 2, ("fc1", "fc2")),
    "Whisper, speech to text": ([f"model.{layer}" for layer in WAVE_LAYERS], ("self_attn",) * 2, ("fc1", "fc2")),
    "CLAP": (
        [f"audio_model.audio_encoder.layers.{stage}.blocks.{block}" for stage in range(2) for block in range(2)],
        ("attention", "attention.output.dense"), ("intermediate.dense", "output.dense"),
    ),
    "SpeechT5": (
        [f"speecht5.encoder.wrapped_encoder.layers.{index}" for index in range(2)], ("attention",) * 2, DENSE
    ),
    "Speech2Text": ([f"model.{layer}" for layer in WAVE_LAYERS], ("self_attn",) * 2, ("fc1", "fc2")),
    "SeamlessM4T v2": (
        [f"speech_encoder.encoder.layers.{index}" for index in range(3)], ("self_attn",) * 2,
        ("ffn2.intermediate_dense", "ffn2.output_dense"),
    ),
    "Moonshine": ([f"model.{layer}" for layer in WAVE_LAYERS], ("self_attn",) * 2, ("mlp",) * 2),
    "Parakeet-CTC": (WAVE_LAYERS, ("self_attn",) * 2, ("feed_forward2",) * 2),
    **dict.fromkeys(
        ("Qwen2-Audio", "Voxtral"),
        ([f"model.audio_tower.layers.{index}" for index in range(2)], ("self_attn",) * 2, ("fc1", "fc2")),
    ),
    "Pop2Piano": (
        ["encoder.block.0.layer", "encoder.block.1.layer"], ("0.SelfAttention",) * 2,
        ("1.DenseReluDense.wi_0", "1.DenseReluDense.wo"),
    ),
    "LASR-CTC": (WAVE_LAYERS, ("self_attn",) * 2, ("feed_forward2",) * 2),
    "Granite Speech": (["layers.0", "layers.1"], ("attn.to_q", "attn"), ("ff2.up_proj", "ff2.down_proj")),
    "Fun-ASR-Nano": (["layers.0", "layers.1", "layers.2"], ("self_attn",) * 2, ("mlp",) * 2),
    "Qwen2.5-Omni": (["layers.0", "layers.1"], ("self_attn",) * 2, ("fc1", "fc2")),
}  # fmt: skip


def adapted(model):
    """Where each block of a model begins and ends."""
    places = set()
    for module in model.modules():
        if isinstance(module, SoftMoALayer):
            for target in module.softmoa_targets.values():
                places.add((target.entry or target.name, target.name))
    return places


def hooks(model):
    return [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
    ]


def encode(family, model, batch):
    """Tokens of the encoder, from a model with or without an adapter."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    return family.encode(model, batch)


def test_every_family_is_here():
    assert PLACES.keys() == FAMILIES.keys()


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_placement(name, placement, tmp_path):
    family, base = FAMILIES[name], build(name)
    batch = family.inputs(list(family.lengths))
    base.requires_grad_(False)  # WavLM's attention takes another kernel then
    with torch.no_grad():
        before = encode(family, base, batch)
    state, hooks_before = copy.deepcopy(base.state_dict()), hooks(base)
    kinds = [type(module) for module in base.modules()]

    torch.manual_seed(0)
    model = get_peft_model(base, SoftMoAConfig(placement=placement, num_experts=3, r=2))
    layers, attention, ffn = PLACES[name]
    wanted = {"attention": [attention], "ffn": [ffn], "both": [attention, ffn]}[placement]
    assert adapted(model) == {
        (f"{layer}.{entry}", f"{layer}.{exit}") for layer in layers for entry, exit in wanted
    }  # fmt: skip
    with torch.no_grad():
        assert torch.equal(encode(family, model, batch), before)

    model.train()
    trainable = {key: tensor for key, tensor in model.named_parameters() if tensor.requires_grad}
    assert trainable and all(".softmoa_" in key for key in trainable)
    start = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2, weight_decay=0.0)
    weights = torch.randn(before.shape, generator=torch.Generator().manual_seed(2))
    for _ in range(2):
        optimizer.zero_grad()
        (encode(family, model, batch) * weights).sum().backward()
        assert all(tensor.grad is not None for tensor in trainable.values())
        optimizer.step()
    assert all(tensor.grad.isfinite().all() and tensor.grad.any() for tensor in trainable.values())
    changes = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, start[key])}
    # A batch norm counts its batches.
    assert {key for key in changes if "batch_norm" not in key and ".norm." not in key} == set(trainable)

    model.eval()
    with torch.no_grad():
        trained = encode(family, model, batch)
    assert not torch.equal(trained, before)
    model.save_pretrained(tmp_path)
    fresh = build(name)
    fresh.load_state_dict({key.replace(".base_layer", ""): tensor for key, tensor in base.state_dict().items()
                           if ".softmoa_" not in key})  # fmt: skip
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    with torch.no_grad():
        assert torch.equal(encode(family, loaded, batch), trained)

    given_back = model.unload()
    assert given_back is base and [type(module) for module in base.modules()] == kinds
    assert hooks(base) == hooks_before
    assert list(base.state_dict()) == list(state)
    frozen = {key for key in state if "batch_norm" not in key and ".norm." not in key}
    assert all(torch.equal(base.state_dict()[key], state[key]) for key in frozen)
    base.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(encode(family, base, batch), before)


def padded_model(name, placement, attention, **options):
    """A model with a random adapter, whose frozen part lets no padding in."""
    if attention == "sdpa" and not FAMILIES[name].config()[0]._supports_sdpa:
        pytest.skip(f"transformers has no SDPA for {name}")
    model = build(name, attention)
    FAMILIES[name].prepare(model)
    return get_peft_model(model, SoftMoAConfig(placement=placement, init_weights=False, scaling=4.0, **options)).eval()


def difference(given, wanted):
    return ((given - wanted).abs().max() / wanted.abs().max()).item()


def padding_error(family, model):
    """How much the outputs of a short clip change when it is padded beside a longer one."""
    short, long = family.lengths
    with torch.no_grad():
        alone = encode(family, model, family.inputs([short]))
        padded = encode(family, model, family.inputs([short, long]))
    valid = family.read(alone.shape[1])
    return difference(padded[0, :valid], alone[0, :valid])


MASKED = [name for name, family in FAMILIES.items() if family.masked]
OF_ANY_LENGTH = [name for name in MASKED if name != "Qwen2-Audio"]  # which pads every clip to 30 seconds


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("placement", ["attention", "ffn"])
@pytest.mark.parametrize("name", OF_ANY_LENGTH)
def test_padding(name, placement, attention, monkeypatch):
    """A clip's outputs are the same alone and beside a longer one, and would not be without the mask."""
    family, model = FAMILIES[name], padded_model(name, placement, attention)
    assert padding_error(family, model) < 1e-5
    monkeypatch.setattr(layer_module, "token_mask", lambda *args: None)
    assert padding_error(family, model) > 1e-3


CONFORMER = {"routing": "dense", "expert_type": "conformer", "num_experts": 2}


@pytest.mark.parametrize("placement", ["attention", "ffn"])
@pytest.mark.parametrize("name", OF_ANY_LENGTH)
def test_padding_of_conformers(name, placement, monkeypatch):
    """Their kernel of 31 reaches from the last real token far into the padding."""
    family, model = FAMILIES[name], padded_model(name, placement, "eager", **CONFORMER)
    assert padding_error(family, model) < 1e-5
    monkeypatch.setattr(layer_module, "token_mask", lambda *args: None)
    assert padding_error(family, model) > 1e-3


@pytest.mark.parametrize("options", [{}, CONFORMER], ids=["soft", "conformer"])
@pytest.mark.parametrize("placement", ["attention", "ffn"])
@pytest.mark.parametrize("name", MASKED)
def test_content_of_padding(name, placement, options):
    """What stands in padded positions changes nothing."""
    family, model = FAMILIES[name], padded_model(name, placement, "eager", **options)
    short, long = family.lengths
    silent = family.inputs([short, long])
    loud = {key: value.clone() for key, value in silent.items()}
    for key in ("input_values", "input_features"):
        if key in loud:
            time = 1 if name != "Qwen2-Audio" else 2
            valid = min(short // 10, 40) if name == "Qwen2-Audio" else short
            part = loud[key][0].narrow(time - 1, valid, loud[key].shape[time] - valid)
            part += torch.randn(part.shape, generator=torch.Generator().manual_seed(3))

    with torch.no_grad():
        wanted, given = encode(family, model, silent), encode(family, model, loud)
        alone = encode(family, model, family.inputs([short]))
    valid = family.read(alone.shape[1])
    assert difference(given[0, :valid], wanted[0, :valid]) < 1e-5


def test_packed_samples():
    """Clips one after another in one sequence do not see each other."""
    family, model = FAMILIES["Qwen2.5-Omni"], padded_model("Qwen2.5-Omni", "both", "eager")
    first, second = family.lengths
    with torch.no_grad():
        alone, both = (encode(family, model, family.inputs(lengths)) for lengths in ([first], [first, second]))
    assert len(both) > len(alone)
    assert difference(both[: len(alone)], alone) < 1e-5


def attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """What flash attention computes with the mask that it takes, `(B, T)` or None."""
    mask = None if attention_mask is None else attention_mask[:, None, None].bool()
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


@pytest.fixture
def flash_masks(monkeypatch):
    """An attention that gets its masks in the form in which flash attention does, on the CPU."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "masks_of_two_dimensions", attend)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "masks_of_two_dimensions", flash_attention_mask)
    return "masks_of_two_dimensions"


@pytest.mark.parametrize("placement", ["attention", "ffn"])
@pytest.mark.parametrize("name", ["Wav2Vec2", "HuBERT", "Moonshine"])
def test_padding_with_flash_masks(name, placement, flash_masks):
    family, model = FAMILIES[name], padded_model(name, placement, flash_masks)
    assert padding_error(family, model) < 1e-5


def test_padding_with_flex_masks():
    family = FAMILIES["Wav2Vec2"]
    try:
        with torch.no_grad():
            encode(family, build("Wav2Vec2", "flex_attention"), family.inputs(list(family.lengths)))
    except torch._dynamo.exc.TorchDynamoException as error:
        pytest.skip(f"this torch does not compile flex attention here: {str(error)[:99]}")
    model = padded_model("Wav2Vec2", "both", "flex_attention")
    assert padding_error(family, model) < 1e-5


@pytest.mark.parametrize("routing", ["soft", "expert_choice", "top_k"])
@pytest.mark.parametrize("name", ["Wav2Vec2", "Wav2Vec2-BERT", "LASR-CTC"])
def test_a_sample_without_tokens(name, routing):
    family = FAMILIES[name]
    model = get_peft_model(build(name, "eager"), SoftMoAConfig(routing=routing, placement="both", init_weights=False))
    batch = family.inputs(list(family.lengths))
    batch["attention_mask"][0] = 0
    output = encode(family, model, batch)
    output.square().mean().backward()
    assert output.isfinite().all()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_a_mask_that_the_model_drops():
    """Whisper takes a mask, and does not use it."""
    name = "Whisper, speech to text"
    family, model = FAMILIES[name], padded_model(name, "both", "eager")
    batch = family.inputs([40, 40])
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, 20:] = 0
    with torch.no_grad():
        wanted, given = encode(family, model, batch), encode(family, model, {**batch, "attention_mask": mask})
    assert torch.equal(given, wanted)


@pytest.mark.filterwarnings("ignore:The load-balancing loss of the latest training pass")
@pytest.mark.parametrize("placement", ["attention", "ffn"])
def test_the_load_balancing_loss_counts_real_tokens_only(placement, masks):
    """Masks are read for it in training, and not needed afterwards."""
    config = SoftMoAConfig(routing="top_k", placement=placement)
    model = get_peft_model(build("Wav2Vec2"), config)
    batch = FAMILIES["Wav2Vec2"].inputs([204, 400])
    model.train()(**batch)
    assert len(masks) == 2 and all(mask.any(dim=1).all() and not mask.all() for mask in masks)
    masks.clear()
    model.eval()(**batch)
    assert masks == [None, None]


@pytest.mark.parametrize("name", FAMILIES)
def test_training_leaves_the_base_as_it_was(name, tmp_path):
    """Parameters and buffers, among them the running statistics of batch norms, which training moves."""
    family, base = FAMILIES[name], build(name)
    before = copy.deepcopy(base.state_dict())
    batch = family.inputs(list(family.lengths))
    model = get_peft_model(base, SoftMoAConfig(r=2, num_experts=2))
    optimizer = torch.optim.SGD((each for each in model.parameters() if each.requires_grad), lr=0.1)
    for _ in range(2):
        encode(family, model.train(), batch).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        trained = encode(family, model.eval(), batch)
    model.save_pretrained(tmp_path)
    loaded = build(name)
    loaded.load_state_dict(before)
    with torch.no_grad():
        assert torch.equal(encode(family, PeftModel.from_pretrained(loaded, tmp_path), batch), trained)
    after = model.unload().state_dict()
    assert after.keys() == before.keys()
    assert not [path for path in before if not torch.equal(after[path], before[path])]


def test_a_part_that_is_called_by_itself_keeps_its_statistics():
    """Whoever switches the model to training calls parts of it, too."""
    model = get_peft_model(build("Wav2Vec2-Conformer"), SoftMoAConfig(r=2, num_experts=2)).train()
    [norm, *_] = [each for each in model.modules() if isinstance(each, torch.nn.BatchNorm1d)]
    before = norm.running_mean.clone()
    norm(torch.randn(4, norm.num_features, 5))
    assert torch.equal(norm.running_mean, before)
