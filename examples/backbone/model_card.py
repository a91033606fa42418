"""The model card of a pretrained backbone, from what pretraining and the probe measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PRETRAINING, PROBE, NOTES = "pretraining.json", "probe.json", "notes.md"

TEMPLATE = """---
license: apache-2.0
library_name: transformers
pipeline_tag: audio-classification
tags:
- audio
- synthetic
---

# A small Audio Spectrogram Transformer, pretrained on synthesised sounds

{parameters:,} parameters: {layers} layers of width {width} on patches of 16 by 16, {frames} frames of 10 ms and \
{bins} mel bins. It has never heard a recording. It was trained from scratch to tell a synthesiser's settings from \
what came out: which kinds of sources there are and when, their pitch, spectrum, rhythm and envelope, the room, the \
noise behind them.

It is a stand-in for a pretrained model where none can be downloaded: to compare ways of fine-tuning, to test, to \
teach. It is not good for classifying sounds as it is, for speech or music, or in place of a model that was pretrained \
on recordings. Clips are best {seconds:g} s long, as in training.

```python
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

feature_extractor = AutoFeatureExtractor.from_pretrained("{folder}")
model = AutoModelForAudioClassification.from_pretrained("{folder}", num_labels=10)  # with a fresh head
```

## Training

```
{command}
```

{steps:,} steps of {batch_size} clips, {clips:,} of them different, seed {seed}; {minutes:.0f} minutes \
({cpu_minutes:.0f} minutes of CPU time) on {hardware}; {versions}. Nothing but the seed goes in.

Held-out clips from the same synthesiser, {held_out_clips:,} of them. `kinds` and `active` (which kinds of sources are \
in a clip, and when) are average precision, beside the share of what is there; all others are accuracy, beside that of \
the answer that is right most often.

| question | result | chance |
|---|---|---|
{metrics}

Not learnt, or hardly, that is less than 0.02 above chance: {unlearnt}.
"""

PROBE_TEMPLATE = """
## What it knows of recordings

`python -m examples.backbone.probe path/to/{data}` measured the accuracy of logistic regression on the mean of all \
tokens, in {count}-fold cross-validation on the {clips} recordings of {classes} classes in that folder, with 95% \
intervals from the folds:

| embedding | accuracy | interval |
|---|---|---|
{rows}

Read this way, the network {verdict} simple statistics of its own input.
"""


def write_card(folder: str | Path) -> None:
    """Write README.md into a folder with a checkpoint, from pretraining.json and, if they are there, probe.json and
    notes.md.

    Args:
        folder (str or Path): of the checkpoint.
    """
    folder = Path(folder)
    run: dict[str, Any] = json.loads((folder / PRETRAINING).read_text())
    rows = [f"| {name} | {each['result']:.3f} | {each['chance']:.3f} |" for name, each in run["held_out"].items()]
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    unlearnt = [name for name, each in run["held_out"].items() if each["result"] < each["chance"] + 0.02]
    more = {"versions": versions, "metrics": "\n".join(rows), "unlearnt": ", ".join(unlearnt) or "none"}
    text = TEMPLATE.format(**{**run, **more, "folder": folder.name})
    if (folder / PROBE).exists():
        probe = json.loads((folder / PROBE).read_text())
        scores = probe["scores"]
        rows = [
            f"| {name} | {each['mean']:.1%} | {each['low']:.1%} to {each['high']:.1%} |"
            for name, each in scores.items()
        ]
        *_, gain = scores.values()
        unclear = "is not shown to give more than"
        verdict = "gives more than" if gain["low"] > 0 else "gives less than" if gain["high"] < 0 else unclear
        more = {"count": len(gain["folds"]), "rows": "\n".join(rows), "verdict": verdict}
        text += PROBE_TEMPLATE.format(**{**probe, **more})
    if (folder / NOTES).exists():
        text += "\n" + (folder / NOTES).read_text()
    (folder / "README.md").write_text(text, newline="\n")
