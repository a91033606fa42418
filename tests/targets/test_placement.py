import warnings

import pytest
import torch
import transformers as tf
from conftest import tiny_ast_config
from families import FAMILIES, build
from peft import get_peft_model
from torch import nn
from transformers import ASTModel

from peft_softmoa import SoftMoAConfig, SoftMoALayer, describe_targets
from peft_softmoa.method import PatchGrid
from peft_softmoa.targets.architectures import ARCHITECTURES, find_patch_grid
from peft_softmoa.targets.layers import is_linear


def test_patch_grid_of_the_audio_spectrogram_transformer():
    config = tiny_ast_config(num_mel_bins=128, max_length=90, frequency_stride=10, time_stride=12)
    grid = find_patch_grid(config.to_dict())
    assert grid == PatchGrid(2, 12, 7, patch_size=16, frequency_stride=10, time_stride=12)
    embeddings = ASTModel(config).embeddings
    assert grid[1:3] == embeddings.get_shape(config)
    assert embeddings.position_embeddings.shape[1] == 2 + 12 * 7


def test_tokens_of_the_patch_grid_are_where_it_says():
    """A louder patch of the spectrogram changes the token that the grid gives it, and no other."""
    config = tiny_ast_config()
    embeddings = ASTModel(config).embeddings.eval()
    _, height, width, *_ = find_patch_grid(config.to_dict())
    quiet = torch.zeros(1, config.max_length, config.num_mel_bins)
    for row, column in ((0, 0), (3, 2), (height - 1, width - 1)):
        loud = quiet.clone()
        loud[:, 16 * column : 16 * (column + 1), 16 * row : 16 * (row + 1)] = 1.0
        changed = (embeddings(loud) != embeddings(quiet)).any(dim=-1)[0].nonzero().flatten().tolist()
        assert changed == [2 + row * width + column]


def test_patch_grid_of_other_models():
    for config in ({"model_type": "wav2vec2"}, {}):
        with pytest.raises(ValueError, match="`patch_grid` is known for models of type audio-spectrogram-transformer"):
            find_patch_grid(config)


LOOKS_FOR = (
    "`placement` looks for the audio encoder of a model: a list of layers, in a part of the model that takes audio"
)


def test_a_text_model():
    config = tf.BertConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
    with pytest.raises(ValueError, match=LOOKS_FOR) as error:
        get_peft_model(tf.BertModel(config), SoftMoAConfig())
    assert "BertModel has none. Its repeated blocks are:" in str(error.value)
    assert "\n  encoder.layer: 3 x BertLayer (attention, intermediate, output)\n" in str(error.value)
    assert "target_modules=['self_attn'], or ['fc1->fc2']" in str(error.value)


def test_a_vision_model():
    config = tf.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    with pytest.raises(ValueError, match=LOOKS_FOR) as error:
        get_peft_model(tf.ViTModel(config), SoftMoAConfig())
    assert "2 x ViTLayer (" in str(error.value)


def test_a_model_without_layers():
    with pytest.raises(ValueError, match=LOOKS_FOR + ".* Sequential has none. It has no repeated blocks. Name the mod"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), SoftMoAConfig())


def test_a_model_of_convolutions():
    with torch.device("meta"):
        model = tf.DacModel(tf.DacConfig())
    with pytest.raises(ValueError, match=LOOKS_FOR) as error:
        describe_targets(model, SoftMoAConfig())
    children = "(res_unit1, res_unit2, res_unit3, snake1, conv1)"
    assert f"\n  encoder.block: 4 x DacEncoderBlock {children}\n" in str(error.value)


def test_a_text_decoder_and_a_text_encoder_of_speech_models():
    whisper = build("Whisper, speech to text").config
    with pytest.raises(ValueError, match=LOOKS_FOR) as error:
        get_peft_model(tf.WhisperForCausalLM(whisper), SoftMoAConfig())
    assert "model.decoder.layers: 2 x WhisperDecoderLayer (self_attn, activation_fn, " in str(error.value)
    with pytest.raises(ValueError, match=LOOKS_FOR + ".* SpeechT5ForTextToSpeech has none"):
        get_peft_model(tf.SpeechT5ForTextToSpeech(build("SpeechT5").config), SoftMoAConfig())


