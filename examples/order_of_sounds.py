"""Which experts hear the order of two sounds: a task that is made here, in minutes on two cores.

    python examples/order_of_sounds.py --seeds 5

A clip is a spectrogram with a low and a high sound at a random place. Its class is which of the two comes first: both
classes have the same sounds, as long and as loud, so that only their order tells. The base model is a small Whisper
encoder with random weights, which stay frozen; adapters of as many parameters learn on top of it, with the head.

The encoder's position embeddings are set to zero. With them, experts that read each token alone can tell the order,
too: what a low sound adds may grow with its place, what a high one adds fall, and the head reads the sum. `--positions`
keeps them.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from method_comparison.intervals import interval
from peft import get_peft_model
from torch import Tensor
from transformers import WhisperConfig, WhisperForAudioClassification

from peft_softmoa import SoftMoAConfig

BANDS, FRAMES = 8, 48  # of a spectrogram; the encoder has a token for each two frames
BASE = WhisperConfig(
    d_model=32,
    encoder_layers=1,
    encoder_attention_heads=2,
    encoder_ffn_dim=64,
    num_mel_bins=BANDS,
    max_source_positions=FRAMES // 2,
    init_std=0.2,
    classifier_proj_size=16,
    num_labels=2,
)
BUDGET = 4_000  # trainable parameters, with the head
METHODS: dict[str, dict[str, Any]] = {
    "bottleneck": {"routing": "dense"},
    "convolution": {"routing": "dense", "expert_type": "convolution"},
    "conformer": {"routing": "dense", "expert_type": "conformer"},
}


def make_clips(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clips with a low and a high sound.

    Args:
        number (int): how many.
        generator (Generator): what draws bands, lengths, places and noise.

    Returns:
        tuple[Tensor, Tensor]: the spectrograms, `(number, BANDS, FRAMES)`, and the classes, 1 if the low one is first.
    """

    def draw(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (number, 1, 1), generator=generator)

    labels = draw(0, 1)
    low, high = draw(0, 3), draw(4, 7)
    first, second, gap = draw(6, 10), draw(6, 10), draw(0, 4)
    # Where the pair begins does not depend on which sound is first.
    begin = (torch.rand(number, 1, 1, generator=generator) * (FRAMES - first - gap - second)).long()
    bands, frames = torch.arange(BANDS).view(1, -1, 1), torch.arange(FRAMES).view(1, 1, -1)
    clips = 0.1 * torch.randn(number, BANDS, FRAMES, generator=generator)
    for start, length, band in (
        (begin, first, torch.where(labels == 1, low, high)),
        (begin + first + gap, second, torch.where(labels == 1, high, low)),
    ):
        clips += ((bands == band) & (frames >= start) & (frames < start + length)).float()
    return clips, labels.flatten()


def train(
    seed: int, positions: bool = False, steps: int = 300, batch_size: int = 64, **options: Any
) -> tuple[float, int]:
    """Train an adapter on clips, all of them new, and test it.

    Args:
        seed (int): of the base model, the clips and the adapter.
        positions (bool): whether the base model knows where in a clip its tokens are. Default: False.
        steps (int): number of batches. Default: 300.
        batch_size (int): clips in each. Default: 64.
        options: fields of the adapter's config; `r` is found.

    Returns:
        tuple[float, int]: the accuracy on 1,000 other clips, and the number of trainable parameters.
    """
    torch.manual_seed(seed)
    base = WhisperForAudioClassification(BASE)
    if not positions:
        torch.nn.init.zeros_(base.encoder.embed_positions.weight)
    generator = torch.Generator().manual_seed(seed)
    tested, labels = make_clips(1000, generator)
    fields: dict[str, Any] = {"num_experts": 2, "modules_to_save": ["projector", "classifier"], **options}
    model = get_peft_model(base, SoftMoAConfig.for_budget(base, BUDGET, **fields)).train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        clips, classes = make_clips(batch_size, generator)
        optimizer.zero_grad()
        model(clips, labels=classes).loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        found = torch.cat([model.eval()(part).logits.argmax(dim=-1) for part in tested.split(100)])
    return (found == labels).double().mean().item(), model.get_nb_trainable_parameters()[0]


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    """Train each method with each seed, and print accuracies and their differences to the bottleneck."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="Number of seeds. Default: 5.")
    parser.add_argument("--steps", type=int, default=300, help="Batches of 64 clips for each. Default: 300.")
    parser.add_argument("--positions", action="store_true", help="Keep the base model's position embeddings.")
    given = parser.parse_args(arguments)
    accuracies: dict[str, list[float]] = {name: [] for name in METHODS}
    sizes = {}
    for seed in range(given.seeds):
        for name, options in METHODS.items():
            started = time.perf_counter()
            accuracy, sizes[name] = train(seed, given.positions, given.steps, **options)
            accuracies[name].append(100 * accuracy)
            print(f"seed {seed}, {name}: {100 * accuracy:.1f} % in {time.perf_counter() - started:.0f} s", flush=True)
    print("\naccuracy in %, and its difference to the bottleneck of the same seed, with 95% intervals")
    for name, values in accuracies.items():
        own = interval(values, 0.0)
        paired = interval([value - other for value, other in zip(values, accuracies["bottleneck"])], 0.0)
        halves = [f" ± {each.half:.1f}" if each.half is not None else "" for each in (own, paired)]
        print(f"{name}, {sizes[name]:,} parameters: {own.mean:.1f}{halves[0]}, {paired.mean:+.1f}{halves[1]}")
    return accuracies


if __name__ == "__main__":
    main()
