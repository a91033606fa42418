"""All private names of other libraries that the package uses, each with the test that fails when it changes."""

import ast
import enum
import inspect
import re
from pathlib import Path

import peft.tuners.tuners_utils
import pytest
import torch
from accelerate import data_loader
from peft.config import PeftConfigMixin
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from transformers import PreTrainedModel, Trainer
from transformers.utils.hub import PushToHubMixin

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "peft_softmoa"

GUARDS = {
    BaseTuner: {
        "_check_merge_allowed": "test_model.py::test_merging_is_refused_and_changes_nothing",
        "_check_target_module_exists": "test_model.py::test_named_targets",
        "_check_tied_modules": "saving/test_checks.py::test_configs_that_are_refused",
        "_create_and_replace": "test_model.py::test_named_targets",
        "_enable_adapter_layers": "test_model.py::test_disable_adapter",
        "_enable_peft_forward_hooks": "calls/test_mixed_batch.py::test_equals_one_by_one",
        "_get_adapter_state_dict": "saving/test_pickles.py::test_what_is_not_read_is_not_written",
        "_prepare_adapter_config": "test_model.py::test_placement_chooses_and_the_config_says_what",
        "_prepare_model": "test_model.py::test_what_cannot_be_adapted_leaves_the_model_as_it_was",
        "_remap_adapter_state_dict_for_load": "test_sharing.py::test_adapters_of_earlier_versions_still_load",
        "_remove_adapter_name_from_key": "test_sharing.py::test_loads_equal_in_a_new_process",
        "_replace_module": "test_model.py::test_whole_modules_as_targets",
    },
    BaseTunerLayer: {
        "_active_adapter": "test_model.py::test_several_adapters",
        "_disable_adapters": "test_layer.py::test_disabled_adapters_change_nothing",
        "_get_base_layer_device_and_dtype": "test_layer.py::test_weights_are_on_the_device_of_the_block",
        "_move_adapter_to_device_of_base_layer": "test_layer.py::test_weights_are_on_the_device_of_the_block",
    },
    peft.tuners.tuners_utils: {
        "_find_minimal_target_modules": "test_model.py::test_placement_chooses_and_the_config_says_what",
        "_maybe_include_all_linear_layers": "targets/test_placement.py::test_all_linear_layers",
    },
    PeftConfigMixin: {
        "_get_peft_type": "inspection/test_inspect_adapter.py::test_what_cannot_be_inspected",
        "_split_kwargs": "test_sharing.py::test_push_and_load_by_id",
    },
    enum: {
        "_hashable_values_": "test_registration.py::test_the_second_list_of_values_has_it",
        "_member_map_": "test_registration.py::test_the_member_is_like_the_others",
        "_member_names_": "test_registration.py::test_the_member_is_like_the_others",
        "_name_": "test_registration.py::test_the_member_is_like_the_others",
        "_sort_order_": "test_registration.py::test_the_member_is_like_the_others",
        "_value2member_map_": "test_registration.py::test_the_member_is_like_the_others",
        "_value_": "test_registration.py::test_the_member_is_like_the_others",
    },
    torch.nn.Module: {
        "_compiled_call_impl": "inspection/test_records.py::test_a_compiled_model_runs_eagerly_and_says_so",
        "_forward_hooks": "targets/test_probes.py::test_norms_of_a_model_with_adapters",
        "_forward_pre_hooks": "targets/test_probes.py::test_norms_of_a_model_with_adapters",
        "_parameters": "targets/test_clip_length.py::test_the_model_reads_clips_of_the_length",
    },
    torch: {
        "_dynamo": "inspection/test_records.py::test_a_compiled_model_runs_eagerly_and_says_so",
        "_C": "calls/test_checkpointing.py::test_gradients_are_the_same",
        "_softmax_backward_data": "method/test_kernels.py::test_agrees_with_the_plain_formula",
    },
    torch._C: {"_current_graph_task_id": "calls/test_checkpointing.py::test_gradients_are_the_same"},
    Trainer: {
        "_finish_current_push": "hub/test_trainer_push.py::test_a_slow_hub_gets_every_checkpoint_before_it_is_removed",
        "_get_output_dir": "training/test_checkpoints.py::test_a_checkpoint_is_whole_or_not_there",
        "_load_from_checkpoint": "training/test_checkpoints.py::test_a_run_that_lacks_only_its_end_trains_no_more",
        "_prepare_inputs": "inspection/test_callback.py::test_a_step_has_the_metrics_of_all_its_batches",
        "_push_from_checkpoint": "hub/test_trainer_push.py::test_each_strategy_gives_what_the_plain_trainer_gives",
        "_save": "training/tasks/test_runs.py::test_recognition_through_the_pipeline_is_text",
        "_save_checkpoint": "training/test_checkpoints.py::test_a_checkpoint_is_whole_or_not_there",
        "_train_batch_size": "training/test_checkpoints.py::test_small_last_batches_are_kept",
    },
    PreTrainedModel: {"_from_config": "test_cli.py::test_the_model_has_no_weights"},
    PushToHubMixin: {"_upload_modified_files": "hub/test_trainer_push.py::test_the_card_of_a_model_that_pushes_itself"},
    data_loader: {"_is_accelerate_prepared": "training/test_streams.py::test_the_loader_is_prepared_once"},
}
LISTED = {name for names in GUARDS.values() for name in names}
# The metrics' two methods and those of named tuples are private in name only.
DOCUMENTED = {"_asdict", "_compute", "_info", "_replace"}


def names_in(node):
    if isinstance(node, ast.Attribute):
        return [node.attr]
    if isinstance(node, ast.ClassDef):
        return [each.name for each in node.body if isinstance(each, ast.FunctionDef)]
    return [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) and not node.level else []


def own_names(tree):
    """The private names that a module defines: functions, fields, and what it assigns to `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):  # a field of a dataclass
            yield node.target.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def test_all_are_listed():
    trees = [ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")]
    used = {name for tree in trees for node in ast.walk(tree) for name in names_in(node) if re.match(r"_[^_]", name)}
    theirs = "".join(inspect.getsource(owner) for owner in (BaseTuner, BaseTunerLayer, PeftConfigMixin, Trainer))
    own = {name for tree in trees for name in own_names(tree)} - set(re.findall(r"\b(?:def|self\.) ?(\w+)", theirs))
    own -= {"_disable_adapters"}  # which is overridden
    assert used - own - DOCUMENTED - LISTED == set()
    assert (
        LISTED - used - {"_hashable_values_"} == set()
    )  # which is a string in the package: only later Pythons have it


@pytest.mark.parametrize("name", sorted(LISTED))
def test_each_has_a_test(name):
    path, _, function = next(names[name] for names in GUARDS.values() if name in names).partition("::")
    assert re.search(rf"^def {function}\(", (TESTS / path).read_text(), re.MULTILINE)