class Mixing(nn.Module):
    """An attention of nobody's kind."""

    def __init__(self, width):
        super().__init__()
        self.everything, self.back = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, frames, mask=None):
        queries, keys, values = self.everything(frames).chunk(3, dim=-1)
        logits = queries @ keys.mT
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None], -1e9)
        return self.back(logits.softmax(dim=-1) @ values)


class Step(nn.Module):
    def __init__(self, width, feeds=True):
        super().__init__()
        self.before, self.mixing = nn.LayerNorm(width), Mixing(width)
        if feeds:
            self.between, self.wide, self.thin = nn.LayerNorm(width), nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, frames, mask=None):
        frames = frames + self.mixing(self.before(frames), mask)
        if hasattr(self, "wide"):
            frames = frames + self.thin(self.wide(self.between(frames)).relu())
        return frames


class Encoder(nn.Module):
    """An encoder that no library has."""

    def __init__(self, feeds=True):
        super().__init__()
        self.steps = nn.ModuleList([Step(8, feeds) for _ in range(2)])

    def forward(self, frames, mask=None):
        for step in self.steps:
            frames = step(frames, mask)
        return frames


def check_padding(model):
    """A clip's outputs are the same alone and beside a longer one, and would not be without the mask."""
    frames = torch.randn(2, 6, 8)
    mask = torch.arange(6) < torch.tensor([[4], [6]])
    with torch.no_grad():
        alone, padded, blind = model(frames[:1, :4]), model(frames, mask)[:1, :4], model(frames)[:1, :4]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)
    assert (blind - alone).abs().max() > 1e-2


@pytest.mark.parametrize("placement", ["attention", "ffn"])
def test_an_encoder_that_nobody_listed(placement):
    torch.manual_seed(0)
    model = get_peft_model(Encoder(), SoftMoAConfig(placement=placement, init_weights=False, scaling=9.0)).eval()
    names = [name for name, module in model.base_model.model.named_modules() if isinstance(module, SoftMoALayer)]
    assert names == [f"steps.{index}.{'mixing' if placement == 'attention' else 'thin'}" for index in range(2)]
    check_padding(model)


def test_a_placement_that_the_architecture_does_not_have():
    get_peft_model(Encoder(feeds=False), SoftMoAConfig())
    for placement in ("ffn", "both"):
        with pytest.raises(
            ValueError, match=f"`placement='{placement}'` looks for a feed-forward block in every layer"
        ):
            get_peft_model(Encoder(feeds=False), SoftMoAConfig(placement=placement))


def test_a_mask_that_is_not_understood_names_the_layer():
    model = get_peft_model(Encoder(), SoftMoAConfig(placement="ffn"))
    mask = torch.ones(2, 7, dtype=torch.bool)
    model.base_model.model.steps[0].mixing.forward = lambda frames, mask=None: frames
    named = r"In the adapted block 'steps\.0\.thin': Its attention mask `mask`, a Tensor torch\.bool of shape \(2, 7\)"
    with pytest.raises(ValueError, match=named):
        model(torch.randn(2, 6, 8), mask)


