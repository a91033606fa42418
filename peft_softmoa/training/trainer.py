"""The Hugging Face Trainer for audio streams on many processes, and for runs that are interrupted."""

from __future__ import annotations

import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any, Optional

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import HubStrategy, TrainOutput, rotate_checkpoints

from ..saving.publishing import CARD, complete_card
from .augment import spec_augment
from .checkpoints import atomic_checkpoint, newest_checkpoint
from .classes import check_classes
from .features import shortest_clip
from .inputs import cast_inputs
from .loaders import make_eval_loader, make_loader
from .network import retry
from .streams import AudioStream

logger = logging.getLogger(__name__)


class _Token(str):
    """An access token that pickles as None: the Trainer pickles its arguments into every checkpoint."""

    def __reduce__(self) -> Any:
        return type(None), ()


class AudioTrainer(Trainer):
    """A Trainer with some differences.

    Each process reads its own part of a training set that is an `AudioStream`. In a stream, clips that are too short to
    give the model a token are audio that cannot be used. SpecAugment runs on the batch, on its device, in training.
    Inputs get the dtype in which the model reads them. All streams and the model must have the same classes. A
    checkpoint appears in the output folder only when it is complete, so training can always resume from the newest
    one, also if the folder was moved. Every push has the adapter's card, no push or checkpoint the access token.

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
        if self.args.hub_token:
            self.args.hub_token = _Token(self.args.hub_token)
        self._check_classes()

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
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_checkpoint(self._get_output_dir(None)) or True
        if isinstance(resume_from_checkpoint, str):
            state = self._find_best(resume_from_checkpoint)
            same_epochs = state.num_train_epochs == math.ceil(self.args.num_train_epochs)
            steps = self.args.max_steps if self.args.max_steps > 0 else state.max_steps if same_epochs else 0
            if 0 < steps <= state.global_step and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
                best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
                self._load_from_checkpoint(best or resume_from_checkpoint)
                state.is_world_process_zero = self.is_world_process_zero()
                state.is_local_process_zero = self.is_local_process_zero()
                self.state = state
                return TrainOutput(state.global_step, 0.0, {})
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _find_best(self, checkpoint: str) -> TrainerState:
        """State of a checkpoint; its best checkpoint is beside it, wherever the folder was when that was written."""
        path = os.path.join(checkpoint, TRAINER_STATE_NAME)
        state = TrainerState.load_from_json(path)
        if state.best_model_checkpoint is None:
            return state
        recorded = state.best_model_checkpoint
        best = os.path.join(os.path.dirname(os.path.abspath(checkpoint)), os.path.basename(recorded))
        if not os.path.isdir(best):
            if self.args.load_best_model_at_end:
                raise ValueError(
                    f"The best checkpoint of the run, '{best}', is missing, so `load_best_model_at_end` cannot load "
                    "it. Put it back, or leave out `load_best_model_at_end`."
                )
            return state
        if not (os.path.isdir(recorded) and os.path.samefile(recorded, best)):
            state.best_model_checkpoint = best
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                state.save_to_json(f"{path}.unfinished")
                os.replace(f"{path}.unfinished", path)
            self.accelerator.wait_for_everyone()
        return state

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The training batches of this process."""
        if not isinstance(self.train_dataset, AudioStream):
            return super().get_train_dataloader()
        if self.args.dataloader_drop_last:
            raise ValueError(
                "An AudioStream keeps its last batches, even small ones: leave out `dataloader_drop_last`."
            )
        self._check_classes()
        options = self._loader_options()
        if self.args.dataloader_num_workers:
            options["persistent_workers"] = self.args.dataloader_persistent_workers
            options["prefetch_factor"] = self.args.dataloader_prefetch_factor
        self._refuse_short_clips(self.train_dataset)
        return make_loader(self.train_dataset, self._train_batch_size, self.accelerator, **options)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """The evaluation batches."""
        known: Any = self.eval_dataset
        dataset = known if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):  # one of several
            dataset = known[dataset]
        if not isinstance(dataset, AudioStream):
            return super().get_eval_dataloader(eval_dataset)
        self._check_classes(evaluation=dataset)
        self._refuse_short_clips(dataset)
        return make_eval_loader(dataset, self.args.eval_batch_size, self.accelerator, **self._loader_options())

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """The batches of a prediction."""
        if not isinstance(test_dataset, AudioStream):
            return super().get_test_dataloader(test_dataset)
        self._check_classes(test=test_dataset)
        self._refuse_short_clips(test_dataset)
        return make_eval_loader(test_dataset, self.args.eval_batch_size, self.accelerator, **self._loader_options())

    def _check_classes(self, **more: Any) -> None:
        """Check that all streams and the model have the same classes, also those of an adapter that is active now."""
        several = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"evaluation": self.eval_dataset}
        model: Any = self.model
        check_classes({"training": self.train_dataset, **several, **more}, model)

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

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        model: Any = self.model
        return cast_inputs(model, super()._prepare_inputs(inputs))

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
            best = f"checkpoint-{self.state.best_global_step}"
            if best == name or os.path.isdir(os.path.join(folder, best)):
                self.state.best_model_checkpoint = os.path.join(folder, best)
            if self.args.should_save:
                # Once more, with the final place of the best checkpoint.
                self.state.save_to_json(os.path.join(path, TRAINER_STATE_NAME))
        if self.args.should_save:
            if self.args.save_total_limit and self.args.hub_strategy in (
                HubStrategy.CHECKPOINT,
                HubStrategy.ALL_CHECKPOINTS,
            ):
                self._finish_current_push()  # which may read a checkpoint that is now removed
            rotate_checkpoints(
                output_dir=folder,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
        if self.args.push_to_hub:
            self._push_from_checkpoint(os.path.join(folder, name))

    def _get_output_dir(self, trial: Any) -> str:
        return self._checkpoint_folder or super()._get_output_dir(trial)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Make the repository on the Hub, if it is missing; retry while the network fails."""
        retry(super().init_hf_repo, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the Trainer's card, with the adapter's own section: how to load it."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            complete_card(self._get_output_dir(None))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._checkpoint_folder is not None:
            return  # it is pushed when it is complete
        self._warn_of_failed_pushes()
        is_busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        is_pushed = self.args.hub_strategy != HubStrategy.END and (self.args.hub_always_push or not is_busy)
        if self.is_world_process_zero() and is_pushed:
            # The Trainer copies the adapter, but not its card.
            checkpoint, folder = Path(checkpoint_folder), Path(self._get_output_dir(None))
            for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, CARD):
                if (checkpoint / name).is_file() and not (name == CARD and (folder / name).exists()):
                    shutil.copy(checkpoint / name, folder / name)
            complete_card(folder)
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._warn_of_failed_pushes()

    def _warn_of_failed_pushes(self) -> None:
        """Name what uploads in the background have raised, which the Trainer does not."""
        jobs: list[Any] = getattr(getattr(self, "push_in_progress", None), "jobs", [])
        for job in [job for job in jobs if job.done()]:
            jobs.remove(job)
            if job.exception() is not None:
                logger.warning(
                    f"A push to '{self.hub_model_id}' failed: {job.exception()!r}. What it had is not on the Hub; "
                    "`push_to_hub` of the Trainer uploads the model again."
                )
