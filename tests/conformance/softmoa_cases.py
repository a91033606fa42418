"""A pytest plugin that puts Soft-MoA's cases into PEFT's tests of custom models.

PEFT parametrizes its tests with lists of cases. Their contents are replaced before a test is collected; tests without
any such list, which are about one method of PEFT alone, are left out.
"""

from __future__ import annotations

import sys
import types
from collections import Counter

import pytest

from peft_softmoa import SoftMoAConfig

# PEFT's tests import one class of this library, for tests of other models.
diffusers = types.ModuleType("diffusers")
diffusers.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})

OPTIONS = {
    "soft": {},
    "soft, one layer": {"target_modules": ["lin1"]},
    "soft, both layers": {"target_modules": ["lin0", "lin1"]},
    "soft, regular expression": {"target_modules": "lin0"},
    "soft, slots": {"num_slots": 3},
    # Without normalization the inputs of PEFT's tests, up to 89, leave the weights of so many experts saturated.
    "soft, more and smaller experts": {"num_experts": 15, "r": 2, "normalize": True},
    "soft, convolution": {"num_slots": 3, "expert_type": "convolution"},
    "dense, conformer": {"routing": "dense", "expert_type": "conformer"},
    "soft, a module to save": {"modules_to_save": ["lin1"]},
    "soft, a target to save": {"target_modules": ["lin0", "lin1"], "modules_to_save": ["lin1"]},
    "single adapter": {"routing": "dense", "num_experts": 1},
    "dense": {"routing": "dense"},
    "top-k": {"routing": "top_k"},
    "expert choice": {"routing": "expert_choice"},
}
CASES = [
    (f"MLP {name}", "MLP", SoftMoAConfig, {"target_modules": ["lin0"], **fields}) for name, fields in OPTIONS.items()
]


def random(**fields):
    """A config of an adapter that is not a no-op."""
    return SoftMoAConfig(**{"target_modules": ["lin0"], "init_weights": False, **fields})


ACTIVE = [
    (
        f"{name} {where}",
        "softmoa",
        SoftMoAConfig,
        *({"target_modules": [lin], "init_weights": False, **fields} for lin in lins),
    )
    for name, fields in (("soft", {}), ("dense", {"routing": "dense"}))
    for where, lins in (("same", ("lin0", "lin0")), ("different", ("lin0", "lin1")))
]
MIXED = [
    ("soft", random(), random()),
    ("soft of two sizes", random(), random(num_experts=3, r=4)),
    ("soft and dense", random(), random(routing="dense")),
]

# The lists that tests share, by their names in PEFT's module, and those of single tests, by the test.
SHARED = {
    "TEST_CASES": CASES,
    "ALL_PEFT_CONFIG_CLASSES": [SoftMoAConfig],
    "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": ACTIVE,
    "MIXED_ADAPTER_TEST_CASES": MIXED,
}
SINGLE = {
    "test_multiple_adapters_mixed_modules_to_save": [SoftMoAConfig],
    "test_multiple_adapters_mixed_modules_to_save_order_switched": [SoftMoAConfig],
    "test_adapter_name_makes_no_difference": [random(), random(routing="dense")],
    "test_mixed_adapter_batches_different_target_layers": [("soft", random(), random(target_modules=["lin1"]))],
    "test_mixed_adapter_batches_multiple_modules_to_save": [
        ("soft", random(modules_to_save=["lin1"]), random(modules_to_save=["lin1"]))
    ],
    "test_mixed_adapter_batches_partly_overlapping_target_layers": [
        ("soft", random(), random(target_modules=["lin0", "lin1"]))
    ],
}

