"""Trains tiny models with the Trainer, alone or as one of two processes: what `test_distributed.py` starts.

    PYTHONPATH=tests python tests/training/train_distributed.py FOLDER CASE [CASE ...]

Each case gets a folder of its own in FOLDER, with the adapter, the loss of each step and the trained model's logits.
Each of two processes has half a batch, so that their optimizer steps see the same samples as those of one alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional
from unittest.mock import patch

import torch
import transformers as tf
from accelerate import DistributedType, PartialState
from conftest import FRAMES, MEL_BINS, tiny_ast_config
from families import FAMILIES, MASKED_WAVE
from peft import PeftModel, get_peft_model
from torch import nn
from torch.distributed.tensor import DTensor

from peft_softmoa import SoftMoAConfig
from peft_softmoa.inspection import ExpertUtilizationCallback
from peft_softmoa.training import AudioTrainer

STEPS, BATCH, ROWS, CLASSES = 6, 4, 12, 5
DROPPED = "dropped"  # a case of its own
CHECKPOINTS = {"save_strategy": "steps", "save_steps": STEPS // 2}


def make_ast() -> nn.Module:
    torch.manual_seed(0)
    return tf.ASTForAudioClassification(tiny_ast_config())


def make_wav2vec2() -> nn.Module:
    torch.manual_seed(0)
    dropout = dict.fromkeys(("hidden_dropout", "attention_dropout", "feat_proj_dropout", "activation_dropout"), 0.0)
    # Accelerate takes an encoder with "Norm" in the name of its class for a norm.
    options = {**MASKED_WAVE, **dropout, "do_stable_layer_norm": False, "apply_spec_augment": False}
    model = tf.Wav2Vec2ForSequenceClassification(tf.Wav2Vec2Config(**options))
    # Accelerate asks for them under FSDP2, and to transformers it is an error that the model has none.
    model.get_input_embeddings = lambda: None
    return model


def make_spectrograms() -> list[dict[str, Any]]:
    clips = torch.randn(ROWS, FRAMES, MEL_BINS, generator=torch.Generator().manual_seed(1))
    return [{"input_values": clip, "labels": index % CLASSES} for index, clip in enumerate(clips)]


def make_waves() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(100, 400, (ROWS,), generator=generator).tolist()
    return [
        {"input_values": torch.randn(length, generator=generator), "labels": index % CLASSES}
        for index, length in enumerate(lengths)
    ]


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch that is as long as its longest clip, with the mask of what is real, where clips have many lengths."""
    clips = [row["input_values"] for row in rows]
    batch = {"labels": torch.tensor([row["labels"] for row in rows])}
    if clips[0].ndim > 1:
        return {**batch, "input_values": torch.stack(clips)}
    real = [torch.ones(len(clip), dtype=torch.long) for clip in clips]
    padded = [nn.utils.rnn.pad_sequence(each, batch_first=True) for each in (clips, real)]
    return {**batch, **dict(zip(("input_values", "attention_mask"), padded))}


@dataclass
class Case:
    """One way to train.

    Args:
        make_model: makes the base model, the same at every call.
        make_rows: makes the data.
        adapter: fields of the adapter's config.
        trained_whole: modules that are trained besides.
        in_turn: whether one process alone sees the batches of two in turn and not at once, which makes a difference to
            a loss that is no mean over samples.
        arguments: fields of the Trainer's arguments.
        dtype: of the base model; in float64 there is no noise that could hide a mistake.
        layer: class of the layers that FSDP shards one by one. Default: what the config file of Accelerate says.
        resumes: the case from whose checkpoint it goes on. Default: it begins anew.
    """

    make_model: Callable[[], nn.Module]
    make_rows: Callable[[], list[dict[str, Any]]]
    adapter: dict[str, Any] = field(default_factory=dict)
    trained_whole: tuple[str, ...] = ("classifier",)
    in_turn: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    layer: Optional[str] = None
    resumes: Optional[str] = None


CASES = {
    "ast": Case(make_ast, make_spectrograms, arguments=CHECKPOINTS),
    "resumed": Case(make_ast, make_spectrograms, arguments=CHECKPOINTS, resumes="ast"),
    "balanced": Case(make_ast, make_spectrograms, {"routing": "top_k", "router_aux_loss_coef": 0.1}, in_turn=True),
    "bf16": Case(make_ast, make_spectrograms, arguments={"bf16": True}, dtype=torch.bfloat16),
    "fp32": Case(make_ast, make_spectrograms, arguments=CHECKPOINTS, dtype=torch.float32),
    "fp32_resumed": Case(make_ast, make_spectrograms, arguments=CHECKPOINTS, dtype=torch.float32, resumes="fp32"),
    "wav2vec2": Case(
        make_wav2vec2,
        make_waves,
        {"placement": "both"},
        ("projector", "classifier"),
        # The model takes the number of samples in all processes, but its loss is still the mean of its own.
        arguments={"average_tokens_across_devices": False},
        layer="Wav2Vec2EncoderLayer",
    ),
}


