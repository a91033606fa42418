"""Pretrain a small Audio Spectrogram Transformer (AST) from scratch to tell the settings of synthesised scenes.

    python -m examples.backbone.pretrain --output_dir peft_softmoa/demo/ast-small

On cores that other work shares, OMP_WAIT_POLICY=PASSIVE in the environment makes it several times faster, as threads
then do not burn the time in which they wait for one another.

Nothing is read: each clip is drawn from the seed and its number. The checkpoint loads with
`AutoModelForAudioClassification.from_pretrained`, which gives it a fresh head; the heads of pretraining are not saved.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.utils.data import DataLoader, IterableDataset
from transformers import ASTConfig, ASTFeatureExtractor, ASTModel, get_cosine_schedule_with_warmup

from ..benchmark.measure import processor
from .model_card import PRETRAINING, write_card
from .scenes import SCENE_BINS, SOURCE_BINS, draw_scene, labels
from .sources import KINDS, SECONDS

PATCH = 16
FRAMES = 512
TRAINING, HELD_OUT = 0, 1  # parts of the stream, which have no clip in common


# --- data ---------------------------------------------------------------------------------------------------------


def log_mels(audio: np.ndarray, extractor: ASTFeatureExtractor) -> Tensor:
    """What ASTFeatureExtractor makes of a clip without torchaudio, all frames at once instead of one by one.

    Args:
        audio (np.ndarray): `(samples,)` float32.
        extractor (ASTFeatureExtractor): its settings.

    Returns:
        Tensor: `(frames, bins)` float32, padded or cut to the extractor's length and normalised.
    """
    frames = torch.from_numpy(audio).unfold(0, 400, 160)[: extractor.max_length]
    frames = frames - frames.mean(1, keepdim=True)
    before = torch.cat([frames[:, :1], frames[:, :-1]], 1)
    window = torch.from_numpy(extractor.window).float()
    power = torch.fft.rfft((frames - 0.97 * before) * window, 512).abs().square()
    filters = torch.from_numpy(extractor.mel_filters).float()
    mels = (power @ filters).clamp(min=1.192092955078125e-07).log()
    padded = torch.nn.functional.pad(mels, (0, 0, 0, extractor.max_length - len(mels)))
    return extractor.normalize(padded)


class SceneStream(IterableDataset):
    """Batches of synthesised scenes without end. Batch `b` has the clips `b·B ... b·B + B - 1`, in any process.

    Args:
        extractor (ASTFeatureExtractor): makes the spectrograms.
        batch_size (int): B.
        seed (int): of all clips.
        part (int): TRAINING or HELD_OUT.
        first (int): the first batch. Default: 0.
    """

    def __init__(
        self, extractor: ASTFeatureExtractor, batch_size: int, seed: int, part: int = TRAINING, first: int = 0
    ) -> None:
        self.extractor, self.batch_size, self.seed, self.part, self.first = extractor, batch_size, seed, part, first

    def clip(self, index: int) -> dict[str, Tensor]:
        """Spectrogram and labels of one clip, which depend on the seed, the part and its number alone."""
        audio, scene = draw_scene(np.random.default_rng((self.seed, self.part, index)))
        answers = {name: torch.as_tensor(answer) for name, answer in labels(scene).items()}
        return {"input_values": log_mels(audio, self.extractor), **answers}

    def batch(self, number: int) -> dict[str, Tensor]:
        start = number * self.batch_size
        clips = [self.clip(index) for index in range(start, start + self.batch_size)]
        return {name: torch.stack([clip[name] for clip in clips]) for name in clips[0]}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = torch.utils.data.get_worker_info()
        number, step = (self.first, 1) if worker is None else (self.first + worker.id, worker.num_workers)
        while True:
            yield self.batch(number)
            number += step


def echoed(
    batches: Iterable[dict[str, Tensor]], times: int, generator: random.Random, memory: int = 32
) -> Iterator[dict[str, Tensor]]:
    """Each batch when it comes, and between any two of them some again that came before.

    Synthesis takes a good part of the time, and other patches of a scene are almost another scene (data echoing,
    1907.05550).

    Args:
        batches (iterable): new ones.
        times (int): how often each is used, on average; 1 is not to use any again.
        generator (Random): chooses.
        memory (int): how many of the latest batches it chooses from. Default: 32.
    """
    latest: deque[dict[str, Tensor]] = deque(maxlen=memory)
    for batch in batches:
        latest.append(batch)
        yield batch
        for _ in range(times - 1):
            yield generator.choice(latest)


# --- model --------------------------------------------------------------------------------------------------------


def make_model(width: int, layers: int, heads: int, frames: int = FRAMES) -> ASTModel:
    """A small AST with random weights: patches of 16 by 16 that do not overlap.

    Args:
        width (int): D.
        layers (int): how many.
        heads (int): of each attention.
        frames (int): length of its input in frames of 10 ms. Default: FRAMES.
    """
    config = ASTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_length=frames,
        patch_size=PATCH,
        frequency_stride=PATCH,
        time_stride=PATCH,
    )
    return ASTModel(config)


def encode(model: ASTModel, spectrograms: Tensor, bands: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Run the transformer on some of the patches of each time.

    Without half of the patches a step takes half as long, and the heads have to do without any one of them (PaSST,
    2110.05069).

    Args:
        model (ASTModel): the transformer.
        spectrograms (Tensor): `(B, frames, bins)`.
        bands (int, optional): how many patches to keep of each time; which ones is random. Default: all.

    Returns:
        tuple: `(B, 2, D)`, AST's own two tokens; `(B, bands, columns, D)`, those of the patches; and `(bands, columns)`
        int64, which band each of them is.
    """
    tokens = model.embeddings(spectrograms)
    total, columns = model.embeddings.get_shape(model.config)
    order = torch.arange(total)[:, None].expand(total, columns)
    if bands is not None:
        order = torch.rand(total, columns).argsort(0)[:bands]
    places = 2 + order * columns + torch.arange(columns)
    hidden = torch.cat([tokens[:, :2], tokens[:, places.flatten()]], 1)
    for layer in model.layers:
        hidden = layer(hidden)
    hidden = model.layernorm(hidden)
    return hidden[:, :2], hidden[:, 2:].unflatten(1, order.shape), order