def test_layers_to_transform():
    model = get_peft_model(Encoder(), SoftMoAConfig(placement="both", layers_to_transform=[1]))
    names = [name for name, module in model.base_model.model.named_modules() if isinstance(module, SoftMoALayer)]
    assert names == ["steps.1.mixing", "steps.1.thin"]
    assert model.peft_config["default"].layers_pattern == "steps"
    with pytest.raises(ValueError, match=r"`layers_to_transform=\[7\]` and `layers_pattern='steps'` match none of the"):
        get_peft_model(Encoder(), SoftMoAConfig(layers_to_transform=[7]))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"causal": False}, "`causal=False` lets tokens see whole clips"),
        ({"chunk_size": 4}, "`chunk_size=4` lets tokens see up to the end of their chunk"),
        (
            {"routing": "expert_choice"},
            "`routing='expert_choice'` lets each expert choose .* may be 'soft', 'dense', 'top_k'",
        ),
        (
            {"routing": "dense", "expert_type": "convolution", "patch_grid": True},
            "`patch_grid=True` convolves in time and frequency",
        ),
        (
            {"expert_type": "conformer", "num_slots": 16},
            "`expert_type='conformer'` does not go with routing='soft' here, as a running average",
        ),
    ],
)
@pytest.mark.parametrize("block", ["self_attn", "fc1->decoder.layers.0.fc2", "self_attn.q_proj"])
def test_a_causal_decoder_takes_nothing_that_sees_ahead(options, named, block):
    config = SoftMoAConfig(target_modules=[f"decoder.layers.0.{block}"], **options)
    with pytest.raises(ValueError, match=named) as error:
        get_peft_model(build("Whisper, speech to text"), config)
    assert "is in a causal or streaming layer, whose tokens must not see the ones after them" in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"forgetting": True, "normalize": True},
        {"expert_type": "convolution", "num_slots": 2},
        {"routing": "dense"},
        {"routing": "dense", "expert_type": "convolution"},
        {"routing": "dense", "expert_type": "conformer"},
        {"routing": "top_k"},
    ],
)
def test_what_works_in_a_causal_decoder_does_not_see_ahead(options):
    targets = ["decoder.layers.0.self_attn", "decoder.layers.1.fc1->decoder.layers.1.fc2"]
    config = SoftMoAConfig(**options, target_modules=targets, init_weights=False, scaling=4.0)
    base = build("Whisper, speech to text")
    batch = {**FAMILIES["Whisper, speech to text"].inputs([40]), "decoder_input_ids": torch.tensor([[1, 4, 5, 6]])}
    with torch.no_grad():
        before = base(**batch).logits
        model = get_peft_model(base, config).eval()
        after = model(**batch).logits
        batch["decoder_input_ids"] = torch.tensor([[1, 4, 7, 8]])
        other = model(**batch).logits
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(other[:, :2], after[:, :2])
    assert (other[:, 2:] - after[:, 2:]).abs().max() > 1e-3


def test_cross_attention_is_never_adapted():
    for block in ("encoder_attn", "encoder_attn.k_proj"):
        config = SoftMoAConfig(routing="dense", target_modules=[f"decoder.layers.0.{block}"])
        with pytest.raises(ValueError, match=f"'model.decoder.layers.0.{block}', which belongs to the cross-attention"):
            get_peft_model(build("Whisper, speech to text"), config)
    model = get_peft_model(
        build("Whisper, speech to text"), SoftMoAConfig(routing="dense", target_modules="all-linear")
    )
    assert not [name for name in model.peft_config["default"].target_modules if "encoder_attn" in name]


def _streaming(name):
    if name == "nemotron_asr_streaming_encoder":
        return tf.NemotronAsrStreamingEncoder, tf.NemotronAsrStreamingEncoderConfig()
    if name == "moonshine_streaming_encoder":
        from transformers.models.moonshine_streaming.modeling_moonshine_streaming import MoonshineStreamingEncoder

        return MoonshineStreamingEncoder, MoonshineStreamingEncoder.config_class()
    if name == "gemma3n_audio":
        return tf.Gemma3nAudioEncoder, tf.Gemma3nAudioConfig()
    return tf.Gemma4AudioModel, tf.Gemma4AudioConfig()


@pytest.mark.parametrize("name", [name for name, known in ARCHITECTURES.items() if known.causal])
def test_streaming_encoders(name):
    model_class, config = _streaming(name)
    assert config.model_type == name
    with torch.device("meta"):
        model = model_class._from_config(config)
    for options in ({}, {"causal": True}, {"routing": "dense"}, {"forgetting": True}):
        targets = describe_targets(model, SoftMoAConfig(**options)).targets
        assert targets and all(target.causal for target in targets)
    with pytest.raises(ValueError, match="is in a causal or streaming layer"):
        describe_targets(model, SoftMoAConfig(routing="expert_choice"))


