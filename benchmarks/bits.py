"""Hashes of many configurations' results: `python benchmarks/bits.py`, before and after a change that must keep bits.

One line per configuration: hashes of the parameters after the last step, of every logged value, and of a checkpoint's
contents. All averagings, with dropout, BatchNorm and ragged tokens, in every precision, with the noise scale measured;
and the command itself, killed and resumed. On one machine, two commits compute the same if and only if their lines are
equal.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import mbgd
from mbgd.models import GPT, MLP

from machine import as_worker

ROOT = Path(__file__).parent.parent
NUM_STEPS = 12
NUM_EXAMPLES = 100
UNSTABLE = ("time/", "train/peak_memory")


def short(text: str | bytes) -> str:
    return hashlib.sha256(text if isinstance(text, bytes) else text.encode()).hexdigest()[:16]


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return total.hexdigest()[:16]


class Normalised(nn.Sequential):
    """Convolutions with BatchNorm."""

    def __init__(self) -> None:
        layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
        super().__init__(*layers)


def ragged(model: nn.Module, batch: Any) -> mbgd.PerExample:
    """Next-token loss over as many tokens as each sequence has; the others have weight 0."""
    tokens, lengths = batch
    logits = model(tokens[:, :-1])
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(len(tokens), -1)
    weights = (torch.arange(losses.shape[1]) < lengths[:, None]).to(losses.dtype)
    return mbgd.PerExample(losses, weights, {"correct": lambda: (logits.argmax(-1) == tokens[:, 1:]).to(losses.dtype)})


def images() -> mbgd.InMemory:
    return mbgd.InMemory(torch.randn(NUM_EXAMPLES, 1, 8, 8), torch.randint(10, (NUM_EXAMPLES,)))


def sequences() -> mbgd.InMemory:
    return mbgd.InMemory(torch.randint(16, (NUM_EXAMPLES, 9)), torch.randint(1, 9, (NUM_EXAMPLES,)))


@dataclass(frozen=True)
class Model:
    make: Callable[[], nn.Module]
    data: Callable[[], mbgd.InMemory]
    objective: Any


MODELS = {
    "dropout": Model(partial(MLP, (1, 8, 8), 10, hidden=(32,), dropout=0.2), images, mbgd.CrossEntropy()),
    "batchnorm": Model(Normalised, images, mbgd.CrossEntropy()),
    "ragged": Model(partial(GPT, (8,), 16, num_layers=1, num_heads=2, width=16, dropout=0.1), sequences, ragged),
}


@dataclass(frozen=True)
class Case:
    model: str
    averaging: str
    num_workers: int = 2
    precision: str = "fp32"
    micro_batch_size: int | None = None


CASES = [
    *(Case(model, averaging) for model in MODELS for averaging in ("ddp", "shared_memory", "reproducible")),
    *(Case(model, "auto", num_workers=1) for model in MODELS),
    Case("dropout", "shared_memory", num_workers=3, micro_batch_size=4),
    Case("batchnorm", "reproducible", num_workers=3, micro_batch_size=3),
    Case("dropout", "auto", precision="fp64"),
    Case("ragged", "reproducible", precision="bf16"),
    Case("batchnorm", "ddp", precision="bf16"),
    Case("dropout", "auto", precision="fp16"),
]


def train(rank: int, port: int, case: Case, file: str) -> None:
    with as_worker(rank, case.num_workers, port) as workers:
        torch.manual_seed(0)
        chosen = MODELS[case.model]
        data = mbgd.Data(train=chosen.data(), evaluation=chosen.data())
        model = chosen.make()
        settings = mbgd.Settings(
            epochs=None,
            steps=NUM_STEPS,
            batch=mbgd.Batch(24, case.micro_batch_size),
            precision=mbgd.Precision(case.precision),
            averaging=mbgd.Averaging(mbgd.AveragingName(case.averaging)),
            evaluation=mbgd.Evaluation(5),
            log_every_steps=1,
            noise_scale=mbgd.NoiseScale(every_steps=3),
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=case.averaging != "ddp")
        trainer = mbgd.Trainer(model, chosen.objective, optimizer, data, settings, workers)
        lines: list[str] = []

        class Lines:
            def progress(self, step: int) -> None:
                pass

            def log(self, step: int, metrics: Mapping[str, Any]) -> None:
                kept = {name: value for name, value in metrics.items() if not name.startswith(UNSTABLE)}
                lines.append(json.dumps([step, kept], sort_keys=True))

            def close(self, ending: object) -> None:
                pass

        trainer.fit(Lines())
        tensors = {f"{file}.{n}": t for file, of_file in trainer.snapshot().tensors.items() for n, t in of_file.items()}
        if workers.is_main:
            hashes = [trainer.weights_sha256()[:16], short("\n".join(lines)), hash_of(tensors)]
            Path(file).write_text(" ".join(hashes))


COMMAND = ["experiment=digits_mlp", "epochs=null", "steps=120", "checkpoint.every_steps=20", "log_every_steps=10"]


def start(folder: Path, averaging: str) -> "subprocess.Popen[bytes]":
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = [*COMMAND, f"averaging={averaging}", f"run.dir={folder}", "model.dropout=0.1", "tracking.quiet=true"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = [*torchrun, str(ROOT / "train.py"), *options]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True, **quiet)


def run_command(averaging: str, *, kill: bool) -> str:
    """The whole command; kill: its processes are killed once a checkpoint lies there, and it is started again."""
    with tempfile.TemporaryDirectory() as out:
        folder = Path(out, "run")
        process = start(folder, averaging)
        if kill:
            while process.poll() is None and not list(folder.glob("checkpoints/*")):
                time.sleep(0.01)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            process = start(folder, averaging)
        assert process.wait() == 0, folder
        summary = json.loads((folder / "summary.json").read_text())
        newest = max(folder.glob("checkpoints/step-*"))
        tensors = {f"{f.name} {n}": t for f in sorted(newest.glob("*.safetensors")) for n, t in load_file(f).items()}
        kept = {name: value for name, value in summary["metrics"].items() if not name.startswith(UNSTABLE)}
        return f"{summary['weights_sha256'][:16]} {short(json.dumps(kept, sort_keys=True))} {hash_of(tensors)}"


def lines() -> Iterable[str]:
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            file = str(Path(folder, "hashes"))
            port = 20000 + os.getpid() % 20000
            torch.multiprocessing.spawn(train, (port, case, file), case.num_workers)
            size = case.micro_batch_size or "-"
            name = f"{case.model} {case.averaging} {case.num_workers} {case.precision} {size}"
            yield f"{name:40}{Path(file).read_text()}"
    for averaging in ("auto", "reproducible"):
        for kill in (False, True):
            name = f"command {averaging} {'killed' if kill else 'whole'}"
            yield f"{name:40}{run_command(averaging, kill=kill)}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    for line in lines():
        print(line, flush=True)


if __name__ == "__main__":
    main()
