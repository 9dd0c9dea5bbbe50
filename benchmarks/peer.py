"""One trainer on one workload, used as its documentation teaches; benchmarks/peers.py starts it under torchrun.

python benchmarks/peer.py TRAINER WORK FILE; the main worker writes the time of each optimizer step's end into
FILE, in seconds since the epoch. Every trainer has the same model, tensors, fused AdamW and minibatch, and
one thread per worker.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

RANK, NUM_WORKERS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


@dataclass(frozen=True)
class Work:
    make_model: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    minibatch: int
    num_examples: int
    steps: int

    def tensors(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(self.num_examples, *self.input_shape, generator=generator)
        return inputs, torch.randint(10, (self.num_examples,), generator=generator)

    def loader(self, size: int) -> Any:
        return DataLoader(TensorDataset(*self.tensors()), batch_size=size, shuffle=True)


def mlp(*sizes: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


WORKS = {
    "digits MLP": Work(partial(mlp, 64, 128, 10), (64,), 64, 1408, 600),
    "6.4 M MLP": Work(partial(mlp, 784, 2160, 2160, 10), (784,), 128, 4096, 40),
    "cnn 28 × 28": Work(cnn, (1, 28, 28), 128, 4096, 40),
}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def by_hand(work: Work, watch: Callable[[Any], Any]) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data.distributed import DistributedSampler

    dist.init_process_group("gloo")
    model = DistributedDataParallel(work.make_model())
    optimizer = watch(adamw(model))
    data = TensorDataset(*work.tensors())
    sampler: Any = DistributedSampler(data)
    loader = DataLoader(data, batch_size=work.minibatch // NUM_WORKERS, sampler=sampler)
    step = epoch = 0
    while step < work.steps:
        sampler.set_epoch(epoch)
        epoch += 1
        for inputs, targets in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            step += 1
            if step == work.steps:
                break
    dist.destroy_process_group()


def mbgd_with(averaging: str, work: Work, watch: Callable[[Any], Any]) -> None:
    import mbgd

    with mbgd.start_workers() as workers:
        model = work.make_model()
        mbgd.Trainer(
            model,
            mbgd.CrossEntropy(),
            watch(adamw(model)),
            mbgd.Data(train=mbgd.InMemory(*work.tensors())),
            mbgd.Settings(
                steps=work.steps,
                batch=mbgd.Batch(work.minibatch),
                averaging=mbgd.Averaging(mbgd.AveragingName(averaging)),
            ),
            workers,
        ).fit()


def lightning(work: Work, watch: Callable[[Any], Any]) -> None:
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = work.make_model()

        def training_step(self, batch: Any, batch_index: int) -> Tensor:
            inputs, targets = batch
            return F.cross_entropy(self.model(inputs), targets)

        def configure_optimizers(self) -> Any:
            return watch(adamw(self.model))

    trainer = L.Trainer(
        accelerator="cpu",
        devices=NUM_WORKERS,
        strategy="ddp" if NUM_WORKERS > 1 else "auto",
        max_steps=work.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), work.loader(work.minibatch // NUM_WORKERS))


def accelerate(work: Work, watch: Callable[[Any], Any]) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = work.make_model()
    model, optimizer, loader = accelerator.prepare(
        model, watch(adamw(model)), work.loader(work.minibatch // NUM_WORKERS)
    )
    step = 0
    while step < work.steps:
        for inputs, targets in loader:
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(model(inputs), targets))
            optimizer.step()
            step += 1
            if step == work.steps:
                break
    accelerator.end_training()


def hf_trainer(work: Work, watch: Callable[[Any], Any]) -> None:
    from transformers import Trainer, TrainingArguments

    class Examples(Dataset[Any]):
        def __init__(self) -> None:
            self.inputs, self.targets = work.tensors()

        def __len__(self) -> int:
            return len(self.inputs)

        def __getitem__(self, index: int) -> Any:
            return {"inputs": self.inputs[index], "labels": self.targets[index]}

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = work.make_model()

        def forward(self, inputs: Tensor, labels: Tensor) -> Any:
            outputs = self.model(inputs)
            return {"loss": F.cross_entropy(outputs, labels), "logits": outputs}

    model = WithLoss()
    optimizer = watch(adamw(model))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=work.minibatch // NUM_WORKERS,
            max_steps=work.steps,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_steps=50,
            disable_tqdm=True,
            max_grad_norm=0.0,
            dataloader_pin_memory=False,
        )
        constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        Trainer(model, arguments, train_dataset=Examples(), optimizers=(optimizer, constant)).train()


def ignite(work: Work, watch: Callable[[Any], Any]) -> None:
    import ignite.distributed as idist
    from ignite.engine import Events, create_supervised_trainer

    def training(local_rank: int) -> None:
        model = idist.auto_model(work.make_model())
        optimizer = idist.auto_optim(watch(adamw(model)))
        loader = idist.auto_dataloader(TensorDataset(*work.tensors()), batch_size=work.minibatch, shuffle=True)
        trainer = create_supervised_trainer(model, optimizer, nn.CrossEntropyLoss())
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=work.steps), trainer.terminate)
        trainer.run(loader, max_epochs=10**6)

    with idist.Parallel(backend="gloo") as parallel:
        parallel.run(training)


TRAINERS: dict[str, Callable[[Work, Callable[[Any], Any]], None]] = {
    "mbgd": partial(mbgd_with, "auto"),
    "mbgd, averaging=ddp": partial(mbgd_with, "ddp"),
    "by hand": by_hand,
    "Lightning": lightning,
    "Accelerate": accelerate,
    "HF Trainer": hf_trainer,
    "Ignite": ignite,
}


def main() -> None:
    trainer, work, file = sys.argv[1:]
    times: list[float] = []

    def watch(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        optimizer.register_step_post_hook(lambda *_: times.append(time.monotonic()))
        return optimizer

    torch.manual_seed(0)
    TRAINERS[trainer](WORKS[work], watch)
    if RANK == 0:
        Path(file).write_text(json.dumps(times))
    sys.stdout.flush()
    os._exit(0)  # torch's process group may abort a process that ends in good order, whichever trainer has made it


if __name__ == "__main__":
    main()
