"""The Hugging Face Trainer for audio streams on many processes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from .augment import mixup, parse_mirror, spec_augment, swap_channels
from .classes import check_classes
from .inputs import Collate, cast_inputs
from .loaders import make_eval_loader, make_loader
from .losses import loss_function
from .metrics import LOWER_IS_BETTER
from .resumable import ResumableTrainer
from .streams import AudioStream
from .tasks import Task


class AudioTrainer(ResumableTrainer):
    """A Trainer with some differences.

    The task of the streams says how batches are made, and what the metrics are; with `Seq2SeqTrainingArguments` and
    `predict_with_generate` they are of what the model generates. Each process reads its own part of a training set that
    is an `AudioStream`. In a stream, clips that are too short to give the model a token are audio that cannot be used.
    SpecAugment, mixup and the swapping of channels run on the batch, on its device, in training. Inputs get the dtype
    in which the model reads them. All streams and the model must have the same classes. Checkpoints and pushes are
    those of `ResumableTrainer`.

    Args:
        model, args, data_collator, train_dataset, eval_dataset, kwargs: as for `transformers.Seq2SeqTrainer`; what is
            not given is the task's.
        mask_frequencies (int): for `spec_augment`. Default: 0.
        mask_frames (int): for `spec_augment`. Default: 0.
        mixup_alpha (float): for `mixup`. Default: 0, no mixup.
        mirror_labels (mapping or sequence of str, optional): for `swap_channels`, the classes that mirror each other,
            such as `{"left": "right"}`. Default: channels keep their order.

    Raises:
        ValueError: if the classes differ, or an argument does not go with the task.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        mask_frequencies: int = 0,
        mask_frames: int = 0,
        mixup_alpha: float = 0.0,
        mirror_labels: Union[Mapping[str, str], Sequence[str], None] = None,
        **kwargs: Any,
    ) -> None:
        self.mask_frequencies = mask_frequencies
        self.mask_frames = mask_frames
        self.mixup_alpha = mixup_alpha
        self.mirror_labels = parse_mirror(mirror_labels)
        evaluated = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
        streams = [each for each in (train_dataset, *evaluated) if isinstance(each, AudioStream) and each.task]
        self.task: Optional[Task] = streams[0].task if streams else None
        if self.task is not None:
            if data_collator is None:
                data_collator = Collate(streams[0].extract.feature_extractor, self.task)
            kwargs.setdefault("compute_metrics", self.task.score)
            if args is not None and args.label_smoothing_factor:
                self._check_smoothing(self.task)
            if self.task.has_loss or mixup_alpha:
                kwargs.setdefault("compute_loss_func", loss_function(model, self.task))
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, **kwargs)
        self._check_arguments()
        self._min_samples: dict[Any, int] = {}  # by feature extractor
        self._check_classes()

    def _check_smoothing(self, task: Task) -> None:
        if not task.can_smooth or self.mixup_alpha:
            raise ValueError(
                "`label_smoothing_factor` is for the plain loss of one label a clip, and does "
                f"not go with {type(task).__name__}{' and mixup' if self.mixup_alpha else ''}"
                f"{' and class weights' if getattr(task, 'class_weights', None) is not None else ''}: leave it out."
            )

    def _check_arguments(self) -> None:
        metric = (self.args.metric_for_best_model or "").removeprefix("eval_")
        if metric in LOWER_IS_BETTER and self.args.greater_is_better:
            raise ValueError(
                f"`metric_for_best_model={metric}` is the better the lower it is: set `greater_is_better=False`."
            )
        if self.task is not None and not self.task.has_loss:
            # Most models take the number of labels of a step, but do not divide their loss by it: a step then has the
            # mean of its batches' losses.
            self.model_accepts_loss_kwargs = False

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
        self._prepare_stream(self.train_dataset)
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
        self._prepare_stream(dataset)
        return make_eval_loader(dataset, self.args.eval_batch_size, self.accelerator, **self._loader_options())

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """The batches of a prediction."""
        if not isinstance(test_dataset, AudioStream):
            return super().get_test_dataloader(test_dataset)
        self._check_classes(test=test_dataset)
        self._prepare_stream(test_dataset)
        return make_eval_loader(test_dataset, self.args.eval_batch_size, self.accelerator, **self._loader_options())

    def _check_classes(self, **more: Any) -> None:
        """Check that all streams and the model have the same classes, also those of an adapter that is active now."""
        several = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"evaluation": self.eval_dataset}
        model: Any = self.model
        check_classes({"training": self.train_dataset, **several, **more}, model)

    def _prepare_stream(self, stream: AudioStream) -> None:
        if stream.task is not None and self.task is not None:
            if type(stream.task) is not type(self.task):
                raise ValueError(
                    f"{stream.name} was loaded for {type(stream.task).__name__}, but the Trainer's first stream is for "
                    f"{type(self.task).__name__}: load both with the same `task`."
                )
            stream.extract.task = self.task
        extractor = stream.extract.feature_extractor
        # FSDP leaves no model to ask after the training has begun.
        model: Any = self.model
        if extractor not in self._min_samples:
            stream.prepare(model)
            self._min_samples[extractor] = stream.extract.min_samples
        stream.extract.min_samples = self._min_samples[extractor]
        stream.choose_channels(model)

    def _loader_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.args.dataloader_num_workers,
            "collate_fn": self.data_collator,
            "pin_memory": self.args.dataloader_pin_memory,
        }

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate without a change of the generator that training uses for masks and dropout."""
        with torch.random.fork_rng(devices=[]):
            return self._base.evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """Predict as `transformers.Seq2SeqTrainer` does."""
        return self._base.predict(*args, **kwargs)

    @property
    def _base(self) -> Any:
        """The Trainer that generates, with the arguments for it and a task that needs it."""
        generates = self.task is None or self.task.generates
        generates = generates and isinstance(self.args, Seq2SeqTrainingArguments) and self.args.predict_with_generate
        return super() if generates else super(Seq2SeqTrainer, self)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The same, without the samples that complete the last batch of several processes."""
        self.gather_function = self.accelerator.gather_for_metrics
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The loss of a batch, what the metrics need of its outputs, and its labels."""
        loss, outputs, labels = self._base.prediction_step(model, inputs, *args, **kwargs)
        if self.task is not None and outputs is not None:
            outputs = self.task.reduce_outputs(outputs, inputs)
        return loss, outputs, labels

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
        """Take a step on a batch, with mirrored channels, mixup and SpecAugment if they are set."""
        if self.mirror_labels:
            if self.task is None:
                raise ValueError("`mirror_labels` needs an AudioStream with labels, which says what they are.")
            inputs = self._prepare_inputs(inputs)
            inputs = swap_channels(inputs, self.task.mirrored(inputs["labels"], self.mirror_labels))
        if self.mixup_alpha:
            if self.task is None:
                raise ValueError("`mixup_alpha` needs an AudioStream with labels, which says what they are.")
            inputs = self._prepare_inputs(inputs)
            inputs = mixup(inputs, self.task.mixable(inputs["labels"]), self.mixup_alpha)
        if self.mask_frequencies or self.mask_frames:
            inputs = self._prepare_inputs(inputs)
            spectrograms = inputs.get("input_values")
            if spectrograms is None or spectrograms.ndim != (4 if "channel_mask" in inputs else 3):
                raise ValueError("SpecAugment is for models that read spectrograms as `input_values`, such as AST.")
            masked = spec_augment(spectrograms, self.mask_frequencies, self.mask_frames)
            inputs = {**inputs, "input_values": masked}
        return super().training_step(model, inputs, *args, **kwargs)

    def _save(self, output_dir: Optional[str] = None, state_dict: Any = None) -> None:
        with warnings.catch_warnings():
            # PEFT takes a vocabulary of the adapter's own, with its head, for embeddings of another size.
            warnings.filterwarnings("ignore", message="Setting `save_embedding_layers` to `True` as the embedding")
            super()._save(output_dir, state_dict=state_dict)
        if self.task is not None:
            self.task.save(str(output_dir or self.args.output_dir))
