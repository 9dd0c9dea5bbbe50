"""The cost of a moving average of the weights after every step: `python benchmarks/ema.py [--rounds N]`."""

import argparse
import statistics
import time
from functools import partial

import torch

import mbgd

from machine import publish
from step import ADAMW, WORKS, Work, make_data, make_model


def seconds_of_a_step(work: Work, observers: list[mbgd.EMA]) -> float:
    model = make_model(work)
    settings = mbgd.Settings(
        epochs=None,
        steps=2 * work.steps,
        batch=mbgd.Batch(size=work.minibatch),
        log_every_steps=10**9,
        noise_scale=mbgd.NoiseScale(every_steps=None),
    )
    optimizer = partial(ADAMW, fused=True)(model.parameters())
    data = mbgd.Data(train=mbgd.InMemory(*make_data(work)))
    trainer = mbgd.Trainer(model, mbgd.CrossEntropy(), optimizer, data, settings, observers=observers)
    marks: list[float] = []

    class Timed:
        def progress(self, step: int) -> None:
            marks.append(time.perf_counter())

        def log(self, step: int, metrics: object) -> None:
            pass

        def close(self, ending: object) -> None:
            pass

    trainer.fit(Timed())
    return (marks[-1] - marks[work.steps]) / (len(marks) - 1 - work.steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    lines = [
        "Seconds of a step without and with ema (decay 0.999, after every step); AdamW, fused; one worker with one",
        f"thread; medians of {rounds} runs in turn.",
        "",
        f"{'':36}  {'without':>10}  {'with':>10}  ratio",
    ]
    for work in WORKS:
        rows = [(seconds_of_a_step(work, []), seconds_of_a_step(work, [mbgd.EMA()])) for _ in range(rounds)]
        without, with_ema = (statistics.median(column) for column in zip(*rows, strict=True))
        lines.append(f"{work.name:36}  {1e6 * without:7,.0f} µs  {1e6 * with_ema:7,.0f} µs  {with_ema / without:5.2f}")
        print(lines[-1], flush=True)
    publish("ema", "\n".join(lines))


if __name__ == "__main__":
    main()