# Tests that are about merging, which is impossible for a mixture: what it adds depends on the input.
NO_MERGING = {
    "test_merge_layers": "merges, and compares outputs",
    "test_merge_layers_fp16": "merges in float16",
    "test_merge_layers_is_idempotent": "merges twice",
    "test_merge_layers_is_deterministic_in_train_mode": "merges in training mode",
    "test_merge_layers_multi": "merges several adapters",
    "test_safe_merge": "merges with a check for infinite numbers",
    "test_disable_adapters_with_merging": "disables a merged adapter",
    "test_delete_merged_adapter_raises_without_mutation": "deletes a merged adapter",
    "test_delete_merged_adapter_only_rejects_the_merged_one": "deletes beside a merged adapter",
    "test_multiple_active_adapters_merge_and_unmerge": "merges two active adapters",
    "test_sequential_merge_matches_batch_merge": "merges one after another",
    "test_unmerge_after_sequential_merge_restores_base": "takes merges back",
    "test_mixed_adapter_batches_merged_raises": "mixes a batch with a merged adapter",
    # These run the model before: a skip here says that this part passed.
    "test_forward_float16": "merges after the forward pass, which has passed",
    "test_forward_bfloat16": "merges after the forward pass, which has passed",
    "test_forward_float16_no_autocast": "merges after the forward pass, which has passed",
    "test_forward_bfloat16_no_autocast": "merges after the forward pass, which has passed",
}
# What PEFT's tests skip by themselves, for every method that has no biases of its own to train.
OTHER_SKIPS = (
    "does not support the 'bias' argument",
    "Testing bias warnings only for LoraConfig or BOFTConfig",
    "requires the PEFT method to support training the bias directly",
    "Multiple active adapters with modules_to_save/trainable_token_indices is not supported",
)
RUNS_FIRST = {name for name, reason in NO_MERGING.items() if reason.endswith("has passed")}


def pytest_configure(config):
    sys.modules["diffusers"] = diffusers


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    """Replace the contents of the lists, once each."""
    for name, cases in SHARED.items():
        getattr(metafunc.module, name)[:] = cases
    cases = SINGLE.get(metafunc.definition.originalname)
    if cases is not None:
        [mark] = metafunc.definition.iter_markers("parametrize")
        mark.args[1][:] = cases


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Leave out the tests of other methods, and mark those that are about merging."""
    ours, others = [], []
    missing = (SINGLE.keys() | NO_MERGING.keys()) - {item.originalname for item in items}
    if missing:
        raise pytest.UsageError(f"PEFT has no tests {sorted(missing)} any more: look for what they are called now")
    for item in items:
        shared = [getattr(item.module, name) for name in SHARED]
        marks = item.iter_markers("parametrize")
        is_ours = item.originalname in SINGLE or any(mark.args[1] is cases for mark in marks for cases in shared)
        (ours if is_ours else others).append(item)
        reason = NO_MERGING.get(item.originalname)
        if reason and item.originalname not in RUNS_FIRST:
            item.add_marker(pytest.mark.skip(reason=f"merging: {reason}"))
    config.hook.pytest_deselected(items=others)
    items[:] = ours


@pytest.fixture(autouse=True)
def skip_merging(request, monkeypatch):
    """Stop where a test goes on to merge, as PEFT's tests do for its own methods that cannot."""
    reason = NO_MERGING.get(request.node.originalname)

    def stop(*args):
        assert reason is not None, f"{request.node.originalname} merges: name it in NO_MERGING"
        pytest.skip(f"merging: {reason}")

    monkeypatch.setattr(request.module, "_skip_if_merging_not_supported", stop)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A skip for a reason that is not known here is a failure."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and not any(reason in report.longrepr[2] for reason in ("merging: ", *OTHER_SKIPS)):
        report.outcome = "failed"


def pytest_terminal_summary(terminalreporter):
    """Print how many tests passed, and how many were skipped for each reason."""
    stats = terminalreporter.stats
    terminalreporter.section("PEFT's tests of custom models, with Soft-MoA")
    for outcome in ("passed", "failed", "error"):
        terminalreporter.line(f"{len(stats.get(outcome, [])):5} {outcome}")
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in stats.get("skipped", []))
    terminalreporter.line(f"{sum(reasons.values()):5} skipped:")
    for reason, times in sorted(reasons.items()):
        terminalreporter.line(f"      {times:5} {reason}")
    terminalreporter.line(f"{len(stats.get('deselected', [])):5} tests of other methods were left out")