def test_the_audio_tower_among_others():
    """The class of Gemma 4's vision tower says that it takes audio, which holds for the model around it."""
    with torch.device("meta"):
        model = tf.Gemma4ForConditionalGeneration._from_config(
            tf.Gemma4Config(vision_config=tf.Gemma4VisionConfig(), audio_config=tf.Gemma4AudioConfig())
        )
        vision = tf.Gemma4VisionModel._from_config(tf.Gemma4VisionConfig())
    targets = describe_targets(model, SoftMoAConfig(routing="dense")).targets
    assert targets and all(target.name.startswith("model.audio_tower.layers.") for target in targets)
    with pytest.raises(ValueError, match=LOOKS_FOR):
        describe_targets(vision, SoftMoAConfig())


def test_a_decoder_of_audio_codes_is_no_encoder():
    with torch.device("meta"):
        model = tf.CsmForConditionalGeneration._from_config(tf.CsmConfig())
    targets = describe_targets(model, SoftMoAConfig(routing="dense")).targets
    if "decoder_transformer" in dict(model.codec_model.named_children()):
        pytest.skip("in this version of transformers, Mimi's encoder and decoder are one model")
    assert targets and all(target.name.startswith("codec_model.encoder.") for target in targets)


def test_a_whole_causal_layer():
    config = SoftMoAConfig(target_modules=["decoder.layers.0"])
    assert [each.causal for each in describe_targets(build("Whisper, speech to text"), config).targets] == [True]


DECODERS = {
    "GPT2Model": "h.0.attn",
    "BloomModel": "h.0.self_attention",
    "Phi3Model": "layers.0.self_attn.qkv_proj",
    "MambaModel": "layers.0.mixer.in_proj",
    "FalconModel": "h.0.mlp.dense_h_to_4h",
    "ProphetNetDecoder": "layers.0.self_attn.key_proj",
}


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_of_any_structure(name):
    """Also where the layers are none that are known, or say nothing of order in time."""
    model_class = getattr(tf, name)
    with torch.device("meta"):
        model = model_class._from_config(model_class.config_class())
    with pytest.raises(ValueError, match="is in a causal or streaming layer"):
        describe_targets(model, SoftMoAConfig(target_modules=[DECODERS[name]], routing="expert_choice"))
    for routing in ("soft", "dense"):
        targets = describe_targets(model, SoftMoAConfig(target_modules=[DECODERS[name]], routing=routing)).targets
        assert targets and all(target.causal for target in targets)


def test_a_text_encoder_may_be_named():
    with torch.device("meta"):
        model = tf.T5EncoderModel._from_config(tf.T5Config())
    assert describe_targets(model, SoftMoAConfig(target_modules=["SelfAttention"])).targets


