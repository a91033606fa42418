#!/usr/bin/env python
"""Train a soft mixture of adapters for audio classification in a plain loop with Accelerate: a script to edit.

    python examples/train_no_trainer.py --dataset_name ashraq/esc50 --label_column_name category \
        --train_rows fold=1,2,3,4 --eval_split_name train --eval_rows fold=5 --output_dir esc50-softmoa

It does what train_audio_classification.py does, with the same data, the same optimisation and the same checkpoints, and
runs under `accelerate launch`, which also chooses the precision. Interrupted runs resume: run the same command again.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field
from typing import Literal, Optional

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from peft import get_peft_model
from tqdm.auto import tqdm
from transformers import (
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    EvalPrediction,
    HfArgumentParser,
    get_cosine_schedule_with_warmup,
)
from transformers.trainer_pt_utils import get_parameter_names
from transformers.trainer_utils import rotate_checkpoints

from peft_softmoa import SoftMoAConfig
from peft_softmoa.saving.card import add_results
from peft_softmoa.training import (
    atomic_checkpoint,
    cast_inputs,
    check_classes,
    check_no_shared_rows,
    checkpoint_only_adapters,
    classification_metrics,
    collect_options,
    fingerprint_config,
    fingerprint_weights,
    flag_names,
    load_stream,
    lock_run,
    make_eval_loader,
    make_loader,
    name_flags,
    option,
    retry,
    shortest_clip,
    spec_augment,
    start_or_resume,
    write_run_state,
)

# What must stay the same when a run resumes, besides the arguments.
SETTINGS = ("num_processes", "mixed_precision", "distributed_type")
# The arguments that may change: they do not affect the training.
OTHER = ("eval_split_name", "eval_rows", "save_steps", "report_to", "output_dir")


@dataclass
class Arguments:
    """The arguments of the script."""

    dataset_name: str = field(metadata={"help": "Id of a dataset on the Hub, or folder."})
    output_dir: str = field(metadata={"help": "Folder for the adapter and the checkpoints."})
    model_name_or_path: str = "MIT/ast-finetuned-audioset-10-10-0.4593"
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32", metadata={"help": "Dtype of the base model's weights; auto is the one they are stored in."}
    )
    train_split_name: str = "train"
    eval_split_name: str = "validation"
    train_rows: Optional[str] = field(default=None, metadata={"help": "Rows to train on, such as fold=1,2,3,4."})
    eval_rows: Optional[str] = field(default=None, metadata={"help": "Rows to evaluate on, such as fold=5."})
    audio_column_name: str = option("audio_column")
    label_column_name: str = option("label_column")
    max_length_seconds: Optional[float] = option("max_length_seconds")
    shuffle_buffer_size: int = option("shuffle_buffer")
    mask_frequencies: int = field(default=0, metadata={"help": "Greatest width of SpecAugment's band, in mel bins."})
    mask_frames: int = field(default=0, metadata={"help": "Greatest length of SpecAugment's span, in frames."})
    per_device_train_batch_size: int = 32
    gradient_accumulation_steps: int = 1
    dataloader_num_workers: int = 0
    learning_rate: float = 5e-3
    num_train_epochs: int = 3
    save_steps: Optional[int] = field(
        default=None, metadata={"help": "Optimizer steps between checkpoints. Default: a checkpoint after each epoch."}
    )
    report_to: Optional[str] = field(
        default=None, metadata={"help": "Where to track the run, such as tensorboard or wandb."}
    )
    seed: int = option("seed", default=42)


# Errors of the library name Python arguments: what this script calls them.
FLAGS = flag_names(Arguments) | {"rows": "--train_rows and --eval_rows"}


@torch.random.fork_rng(devices=[])  # a resumed run does not repeat it, and needs the same random numbers
def evaluate(model, loader, accelerator: Accelerator) -> dict[str, float]:
    model.eval()
    outputs = []
    for batch in loader:
        batch = cast_inputs(model, batch)
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch).logits
        outputs.append(accelerator.gather_for_metrics((logits, labels)))
    logits, labels = (torch.cat(each).cpu().float().numpy() for each in zip(*outputs))
    return classification_metrics(EvalPrediction(logits, labels))


@name_flags(FLAGS)
def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = HfArgumentParser(Arguments, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    [args] = parser.parse_args_into_dataclasses(argv)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to,
        project_dir=args.output_dir,
    )
    evaluation = (args.eval_split_name, args.eval_rows)
    check_no_shared_rows({"training": (args.train_split_name, args.train_rows), "evaluation": evaluation})
    with lock_run(args.output_dir, is_main=accelerator.is_main_process):
        return train(args, accelerator)


def train(args: Arguments, accelerator: Accelerator) -> dict[str, float]:
    set_seed(args.seed)

    extractor = retry(AutoFeatureExtractor.from_pretrained, args.model_name_or_path)
    options = collect_options(args)
    train_stream = load_stream(args.dataset_name, args.train_split_name, extractor, options, rows=args.train_rows)
    label_names = train_stream.label_names
    eval_stream = load_stream(
        args.dataset_name,
        args.eval_split_name,
        extractor,
        options,
        rows=args.eval_rows,
        label_names=label_names,
        training=False,
        needs_length=False,
    )

    model = retry(AutoModelForAudioClassification.from_pretrained, args.model_name_or_path, dtype=args.dtype)
    config = SoftMoAConfig(
        modules_to_save=["classifier"], label_names=label_names, problem_type="single_label_classification"
    )
    model = get_peft_model(model, config)
    for stream in (train_stream, eval_stream):
        stream.extract.min_samples = shortest_clip(model, extractor)
    check_classes({"training": train_stream, "evaluation": eval_stream}, model)
    settings = {name: value for name, value in vars(args).items() if name not in OTHER}
    settings.update({name: str(getattr(accelerator, name)) for name in SETTINGS})
    settings.update({f"training_{what}": value for what, value in train_stream.fingerprint.items()})
    settings.update(base_weights=fingerprint_weights(model), base_config=fingerprint_config(model.config))
    settings["feature_extractor"] = fingerprint_config(extractor)
    [settings] = broadcast_object_list([settings])  # files may have other times where other processes read them
    checkpoint = start_or_resume(args.output_dir, settings, is_main=accelerator.is_main_process)
    decayed = set(get_parameter_names(model, [torch.nn.LayerNorm], ["bias"]))
    groups: list[dict] = [{"params": [], "weight_decay": decay} for decay in (0.0, 0.1)]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name in decayed]["params"].append(parameter)
    optimizer = torch.optim.AdamW(groups, args.learning_rate, betas=(0.9, 0.98), eps=1e-6)
    batch_size, num_workers = args.per_device_train_batch_size, args.dataloader_num_workers
    loader = make_loader(train_stream, batch_size, accelerator, num_workers=num_workers)
    eval_loader = make_eval_loader(eval_stream, batch_size, accelerator, num_workers=num_workers)
    steps_per_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps)
    steps = args.num_train_epochs * steps_per_epoch
    scheduler = get_cosine_schedule_with_warmup(optimizer, 0, steps)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(scheduler)
    checkpoint_only_adapters(accelerator)
    if args.report_to:
        accelerator.init_trackers("softmoa", {name: value for name, value in settings.items() if value is not None})

    step = 0
    if checkpoint:
        accelerator.load_state(checkpoint)
        step = int(checkpoint.rpartition("-")[2])
    progress = tqdm(total=steps, initial=step, disable=not accelerator.is_local_main_process)
    metrics: dict[str, float] = {}
    for epoch in range(step // steps_per_epoch, args.num_train_epochs):
        model.train()
        loader.set_epoch(epoch)
        done = step % steps_per_epoch * args.gradient_accumulation_steps
        for batch in accelerator.skip_first_batches(loader, done) if done else loader:
            batch = cast_inputs(model, batch)
            with accelerator.accumulate(model):
                if args.mask_frequencies or args.mask_frames:
                    batch["input_values"] = spec_augment(batch["input_values"], args.mask_frequencies, args.mask_frames)
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            scheduler.step()
            step += 1
            progress.update()
            accelerator.log({"loss": loss.item(), "learning_rate": scheduler.get_last_lr()[0]}, step)
            if step % (args.save_steps or steps_per_epoch) == 0:
                name, is_main = f"checkpoint-{step}", accelerator.is_main_process
                with atomic_checkpoint(args.output_dir, name, is_main, accelerator.wait_for_everyone) as folder:
                    accelerator.save_state(folder)
                if is_main:
                    rotate_checkpoints(args.output_dir, save_total_limit=2)

        metrics = evaluate(model, eval_loader, accelerator)
        accelerator.log({f"eval_{name}": value for name, value in metrics.items()}, step)
        accelerator.print(f"Epoch {epoch + 1}: accuracy {metrics['accuracy']:.1%}")

    metrics = metrics or evaluate(model, eval_loader, accelerator)
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output_dir, state_dict=state)
        extractor.save_pretrained(args.output_dir)
        split = f"{args.eval_split_name} ({args.eval_rows})" if args.eval_rows else args.eval_split_name
        add_results(args.output_dir, metrics, dataset=args.dataset_name, split=split)
        write_run_state(args.output_dir, settings, finished=True)
    accelerator.end_training()
    return metrics


if __name__ == "__main__":
    main()
