#!/usr/bin/env python
"""Train an adapter with the Hugging Face Trainer: a script to copy and edit.

For example, on ESC-50 with its fifth fold for evaluation:

    python examples/train_audio_classification.py \
        --model_name_or_path MIT/ast-finetuned-audioset-10-10-0.4593 \
        --dataset_name ashraq/esc50 --label_column_name category \
        --train_rows fold=1,2,3,4 --eval_split_name train --eval_rows fold=5 \
        --num_train_epochs 10 --output_dir esc50-softmoa

It takes the options of `peft-softmoa train`, other tasks included, and does the same in its plainest form. What the
command does besides: it resumes interrupted runs, keeps one run to a folder, and writes the results into the card.
"""

from __future__ import annotations

import sys
from typing import Optional

from transformers import set_seed

from peft_softmoa.arguments import make_config
from peft_softmoa.commands.train import FLAGS, parse
from peft_softmoa.training import AudioTrainer, name_flags
from peft_softmoa.training.run import add_adapter, load_base, load_feature_extractor, load_streams


@name_flags(FLAGS)
def main(arguments: Optional[list[str]] = None) -> dict[str, float]:
    run = parse(sys.argv[1:] if arguments is None else arguments)
    set_seed(run.training.seed)

    # The task says what a row's target is; the training data says its classes.
    task = run.make_task()
    base = load_base(run, task)
    feature_extractor = load_feature_extractor(run, base)
    streams = load_streams(run, task, feature_extractor)

    # `SoftMoAConfig`, where a script with LoRA has `LoraConfig`.
    config = make_config(run.adapter, modules_to_save=run.model.modules_to_save)
    model = add_adapter(run, base, streams["training"].task, config)
    model.print_trainable_parameters()

    trainer = AudioTrainer(
        model=model,
        args=run.training,
        train_dataset=streams["training"],
        eval_dataset=streams.get("evaluation"),
        processing_class=feature_extractor,
        mask_frequencies=run.data.mask_frequencies,
        mask_frames=run.data.mask_frames,
        mixup_alpha=run.task.mixup_alpha,
    )
    trainer.train()
    trainer.save_model()
    metrics = trainer.evaluate() if "evaluation" in streams else {}
    trainer.log_metrics("eval", metrics)
    trainer.accelerator.end_training()
    return metrics


if __name__ == "__main__":
    main()
