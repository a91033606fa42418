"""Progress bars: in a terminal, on stderr; none elsewhere."""

import io
import sys
from functools import partial

import pytest
import torch
from conftest import tiny_ast_config
from datasets import IterableDataset
from peft import get_peft_model
from tqdm.auto import tqdm
from transformers import ASTForAudioClassification

import peft_softmoa.saving.contents
import peft_softmoa.training.fingerprint
from peft_softmoa import SoftMoAConfig, check_adapter
from peft_softmoa.inspection import expert_report
from peft_softmoa.training.fingerprint import fingerprint_weights
from peft_softmoa.training.rows import summarize_rows
from peft_softmoa.training.tasks import SingleLabel


class Terminal(io.StringIO):
    def __init__(self, is_terminal):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self):
        return self.is_terminal


def rows():
    for label in ("b", "a", "b"):
        yield {"label": label}


@pytest.mark.parametrize("is_terminal", [False, True])
def test_bars_are_for_terminals(is_terminal, tmp_path, monkeypatch, capsys):
    model = get_peft_model(ASTForAudioClassification(tiny_ast_config()), SoftMoAConfig())
    model.save_pretrained(tmp_path)
    inputs = {"input_values": torch.randn(2, tiny_ast_config().max_length, tiny_ast_config().num_mel_bins)}
    source = IterableDataset.from_generator(rows)
    # Those of what is mostly quick come after a second.
    for module in (peft_softmoa.training.fingerprint, peft_softmoa.saving.contents):
        monkeypatch.setattr(module, "tqdm", partial(remove_delay, tqdm))
    terminal = Terminal(is_terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    fingerprint = fingerprint_weights(model)
    summary = summarize_rows(source, ["label"], SingleLabel(), "made")
    expert_report(model, [inputs])
    check_adapter(str(tmp_path))
    shown = terminal.getvalue()
    for name in ("Fingerprint of the base model", "Reading labels of made", "Recording experts", "Checking values"):
        assert (name in shown) == is_terminal
    assert is_terminal or not shown
    assert not capsys.readouterr().out
    # What is counted does not depend on the bar.
    assert (summary.num_rows, summary.labels, summary.rows_per_shard) == (3, ("a", "b"), (3,))
    assert fingerprint == fingerprint_weights(model)


def remove_delay(bar, *args, delay, **options):
    assert delay == 1
    return bar(*args, **options)
