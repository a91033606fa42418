"""The Hugging Face Trainer for audio streams on many processes, and for runs that are interrupted."""

from __future__ import annotations

import math
import os
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from .augment import spec_augment
from .checkpoints import atomic_checkpoint
from .features import shortest_clip
from .loaders import make_eval_loader, make_loader
from .streams import AudioStream


class AudioTrainer(Trainer):
    """A Trainer with four differences.

    Each process reads its own part of a training set that is an `AudioStream`. In a stream, clips that are too short to
    give the model a token are audio that cannot be used. SpecAugment runs on the batch, on its
    device, in training only. A checkpoint appears in the output folder only when it is complete, so training can always
    resume from the newest one.

    Args:
        args, kwargs: as for `transformers.Trainer`.
        mask_frequencies (int): for `spec_augment`. Default: 0.
        mask_frames (int): for `spec_augment`. Default: 0.
    """

    def __init__(self, *args: Any, mask_frequencies: int = 0, mask_frames: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mask_frequencies = mask_frequencies
        self.mask_frames = mask_frames
        self._min_samples: dict[Any, int] = {}  # by feature extractor
        self._checkpoint_folder: Optional[str] = None  # while a checkpoint is written

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as `transformers.Trainer` does, but without a further step if the checkpoint has all of them.

        FSDP and DeepSpeed load the parts of a model after it was prepared for training; they take one further step.

        Args:
            resume_from_checkpoint (str or bool, optional): as for `transformers.Trainer.train`. Default: none.
            *args (Any): the same.
            **kwargs (Any): the same.

        Returns:
            TrainOutput: number of steps, mean loss and metrics.
        """
        if isinstance(resume_from_checkpoint, str) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            state = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME))
            same_epochs = state.num_train_epochs == math.ceil(self.args.num_train_epochs)
            steps = self.args.max_steps if self.args.max_steps > 0 else state.max_steps if same_epochs else 0
            if 0 < steps <= state.global_step:
                best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
                self._load_from_checkpoint(best or resume_from_checkpoint)
                state.is_world_process_zero = self.is_world_process_zero()
                state.is_local_process_zero = self.is_local_process_zero()
                self.state = state
                return TrainOutput(state.global_step, 0.0, {})
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The training batches of this process."""
        if not isinstance(self.train_dataset, AudioStream):
            return super().get_train_dataloader()
        if self.args.dataloader_drop_last:
            raise ValueError(
                "An AudioStream keeps its last batches, even small ones: leave out `dataloader_drop_last`."
            )
        options = self._loader_options()
        if self.args.dataloader_num_workers:
            options["persistent_workers"] = self.args.dataloader_persistent_workers
            options["prefetch_factor"] = self.args.dataloader_prefetch_factor
        self._refuse_short_clips(self.train_dataset)
        return make_loader(self.train_dataset, self._train_batch_size, self.accelerator, **options)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """The evaluation batches."""
        own: Any = self.eval_dataset
        dataset = own if eval_dataset is None else own[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        if not isinstance(dataset, AudioStream):
            return super().get_eval_dataloader(eval_dataset)
        self._refuse_short_clips(dataset)
        return make_eval_loader(dataset, self.args.eval_batch_size, self.accelerator, **self._loader_options())

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """The batches to predict."""
        if not isinstance(test_dataset, AudioStream):
            return super().get_test_dataloader(test_dataset)
        return self.get_eval_dataloader(test_dataset)

    def _refuse_short_clips(self, stream: AudioStream) -> None:
        extractor = stream.extract.feature_extractor
        # FSDP leaves no model to ask after the training has begun.
        if extractor not in self._min_samples:
            model: Any = self.model
            self._min_samples[extractor] = shortest_clip(model, extractor)
        stream.extract.min_samples = self._min_samples[extractor]

    def _loader_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.args.dataloader_num_workers,
            "collate_fn": self.data_collator,
            "pin_memory": self.args.dataloader_pin_memory,
        }

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate without a change of the generator that training uses for masks and dropout."""
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*args, **kwargs)

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Number of rows of a dataset, in all processes together."""
        dataset = dataloader.dataset
        if isinstance(dataset, AudioStream) and dataset.summary:
            return dataset.summary.num_rows
        return super().num_examples(dataloader)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Take a step on a batch, with SpecAugment if `mask_frequencies` or `mask_frames` is set."""
        if self.mask_frequencies or self.mask_frames:
            inputs = self._prepare_inputs(inputs)
            spectrograms = inputs.get("input_values")
            if spectrograms is None:
                raise ValueError("SpecAugment is for models that read spectrograms as `input_values`, such as AST.")
            masked = spec_augment(spectrograms, self.mask_frequencies, self.mask_frames)
            inputs = {**inputs, "input_values": masked}
        return super().training_step(model, inputs, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder, name = self._get_output_dir(trial), f"checkpoint-{self.state.global_step}"
        with atomic_checkpoint(folder, name, self.args.should_save, self.accelerator.wait_for_everyone) as path:
            self._checkpoint_folder = os.path.dirname(path)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._checkpoint_folder = None
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = os.path.join(folder, name)
            if self.args.should_save:
                # Once more, with the final place of the best checkpoint.
                self.state.save_to_json(os.path.join(path, TRAINER_STATE_NAME))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=folder,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )

    def _get_output_dir(self, trial: Any) -> str:
        return self._checkpoint_folder or super()._get_output_dir(trial)
