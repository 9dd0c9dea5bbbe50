"""The library with what train.py has: `torchrun --standalone --nproc-per-node 2 examples/library_resume.py FOLDER`.

Ctrl-C or SIGTERM saves and ends with exit code 75; the same command goes on to the same bits.
"""

import sys
from pathlib import Path

import torch

import mbgd


def main(folder: Path) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(1000, 20)
    targets = inputs @ torch.randn(20, 1) + 0.1 * torch.randn(1000, 1)
    model = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    train, held_out = mbgd.InMemory(inputs[:900], targets[:900]), mbgd.InMemory(inputs[900:], targets[900:])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    settings = mbgd.Settings(epochs=40, batch=mbgd.Batch(size=64), schedule=mbgd.schedule.Constant(num_steps=600))
    with mbgd.start_workers() as workers:
        data = mbgd.Data(train=train, evaluation=held_out)
        early = mbgd.EarlyStopping("eval/loss", patience=3)
        trainer = mbgd.Trainer(model, mbgd.MeanSquaredError(), optimizer, data, settings, workers, observers=[early])
        checkpoints = mbgd.Checkpoints(folder, trainer, mbgd.Checkpoint(every_seconds=60, best="eval/loss"))
        checkpoints.resume()
        tracker = mbgd.JsonLines(folder / "metrics.jsonl") if workers.is_main else None
        try:
            result = trainer.fit(tracker, checkpoints, mbgd.StopOnSignal(workers))
        except mbgd.Preempted:
            sys.exit(75)
        if workers.is_main:
            ended = f"stopped by {result.stopped_by}" if result.stopped_by else "the last step"
            print(f"evaluation loss {result.metrics['eval/loss']:.4f} after {result.steps} steps ({ended})")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
