"""Routing in order of time learns what depends on the past."""

import json

import pytest
import torch

from examples.order_in_time import COMPARISONS, UNKNOWN, main, make_streams, train


def test_labels_are_the_classes_of_the_last_markers(monkeypatch):
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: torch.zeros(shape))  # no noise
    for task in COMPARISONS:
        frames, labels = make_streams(task, 8, 60, torch.Generator().manual_seed(0))
        loudest = frames.max(dim=-1)
        assert (loudest.values > 0).sum(dim=1).eq(1).all() == (task == "one marker")
        for sounds, classes, known in zip(loudest.values, loudest.indices, labels):
            latest = UNKNOWN
            for sound, which, label in zip(sounds.tolist(), classes.tolist(), known.tolist()):
                latest = which if sound > 0 else latest
                assert label == latest


@pytest.mark.parametrize("task, margin", [("one marker", 0.5), ("markers that follow one another", 0.05)])
def test_the_past_is_learned(task, margin):
    """By a margin that is far below what all seeds of the study have."""
    first, second = (train(task, adapter, seed=0, steps=100) for adapter in COMPARISONS[task])
    assert first[0] > second[0] + margin
    assert abs(first[1] - second[1]) <= 8  # parameters: the bias of the gate, or the rates


def test_the_study_writes_lines(tmp_path, capsys):
    file = tmp_path / "study.jsonl"
    main(["--seeds", "2", "--steps", "1", "--output_file", str(file)])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["seed"], row["adapter"]) for row in rows[:2]] == [(0, name) for name in COMPARISONS["one marker"]]
    assert len(rows) == 8
    assert capsys.readouterr().out.count("(95% interval over the seeds)") == 2
