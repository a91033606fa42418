"""A Trainer whose runs can be interrupted at any moment, and which pushes complete adapters."""

from __future__ import annotations

import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any, Optional

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import HubStrategy, TrainOutput, rotate_checkpoints

from ..saving.publishing import CARD, complete_card
from .checkpoints import atomic_checkpoint, newest_checkpoint
from .network import retry

logger = logging.getLogger(__name__)


class _Token(str):
    """An access token that pickles as None: the Trainer pickles its arguments into every checkpoint."""

    def __reduce__(self) -> Any:
        return type(None), ()


class ResumableTrainer(Seq2SeqTrainer):
    """A Trainer with complete checkpoints and pushes.

    A checkpoint appears in the output folder only when it is complete, so training can always resume from the newest
    one, also if the folder was moved. Every push has the adapter's card, no push or checkpoint the access token.

    Args:
        args, kwargs: as for `transformers.Trainer`, or for `Seq2SeqTrainer` with its arguments.
    """

    def __init__(self, model: Any = None, args: Any = None, *others: Any, **kwargs: Any) -> None:
        base: Any = Seq2SeqTrainer if isinstance(args, Seq2SeqTrainingArguments) else Trainer
        base.__init__(self, model, args, *others, **kwargs)
        self._checkpoint_folder: Optional[str] = None  # while a checkpoint is written
        if self.args.hub_token:
            self.args.hub_token = _Token(self.args.hub_token)

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
