"""The Hugging Face Trainer for audio streams on many processes, and for runs that are cut off."""

from __future__ import annotations

import os
from typing import Any, Optional

from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from .augment import spec_augment
from .checkpoints import whole_checkpoint
from .streams import AudioStream, make_loader


class AudioTrainer(Trainer):
    """A Trainer with three differences.

    Each process reads its own part of a training set that is an `AudioStream`; SpecAugment runs on the batch, on its
    device, in training only; and a checkpoint appears in the output folder when it is whole, so that the newest one
    can always be resumed from.

    Args:
        args, kwargs: as for `transformers.Trainer`.
        mask_frequencies (int): for `spec_augment`. Default: 0.
        mask_frames (int): for `spec_augment`. Default: 0.
    """

    def __init__(self, *args: Any, mask_frequencies: int = 0, mask_frames: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mask_frequencies = mask_frequencies
        self.mask_frames = mask_frames
        self._checkpoint_folder: Optional[str] = None  # while a checkpoint is written

    def get_train_dataloader(self) -> DataLoader:
        """The batches of this process."""
        if not isinstance(self.train_dataset, AudioStream):
            return super().get_train_dataloader()
        return make_loader(
            self.train_dataset,
            self._train_batch_size,
            self.accelerator,
            num_workers=self.args.dataloader_num_workers,
            collate_fn=self.data_collator,
            drop_last=self.args.dataloader_drop_last,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def num_examples(self, dataloader: DataLoader) -> int:
        """Number of rows of a dataset, in all processes together."""
        dataset = dataloader.dataset
        if isinstance(dataset, AudioStream) and dataset.survey:
            return dataset.survey.num_rows
        return super().num_examples(dataloader)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """A step on a batch, with SpecAugment if it was asked for."""
        if self.mask_frequencies or self.mask_frames:
            inputs = self._prepare_inputs(inputs)
            [name] = inputs.keys() & {"input_values", "input_features"}
            inputs = {**inputs, name: spec_augment(inputs[name], self.mask_frequencies, self.mask_frames)}
        return super().training_step(model, inputs, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder, name = self._get_output_dir(trial), f"checkpoint-{self.state.global_step}"
        with whole_checkpoint(folder, name, self.args.should_save, self.accelerator.wait_for_everyone) as path:
            self._checkpoint_folder = os.path.dirname(path)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._checkpoint_folder = None
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = os.path.join(folder, name)
            if self.args.should_save:
                # Once more, for where the best checkpoint will be.
                self.state.save_to_json(os.path.join(path, TRAINER_STATE_NAME))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=folder,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )

    def _get_output_dir(self, trial: Any) -> str:
        return self._checkpoint_folder or super()._get_output_dir(trial)