class Heads(nn.Module):
    """A linear classifier for every question about a scene.

    Args:
        width (int): D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = {name: len(edges) + 1 for name, edges in (SOURCE_BINS | SCENE_BINS).items()}
        self.kinds = nn.Linear(width, len(KINDS))
        self.active = nn.Linear(width, len(KINDS))
        self.loudest = nn.Linear(width, len(KINDS) + 1)
        self.bins = nn.ModuleDict(
            {name: nn.Linear(width, size * self.answers(name)) for name, size in self.sizes.items()}
        )

    @staticmethod
    def answers(name: str) -> int:
        """How many answers a question has in a clip: one for each kind of source, or one."""
        return len(KINDS) if name in SOURCE_BINS else 1

    def forward(self, clip: Tensor, patches: Tensor) -> dict[str, Tensor]:
        """Logits.

        Args:
            clip (Tensor): `(B, D)`, an embedding of each clip.
            patches (Tensor): `(B, bands, columns, D)`.

        Returns:
            dict[str, Tensor]: `kinds`, `(B, kinds)`; `active`, `(B, kinds, columns)`, from the mean of each column;
            `loudest`, `(B, kinds + 1, bands, columns)`; for each question `(B, bins, kinds)` or `(B, bins)`.
        """
        logits = {
            "kinds": self.kinds(clip),
            "active": self.active(patches.mean(1)).mT,
            "loudest": self.loudest(patches).movedim(3, 1),
        }
        for name, head in self.bins.items():
            answers = head(clip).unflatten(1, (self.sizes[name], self.answers(name)))
            logits[name] = answers if name in SOURCE_BINS else answers.squeeze(2)
        return logits


def losses(logits: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cross-entropy of each question, over the clips and kinds for which there is an answer."""
    result = {
        name: binary_cross_entropy_with_logits(logits[name].float(), batch[name].float())
        for name in ("kinds", "active")
    }
    for name in ("loudest", *SOURCE_BINS, *SCENE_BINS):
        # A batch may be without any answer; the mean over none would not be a number.
        total = cross_entropy(logits[name].float(), batch[name], ignore_index=-100, reduction="sum")
        result[name] = total / (batch[name] != -100).sum().clamp(min=1)
    return result


# Yes or no for ten kinds, of which one or two are right, is a small loss for a hard question; and what a patch is can
# be learnt from the patch, which is where learning begins.
WEIGHTS = {"kinds": 5.0, "active": 5.0, "loudest": 5.0}


def training_loss(model: ASTModel, heads: Heads, batch: dict[str, Tensor], bands: int | None) -> Tensor:
    """The weighted sum of all losses, for the mean of all tokens and for AST's own two tokens, both of which may be
    what a later classifier reads.
    """
    own, patches, order = encode(model, batch["input_values"], bands)
    kept = {**batch, "loudest": batch["loudest"].gather(1, order.expand(len(own), -1, -1))}
    total = torch.zeros(())
    for clip in (mean_token(own, patches), own.mean(1)):
        for name, loss in losses(heads(clip, patches), kept).items():
            total = total + WEIGHTS.get(name, 1.0) * loss
    return total / 2


def mean_token(own: Tensor, patches: Tensor) -> Tensor:
    """The mean of all tokens. `(B, D)`."""
    return torch.cat([own, patches.flatten(1, 2)], 1).mean(1)


