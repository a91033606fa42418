"""Tiny models with their feature extractors, and small datasets of tones, for each task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import transformers as tf
from conftest import FRAMES, MEL_BINS, tiny_ast_config
from families import CONFORMER, DECODER, MASKED_WAVE, WHISPER
from tokenizers import Tokenizer, models, pre_tokenizers

RATE = 16_000
PITCHES = {"low": 200, "middle": 800, "high": 3200}
WORDS = {"low": "ab", "middle": "ba c", "high": "cab"}
# A frame reads 700 samples, and the next one begins 320 later.
WAVE = {**MASKED_WAVE, "conv_kernel": (80, 16), "conv_stride": (40, 8)}
BERT = {**CONFORMER, "feature_projection_input_dim": 160, "conv_depthwise_kernel_size": 3, "mask_time_prob": 0.0}


def tone(pitch: float, num_samples: int) -> Any:
    """A sine tone with a little noise, without which some feature extractors would divide by zero."""
    noise = np.random.default_rng(0).normal(size=num_samples)
    return (0.3 * np.sin(2 * np.pi * pitch * np.arange(num_samples) / RATE) + 0.01 * noise).astype("f4")


def save(folder: Path, model: Any, extractor: Any, tokenizer: Any = None) -> Path:
    for each in filter(None, (model, extractor, tokenizer)):
        each.save_pretrained(folder)
    return folder


def wave_extractor() -> Any:
    return tf.Wav2Vec2FeatureExtractor(return_attention_mask=True)


def make_base(folder: Path, family: str, model_class: str, tokenizer: Any = None, **options: Any) -> Path:
    """A checkpoint of a family, such as `make_base(folder, "Wav2Vec2", "ForCTC")`."""
    torch.manual_seed(0)
    if family == "AST":
        config, extractor = tiny_ast_config(**options), tf.ASTFeatureExtractor(max_length=FRAMES, num_mel_bins=MEL_BINS)
    elif family == "Wav2Vec2Bert":
        config, extractor = tf.Wav2Vec2BertConfig(**{**BERT, **options}), tf.SeamlessM4TFeatureExtractor()
    elif family == "Whisper":
        config = tf.WhisperConfig(**{**WHISPER, "max_source_positions": 50, "max_target_positions": 20, **options})
        extractor = tf.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    elif family == "Speech2Text":
        config = tf.Speech2TextConfig(
            d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=32, decoder_layers=2,
            decoder_attention_heads=2, decoder_ffn_dim=32, input_feat_per_channel=80, conv_channels=8,
            conv_kernel_sizes=[3, 3], max_source_positions=200, max_target_positions=20,
            **{"vocab_size": 12, **DECODER, **options},
        )  # fmt: skip
        extractor = tf.Speech2TextFeatureExtractor()
    elif family == "Moonshine":
        config = tf.MoonshineConfig(
            hidden_size=16, intermediate_size=32, encoder_num_hidden_layers=2, decoder_num_hidden_layers=2,
            encoder_num_attention_heads=2, decoder_num_attention_heads=2, max_position_embeddings=50,
            **{"vocab_size": 12, **DECODER, **options},
        )  # fmt: skip
        extractor = wave_extractor()
    else:
        config, extractor = (
            getattr(tf, f"{family}Config")(**{**WAVE, "mask_time_prob": 0.0, **options}),
            wave_extractor(),
        )
    return save(folder, getattr(tf, f"{family}{model_class}")(config), extractor, tokenizer)


def word_tokenizer(words: Any = ("a", "b", "c", "ab", "ba", "cab")) -> Any:
    """A tokenizer with a token for each word, and the special tokens of `DECODER`."""
    vocabulary = {name: index for index, name in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def whisper_tokenizer() -> Any:
    """A tokenizer of Whisper for English, with a token for each letter; its ids are those of `WHISPER_TOKENS`."""
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|transcribe|>", "<|notimestamps|>"]
    vocabulary = {name: index for index, name in enumerate(["a", "b", "c", "\u0120", *special])}
    return tf.WhisperTokenizer(
        vocab=vocabulary, merges=[], pad_token=special[0], additional_special_tokens=special[1:], model_max_length=20
    )


WHISPER_TOKENS = {
    "vocab_size": 12, "pad_token_id": 4, "bos_token_id": 4, "eos_token_id": 4, "decoder_start_token_id": 5
}  # fmt: skip


def write_clips(folder: Path, column: str, values: dict[str, Any], seconds: float = 0.4, count: int = 2) -> Path:
    """A folder of tones with a metadata.jsonl: fold 1 for training, fold 2 for evaluation, each clip longer.

    Args:
        folder: where to.
        column: the column of the labels; several, with commas between them, for values that are tuples.
        values: the labels of the three pitches, by their names.
        seconds: length of the first clip.
        count: number of clips of each pitch and fold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for fold in (1, 2):
        for index in range(count):
            for name, value in values.items():
                file = f"{fold}-{name}-{index}.wav"
                length = int(RATE * (seconds + 0.05 * (len(rows) % 6)))
                soundfile.write(folder / file, tone(PITCHES[name] * (1 + index / 20), length), RATE)
                columns = column.split(",")
                labels = dict(zip(columns, value if len(columns) > 1 else [value]))
                rows.append({"file_name": file, "fold": fold, **labels})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def options(base: Any, dataset: Any, output: Any, **arguments: Any) -> list[str]:
    """A command line of `peft-softmoa train`: two epochs on fold 1, evaluated on fold 2."""
    defaults = {
        "model_name_or_path": base,
        "dataset_name": dataset,
        "train_rows": "fold=1",
        "eval_split_name": "train",
        "eval_rows": "fold=2",
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "report_to": "none",
        "disable_tqdm": True,
        "output_dir": output,
    }
    words: list[str] = []
    for key, value in {**defaults, **arguments}.items():
        words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return words


def predict(model: Any, extractor: Any) -> Any:
    """What a model gives for a made clip: its logits, or the tokens that it generates."""
    inputs = extractor(tone(500, 8000), sampling_rate=RATE, return_tensors="pt")
    model = model.eval()
    with torch.no_grad():
        if model.can_generate():
            return model.generate(**inputs, max_new_tokens=8).numpy()
        return model(**inputs).logits.numpy()
