"""mbgd as a library: `torchrun --standalone --nproc-per-node 2 examples/library.py`, or plain `python`."""

import torch

import mbgd


def main() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(1000, 20)
    targets = inputs @ torch.randn(20, 1) + 0.1 * torch.randn(1000, 1)
    model = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    with mbgd.start_workers() as workers:
        trainer = mbgd.Trainer(
            model,
            mbgd.MeanSquaredError(),
            torch.optim.AdamW(model.parameters(), lr=0.01),
            mbgd.Data(
                train=mbgd.InMemory(inputs[:900], targets[:900]),
                evaluation=mbgd.InMemory(inputs[900:], targets[900:]),
            ),
            mbgd.Settings(epochs=20, batch=mbgd.Batch(size=64)),
            workers,
        )
        result = trainer.fit()
        if workers.is_main:
            print(f"evaluation loss {result.metrics['eval/loss']:.4f} after {result.steps} steps")


if __name__ == "__main__":
    main()
