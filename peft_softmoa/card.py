"""The model card of an adapter: what it is and how to load it.

PEFT writes a card of its own before it saves the adapter's config. A card that is still PEFT's empty form is replaced;
one that somebody has written keeps its text and gets the section at its end.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

TAGS = ("peft-softmoa", "soft-moa", "mixture-of-experts", "audio")
HEADING = "## Mixture of adapters"

SECTION = """{heading}

This is an adapter for `{base_model}`, made with [PEFT](https://github.com/huggingface/peft) and its plugin
`peft-softmoa`. Each adapted block ({targets}) has {num_experts} small expert(s) in parallel to it (type {expert_type},
r {r}, activation {activation}), with {routing_name} routing:
{routing_text} The base model is unchanged.

```python
import peft_softmoa  # registers the method with PEFT: without this import the adapter cannot be loaded
from {library} import {loader}

{call}
```

The method: U. Cappellazzo, D. Falavigna, A. Brutti, *Efficient Fine-tuning of Audio Spectrogram Transformers via Soft
Mixture of Adapters*, Interspeech 2024, [arXiv:2402.00828](https://arxiv.org/abs/2402.00828).
"""


ROUTINGS = {
    "soft": "every expert reads {num_slots} slot(s), each a soft average of all tokens (normalized: {normalize}); "
    "every token gets a soft average of the experts' outputs.",
    "dense": "every expert reads every token, and a softmax router weights them.",
    "top_k": "a softmax router weights the {top_k} best experts for each token.",
    "expert_choice": "every expert takes its best tokens of a sample, {capacity_factor} times an equal share.",
}
SINGLE = "the only expert reads every token."


def write_model_card(config: dict[str, Any], folder: str | os.PathLike) -> None:
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
    if _own_words(card.text) == _own_words(form.text):
        card.text = _section(config)
    elif HEADING in card.text:
        before, _, after = card.text.partition(HEADING)
        _, heading, rest = after.partition("\n## ")
        card.text = before + _section(config) + heading + rest
    else:
        card.text = f"{card.text.rstrip()}\n\n{_section(config)}"
    card.data["library_name"] = "peft"
    # The Hub takes ids of models here, not folders of one computer.
    tags = {*(card.data.tags or []), *TAGS}
    card.data["tags"] = sorted(tag for tag in tags if not os.path.isdir(tag.partition("base_model:adapter:")[2]))
    if os.path.isdir(card.data.get("base_model") or ""):
        card.data["base_model"] = None
    if config["label_names"] and not card.data.pipeline_tag:
        card.data["pipeline_tag"] = "audio-classification"
    card.save(path)


def _own_words(text: str) -> list[str]:
    """Lines of a card, but for the versions that PEFT puts at its end."""
    return [line for line in text.partition("### Framework versions")[0].splitlines() if line.strip()]


def _section(config: dict[str, Any]) -> str:
    base_model = config["base_model_name_or_path"] or "the base model"
    if os.path.isdir(base_model):
        base_model = os.path.basename(base_model.rstrip("/"))
    if config["label_names"]:
        library, loader = "transformers", "AutoFeatureExtractor, pipeline"
        call = f'feature_extractor = AutoFeatureExtractor.from_pretrained("{base_model}")\n'
        call += 'adapter = "path/or/id/of/this/adapter"\n'
        call += 'classifier = pipeline("audio-classification", model=adapter, feature_extractor=feature_extractor)'
    else:
        library, loader = "peft", "PeftModel"
        call = 'model = PeftModel.from_pretrained(base_model, "path/or/id/of/this/adapter")'
    targets = config["target_modules"] or "chosen by the placement"
    if not isinstance(targets, str):
        targets = ", ".join(f"`{target}`" for target in sorted(targets))
    routing = SINGLE if config["num_experts"] == 1 and config["routing"] == "dense" else ROUTINGS[config["routing"]]
    names = ("num_experts", "expert_type", "r", "activation")
    return SECTION.format(
        heading=HEADING,
        base_model=base_model,
        targets=targets,
        library=library,
        loader=loader,
        call=call,
        routing_name=config["routing"],
        routing_text=routing.format_map(config),
        **{name: config[name] for name in names},
    )