def test_generation_with_top_k():
    """With a cache, masks are no squares; they say nothing that a token's own choice of experts needs."""
    name = "Whisper, speech to text"
    config = SoftMoAConfig(routing="top_k", target_modules=r".*decoder.*self_attn", init_weights=False, scaling=4.0)
    model = get_peft_model(build(name, "eager"), config).eval()
    features = FAMILIES[name].inputs([40])["input_features"]
    given = model.generate(
        input_features=features, max_new_tokens=5, min_new_tokens=5, return_dict_in_generate=True, output_logits=True
    )
    logits = torch.stack(given.logits, dim=1)
    with torch.no_grad():
        wanted = model(input_features=features, decoder_input_ids=given.sequences[:, :-1]).logits
    assert logits.shape[1] > 1
    torch.testing.assert_close(logits, wanted[:, -logits.shape[1] :], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_all_linear_layers(name):
    """Each with the widths that it has, whatever it is a part of."""
    family, base = FAMILIES[name], build(name)
    widths = {path: (each.in_features, each.out_features) for path, each in base.named_modules() if is_linear(each)}
    model = get_peft_model(base, SoftMoAConfig(target_modules="all-linear", routing="dense", num_experts=2, r=1))
    adapted = {layer.name: layer for layer in model.modules() if isinstance(layer, SoftMoALayer)}
    assert adapted
    for path, layer in adapted.items():
        target = layer.softmoa_targets["default"]
        assert (target.in_features, target.out_features) == widths[path]
    family.encode(base.eval(), family.inputs(list(family.lengths)))


def test_one_half_of_a_block():
    config = SoftMoAConfig(target_modules=["fc2"], routing="dense", layers_to_transform=[0], layers_pattern="layers")
    target = describe_targets(build("Whisper, classification"), config).targets[0]
    assert (target.name, target.entry, target.in_features) == ("encoder.layers.0.fc2", None, 32)


def test_outside_of_the_layers_there_is_no_mask():
    for options, warns in (({}, True), ({"routing": "dense"}, False), ({"routing": "top_k"}, True)):
        config = SoftMoAConfig(target_modules=["feature_projection.projection"], **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            get_peft_model(build("Wav2Vec2"), config)
        said = [str(each.message) for each in caught if "padded tokens count as real ones" in str(each.message)]
        assert bool(said) == warns and all("'feature_projection.projection' is in no layer" in each for each in said)


def test_layers_of_an_unknown_structure_still_have_a_mask():
    """The layer around a block that was named by hand is called with it."""

    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.only = nn.Linear(8, 8)

        def forward(self, frames, mask=None):
            return frames + self.only(frames)

    class Pools(nn.Module):
        def __init__(self):
            super().__init__()
            self.pools = nn.ModuleList([Pool(), Pool()])

        def forward(self, frames, mask=None):
            for pool in self.pools:
                frames = pool(frames, mask=mask)
            return frames

    torch.manual_seed(0)
    model = get_peft_model(Pools(), SoftMoAConfig(target_modules=["only"], init_weights=False, scaling=9.0)).eval()
    check_padding(model)


def test_excluded_blocks_in_the_same_form():
    config = SoftMoAConfig(placement="ffn", exclude_modules=["layers.0.fc1->layers.0.fc2"])
    targets = describe_targets(build("Whisper, classification"), config).targets
    assert [target.name for target in targets] == ["encoder.layers.1.fc2"]


def test_tokens_of_four_dimensions():
    """WavLM's gate reads each head alone; what mixes tokens would not know which these are."""
    batch = FAMILIES["WavLM"].inputs([204])
    config = SoftMoAConfig(target_modules=["gru_rel_pos_linear"])
    with pytest.raises(ValueError, match="gru_rel_pos_linear' takes tokens of .* Name it in `exclude_modules`"):
        get_peft_model(build("WavLM"), config)(**batch)


def test_a_flag_that_is_wrong():
    """Phi-4's audio encoder says that it is causal, but it is not, and its mask is no order in time."""
    with torch.device("meta"):
        config = tf.Phi4MultimodalConfig()
        model = tf.Phi4MultimodalModel._from_config(config)
    targets = describe_targets(model, SoftMoAConfig()).targets
    assert len(targets) == config.audio_config.num_blocks
    assert all(target.name.endswith(".self_attn") and ".audio_embed." in target.name for target in targets)


def test_a_block_whose_end_is_given_with_two_beginnings():
    config = SoftMoAConfig(target_modules=["steps.0.wide->steps.0.thin", "between->thin"])
    with pytest.raises(ValueError, match=r"matches 'steps.0.thin' as the end of several blocks"):
        get_peft_model(Encoder(), config)


def test_a_block_without_its_beginning():
    with pytest.raises(
        ValueError,
        match="from 'steps.0.nothing' to 'steps.0.thin', but no 'steps.0.nothing'. Write both names from the same",
    ):
        get_peft_model(Encoder(), SoftMoAConfig(target_modules=["nothing->thin"]))


def test_a_block_that_begins_where_nothing_is_called():
    model = get_peft_model(Encoder(), SoftMoAConfig(target_modules=["between->thin"]))
    model.base_model.model.steps[0].between = nn.Identity()
    with pytest.raises(ValueError, match="'steps.0.thin' begins in 'steps.0.between', which was not called before it"):
        model(torch.randn(2, 6, 8))


def test_a_target_given_by_hand_reads_the_mask_too():
    """A linear layer inside the attention, which is never called with a mask."""
    torch.manual_seed(0)
    model = get_peft_model(
        Encoder(), SoftMoAConfig(target_modules=["everything", "wide"], init_weights=False, scaling=9.0)
    ).eval()
    check_padding(model)
