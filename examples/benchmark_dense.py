#!/usr/bin/env python
"""Time and memory of Dense-MoA: stacked, as in this package, and literally, as a loop over the experts and a stack.

    python examples/benchmark_dense.py

Both compute the same, forward and backward, on tokens (8, 590, 768) as in a batch of AudioSet clips. The times are
medians of interleaved runs. The memory is the growth of the process's peak, each measured in a process of its own.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from peft_softmoa import SoftMoAConfig
from peft_softmoa.mixture import add_mixture, build_mixture

SHAPE = (8, 590, 768)


def implementations(num_experts: int, r: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Both ways, with the same weights."""
    torch.manual_seed(0)
    config = SoftMoAConfig(routing="dense", num_experts=num_experts, r=r, init_weights=False)
    router, experts = build_mixture(config, SHAPE[-1], SHAPE[-1])

    def stacked(tokens: Tensor) -> Tensor:
        return add_mixture(torch.zeros_like(tokens), tokens, router, experts)[0]

    def literal(tokens: Tensor) -> Tensor:
        gates = (tokens @ router.weight + router.bias).softmax(dim=-1)
        outputs = []
        for n in range(num_experts):
            hidden = experts.activation(tokens @ experts.down_weight[n] + experts.down_bias[n])
            outputs.append(hidden @ experts.up_weight[n] + experts.up_bias[n])
        return (torch.stack(outputs, dim=-1) * gates.unsqueeze(2)).sum(dim=-1)

    return {"stacked": stacked, "literal": literal}


def run(function: Callable[[Tensor], Tensor], tokens: Tensor) -> float:
    """Seconds of one forward and backward pass."""
    tokens.grad = None
    start = time.perf_counter()
    output = function(tokens)
    output.backward(torch.ones_like(output))
    return time.perf_counter() - start


def peak_memory(name: str, num_experts: int, r: int) -> float:
    """Growth of this process's peak memory by one pass, in MiB."""
    function = implementations(num_experts, r)[name]
    tokens = torch.randn(SHAPE, requires_grad=True)
    run(function, tokens.detach()[:1, :8].clone().requires_grad_())  # the libraries' own memory
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(function, tokens)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_experts", type=int, nargs="+", default=[2, 7, 15])
    parser.add_argument("--r", type=int, default=2, help="width of each bottleneck; 2 is what 905,000 gives 15 experts")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only_memory_of", choices=["stacked", "literal"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.only_memory_of:
        print(peak_memory(arguments.only_memory_of, arguments.num_experts[0], arguments.r))
        return

    # Before this process grows: on Linux a new process inherits the peak of the one that starts it.
    memory = {
        (num_experts, name): float(
            subprocess.check_output(
                [sys.executable, __file__, "--num_experts", str(num_experts), "--r", str(arguments.r)]
                + ["--threads", str(arguments.threads), "--only_memory_of", name]
            )
        )
        for num_experts in arguments.num_experts
        for name in ("stacked", "literal")
    }
    print(f"tokens {SHAPE}, r={arguments.r}, {arguments.threads} threads, medians of {arguments.repeats} runs")
    print("experts  stacked ms  literal ms  ratio  stacked MiB  literal MiB")
    for num_experts in arguments.num_experts:
        functions = implementations(num_experts, arguments.r)
        tokens = torch.randn(SHAPE, requires_grad=True)
        times: dict[str, list[float]] = {name: [] for name in functions}
        for repeat in range(arguments.repeats + 1):
            for name, function in functions.items():
                seconds = run(function, tokens)
                if repeat > 0:
                    times[name].append(1000 * seconds)
        stacked, literal = (statistics.median(times[name]) for name in functions)
        print(
            f"{num_experts:7d}  {stacked:10.1f}  {literal:10.1f}  {literal / stacked:5.1f}"
            f"  {memory[num_experts, 'stacked']:11.0f}  {memory[num_experts, 'literal']:11.0f}"
        )


if __name__ == "__main__":
    main()
