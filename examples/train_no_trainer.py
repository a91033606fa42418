#!/usr/bin/env python
"""Train an adapter in a plain loop with Accelerate: a script to copy and edit.

    python examples/train_no_trainer.py --dataset_name ashraq/esc50 --label_column_name category \
        --train_rows fold=1,2,3,4 --eval_split_name train --eval_rows fold=5 --output_dir esc50-softmoa

It does what `peft-softmoa train` does, for all its tasks, with the same data, optimisation and checkpoints, and runs
under `accelerate launch`, which also chooses the precision. Interrupted runs resume: run the same command again.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from tqdm.auto import tqdm
from transformers import EvalPrediction, HfArgumentParser, get_cosine_schedule_with_warmup
from transformers.trainer_pt_utils import get_parameter_names, nested_concat
from transformers.trainer_utils import rotate_checkpoints

from peft_softmoa.arguments import AdapterArguments, make_config
from peft_softmoa.commands.train import FLAGS
from peft_softmoa.saving.card import add_results
from peft_softmoa.training import (
    Collate,
    Task,
    atomic_checkpoint,
    cast_inputs,
    check_classes,
    check_no_shared_rows,
    checkpoint_only_adapters,
    compute_loss,
    lock_run,
    make_eval_loader,
    make_loader,
    mixup,
    name_flags,
    option,
    spec_augment,
    start_or_resume,
    swap_channels,
    write_run_state,
)
from peft_softmoa.training.arguments import DataArguments, ModelArguments, RunArguments, TaskArguments
from peft_softmoa.training.run import add_adapter, fingerprints, load_base, load_feature_extractor, load_streams


@dataclass
class LoopArguments:
    """The loop."""

    output_dir: str = field(metadata={"help": "Folder for the adapter and the checkpoints."})
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
    # What else the loading of the data asks for.
    max_steps, eval_strategy, load_best_model_at_end = 0, "epoch", False


@torch.random.fork_rng(devices=[])  # a resumed run does not repeat it, and needs the same random numbers
def evaluate(model: Any, loader: Any, task: Task, accelerator: Accelerator) -> dict[str, float]:
    model.eval()
    outputs = labels = None
    for batch in loader:
        batch = cast_inputs(model, batch)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            if task.generates:
                predicted = accelerator.unwrap_model(model).generate(**inputs)
            else:
                predicted = task.reduce_outputs(model(**inputs).logits.float(), batch)
        both = predicted, batch["labels"]
        if predicted.ndim > 1:  # texts and frames differ in length
            both = accelerator.pad_across_processes(both, dim=1, pad_index=-100)
        predicted, true = (each.cpu() for each in accelerator.gather_for_metrics(both))
        outputs = predicted if outputs is None else nested_concat(outputs, predicted, padding_index=-100)
        labels = true if labels is None else nested_concat(labels, true, padding_index=-100)
    return task.score(EvalPrediction(outputs.numpy(), labels.numpy()))


@name_flags(FLAGS)
def main(arguments: Optional[list[str]] = None) -> dict[str, float]:
    parser = HfArgumentParser(
        (ModelArguments, TaskArguments, DataArguments, AdapterArguments, LoopArguments),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run = RunArguments(*parser.parse_args_into_dataclasses(arguments))
    accelerator = Accelerator(
        gradient_accumulation_steps=run.training.gradient_accumulation_steps,
        log_with=run.training.report_to,
        project_dir=run.training.output_dir,
    )
    check_no_shared_rows(run.parts())
    with lock_run(run.training.output_dir, is_main=accelerator.is_main_process):
        return train(run, accelerator)


def train(run: RunArguments, accelerator: Accelerator) -> dict[str, float]:
    args = run.training
    set_seed(args.seed)
    task = run.make_task()
    base = load_base(run, task)
    extractor = load_feature_extractor(run, base)
    streams = load_streams(run, task, extractor)
    task = streams["training"].task
    model = add_adapter(run, base, task, make_config(run.adapter, modules_to_save=run.model.modules_to_save))
    check_classes(streams, model)
    for stream in streams.values():
        stream.prepare(model)
    settings = run.settings() | fingerprints(model, extractor, streams, False)
    settings["mixed_precision"] = accelerator.mixed_precision
    [settings] = broadcast_object_list([settings])  # files may have other times where other processes read them
    checkpoint = start_or_resume(args.output_dir, settings, is_main=accelerator.is_main_process)
    decayed = set(get_parameter_names(model, [torch.nn.LayerNorm], ["bias"]))
    groups: list[Any] = [{"params": [], "weight_decay": decay} for decay in (0.0, 0.1)]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name in decayed]["params"].append(parameter)
    optimizer = torch.optim.AdamW(groups, args.learning_rate, betas=(0.9, 0.98), eps=1e-6)
    options = {"num_workers": args.dataloader_num_workers, "collate_fn": Collate(extractor, task)}
    loader = make_loader(streams["training"], args.per_device_train_batch_size, accelerator, **options)
    eval_loader = make_eval_loader(streams["evaluation"], args.per_device_train_batch_size, accelerator, **options)
    steps_per_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 0, steps := args.num_train_epochs * steps_per_epoch)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(scheduler)
    checkpoint_only_adapters(accelerator)
    if args.report_to:
        accelerator.init_trackers("softmoa", {name: str(value) for name, value in settings.items()})
    step = int(checkpoint.rpartition("-")[2]) if checkpoint else 0
    if checkpoint:
        accelerator.load_state(checkpoint)
    progress, metrics = tqdm(total=steps, initial=step, disable=not accelerator.is_local_main_process), {}
    for epoch in range(step // steps_per_epoch, args.num_train_epochs):
        model.train()
        loader.set_epoch(epoch)
        done = step % steps_per_epoch * args.gradient_accumulation_steps
        for batch in accelerator.skip_first_batches(loader, done) if done else loader:
            batch = cast_inputs(model, batch)
            with accelerator.accumulate(model):
                if run.data.mirror_labels:
                    batch = swap_channels(batch, task.mirrored(batch["labels"], run.data.mirror_labels))
                if run.task.mixup_alpha:
                    batch = mixup(batch, task.mixable(batch["labels"]), run.task.mixup_alpha)
                if any(masks := (run.data.mask_frequencies, run.data.mask_frames)):
                    batch["input_values"] = spec_augment(batch["input_values"], *masks)  # spectrograms, as AST's
                loss = compute_loss(model, batch, task)
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
                of_checkpoint = f"checkpoint-{step}", accelerator.is_main_process, accelerator.wait_for_everyone
                with atomic_checkpoint(args.output_dir, *of_checkpoint) as folder:
                    accelerator.save_state(folder)
                if accelerator.is_main_process:
                    rotate_checkpoints(args.output_dir, save_total_limit=2)
        metrics = evaluate(model, eval_loader, task, accelerator)
        accelerator.log({f"eval_{name}": value for name, value in metrics.items()}, step)
        accelerator.print(f"Epoch {epoch + 1}: {metrics}")

    metrics = metrics or evaluate(model, eval_loader, task, accelerator)
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output_dir, state_dict=state)
        extractor.save_pretrained(args.output_dir)
        task.save(args.output_dir)
        split, rows = run.parts()["evaluation"]
        split = f"{split} ({rows})" if rows else split
        add_results(args.output_dir, metrics, dataset=run.data.dataset_name, split=split)
        write_run_state(args.output_dir, settings, finished=True)
    accelerator.end_training()
    return metrics


if __name__ == "__main__":
    main()
