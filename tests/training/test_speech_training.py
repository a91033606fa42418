"""Fine-tuning of speech models with the Trainer, as their users do it: real feature extractors, padded batches."""

import numpy as np
import pytest
import torch
import transformers as tf
from families import CONFORMER, FAMILIES, MASKED_WAVE, WHISPER, build
from peft import get_peft_model

from peft_softmoa import SoftMoAConfig

STEPS = 12
SAMPLING_RATE = 16_000


def tones(count, seconds):
    """Tones of rising pitch and length."""
    for index in range(count):
        times = np.arange(int(seconds * (index + 1) / count * SAMPLING_RATE)) / SAMPLING_RATE
        yield np.sin(2 * np.pi * 200 * (index + 1) * times).astype("f4")


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def padded(rows, value=-100):
    """Pad labels with -100, as collators for speech do."""
    labels = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["labels"]) for row in rows], True, padding_value=value)
    return {"labels": labels}


def train(model, rows, collate, folder, trainer_class=tf.Trainer, arguments_class=tf.TrainingArguments, **options):
    """Twelve steps, in which the loss falls and only the adapter, with the head that it brings, changes."""
    for module in model.modules():
        # Without dropout the loss of so few steps shows that they train.
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    arguments = arguments_class(
        str(folder), max_steps=STEPS, per_device_train_batch_size=len(rows), learning_rate=2e-2, logging_steps=1,
        label_smoothing_factor=0.0, report_to="none", save_strategy="no", remove_unused_columns=False,
        dataloader_num_workers=0, use_cpu=True, lr_scheduler_type="constant", **options,
    )  # fmt: skip
    trainer = trainer_class(model, arguments, train_dataset=Rows(rows), data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS and np.isfinite(losses).all()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    # Batch norms count their batches.
    assert {name for name in changed if "batch_norm" not in name and ".norm." not in name} == trainable
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


@pytest.mark.parametrize("placement", ["attention", "ffn", "both"])
def test_whisper_speech_to_text(placement, tmp_path):
    extract = tf.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    torch.manual_seed(0)
    config = tf.WhisperConfig(**{**WHISPER, "max_source_positions": 50})
    model = get_peft_model(tf.WhisperForConditionalGeneration(config), SoftMoAConfig(placement=placement))
    rows = [{"audio": audio, "labels": [4 + index, 5, 6][: index + 1] + [2]} for index, audio in enumerate(tones(4, 1))]

    def collate(batch):
        audio = [row["audio"] for row in batch]
        features = extract(audio, sampling_rate=SAMPLING_RATE, return_tensors="pt")
        return {"input_features": features.input_features, **padded(batch)}

    train(model, rows, collate, tmp_path, tf.Seq2SeqTrainer, tf.Seq2SeqTrainingArguments)


def wav2vec2(**options):
    return tf.Wav2Vec2ForCTC(
        tf.Wav2Vec2Config(
            **{**MASKED_WAVE, "conv_kernel": (80, 16), "conv_stride": (40, 8), "layerdrop": 0.3, **options},
            ctc_loss_reduction="mean", ctc_zero_infinity=True, pad_token_id=0,
        )
    )  # fmt: skip


def wav2vec2_bert(**options):
    return tf.Wav2Vec2BertForCTC(
        tf.Wav2Vec2BertConfig(
            **CONFORMER, feature_projection_input_dim=160, conv_depthwise_kernel_size=3, mask_time_prob=0.3,
            mask_time_length=2, ctc_loss_reduction="mean", ctc_zero_infinity=True, pad_token_id=0,
        )
    )  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("placement", ["attention", "ffn", "both"])
@pytest.mark.parametrize("make", [wav2vec2, wav2vec2_bert])
def test_ctc(make, placement, checkpointing, tmp_path):
    """With attention masks, SpecAugment and, in wav2vec 2.0, layers that are dropped."""
    torch.manual_seed(0)
    np.random.seed(0)
    options = {"mask_time_prob": 0.3, "mask_time_length": 2} if make is wav2vec2 else {}
    model = get_peft_model(make(**options), SoftMoAConfig(placement=placement, modules_to_save=["lm_head"]))
    if make is wav2vec2:
        extract = tf.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    else:
        extract = tf.SeamlessM4TFeatureExtractor()
    rows = [{"audio": audio, "labels": [4 + index, 5, 6][: index + 1]} for index, audio in enumerate(tones(4, 0.3))]

    def collate(batch):
        audio = [row["audio"] for row in batch]
        features = extract(audio, sampling_rate=SAMPLING_RATE, return_tensors="pt", padding=True)
        assert not features.attention_mask.all()
        return {**features, **padded(batch)}

    options = {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if checkpointing else {}
    train(model, rows, collate, tmp_path, gradient_checkpointing=checkpointing, **options)


def test_parakeet_ctc(tmp_path):
    model = get_peft_model(build("Parakeet-CTC"), SoftMoAConfig(placement="both", modules_to_save=["ctc_head"]))
    batch = FAMILIES["Parakeet-CTC"].inputs([204, 400])
    rows = [{"labels": [4, 5]}, {"labels": [6, 7, 8]}]
    # Its processor pads with the blank token.
    train(model, rows, lambda rows: {**batch, **padded(rows, model.config.pad_token_id)}, tmp_path)


@pytest.mark.parametrize("name", ["Speech2Text", "Moonshine", "SpeechT5"])
def test_other_speech_to_text(name, tmp_path):
    family = FAMILIES[name]
    model = get_peft_model(build(name), SoftMoAConfig(placement="both"))
    batch = {key: value for key, value in family.inputs(list(family.lengths)).items() if "decoder" not in key}
    rows = [{"labels": [4, 5, 2]}, {"labels": [6, 7, 8, 2]}]
    train(model, rows, lambda rows: {**batch, **padded(rows)}, tmp_path)


def test_masked_time_steps_do_not_touch_the_token_mask(masks):
    """SpecAugment replaces real tokens, which stay real; padded ones stay padded."""
    torch.manual_seed(0)
    base = wav2vec2(mask_time_prob=0.5, mask_time_length=2, layerdrop=0.0)
    model = get_peft_model(base, SoftMoAConfig(placement="both")).train()
    batch = FAMILIES["Wav2Vec2"].inputs([1000, 4000])
    model(**batch)
    wanted = base.wav2vec2._get_feature_vector_attention_mask(masks[0].shape[1], batch["attention_mask"]).bool()
    assert len(masks) == 4 and not wanted.all()
    assert all(torch.equal(mask, wanted) for mask in masks)
