"""Tiny models of the families of audio transformers in transformers, from configs, with inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import nn

WAVE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (8, 8),
    "conv_stride": (4, 2),
    "conv_kernel": (8, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "num_labels": 5,
    "vocab_size": 12,
    "layerdrop": 0.0,
}
# Layer normalization in the feature extractor: these models honour the attention mask.
MASKED_WAVE = {**WAVE, "feat_extract_norm": "layer", "do_stable_layer_norm": True}
DECODER = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
WHISPER = {
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "vocab_size": 12,
    "num_labels": 5,
    "classifier_proj_size": 8,
    **DECODER,
}
CONFORMER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_labels": 5,
    "vocab_size": 12,
    "layerdrop": 0.0,
}


@dataclass
class Family:
    """One family of models.

    Args:
        name: what its users call it.
        config: class and config of the model.
        inputs: from a list of lengths to a padded batch of random clips, in the features that the model takes.
        masked: whether the model honours the attention mask; then padding changes nothing.
        unmasked: what it does about clips of different lengths, if it does not.
        encode: the encoder's tokens `(B, T, D)`, from the model and a batch. Default: `last_hidden_state`.
        lengths: two lengths of clips that the model takes.
        prepare: for tests of padding, keeps the frozen model itself from letting padding in.
        read: how many of the tokens of a clip read nothing beyond its end. Default: all.
        checkpoints: whether transformers can checkpoint its layers.
        onnx: what of it can be written as an ONNX file, and for clips of which lengths, or why nothing can.
        listed: whether the documentation names it; the others are there because the search goes by structure.
    """

    name: str
    config: Callable[[], tuple[type, tf.PreTrainedConfig]]
    inputs: Callable[[list[int]], dict[str, torch.Tensor]]
    masked: bool = False
    unmasked: str = ""
    encode: Callable[[nn.Module, dict[str, Any]], torch.Tensor] = lambda model, batch: model(**batch).last_hidden_state
    lengths: tuple[int, int] = (204, 400)
    prepare: Callable[[nn.Module], None] = lambda model: None
    read: Callable[[int], int] = lambda tokens: tokens
    checkpoints: bool = True
    onnx: str = "any length"
    listed: bool = True


def _clips(lengths: list[int], *size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same random clips, cut to lengths and padded with zeros, and their mask."""
    generator = torch.Generator().manual_seed(1)
    clips = torch.randn(len(lengths), 4000, *size, generator=generator)[:, : max(lengths)]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return clips * mask.reshape(*mask.shape, *[1] * len(size)), mask.long()


def waves(lengths: list[int]) -> dict[str, torch.Tensor]:
    clips, mask = _clips(lengths)
    return {"input_values": clips, "attention_mask": mask}


def features(size: int) -> Callable[[list[int]], dict[str, torch.Tensor]]:
    def make(lengths: list[int]) -> dict[str, torch.Tensor]:
        clips, mask = _clips(lengths, size)
        return {"input_features": clips, "attention_mask": mask}

    return make


def without_mask(make: Callable[[list[int]], dict[str, torch.Tensor]]) -> Callable[[list[int]], dict[str, Any]]:
    return lambda lengths: {key: value for key, value in make(lengths).items() if key != "attention_mask"}


def _spectrograms(length: int, size: int, name: str = "input_features", transposed: bool = True):
    """Features of a fixed length, one row for each clip."""

    def make(lengths: list[int]) -> dict[str, torch.Tensor]:
        clips, _ = _clips([min(each, length) for each in lengths], size)
        clips = torch.nn.functional.pad(clips, (0, 0, 0, length - clips.shape[1]))
        return {name: clips.mT.contiguous() if transposed else clips}

    return make


def _whisper_s2t(lengths: list[int]) -> dict[str, torch.Tensor]:
    batch = _spectrograms(40, 8)(lengths)
    return {**batch, "decoder_input_ids": torch.tensor([[1, 4, 5]] * len(lengths))}


def _with_text(make: Callable[[list[int]], dict[str, Any]]) -> Callable[[list[int]], dict[str, Any]]:
    return lambda lengths: {**make(lengths), "decoder_input_ids": torch.tensor([[1, 4, 5]] * len(lengths))}