def build(case: Case) -> PeftModel:
    torch.manual_seed(2)
    model = case.make_model().to(case.dtype)
    config = SoftMoAConfig(num_experts=3, r=4, modules_to_save=list(case.trained_whole), **case.adapter)
    return get_peft_model(model, config)


def logits(model: nn.Module, case: Case) -> torch.Tensor:
    batch = collate(case.make_rows())
    batch["input_values"] = batch["input_values"].to(case.dtype)
    model.eval()
    with torch.no_grad():
        return model(**batch).logits


def train(case: Case, folder: Path, checkpoint: Optional[Path]) -> None:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    parts = 2 if processes == 2 or case.in_turn else 1
    options = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH // parts,
        "gradient_accumulation_steps": parts // processes,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        **case.arguments,
    }
    arguments = tf.TrainingArguments(str(folder), **options)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and arguments.use_cpu:
        # Without an accelerator, Accelerate would leave FSDP out and train as DDP, although PyTorch's runs on a CPU.
        arguments.distributed_state.distributed_type = DistributedType.MULTI_GPU
    rows = [{**row, "input_values": row["input_values"].to(case.dtype)} for row in case.make_rows()]
    trainer = AudioTrainer(build(case), arguments, train_dataset=rows, data_collator=collate)
    trainer.add_callback(ExpertUtilizationCallback(trainer, every=2))
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    trainer.save_model()
    result = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "experts": [entry for entry in trainer.state.log_history if "experts/effective_number" in entry],
        "way": str(trainer.accelerator.distributed_type),
        # Before the forward pass, after which FSDP keeps some parameters whole.
        "held": sum(_held(parameter) for parameter in trainer.model_wrapped.parameters()),
        "logits": logits(trainer.model_wrapped, case),
    }
    torch.save(result, folder / f"{arguments.process_index}.pt")


def _held(parameter: nn.Parameter) -> int:
    """How many elements of a parameter this process holds."""
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()


class Seed(tf.TrainerCallback):
    """Lets each process drop layers of its own."""

    def on_train_begin(self, args: tf.TrainingArguments, *others: Any, **kwargs: Any) -> None:
        torch.manual_seed(args.process_index)


def train_with_dropped_layers(folder: Path) -> None:
    torch.manual_seed(0)
    config = tf.Wav2Vec2Config(**{**MASKED_WAVE, "layerdrop": 0.5}, pad_token_id=0, ctc_zero_infinity=True)
    model = get_peft_model(tf.Wav2Vec2ForCTC(config), SoftMoAConfig(placement="both", modules_to_save=["lm_head"]))
    batch = FAMILIES["Wav2Vec2"].inputs([300, 400, 350, 400])
    labels = torch.tensor([4, 5])
    rows = [{**{key: value[index] for key, value in batch.items()}, "labels": labels} for index in range(4)]
    ran: list[int] = []
    for index, layer in enumerate(model.get_base_model().wav2vec2.encoder.layers):
        layer.register_forward_hook(lambda module, args, output, index=index: ran.append(index))
    arguments = tf.TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=1, learning_rate=1e-2, report_to="none", use_cpu=True,
        save_strategy="no", gradient_accumulation_steps=2,
    )  # fmt: skip
    tf.Trainer(model, arguments, train_dataset=rows, callbacks=[Seed()]).train()
    weights = torch.cat([each.detach().flatten() for each in model.parameters() if each.requires_grad])
    torch.save({"weights": weights, "ran": ran}, folder / f"{arguments.process_index}.pt")


def main(folder: str, *names: str) -> None:
    for name in names:
        if name == DROPPED:
            train_with_dropped_layers(Path(folder) / name)
            continue
        case = CASES[name]
        checkpoint = Path(folder) / case.resumes / f"checkpoint-{STEPS // 2}" if case.resumes else None
        with patch.dict(os.environ, {"FSDP_TRANSFORMER_CLS_TO_WRAP": case.layer} if case.layer else {}):
            train(case, Path(folder) / name, checkpoint)


if __name__ == "__main__":
    main(*sys.argv[1:])
    # Threads of gloo that still run when Python ends abort it.
    PartialState().destroy_process_group()
