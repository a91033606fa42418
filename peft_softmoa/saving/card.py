"""The model card of an adapter: what it is and how to load it.

PEFT writes a card of its own before it saves the adapter's config. A card that is still PEFT's empty form, or a part of
it, is replaced; one that somebody has written keeps its text and gets the section at its end. What this module writes
lies between marks, with a digest that tells whether somebody has changed it since: it is then theirs, and stays.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_AUDIO_FRAME_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_CTC_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)

TAGS = ("peft-softmoa", "soft-moa", "mixture-of-experts", "audio")
HEADING = "## Mixture of adapters"
RESULTS = "## Results of training"
# Names of metrics on the Hub, by the names that `peft_softmoa.training` gives them.
METRICS = {
    "accuracy": ("accuracy", "Accuracy"),
    "f1_macro": ("f1", "Macro F1"),
    "unweighted_average_recall": ("recall", "Unweighted average recall"),
    "mean_average_precision": ("mean_average_precision", "Mean average precision"),
    "mae": ("mae", "Mean absolute error"),
    "pearson": ("pearsonr", "Pearson correlation"),
    "wer": ("wer", "Word error rate"),
    "cer": ("cer", "Character error rate"),
}
# What the Hub calls a task, by the class of the model.
RECOGNITION = "automatic-speech-recognition"
RECOGNIZERS = {*MODEL_FOR_CTC_MAPPING_NAMES.values(), *MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.values()}

# Their `load_adapter` is for another kind of adapter, so that `pipeline()` refuses the folder of one of PEFT's.
OWN_ADAPTERS = ("Wav2Vec2For", "WavLMFor", "Data2VecAudioFor")

# Around what this module writes. The first has a digest of it.
BEGIN, END = "<!-- peft-softmoa {}: saving writes this part anew, unless it was changed -->", "<!-- end of the part -->"
VERSIONS = "### Framework versions"  # which PEFT adds at the end of a card

SECTION = """{heading}