# --- held-out clips -----------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(model: ASTModel, heads: Heads, batches: list[dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """Accuracy on clips that were not trained on.

    Returns:
        dict: for each question the `result`, its accuracy, and `chance`, that of the answer which is right most often;
        of `kinds` and `active` the mean over kinds of the average precision, and the share of what is there.
    """
    model.eval()
    outputs: dict[str, list[Tensor]] = {}
    for batch in batches:
        own, patches, _ = encode(model, batch["input_values"])
        for name, logits in heads(mean_token(own, patches), patches).items():
            outputs.setdefault(name, []).append(logits)
    model.train()
    result = {}
    for name, parts in outputs.items():
        logits, target = torch.cat(parts), torch.cat([batch[name] for batch in batches])
        if name in ("kinds", "active"):
            scores = [(logits[:, kind].flatten(), target[:, kind].flatten()) for kind in range(len(KINDS))]
            result[name] = {
                "result": float(np.mean([average_precision(*each) for each in scores])),
                "chance": target.mean().item(),
            }
        else:
            known = target != -100
            result[name] = {
                "result": (logits.argmax(1) == target)[known].double().mean().item(),
                "chance": (target[known].bincount().max() / known.sum()).item(),
            }
    return result


def average_precision(scores: Tensor, target: Tensor) -> float:
    """Mean over all that is there of the precision down to it."""
    ranked = target[scores.argsort(descending=True)].double()
    precision = ranked.cumsum(0) / torch.arange(1, len(ranked) + 1)
    return ((precision * ranked).sum() / ranked.sum().clamp(min=1)).item()


# --- the run ------------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.backbone.pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--warmup_steps", type=int, default=100)
    parser.add_argument("--weight_decay", type=float, default=0.05)
    parser.add_argument("--bands", type=int, default=4, help="patches of each time that training keeps, of 8")
    parser.add_argument("--echo", type=int, default=2, help="steps for each batch that is synthesised")
    parser.add_argument("--whole_steps", type=int, default=200, help="at the end, with all patches")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--held_out_clips", type=int, default=512)
    parser.add_argument("--workers", type=int, default=1, help="processes that synthesise")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log_steps", type=int, default=100)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    extractor = ASTFeatureExtractor(max_length=FRAMES)
    model, heads = make_model(arguments.width, arguments.layers, arguments.heads), Heads(arguments.width)
    if arguments.bf16:
        # The backward pass of torch's own attention is many times slower in bfloat16 than in float32 on a CPU.
        model.set_attn_implementation("eager")
    parameters = [*model.parameters(), *heads.parameters()]
    groups = [
        {"params": [each for each in parameters if each.ndim == 2 or each.ndim == 4]},
        {"params": [each for each in parameters if each.ndim not in (2, 4)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=arguments.learning_rate, betas=(0.9, 0.98), weight_decay=arguments.weight_decay
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, arguments.warmup_steps, arguments.steps)
    stream = SceneStream(extractor, arguments.batch_size, arguments.seed)
    loader = DataLoader(stream, batch_size=None, num_workers=arguments.workers)

    folder = Path(arguments.output_dir)
    extractor.save_pretrained(folder)
    start, running = time.perf_counter(), 0.0
    batches = echoed(loader, arguments.echo, random.Random(arguments.seed))
    for step, batch in zip(range(1, arguments.steps + 1), batches):
        bands = arguments.bands if step <= arguments.steps - arguments.whole_steps else None
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
            loss = training_loss(model, heads, batch, bands)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        running += loss.item()
        if step % arguments.log_steps == 0 or step == arguments.steps:
            spent = time.perf_counter() - start
            print(
                f"step {step}/{arguments.steps}, loss {running / ((step - 1) % arguments.log_steps + 1):.3f}, "
                f"{step * arguments.batch_size / spent:.0f} clips/s, {spent / 60:.1f} min, "
                f"about {spent / step * (arguments.steps - step) / 60:.1f} min left",
                flush=True,
            )
            running = 0.0
            model.save_pretrained(folder)  # as far as it is
    minutes = (time.perf_counter() - start) / 60
    batches.close()
    del loader, batches  # ends the workers, whose CPU time counts from then on
    cpu_minutes = sum(os.times()[:4]) / 60

    held_out = SceneStream(extractor, arguments.batch_size, arguments.seed, HELD_OUT)
    count = -(-arguments.held_out_clips // arguments.batch_size)
    metrics = evaluate(model, heads, [held_out.batch(number) for number in range(count)])
    for name, each in metrics.items():
        print(f"{name:>16}: {each['result']:.3f}, chance {each['chance']:.3f}")
    waiting = [f"OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}"] if "OMP_WAIT_POLICY" in os.environ else []
    run = {
        "command": shlex.join(
            [*waiting, "python", "-m", "examples.backbone.pretrain", *(sys.argv[1:] if argv is None else argv)]
        ),
        **vars(arguments),
        "output_dir": folder.name,
        "clips": -(-arguments.steps // arguments.echo) * arguments.batch_size,
        "minutes": minutes,
        "cpu_minutes": cpu_minutes,
        "hardware": f"{arguments.threads} threads of {processor()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "parameters": model.num_parameters(),
        "frames": FRAMES,
        "bins": model.config.num_mel_bins,
        "seconds": SECONDS,
        "held_out_clips": count * arguments.batch_size,
        "held_out": metrics,
    }
    (folder / PRETRAINING).write_text(json.dumps(run, indent=2) + "\n", newline="\n")
    write_card(folder)
    return run


if __name__ == "__main__":
    main()