def _encoder_state(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    return model(**batch).encoder_last_hidden_state


def _clap() -> tuple[type, tf.PreTrainedConfig]:
    audio = tf.ClapAudioConfig(
        window_size=4, num_mel_bins=16, spec_size=64, patch_size=4, patch_stride=[4, 4], num_classes=5,
        hidden_size=32, projection_dim=8, depths=[2, 2], num_attention_heads=[2, 2], num_hidden_layers=2,
        patch_embeds_hidden_size=16, hidden_dropout_prob=0.1,
    )  # fmt: skip
    text = tf.ClapTextConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        projection_dim=8, max_position_embeddings=20,
    )  # fmt: skip
    return tf.ClapModel, tf.ClapConfig(text_config=text.to_dict(), audio_config=audio.to_dict(), projection_dim=8)


def _clap_inputs(lengths: list[int]) -> dict[str, torch.Tensor]:
    clips, _ = _clips([min(length, 256) for length in lengths], 16)
    clips = torch.nn.functional.pad(clips, (0, 0, 0, 256 - clips.shape[1]))
    ids = torch.tensor([[0, 5, 6, 2]] * len(lengths))
    return {"input_features": clips[:, None], "input_ids": ids}


def _llama() -> dict[str, Any]:
    return {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 30, "head_dim": 8, "pad_token_id": 0,
    }  # fmt: skip


def _qwen2_audio() -> tuple[type, tf.PreTrainedConfig]:
    audio = {
        "num_mel_bins": 8, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "d_model": 16,
        "max_source_positions": 20,
    }  # fmt: skip
    text = {**_llama(), "model_type": "qwen2"}
    config = tf.Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=20)
    return tf.Qwen2AudioForConditionalGeneration, config