This is an adapter for `{base_model}`, made with [PEFT](https://github.com/huggingface/peft) and its plugin
`peft-softmoa`. Each adapted block ({targets}) has {num_experts} small expert(s) in parallel to it (type {expert_type},
r {r}, activation {activation}), with {routing_name} routing:
{routing_text} The base model is unchanged{length}.

```python
import peft_softmoa  # registers the method with PEFT: without this import the adapter cannot be loaded
from {library} import {loader}

{call}
```

The method: U. Cappellazzo, D. Falavigna, A. Brutti, *Efficient Fine-tuning of Audio Spectrogram Transformers via Soft
Mixture of Adapters*, Interspeech 2024, [arXiv:2402.00828](https://arxiv.org/abs/2402.00828)."""


ROUTINGS = {
    "soft": "every expert reads {num_slots} slot(s), each a soft average of all tokens (normalized: {normalize}); "
    "every token gets a soft average of the experts' outputs.",
    "dense": "every expert reads every token, and a softmax router weights them.",
    "top_k": "a softmax router weights the {top_k} best experts for each token.",
    "expert_choice": "every expert takes its best tokens of a sample, {capacity_factor} times an equal share.",
}
SINGLE = "the only expert reads every token."

# What versions before 0.2 wrote, as long as nobody has changed it.
_FIELD = re.compile(r"\\\{\w+\\\}")
UNMARKED = {
    HEADING: re.compile(
        _FIELD.sub(".*", re.escape(SECTION.replace("{heading}", HEADING)).replace(r"\{call\}", r"(?:.*\n){0,2}.*"))
    ),
    RESULTS: re.compile(rf"^{re.escape(RESULTS)}\n\n(?:\|.*\n)+", re.MULTILINE),
}


def write_model_card(config: dict[str, Any], folder: str | os.PathLike[str]) -> None:
    """Write `README.md` next to an adapter's weights, or complete the one that is there.

    Args:
        config (dict): the fields of the adapter's `SoftMoAConfig`.
        folder (str or PathLike): the adapter's folder; nothing is written if it holds no weights.
    """
    if not list(Path(folder).glob("adapter_model.*")):
        return
    path = Path(folder) / "README.md"
    form = ModelCard.from_template(ModelCardData())
    card = ModelCard.load(path) if path.exists() else form
    if _is_form(card, form):
        card.text = card.text[card.text.index(VERSIONS) :] if VERSIONS in card.text else ""
        card.text = f"{_marked(_section(config))}\n\n{card.text}"
    else:
        card.text = _with_part(card.text, HEADING, _section(config))
    card.data["library_name"] = "peft"
    # The Hub takes ids of models here, not folders of one computer.
    tags = {*(card.data.tags or []), *TAGS}
    card.data["tags"] = sorted(tag for tag in tags if not os.path.isdir(tag.partition("base_model:adapter:")[2]))
    if os.path.isdir(card.data.get("base_model") or ""):
        card.data["base_model"] = None
    if not card.data.pipeline_tag and (tag := _pipeline(config)):
        card.data["pipeline_tag"] = tag
    _save(card, path)


def remove_form(folder: str | os.PathLike[str]) -> None:
    """Remove a card in which nobody has written anything.

    Args:
        folder (str or PathLike): where it may be.
    """
    path = Path(folder) / "README.md"
    if path.exists() and _is_form(ModelCard.load(path), ModelCard.from_template(ModelCardData())):
        path.unlink()


def add_results(
    folder: str | os.PathLike[str],
    metrics: Mapping[str, float],
    *,
    dataset: str,
    split: str,
    config_name: Optional[str] = None,
    revision: Optional[str] = None,
) -> None:
    """State in an adapter's card how it did on a dataset: as the Hub's `model-index`, and as a table.

    Args:
        folder (str or PathLike): the adapter's folder, with its card.
        metrics (mapping): values of `METRICS`, by name.
        dataset (str): id on the Hub, or a local folder, of which only the name is stated.
        split (str): the split, and which rows of it.
        config_name (str, optional): configuration of the dataset.
        revision (str, optional): of the dataset.
    """
    path = Path(folder) / "README.md"
    card = ModelCard.load(path)
    is_local = os.path.isdir(dataset)
    task = card.data.pipeline_tag or "audio-classification"
    name = os.path.basename(os.path.abspath(dataset)) if is_local else dataset
    results = [
        EvalResult(
            task_type=task,
            task_name=task.replace("-", " ").capitalize(),
            dataset_type="audiofolder" if is_local else dataset,
            dataset_name=name,
            dataset_config=config_name,
            dataset_revision=revision,
            dataset_split=split,
            metric_type=METRICS[metric][0],
            metric_name=METRICS[metric][1],
            metric_value=round(float(value), 4),
        )
        for metric, value in metrics.items()
    ]
    here = (name, config_name, split)
    others = [
        each
        for each in card.data.eval_results or []
        if (each.dataset_name, each.dataset_config, each.dataset_split) != here
    ]
    card.data.model_name = Path(folder).resolve().name
    card.data.eval_results = [*others, *results]
    if not is_local:
        card.data["datasets"] = sorted({*(card.data.datasets or []), dataset})
    lines = [RESULTS, "", "| dataset | split | metric | value |", "| --- | --- | --- | --- |"]
    for each in card.data.eval_results:
        cells = (each.dataset_name, each.dataset_split, each.metric_name, f"{each.metric_value:.4f}")
        lines.append(f"| {' | '.join(_shown(str(cell)).replace('|', chr(92) + '|') for cell in cells)} |")
    card.text = _with_part(card.text, RESULTS, "\n".join(lines))
    _save(card, path)


def _save(card: ModelCard, path: Path) -> None:
    """Write a card so that it is whole or as it was."""
    written = path.with_name(".README.md.part")
    card.save(written)
    os.replace(written, path)


def _digest(part: str) -> str:
    return hashlib.sha256(part.encode(errors="replace")).hexdigest()[:12]


def _marked(part: str) -> str:
    return f"{BEGIN.format(_digest(part))}\n{part}\n{END}"


def _with_part(text: str, heading: str, part: str) -> str:
    """A card's text with a part in the place of the earlier one with that heading, or at the end."""
    new, (mark, then) = _marked(part), BEGIN.split("{}")
    pattern = rf"{re.escape(mark)}(\w+){re.escape(then)}\n({re.escape(heading)}\n.*?)\n{END}"
    parts = list(re.finditer(pattern, text, re.DOTALL))
    for found in parts:
        if _digest(found[2]) == found[1]:
            return text[: found.start()] + new + text[found.end() :]
    for found in parts:
        text = text.replace(found[0], found[2])
    # PEFT writes the card anew, too, and may be stopped in the middle.
    before, _, cut = text.rpartition(mark)
    written, versions, rest = cut.partition(VERSIONS)
    if cut and new.startswith(f"{mark}{written.rstrip()}"):
        text = f"{before}{versions}{rest}"
    # Earlier versions had no marks.
    if unmarked := UNMARKED[heading].search(text):
        return text[: unmarked.start()] + new + text[unmarked.end() :]
    return f"{text.rstrip()}\n\n{new}\n"


def _is_form(card: ModelCard, form: ModelCard) -> bool:
    """Whether a card is PEFT's empty form, or as much of it as was written before something went wrong."""
    lines = _own_words(card.text)
    for whole in (form.text, f"---\n{card.data.to_yaml()}\n---\n{form.text}"):
        expected = _own_words(whole)[: len(lines)]
        if lines[:-1] == expected[:-1] and (not lines or expected[-1].startswith(lines[-1])):
            return True
    return False


def _own_words(text: str) -> list[str]:
    """Lines of a card, but for the versions that PEFT puts at its end, and what transformers says of its empty form."""
    lines = text.partition(VERSIONS)[0].splitlines()
    return [line for line in lines if line.strip() and "card has been automatically generated" not in line]


def _literal(text: str) -> str:
    """A string as Python writes it, in double quotes if it is an ordinary one."""
    return f'"{text}"' if text.isprintable() and not {'"', "\\"} & set(text) else repr(text)


def _shown(text: str) -> str:
    """A string for a line of Markdown, between backticks or in a cell."""
    return "".join(each if each.isprintable() and each != "`" else "?" for each in text)


def _pipeline(config: Mapping[str, Any]) -> Optional[str]:
    """The pipeline of transformers that runs an adapter; there is none for frames, nor for several channels."""
    if config.get("num_channels") is not None:
        return None
    base = (config.get("auto_mapping") or {}).get("base_model_class")
    if base in RECOGNIZERS:
        return RECOGNITION
    is_framed = base in MODEL_FOR_AUDIO_FRAME_CLASSIFICATION_MAPPING_NAMES.values()
    return "audio-classification" if config["label_names"] and not is_framed else None


def _section(config: dict[str, Any]) -> str:
    base_model = config["base_model_name_or_path"] or "the base model"
    if os.path.isdir(base_model):
        base_model = os.path.basename(base_model.rstrip("/"))
    base_class = (config.get("auto_mapping") or {}).get("base_model_class") or ""
    tag = None if base_class.startswith(OWN_ADAPTERS) else _pipeline(config)
    if tag == RECOGNITION:
        library, loader = "transformers", "pipeline"
        # By itself the pipeline takes the tokenizer of the base model.
        call = 'adapter = "path/or/id/of/this/adapter"\n'
        call += f'recognizer = pipeline("{RECOGNITION}", model=adapter, tokenizer=adapter, feature_extractor=adapter)'
    elif tag:
        library, loader = "transformers", "AutoFeatureExtractor, pipeline"
        call = f"feature_extractor = AutoFeatureExtractor.from_pretrained({_literal(base_model)})\n"
        call += 'adapter = "path/or/id/of/this/adapter"\n'
        call += 'classifier = pipeline("audio-classification", model=adapter, feature_extractor=feature_extractor)'
    else:
        library, loader = "peft", "PeftModel"
        call = 'model = PeftModel.from_pretrained(base_model, "path/or/id/of/this/adapter")'
    targets = config["target_modules"] or "chosen by the placement"
    if not isinstance(targets, str):
        targets = ", ".join(f"`{_shown(target)}`" for target in sorted(targets))
    routing = SINGLE if config["num_experts"] == 1 and config["routing"] == "dense" else ROUTINGS[config["routing"]]
    seconds, channels = config["max_length_seconds"], config.get("num_channels")
    reads = "" if seconds is None else f", but reads clips of {seconds:g} s, and cuts longer ones"
    if channels is not None:
        number = channels if config["channel_embedding"] else "any number of"
        reads += f"; it reads each channel by itself, and the {number} channels of a clip meet in the experts"
    names = ("num_experts", "expert_type", "r", "activation")
    return SECTION.format(
        heading=HEADING,
        base_model=_shown(base_model),
        targets=targets,
        library=library,
        loader=loader,
        call=call,
        routing_name=config["routing"],
        routing_text=routing.format_map(config),
        length=reads,
        **{name: config[name] for name in names},
    )
