"""Peak memory with and without activations computed again: `python benchmarks/activation_memory.py [--rounds N]`."""

import argparse
import resource
import statistics
import subprocess
import sys
import time

import torch

import mbgd
from mbgd.models import GPT

from machine import publish

NUM_LAYERS, WIDTH, CONTEXT, MINIBATCH, NUM_STEPS = 12, 256, 256, 16, 4


def train(layers: list[str]) -> tuple[float, float]:
    """(peak memory in MiB, seconds of a step) of a small GPT in this process."""
    torch.set_num_threads(1)
    model = GPT((CONTEXT,), 256, num_layers=NUM_LAYERS, num_heads=4, width=WIDTH, dropout=0.1)
    tokens = torch.randint(256, (MINIBATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    settings = mbgd.Settings(
        steps=NUM_STEPS,
        batch=mbgd.Batch(MINIBATCH),
        noise_scale=mbgd.NoiseScale(every_steps=None),
        activation_checkpointing=mbgd.ActivationCheckpointing(layers),
    )
    data = mbgd.Data(train=mbgd.InMemory(tokens[:, :-1], tokens[:, 1:]))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    trainer = mbgd.Trainer(model, mbgd.CrossEntropy(class_dim=-1), optimizer, data, settings)
    start = time.perf_counter()
    trainer.fit()
    seconds = (time.perf_counter() - start) / NUM_STEPS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, seconds


def measured(layers: str) -> tuple[float, float]:
    done = subprocess.run([sys.executable, __file__, "--layers", layers], capture_output=True, text=True, check=True)
    peak, seconds = map(float, done.stdout.splitlines()[-1].split())
    return peak, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.layers is not None:
        print(*train([parsed.layers] if parsed.layers else []))
        return
    rows = {
        name: [measured(layers) for _ in range(parsed.rounds)] for name, layers in (("kept", ""), ("again", "blocks.*"))
    }
    (kept, kept_seconds), (again, again_seconds) = (
        [statistics.median(column) for column in zip(*row, strict=True)] for row in rows.values()
    )
    publish(
        "activation_memory",
        f"A GPT of {NUM_LAYERS} layers, width {WIDTH}, context {CONTEXT}, minibatch {MINIBATCH}; one worker with one\n"
        f"thread, medians of {parsed.rounds} processes. Peak memory of the whole process, torch included.\n\n"
        f"{'activations':16} {'peak memory':>12}  step\n"
        f"{'kept':16} {kept:8,.0f} MiB  1.00\n"
        f"{'computed again':16} {again:8,.0f} MiB  {again_seconds / kept_seconds:.2f}",
    )


if __name__ == "__main__":
    main()