def _qwen2_audio_inputs(lengths: list[int]) -> dict[str, torch.Tensor]:
    clips, mask = _clips([min(length // 10, 40) for length in lengths], 8)
    pad = 40 - clips.shape[1]
    clips, mask = torch.nn.functional.pad(clips, (0, 0, 0, pad)), torch.nn.functional.pad(mask, (0, pad))
    frames = ((mask.sum(dim=1) - 1) // 2 + 1 - 2) // 2 + 1
    rows = [[3] * (1 + 20 - int(each)) + [20] * int(each) + [4, 5] for each in frames]
    ids = torch.tensor(rows)
    return {
        "input_features": clips.mT.contiguous(),
        "feature_attention_mask": mask,
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }


def _qwen2_audio_tokens(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    return model(**batch).logits


def _voxtral() -> tuple[type, tf.PreTrainedConfig]:
    audio = {
        "num_mel_bins": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "hidden_size": 16, "max_source_positions": 20,
    }  # fmt: skip
    text = {**_llama(), "model_type": "llama"}
    return tf.VoxtralForConditionalGeneration, tf.VoxtralConfig(audio_config=audio, text_config=text, audio_token_id=20)


def _voxtral_inputs(lengths: list[int]) -> dict[str, torch.Tensor]:
    batch = _spectrograms(40, 8)(lengths)
    return {**batch, "input_ids": torch.tensor([[3] + [20] * 5 + [4]] * len(lengths))}


def _seamless() -> tuple[type, tf.PreTrainedConfig]:
    config = tf.SeamlessM4Tv2Config(
        vocab_size=30, char_vocab_size=30, hidden_size=16, encoder_layers=2, encoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_layers=2, decoder_ffn_dim=32, decoder_attention_heads=2,
        speech_encoder_layers=3, speech_encoder_attention_heads=2, speech_encoder_intermediate_size=32,
        feature_projection_input_dim=8, adaptor_kernel_size=4, adaptor_stride=4, conv_depthwise_kernel_size=3,
        t2u_encoder_layers=2, t2u_decoder_layers=2, speech_encoder_layerdrop=0.0, max_position_embeddings=64,
        decoder_layerdrop=0.0, **{**DECODER, "decoder_start_token_id": 2},
    )  # fmt: skip
    return tf.SeamlessM4Tv2ForSpeechToText, config


def _prepare_moonshine(model: nn.Module) -> None:
    """Frames that do not overlap, and no norm over time: Moonshine's own cross the end of a clip."""
    encoder = model.model.encoder
    width = encoder.conv1.out_channels
    encoder.conv1 = nn.Conv1d(1, width, 64, 64)
    encoder.conv2, encoder.conv3 = nn.Conv1d(width, 2 * width, 3, 3), nn.Conv1d(2 * width, width, 2, 2)
    encoder.groupnorm = nn.Identity()
    encoder._get_feat_extract_output_lengths = lambda length: length // 384


def _prepare_seamless(model: nn.Module) -> None:
    """No chunks under eager attention, which adds their boolean mask to the logits as zeros and ones."""
    encoder = model.speech_encoder.encoder
    if encoder.config._attn_implementation == "eager":
        encoder._apply_chunk_attention = lambda attention_mask, hidden_states: attention_mask


def _prepare_qwen2_audio(model: nn.Module) -> None:
    """A convolution without neighbours: Qwen2-Audio's own reads beyond the end of a clip."""
    encoder = model.model.audio_tower
    width = encoder.conv1.out_channels
    encoder.conv1, encoder.conv2 = nn.Conv1d(8, width, 1), nn.Conv1d(width, width, 1, stride=2)


def _parakeet() -> tuple[type, tf.PreTrainedConfig]:
    encoder = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "conv_kernel_size": 3, "subsampling_factor": 4, "subsampling_conv_channels": 4, "num_mel_bins": 8,
        "layerdrop": 0.0,
    }  # fmt: skip
    return tf.ParakeetForCTC, tf.ParakeetCTCConfig(vocab_size=12, pad_token_id=0, encoder_config=encoder)


def _fun_asr_nano_inputs(lengths: list[int]) -> dict[str, torch.Tensor]:
    batch = features(24)(lengths)
    return {"input_features": batch["input_features"], "input_features_mask": batch["attention_mask"]}


def _qwen2_5_omni() -> tuple[type, tf.PreTrainedConfig]:
    from transformers.models.qwen2_5_omni import configuration_qwen2_5_omni, modeling_qwen2_5_omni

    config = configuration_qwen2_5_omni.Qwen2_5OmniAudioEncoderConfig(
        num_mel_bins=8, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=32, d_model=16,
        max_source_positions=20, n_window=10, output_dim=12,
    )  # fmt: skip
    return modeling_qwen2_5_omni.Qwen2_5OmniAudioEncoder, config


def _packed_inputs(lengths: list[int]) -> dict[str, torch.Tensor]:
    """Clips one after another, without padding."""
    clips, mask = _clips(lengths, 8)
    return {"input_features": clips[mask.bool()].mT.contiguous(), "feature_lens": torch.tensor(lengths)}


def _encoder_of(name: str) -> Callable[[nn.Module, dict[str, Any]], torch.Tensor]:
    """Tokens of the part of a model that the batch goes to first."""

    def encode(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        outputs: list[Any] = []
        handle = model.get_submodule(name).register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            model(**batch)
        finally:
            handle.remove()
        output = outputs[0]
        return output if isinstance(output, torch.Tensor) else output[0]

    return encode


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "AST",
            lambda: (tf.ASTForAudioClassification,
                tf.ASTConfig(
                    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_length=40,
                    num_mel_bins=16, patch_size=8, frequency_stride=8, time_stride=8, num_labels=5,
                )
            ),
            _spectrograms(40, 16, "input_values", transposed=False),
            encode=_encoder_of("audio_spectrogram_transformer"), unmasked="fixed length",
            onnx="fixed length",
        ),
        Family("Wav2Vec2", lambda: (tf.Wav2Vec2Model, tf.Wav2Vec2Config(**MASKED_WAVE)), waves, masked=True),
        Family(
            "Wav2Vec2-BERT",
            lambda: (tf.Wav2Vec2BertModel,
                tf.Wav2Vec2BertConfig(
                    **CONFORMER, feature_projection_input_dim=8, conv_depthwise_kernel_size=3, mask_time_prob=0.0
                )
            ),
            features(8), masked=True, lengths=(20, 40),
        ),
        Family(
            "Wav2Vec2-Conformer",
            lambda: (tf.Wav2Vec2ConformerModel,
                tf.Wav2Vec2ConformerConfig(
                    **MASKED_WAVE, position_embeddings_type="relative", conv_depthwise_kernel_size=1,
                    mask_time_prob=0.0,
                )
            ),
            waves, masked=True,
        ),
        Family("HuBERT", lambda: (tf.HubertModel, tf.HubertConfig(**MASKED_WAVE)), waves, masked=True),
        Family(
            "WavLM",
            lambda: (tf.WavLMModel, tf.WavLMConfig(**MASKED_WAVE, num_buckets=8, max_bucket_distance=16)),
            waves, masked=True,
        ),
        Family("UniSpeech", lambda: (tf.UniSpeechModel, tf.UniSpeechConfig(**MASKED_WAVE)), waves, masked=True),
        Family(
            "UniSpeech-SAT", lambda: (tf.UniSpeechSatModel, tf.UniSpeechSatConfig(**MASKED_WAVE)), waves, masked=True
        ),
        Family(
            "SEW",
            lambda: (tf.SEWModel, tf.SEWConfig(**{**WAVE, "feat_extract_norm": "layer"}, squeeze_factor=2)),
            waves, masked=True,
        ),
        Family(
            "SEW-D",
            lambda: (tf.SEWDModel,
                tf.SEWDConfig(
                    **{**{k: v for k, v in WAVE.items() if k != "layerdrop"}, "feat_extract_norm": "layer"},
                    squeeze_factor=2, position_buckets=4, max_position_embeddings=64,
                )
            ),
            waves, masked=True,
            onnx="one length",
        ),
        Family(
            "Data2VecAudio",
            lambda: (tf.Data2VecAudioModel,
                tf.Data2VecAudioConfig(
                    **{k: v for k, v in WAVE.items() if k != "num_conv_pos_embeddings"}, num_conv_pos_embeddings=2,
                    conv_pos_kernel_size=1,
                )
            ),
            waves, masked=True,
        ),
        Family(
            "Whisper, classification",
            lambda: (tf.WhisperForAudioClassification, tf.WhisperConfig(**WHISPER)),
            _spectrograms(40, 8), encode=_encoder_of("encoder"), unmasked="fixed length, drops the mask",
            onnx="fixed length",
        ),
        Family(
            "Whisper, speech to text",
            lambda: (tf.WhisperForConditionalGeneration, tf.WhisperConfig(**WHISPER)),
            _whisper_s2t, encode=_encoder_state, unmasked="fixed length, drops the mask",
            onnx="encoder, fixed length",
        ),
        Family(
            "CLAP", _clap, _clap_inputs, encode=_encoder_of("audio_model"), checkpoints=False,
            unmasked="fixed length, routes in windows",
            onnx="encoder, fixed length",
        ),
        Family(
            "SpeechT5",
            lambda: (tf.SpeechT5ForSpeechToText,
                tf.SpeechT5Config(
                    hidden_size=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=32, decoder_layers=2,
                    decoder_ffn_dim=32, decoder_attention_heads=2, conv_dim=(8, 8), conv_stride=(4, 2),
                    conv_kernel=(8, 4), feat_extract_norm="layer", num_conv_pos_embeddings=1,
                    num_conv_pos_embedding_groups=2, vocab_size=12, encoder_layerdrop=0.0, decoder_layerdrop=0.0,
                    encoder_max_relative_position=8, mask_time_prob=0.0, **DECODER,
                )
            ),
            _with_text(waves), masked=True, encode=_encoder_state,
            onnx="encoder, any length",
        ),
        Family(
            "Speech2Text",
            lambda: (tf.Speech2TextForConditionalGeneration,
                tf.Speech2TextConfig(
                    d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=32, decoder_layers=2,
                    decoder_attention_heads=2, decoder_ffn_dim=32, input_feat_per_channel=8, conv_channels=8,
                    conv_kernel_sizes=[1, 1],
                    vocab_size=12, max_source_positions=60, encoder_layerdrop=0.0, decoder_layerdrop=0.0, **DECODER,
                )
            ),
            _with_text(features(8)), masked=True, encode=_encoder_state, lengths=(20, 40),
            onnx="encoder, any length",
        ),
        Family(
            "SeamlessM4T v2", _seamless, _with_text(features(8)), masked=True,
            encode=_encoder_of("speech_encoder.encoder"), lengths=(20, 40), prepare=_prepare_seamless,
            onnx="encoder, any length",
        ),
        Family(
            "Moonshine",
            lambda: (tf.MoonshineForConditionalGeneration,
                tf.MoonshineConfig(
                    vocab_size=12, hidden_size=16, intermediate_size=32, encoder_num_hidden_layers=2,
                    decoder_num_hidden_layers=2, encoder_num_attention_heads=2, decoder_num_attention_heads=2,
                    **DECODER,
                )
            ),
            _with_text(waves), masked=True, encode=_encoder_state, lengths=(1920, 3840), prepare=_prepare_moonshine,
            onnx="encoder, one length",
        ),
        Family(
            "Parakeet-CTC", _parakeet, features(8), masked=True, encode=_encoder_of("encoder"),
            read=lambda tokens: tokens - 1,
        ),
        Family(
            "Qwen2-Audio", _qwen2_audio, _qwen2_audio_inputs, masked=True, encode=_qwen2_audio_tokens,
            prepare=_prepare_qwen2_audio,
            onnx="no: the model makes the encoder's mask",
        ),
        Family(
            "Voxtral", _voxtral, _voxtral_inputs, encode=_encoder_of("model.audio_tower"), unmasked="fixed length",
            onnx="encoder, fixed length",
        ),
        Family(
            "Pop2Piano",
            lambda: (tf.Pop2PianoForConditionalGeneration,
                tf.Pop2PianoConfig(
                    vocab_size=12, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0,
                )
            ),
            _with_text(features(16)), masked=True, encode=_encoder_state, lengths=(20, 40), listed=False,
            onnx="no: the encoder reads embeddings",
        ),
        Family(
            "LASR-CTC",
            lambda: (tf.LasrForCTC,
                tf.LasrCTCConfig(
                    vocab_size=12, pad_token_id=0,
                    encoder_config={
                        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
                        "conv_kernel_size": 3, "subsampling_conv_channels": 4, "num_mel_bins": 8, "layerdrop": 0.0,
                    },
                )
            ),
            features(8), masked=True, encode=_encoder_of("encoder"), listed=False,
        ),
        Family(
            "Granite Speech",
            lambda: (tf.GraniteSpeechCTCEncoder,
                tf.GraniteSpeechEncoderConfig(
                    input_dim=8, num_layers=2, hidden_dim=16, num_heads=2, context_size=8, max_pos_emb=8,
                    conv_kernel_size=3, output_dim=12,
                )
            ),
            # No multiple of the context, to which the attention pads.
            lambda lengths: {"hidden_states": features(8)(lengths)["input_features"]}, lengths=(20, 37),
            checkpoints=False, unmasked="takes no mask", listed=False,
        ),
        Family(
            "Fun-ASR-Nano",
            lambda: (tf.FunAsrNanoEncoder,
                tf.FunAsrNanoEncoderConfig(
                    num_mel_bins=4, num_stacked_frames=6, hidden_size=16, num_attention_heads=2, intermediate_size=32,
                    num_hidden_layers=3, num_timestamp_prediction_layers=1, fsmn_kernel_size=3,
                )
            ),
            _fun_asr_nano_inputs, masked=True, lengths=(20, 40), listed=False,
        ),
        Family(
            "Qwen2.5-Omni",
            _qwen2_5_omni, _packed_inputs, lengths=(36, 56), unmasked="packs, routes in windows", listed=False,
            onnx="no: lengths of packed clips decide shapes",
        ),
    )
}  # fmt: skip


def build(name: str, attention: str | None = None) -> nn.Module:
    """The family's model with random weights, in evaluation, the same at every call."""
    torch.manual_seed(0)
    model_class, config = FAMILIES[name].config()
    options = {} if attention is None else {"attn_implementation": attention}
    return model_class._from_config(config, **options).eval()
