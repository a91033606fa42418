"""SoftMoAModel: puts mixtures into a model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, Optional

from peft import PeftModel, TaskType
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from .adapter_hooks import add_hooks
from .averaging import average_into, check_average
from .calls.forward_pass import find_passes, make_passes
from .calls.masks import argument_names
from .calls.mixed_batch import make_mixed_batch
from .config import SoftMoAConfig
from .layer import CANNOT_MERGE, SoftMoALayer, is_adapted
from .registration import SOFTMOA, name_in_model, name_since_0_2
from .saving.checks import check_shapes, check_size, embedding_shapes, read_shapes, text_embeddings
from .saving.pickles import begin_saving
from .targets.architectures import channel_reader
from .targets.choice import find_targets, is_matched_by_peft, is_target, name_targets, unmatched_target
from .targets.clip_length import fit_length
from .targets.description import mixture_options, mixture_shapes
from .targets.heads import base_classes, find_head, fit_head, name_classes, note_problem_type
from .targets.placement import choose_targets
from .targets.rollback import Snapshot
from .targets.saved_modules import count_saved, find_saved, saved_shapes


class SoftMoAModel(BaseTuner):
    """
    Creates a soft mixture of adapters from a pretrained model. The method is described in
    https://arxiv.org/abs/2402.00828

    Args:
        model (`torch.nn.Module`): The model to which the adapter tuner layers will be attached.
        config ([`SoftMoAConfig`]): The configuration of the adapter.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, `optional`, defaults to `False`):
            Create empty adapter weights on meta device. Useful to speed up the loading process.

    Returns:
        `torch.nn.Module`: The model with its adapter.

    Example:
        ```py
        >>> from peft import get_peft_model
        >>> from peft_softmoa import SoftMoAConfig
        >>> from transformers import AutoModelForAudioClassification

        >>> model = AutoModelForAudioClassification.from_pretrained("MIT/ast-finetuned-audioset-10-10-0.4593")
        >>> model = get_peft_model(model, SoftMoAConfig(num_experts=7, r=6, modules_to_save=["classifier"]))
        ```

    **Attributes**:
        - **model** ([`~torch.nn.Module`]) -- The model to be adapted.
        - **peft_config** ([`SoftMoAConfig`]): The configuration of the adapter.
    """

    prefix: str = "softmoa_"
    tuner_layer_cls = SoftMoALayer
    target_module_mapping: dict[str, list[str]] = {}
    peft_config: dict[str, SoftMoAConfig]  # type: ignore[assignment]
    _before_adding: Optional[Snapshot] = None  # an adapter that was added to be loaded, until it is

    def _prepare_adapter_config(self, peft_config: SoftMoAConfig, model_config: dict[str, Any]) -> SoftMoAConfig:
        return peft_config  # its targets depend on more than the model's config

    def _prepare_model(self, peft_config: SoftMoAConfig, model: nn.Module) -> None:
        """Check everything before the first module is replaced, so that an error leaves the model as it was."""
        generates = hasattr(model, "prepare_inputs_for_generation")
        if peft_config.task_type in (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM) and not generates:
            raise ValueError(
                f"`task_type='{peft_config.task_type}'` is for models that generate text, which {type(model).__name__} "
                "does not. Leave it out."
            )
        if peft_config.num_channels is not None:
            channel_reader(model, "")  # that it can be read
        source = peft_config.loaded_from
        loaded = None if source is None else read_shapes(source.model_id, source.subfolder, **source.hub)
        fit_length(model, peft_config.max_length_seconds)
        choose_targets(peft_config, model)
        self._targets = targets = find_targets(peft_config, model)
        name_targets(peft_config, model, targets)
        saved = find_saved(peft_config, model, targets.values())
        self._head = find_head(model, saved, peft_config.label_names)
        if saved and loaded is None and peft_config.problem_type is None:
            peft_config.problem_type = base_classes(model).problem_type
        self._argument_names = argument_names(model)
        self._options = mixture_options(model, peft_config)
        self._forward_passes = next(iter(find_passes(model)), None) or make_passes()
        blocks = mixture_shapes(model, peft_config, targets.values())
        parameters = sum(prod(shape) for shapes in blocks for shape in shapes.values())
        check_size(peft_config, parameters + count_saved(saved, self._head), model)
        if loaded is not None:
            expected = saved_shapes(saved, self._head)
            for target, shapes in zip(targets, blocks):
                expected.update({f"{target}.softmoa_mixture.{tensor}": shape for tensor, shape in shapes.items()})
            current = {name_in_model(name): shape for name, shape in loaded.items()}
            check_shapes(current, expected, embedding_shapes(model))

    def _create_and_replace(
        self,
        peft_config: SoftMoAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: Optional[str] = None,
    ) -> None:
        # Where PEFT goes by the names in a state dict, a module may be none of the config's targets.
        where = self._targets.get(current_key) or unmatched_target(peft_config, self.model, current_key)
        if is_adapted(target):
            target.update_layer(adapter_name, where, self._options, peft_config.scaling)
        else:
            new = SoftMoALayer(target, adapter_name, where, self._options, peft_config.scaling, self._forward_passes)
            self._replace_module(parent, target_name, new, new.base_layer)

    def _check_tied_modules(self, model: nn.Module, peft_config: SoftMoAConfig) -> None:
        # PEFT would match a regular expression here without a limit of time; text embeddings are never adapted.
        peft_config = copy.copy(peft_config)
        if isinstance(peft_config.target_modules, str):
            peft_config.target_modules = None
        super()._check_tied_modules(model, peft_config)

    @staticmethod
    def _check_target_module_exists(peft_config: SoftMoAConfig, key: str) -> Any:
        return is_target(peft_config, key)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own method copies the weight of the child, which a block or a head does not have.
        setattr(parent, child_name, new_module)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        is_shared = any(other is config for name, other in self.peft_config.items() if name != adapter_name)
        # What is written into it is of this adapter and, in place of an expression, of this model.
        if is_shared or is_matched_by_peft(config, model):
            self.peft_config[adapter_name] = copy.copy(config)
        before = Snapshot(model, adapter_name)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            if self._head is not None:
                fit_head(model, adapter_name, self._head)
            add_hooks(model, adapter_name, self.peft_config[adapter_name])
        except BaseException:
            before.restore()
            raise
        # Its weights may be loaded next, and that may fail, too.
        config = self.peft_config[adapter_name]
        self._before_adding = before if config.inference_mode or config.loaded_from else None

    def end_loading(self, adapter_name: str, failed: bool) -> None:
        """Note that `PeftModel.load_adapter` has ended; if it failed, remove an adapter that was added for it."""
        before, self._before_adding = self._before_adding, None
        if failed and before is not None and before.adapter_name == adapter_name:
            before.restore()
            self.peft_config.pop(adapter_name, None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; as a call, unlike in PEFT's own tuners, so that the model's hooks run."""
        if self._before_adding is not None:  # it is used as it is
            self._before_adding = None
        # For a task type PEFT gives the arguments of models of text, most of them None, which others do not take.
        given = {name: each for name, each in kwargs.items() if each is not None or name in self._argument_names}
        return self.model(*args, **given)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Around a call of the model with `adapter_names`: let each sample have an adapter of its own."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode. Call `eval()` first.")
        batch = make_mixed_batch(self.model, adapter_names, self.peft_config, kwargs)
        with find_passes(self.model)[0].mixing(batch):
            yield

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._name_classes()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._name_classes()

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._name_classes(enabled)

    def get_input_embeddings(self) -> Optional[nn.Module]:
        """The base model's embeddings of text, which PEFT saves if they were resized; None if it reads audio."""
        return text_embeddings(self.model)[0]

    def get_output_embeddings(self) -> Optional[nn.Module]:
        """The base model's head that writes text, which PEFT saves if it was resized; None if there is none."""
        return text_embeddings(self.model)[1]

    def average_adapters(
        self, adapter_names: Sequence[str], weights: Optional[Sequence[float]] = None, new_name: str = "average"
    ) -> None:
        """Make a new adapter from the weighted average of the weights of others: a model soup (arXiv 2203.05482).

            θ = Σ_i w_i θ_i / Σ_i w_i

        The trained modules that they bring with them, such as heads, are averaged too. The order of experts is
        arbitrary, so that only adapters with a common start average to something: runs that go on from one adapter, or
        that begin with the same seed.

        Args:
            adapter_names (sequence of `str`): names of the adapters.
            weights (sequence of `float`, *optional*): w, one for each, from 0. Default: all the same.
            new_name (`str`, defaults to `"average"`): name of the new adapter; it is not made the active one.

        Raises:
            ValueError: if a name is unknown or taken, the weights are not allowed, or the adapters' configs differ.
        """
        names = list(adapter_names)
        shares = check_average(self.peft_config, names, weights, new_name)
        self.peft_config[new_name] = copy.deepcopy(self.peft_config[names[0]])
        self.inject_adapter(self.model, new_name)
        average_into(self.model, names, shares, new_name)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Impossible: a ValueError that names `average_adapters`."""
        raise ValueError(
            "The experts of a Soft-MoA adapter cannot be combined as LoRA's matrices can. The average of the weights "
            "of adapters with a common start is `average_adapters(adapter_names, weights, new_name)`."
        )

    def unload(self) -> nn.Module:
        """Give the base model back as it was, with its own head and labels."""
        for name, module in list(self.model.named_modules()):
            if isinstance(module, ModulesToSaveWrapper):
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, module.original_module)
        for module in filter(is_adapted, self.model.modules()):
            for adapter_name in list(self.peft_config):
                module.delete_adapter(adapter_name)
        self._name_classes(enabled=False)
        return super().unload()

    def unmerge_adapter(self) -> None:
        """Impossible: a ValueError that says why."""
        raise ValueError(CANNOT_MERGE)

    def _check_merge_allowed(self) -> None:
        raise ValueError(CANNOT_MERGE)

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, config: SoftMoAConfig, *args: Any, **kwargs: Any) -> Any:
        begin_saving(config)
        note_problem_type(model, config)
        return super()._get_adapter_state_dict(model, config, *args, **kwargs)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        before, mixture, after = key.rpartition(f".softmoa_mixture.{adapter_name}.")
        return (
            f"{before}.softmoa_mixture.{after}" if mixture else super()._remove_adapter_name_from_key(key, adapter_name)
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SoftMoAConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        current = {name_since_0_2(key): tensor for key, tensor in state_dict.items()}
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, current)
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        # Any other tensor would replace one of the base model's.
        given = {
            name_in_model(key, adapter_name): tuple(tensor.shape)
            for key, tensor in remapped.items()
            if f".modules_to_save.{adapter_name}." not in key
        }
        expected = {
            name_in_model(f"{name}.softmoa_mixture.{path}"): tuple(parameter.shape)
            for name, layer in base.named_modules()
            if is_adapted(layer) and adapter_name in layer.softmoa_mixture
            for path, parameter in layer.softmoa_mixture[adapter_name].named_parameters()
        }
        check_shapes(given, expected, embedding_shapes(base))
        return remapped

    def _name_classes(self, enabled: bool = True) -> None:
        """Let the model say the classes of the head that is in use, and its loss."""
        # transformers can hold adapters of other methods in the same dict.
        active = [self.peft_config[name] for name in self.active_adapters] if enabled else []
        active = [config for config in active if config.peft_type == SOFTMOA]
        label_names = next((config.label_names for config in active if config.label_names), None)
        name_classes(self.model, label_names, next((each.problem_type for each in active if each.problem_type), None))
