import ast
import re

import pytest
import torch
from conftest import tiny_ast_config
from huggingface_hub import ModelCard
from peft import get_peft_model
from transformers import ASTForAudioClassification

from peft_softmoa import SoftMoAConfig
from peft_softmoa.saving.card import HEADING, RESULTS, add_results


def save(folder, base_model="MIT/ast-finetuned-audioset-10-10-0.4593", **options):
    model = ASTForAudioClassification(tiny_ast_config())
    model.name_or_path = model.config._name_or_path = base_model
    model = get_peft_model(model, SoftMoAConfig(**{"num_experts": 3, **options}))
    model.save_pretrained(folder)
    return model


def test_card_of_an_adapter(tmp_path):
    save(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model == "MIT/ast-finetuned-audioset-10-10-0.4593"
    assert {"peft-softmoa", "soft-moa", "audio", "transformers"} <= set(card.data.tags)
    assert "base_model:adapter:MIT/ast-finetuned-audioset-10-10-0.4593" in card.data.tags
    assert "import peft_softmoa" in card.text and "PeftModel.from_pretrained" in card.text
    assert "adapter for `MIT/ast-finetuned-audioset-10-10-0.4593`" in card.text
    assert "3 small expert(s)" in card.text and "reads 1 slot(s)" in card.text and "(`attention`)" in card.text
    assert "2402.00828" in card.text
    assert "More Information Needed" not in card.text
    assert card.data.pipeline_tag is None


@pytest.mark.parametrize(
    "options, words",
    [
        ({"routing": "dense"}, "with dense routing:\nevery expert reads every token, and a softmax router"),
        ({"routing": "dense", "num_experts": 1}, "the only expert reads every token"),
        ({"routing": "top_k", "top_k": 3}, "the 3 best experts for each token"),
        ({"routing": "expert_choice", "expert_type": "convolution"}, "1.0 times an equal share"),
        ({"routing": "dense", "expert_type": "conformer"}, "activation SiLU after a gate), with dense routing"),
        (
            {"r_pattern": {"layers.0.attention": 2}, "scaling_pattern": {".*1.attention": 0.5}},
            "some blocks otherwise (r 2 for 'layers.0.attention', scaling 0.5 for '.*1.attention'), with soft",
        ),
    ],
)
def test_card_names_the_routing(tmp_path, options, words):
    save(tmp_path, **options)
    text = ModelCard.load(tmp_path / "README.md").text
    assert words in text and f"type {options.get('expert_type', 'bottleneck')}" in text


def test_card_of_a_classifier_shows_the_pipeline(tmp_path):
    save(tmp_path, modules_to_save=["classifier"], label_names=["a", "b"])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "audio-classification"
    assert 'pipeline("audio-classification"' in card.text


def test_a_card_that_somebody_wrote_is_kept_and_its_section_renewed(tmp_path):
    words = "# Birds\n\nTrained on our garden.\n\n## Evaluation\n\n[More Information Needed]"
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\n---\n{words}\n")
    model = save(tmp_path)
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    card.text += "\n## Thanks\n\nTo the birds.\n"
    card.save(tmp_path / "README.md")
    save(tmp_path, r=2)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.startswith(words) and card.text.rstrip().endswith("## Thanks\n\nTo the birds.")
    assert card.text.count(HEADING) == 1 and card.text.count("import peft_softmoa") == 1
    assert "r 2," in card.text and "r 6," not in card.text
    assert card.data.license == "mit" and "soft-moa" in card.data.tags


def test_no_local_path_in_the_card(tmp_path):
    (tmp_path / "secret" / "ast").mkdir(parents=True)
    save(tmp_path / "adapter", base_model=str(tmp_path / "secret" / "ast"))
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert "secret" not in text and "adapter for `ast`" in text
    assert ModelCard.load(tmp_path / "adapter" / "README.md").data.base_model is None


def test_a_config_without_weights_writes_no_card(tmp_path):
    SoftMoAConfig().save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize("classifier", [False, True])
def test_code_in_the_card_runs(tmp_path, base_folder, classifier):
    model = ASTForAudioClassification.from_pretrained(base_folder)
    options = {"modules_to_save": ["classifier"], "label_names": ["a", "b"]} if classifier else {}
    get_peft_model(model, SoftMoAConfig(**options)).save_pretrained(tmp_path)
    code = re.search(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL).group(1)
    names = {"base_model": ASTForAudioClassification.from_pretrained(base_folder)}
    code = code.replace("path/or/id/of/this/adapter", str(tmp_path))
    exec(code.replace(f'"{base_folder.name}"', f'"{base_folder}"'), names)
    loaded = names["classifier"].model if classifier else names["model"]
    assert any(".softmoa_" in name for name, _ in loaded.named_parameters())
    assert isinstance(loaded, torch.nn.Module)


def test_results_are_stated_for_the_hub_and_for_readers(tmp_path):
    save(tmp_path / "birds")
    for accuracy in (0.5, 0.91234):  # the second time in place of the first
        metrics = {"accuracy": accuracy, "f1_macro": 0.25}
        add_results(tmp_path / "birds", metrics, dataset="ashraq/esc50", split="train (fold=5)", revision="main")
    add_results(tmp_path / "birds", {"accuracy": 1.0}, dataset=str(tmp_path), split="test")
    card = ModelCard.load(tmp_path / "birds" / "README.md")
    found = {
        (each.dataset_type, each.dataset_name, each.dataset_split, each.metric_type): each.metric_value
        for each in card.data.eval_results
    }
    assert found == {
        ("ashraq/esc50", "ashraq/esc50", "train (fold=5)", "accuracy"): 0.9123,
        ("ashraq/esc50", "ashraq/esc50", "train (fold=5)", "f1"): 0.25,
        ("audiofolder", tmp_path.name, "test", "accuracy"): 1.0,
    }
    assert card.data.model_name == "birds" and card.data.datasets == ["ashraq/esc50"]
    assert card.data.to_dict()["model-index"][0]["results"][0]["dataset"]["revision"] == "main"
    assert "| ashraq/esc50 | train (fold=5) | Accuracy | 0.9123 |\n" in card.text
    assert card.text.count("## Results of training") == 1
    assert str(tmp_path) not in str(card)
    # Saving the adapter again keeps them.
    save(tmp_path / "birds")
    again = ModelCard.load(tmp_path / "birds" / "README.md")
    assert HEADING in again.text and "## Results of training" in again.text and len(again.data.eval_results) == 3


def write_words(folder):
    """A card with words around and between what was generated."""
    path = folder / "README.md"
    head, generated, rest = path.read_text().partition("<!-- peft-softmoa")
    generated, end, rest = f"{generated}{rest}".partition("<!-- end of the part -->")
    path.write_text(
        f"{head}\nWords before.\n{generated}{end}\nWords after.\n\n### Notes\n\nMore words.\n{rest}\nLast words."
    )
    return ["Words before.", "Words after.", "### Notes", "More words.", "Last words."]


def test_words_around_the_generated_parts_stay(tmp_path):
    save(tmp_path)
    words = write_words(tmp_path)
    add_results(tmp_path, {"accuracy": 0.5}, dataset="user/birds", split="test")
    with open(tmp_path / "README.md", "a") as file:
        file.write("\nWords after the results.\n")
    for options in ({"r": 2}, {"r": 2}, {"r": 4}):
        save(tmp_path, **options)
        add_results(tmp_path, {"accuracy": 0.75}, dataset="user/birds", split="test")
    text = (tmp_path / "README.md").read_text()
    places = [text.index(each) for each in [*words[:4], "Words after the results."]]
    assert places == sorted(places) and text.count("Last words.") == 1
    assert text.count(HEADING) == text.count(RESULTS) == text.count("import peft_softmoa") == 1
    assert "r 4," in text and "r 2," not in text and "0.7500" in text and "0.5000" not in text


@pytest.mark.parametrize(
    "old, new", [("The base model is unchanged.", "I changed the base model."), ("2402.00828](", "](")]
)
def test_words_in_the_generated_part_stay_too(tmp_path, old, new):
    save(tmp_path)
    path = tmp_path / "README.md"
    changed = path.read_text().replace(old, new)
    assert new in changed
    path.write_text(changed)
    for _ in range(2):
        save(tmp_path, r=2)
    text = path.read_text()
    assert new in text and "r 6," in text  # what was changed is a person's now
    assert text.count("r 2,") == 1 and text.count("<!-- peft-softmoa") == text.count("<!-- end of the part -->") == 1


def test_a_card_from_before_there_were_marks(tmp_path):
    """Earlier versions wrote the same without them; what was not changed is written anew."""
    save(tmp_path)
    add_results(tmp_path, {"accuracy": 0.5}, dataset="user/birds", split="test")
    path = tmp_path / "README.md"
    path.write_text(re.sub(r"<!-- (peft-softmoa|end of the part).*-->\n", "", path.read_text()) + "\nLast words.\n")
    assert HEADING in path.read_text() and "<!-- peft-softmoa" not in path.read_text()
    save(tmp_path, r=2)
    add_results(tmp_path, {"accuracy": 0.75}, dataset="user/birds", split="test")
    text = path.read_text()
    assert text.count(HEADING) == text.count(RESULTS) == 1 and "Last words." in text
    assert "r 2," in text and "r 6," not in text and "0.7500" in text and "0.5000" not in text


def test_what_is_cut_off_is_nobodys_words(tmp_path):
    """PEFT writes its form, and later the whole card, without care for what stops it."""
    model = save(tmp_path / "whole")
    (tmp_path / "form").mkdir()
    model.create_or_update_model_card(tmp_path / "form")
    form = (tmp_path / "form/README.md").read_text()
    for cut in range(0, len(form) + 1, 97):
        (tmp_path / "form/README.md").write_text(form[:cut])
        model.save_pretrained(tmp_path / "form")
        assert (tmp_path / "form/README.md").read_text() == (tmp_path / "whole/README.md").read_text(), form[:cut]
    whole = (tmp_path / "whole/README.md").read_text()
    begin, end = whole.index(HEADING), whole.index("<!-- end of the part -->")
    for cut in range(begin, end, 197):
        (tmp_path / "whole/README.md").write_text(
            whole[:begin].replace("---\n<!--", "---\nWords.\n<!--") + whole[begin:cut]
        )
        model.save_pretrained(tmp_path / "whole")
        text = (tmp_path / "whole/README.md").read_text()
        assert "Words." in text and text.count("The base model is unchanged") == text.count(HEADING) == 1, whole[:cut]


def test_a_card_is_written_at_once(tmp_path, monkeypatch):
    save(tmp_path)
    before = (tmp_path / "README.md").read_text()

    def stopped(card, path):
        path.write_text(str(card)[:100])
        raise OSError("No space left on device")

    monkeypatch.setattr(ModelCard, "save", stopped)
    with pytest.raises(OSError, match="No space"):
        add_results(tmp_path, {"accuracy": 0.5}, dataset="user/birds", split="test")
    assert (tmp_path / "README.md").read_text() == before


HOSTILE = 'me/"); import os; print("owned")\n```\n# `'


@pytest.mark.parametrize("classifier", [False, True])
def test_names_in_the_card_are_no_code(tmp_path, classifier):
    save(tmp_path, HOSTILE, **({"modules_to_save": ["classifier"], "label_names": ["a", "b"]} if classifier else {}))
    text = ModelCard.load(tmp_path / "README.md").text
    code = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(code) == 1 and text.count("\n```") == 2
    strings = [node.value for node in ast.walk(ast.parse(code[0])) if isinstance(node, ast.Constant)]
    assert HOSTILE in strings or not classifier
    assert "import os" not in [ast.unparse(node) for node in ast.walk(ast.parse(code[0])) if isinstance(node, ast.stmt)]
    assert 'adapter for `me/"); import os; print("owned")?????# ?`, made with' in text


def test_names_in_the_table_of_results_are_cells(tmp_path):
    save(tmp_path)
    add_results(tmp_path, {"accuracy": 0.5}, dataset="a | b\nc", split="`x`")
    rows = [line for line in (tmp_path / "README.md").read_text().splitlines() if line.startswith("| a")]
    assert rows == [r"| a \| b?c | ?x? | Accuracy | 0.5000 |"]
