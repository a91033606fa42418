"""Regular expressions of a config: none costs much time or memory, and only this package's limits meet them."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import tiny_ast_config
from families import build
from peft import PeftModel, get_peft_model
from transformers import ASTForAudioClassification

from peft_softmoa import SoftMoAConfig
from peft_softmoa.targets.choice import find_targets

# Each takes over 1 s or 200 MB where nothing bounds it, or has what could.
BOMBS = {
    "full case": "(?fi)(?:" + "[ß-\uffff]" * 18 + "){900}",
    "repeated": "a{10000000}",
    "repeated at least": "a{10000000,}",
    "repeated group": "(ab){1000000}",
    "repeated class": "[ab]{10000000}",
    "repeated long group": "(" + "ab" * 2000 + "){5000}",
    "repetitions in repetitions": "((((a{9}){9}){9}){9}){99}",
    "twenty deep": "(?:" * 20 + "a" + "){2}" * 20,
    "spaces in the count": "(?x)a{ 1000 0000 }",
    "comment in the count": "(?x)a{1#}\n0000000}",
    "lookbehind": "(?<=(a{1000}){1000})b",
    "many digits": "a{" + "9" * 5000 + "}",
    "recursion": "(?R)?a",
    "recursion by name": "(?<a>(?&a)(?&a)|x)",
    "recursion by Python's name": "(?P<a>(?P>a)(?P>a)|x)",
    "recursion by number": "((?1)(?1)|x)",
    "fuzzy": "(?:" + "a" * 9000 + "){e<=99}",
    "exponential": "((.|[a-z])+)+[A-Z]",
    "exponential counts": "(?:" * 20 + "a" + "){0,2}" * 20,
    "polynomial": ".*" * 30 + "[A-Z]",
    "deep": "(?:" * 2400 + "a" + ")" * 2400,
    "lookbehinds": "(?<=" * 1600 + "a" + ")" * 1600,
    "alternatives": "|".join(f"{number:04}" for number in range(1990)),
    "nested alternatives": "(a|" * 2000 + "b" + ")" * 2000,
    "large class": "[" + "".join(chr(0x100 + 2 * index) for index in range(9990)) + "]",
    "large class in any case": "(?i)" + "[\0-\U0010ffff]" * 2400,
    "many counts": "a{2}" * 2400,
    "optional": "a?" * 3000 + "a" * 3000,
}
SCRIPT = """
import json, resource, sys, time, warnings
import torch
from conftest import tiny_ast_config
from peft import PeftConfig, get_peft_model
from peft_softmoa import SoftMoAConfig
from transformers import ASTForAudioClassification

