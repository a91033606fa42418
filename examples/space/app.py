"""A page that classifies a clip and shows where the experts of an adapter listen.

    ADAPTER=your-name/esc50-softmoa python app.py

takes an adapter's folder or its id on the Hub; without ADAPTER, what `peft-softmoa demo --output_dir demo` has written.
The README beside this file puts the page on a Hugging Face Space.
"""

from __future__ import annotations

import base64
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Optional

import gradio as gr
import numpy as np
import soundfile

from peft_softmoa.demo.sounds import SAMPLING_RATE, SOUNDS, synthesise
from peft_softmoa.inference import Window, classify_windows, load_classifier
from peft_softmoa.inspection.clips import read_clip
from peft_softmoa.inspection.plots import plot_reading, png
from peft_softmoa.inspection.report import short_names
from peft_softmoa.training import AudioError, decode_audio

ADAPTER = os.environ.get("ADAPTER") or "demo/adapter"
ALL = "all experts"
LONGEST = 30.0  # seconds, for models that take clips of any length
TEXT = """# What sounds here, and which experts hear it?

The [soft mixture of adapters](https://github.com/peft-softmoa/peft-softmoa) `{adapter}` names the sound. In each block
of the model, every expert reads a weighted average of the clip: the picture shows where in the clip its weights lie.
"""

if not os.environ.get("ADAPTER") and not os.path.isdir(ADAPTER):
    sys.exit(
        f"There is no adapter in {ADAPTER}. Set the environment variable ADAPTER to an adapter's folder or id on the "
        "Hub, or make one in a minute: peft-softmoa demo --output_dir demo"
    )
classifier = load_classifier(ADAPTER)  # which checks the adapter's file before it builds anything of it
if classifier.per_frame or classifier.scores == "none" or classifier.channels != "mono":
    sys.exit(f"'{ADAPTER}' is for frames, numbers or several channels, and this page is for classes of mono clips.")
longest = classifier.max_samples / classifier.sampling_rate if classifier.max_samples else LONGEST


def listen(path: Optional[str]) -> tuple[Any, ...]:
    """Classify a clip, and find where the experts read it."""
    if path is None:
        raise gr.Error("There is no clip: upload one, record one, or pick an example.", print_exception=False)
    try:
        samples = decode_audio(path, classifier.sampling_rate, longest + 1)
        seconds = len(samples) / classifier.sampling_rate
        if seconds > longest + 0.01:
            raise AudioError(path, f"longer than the {longest:.4g} s that the model takes: trim it with the scissors")
        [result] = classify_windows(classifier, [Window(path, samples, 0.0, seconds)])
        reading = read_clip(classifier.model, classifier.feature_extractor, path)
    except AudioError as error:  # without the folders of this computer
        raise gr.Error(f"{Path(path).name}: {error.reason}", print_exception=False) from error
    scores = dict(zip(classifier.label_names, result.scores.tolist()))
    maps = {found.block: found for found in reading.maps if found}
    maps = {short: maps[name] for name, short in short_names(list(maps)).items()}
    if not maps:
        gr.Warning(" ".join(reading.without_map))
        return scores, None, gr.Column(visible=False), gr.Dropdown(), gr.Dropdown(), ""
    # In the first block, tokens have seen least of their neighbours: what is read there is what sounds there.
    first, state = next(iter(maps)), (reading.clip, maps)
    return scores, state, gr.Column(visible=True), gr.Dropdown(list(maps), value=first), *draw(state, first, ALL)


def draw(state: tuple[Any, ...], block: str, expert: str) -> tuple[Any, ...]:
    """Draw where an expert of a block reads, and offer the experts that the block has."""
    clip, maps = state
    experts = [ALL, *(f"expert {number}" for number in range(len(maps[block].shares)))]
    expert = expert if expert in experts else ALL
    number = None if expert == ALL else experts.index(expert) - 1
    figure = plot_reading(maps[block], clip, f"{block}, {expert}", expert=number, width=5)
    picture = (
        f'<img src="data:image/png;base64,{base64.b64encode(png(figure)).decode()}" style="width: min(100%, 42rem); '
        f'margin: auto" alt="The clip, and below it where in the clip {expert} of {block} read">'
    )
    return gr.Dropdown(experts, value=expert), picture


def make_examples(folder: str) -> list[str]:
    """Synthesise a sound of each of the demo's classes, no longer than the model takes."""
    for label in SOUNDS:
        samples = synthesise(label, np.random.default_rng(1))[: int(longest * SAMPLING_RATE)]
        soundfile.write(f"{folder}/{label}.wav", samples, SAMPLING_RATE)
    return [f"{folder}/{label}.wav" for label in SOUNDS]


folder = tempfile.TemporaryDirectory()
with gr.Blocks(title="Soft mixture of adapters", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
    gr.Markdown(TEXT.format(adapter=Path(ADAPTER).name if os.path.isdir(ADAPTER) else ADAPTER))
    state = gr.State()
    with gr.Row():
        with gr.Column():
            clip = gr.Audio(type="filepath", label=f"Clip, up to {longest:.4g} s", buttons=[])
            button = gr.Button("Classify", variant="primary")
            gr.Examples(make_examples(folder.name), clip, label="Or a sound that was synthesised")
        label = gr.Label(num_top_classes=6, label="Class")
    with gr.Column(visible=False) as where:
        with gr.Row():
            block = gr.Dropdown(label="Block", min_width=240)
            expert = gr.Dropdown(label="Expert", min_width=240)
        picture = gr.HTML(padding=False)
    button.click(listen, clip, [label, state, where, block, expert, picture])
    for picker in (block, expert):
        picker.input(draw, [state, block, expert], [expert, picture])

if __name__ == "__main__":
    demo.launch(max_file_size="50mb", footer_links=[], theme=gr.themes.Default(primary_hue="indigo"))