warnings.simplefilter("ignore")
model = ASTForAudioClassification(tiny_ast_config())
get_peft_model(model, SoftMoAConfig()).unload()
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**30,) * 2)
for line in sys.stdin:
    expression = json.loads(line)
    for fields in ({"target_modules": expression}, {"target_modules": ["attention"], "exclude_modules": expression}):
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        try:
            # What PEFT and transformers make of a file.
            get_peft_model(model, PeftConfig.from_peft_type(peft_type="SOFTMOA", **fields)).unload()
            outcome = "works"
        except ValueError as error:
            outcome = "refused"
        except MemoryError:
            outcome = "no memory"
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(json.dumps([outcome, time.process_time() - started, grown]), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux tells it")
def test_no_expression_takes_long_or_much_memory():
    ordinary = r".*\.1\.attention"
    lines = "".join(f"{json.dumps(expression)}\n" for expression in [*BOMBS.values(), ordinary])
    path = "import sys; sys.path[:0] = " + repr([path for path in sys.path if path]) + "\n"
    done = subprocess.run([sys.executable, "-c", path + SCRIPT], input=lines, capture_output=True, text=True)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == 2 * len(BOMBS) + 2, done.stderr
    slow = {
        (name, field): result
        for (name, field), result in zip(((name, field) for name in BOMBS for field in ("target", "exclude")), results)
        if result[0] == "no memory" or result[1] > 1 or result[2] > 200
    }
    assert slow == {}
    assert [result[0] for result in results[-2:]] == ["works", "works"]


@pytest.mark.parametrize("name", [name for name in BOMBS if name.startswith(("repe", "spaces", "comment", "recur"))])
def test_such_expressions_are_refused_with_the_field(name):
    with pytest.raises(ValueError, match="^`exclude_modules` must be None, names, or a regular expression .*, got"):
        SoftMoAConfig(exclude_modules=BOMBS[name])


@pytest.mark.parametrize(
    "expression", [r".*\.layers\.(\d{1,2})\.mlp", r".*(attention|mlp)", r"(\w+\.){2,}mlp", r".*\.[01]\.(?!mlp)\w+"]
)
def test_ordinary_expressions_are_allowed(expression):
    assert SoftMoAConfig(target_modules=expression).target_modules == expression


# Python's own `re` does not know it, and so fails if it is asked.
NOT_PYTHONS = r".*(?|decoder|encoder)\.layers\.\d+\.self_attn"


def test_peft_never_matches_an_expression(tmp_path):
    """It would, without a limit of time, when it saves an adapter of a model with text embeddings."""
    config = SoftMoAConfig(
        routing="dense", target_modules=NOT_PYTHONS, exclude_modules=r".*(?|(decoder))\..*", init_weights=False
    )
    model = get_peft_model(build("Whisper, speech to text"), config)
    model.save_pretrained(tmp_path)
    assert config.target_modules == NOT_PYTHONS  # the same config may be for another model
    expected = model.state_dict()
    again = PeftModel.from_pretrained(build("Whisper, speech to text"), tmp_path).state_dict()
    assert again.keys() == expected.keys() and any(".encoder." in name for name in again if "softmoa" in name)
    assert all(torch.equal(again[name], expected[name]) for name in again if "softmoa" in name)
    through_transformers = build("Whisper, speech to text")
    through_transformers.add_adapter(config)
    through_transformers.save_pretrained(tmp_path / "transformers")
    assert isinstance(json.loads((tmp_path / "transformers/adapter_config.json").read_text())["target_modules"], list)


@pytest.mark.parametrize("embeddings", [None, "embed_tokens"])
def test_an_expression_may_serve_several_models(embeddings):
    config = SoftMoAConfig(target_modules=r".*layers\.\d+\.attention")
    for layers in (1, 3):
        model = ASTForAudioClassification(tiny_ast_config(num_hidden_layers=layers))
        if embeddings:
            model.add_module(embeddings, torch.nn.Embedding(2, 2))
        adapted = get_peft_model(model, config)
        names = {f"audio_spectrogram_transformer.layers.{index}.attention" for index in range(layers)}
        assert set(adapted.targeted_module_names) == names
        assert adapted.peft_config["default"].target_modules == (names if embeddings else config.target_modules)


def test_names_that_an_expression_matches_may_not_mean_others_too():
    """Names match endings of names, too."""

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = torch.nn.Linear(4, 4)
            self.inner = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(4, 4)})

    with pytest.raises(ValueError, match="`target_modules='lm_head'` matches 'lm_head', but not 'inner.lm_head'"):
        get_peft_model(Both(), SoftMoAConfig(target_modules="lm_head", routing="dense"))
    model = get_peft_model(Both(), SoftMoAConfig(target_modules=r".*lm_head", routing="dense"))
    assert len([name for name, _ in model.named_modules() if name.endswith("softmoa_mixture")]) == 2
    names = ["inner.lm_head"]
    assert list(find_targets(SoftMoAConfig(target_modules=names, routing="dense"), Both())) == names


# Names are matched, too: PEFT makes all endings of each, and puts some into expressions of Python's `re`.
NAMES = {
    "many dots": {"target_modules": [f"a{index}" for index in range(19)] + ["a." * 20_000 + "a"]},
    "many": {"target_modules": [f"a{index}" for index in range(200_000)]},
    "long": {"modules_to_save": [f"{index:0>4000}" for index in range(256)]},
    "long patterns": {"layers_pattern": [f"a{index:0>4000}" for index in range(250)], "layers_to_transform": [0]},
    "many indices": {"layers_to_transform": list(range(500_000)), "layers_pattern": "layers"},
    "nested": {"auto_mapping": {"a": {"a": {"a": 1}}}},
}


@pytest.mark.parametrize("name", NAMES)
def test_names_are_bounded_too(name):
    """A config may hold as much as a file may."""
    with pytest.raises(ValueError, match=f"^`{list(NAMES[name])[0]}` must be None.*, got .{{,2000}}$"):
        SoftMoAConfig(**NAMES[name])
