"""Modules of parts drawn at random equal plain torch on 1, 2 and 3 workers, in every averaging."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_accounted_for import NUM_EXAMPLES, SIZE, data, squared, state
from torch import Tensor, nn

import mbgd

from processes import run_workers

EPOCHS = 2
KINDS = (
    "plain",
    "frozen",
    "tied",
    "unused",
    "complex",
    "moving",
    "assigned",
    "late",
    "unfreezing",
    "hooked",
    "counted",
)


class Part(nn.Module):
    """4 values → 4 values, with something that training changes."""

    def __init__(self, kind: str, at: int) -> None:
        super().__init__()
        self.kind, self.at = kind, at
        self.layer = nn.Linear(4, 4)
        self.never = nn.Linear(2, 2) if kind == "unused" else None
        if kind == "complex":
            self.phase = nn.Parameter(torch.randn(3, dtype=torch.complex128))
        if kind == "hooked":
            self.layer.weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
        self.register_buffer("mean", torch.zeros(4), persistent=kind != "assigned")
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.layer.requires_grad_(kind not in ("frozen", "unfreezing"))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.layer(inputs - self.mean).tanh()
        if self.kind == "complex":
            outputs = torch.fft.irfft(torch.fft.rfft(outputs) * self.phase, n=4)
        if self.training and self.kind in ("moving", "assigned", "late", "counted", "unfreezing"):
            self.calls += 1
            mean = inputs.detach().mean(0)
            if self.kind == "moving" or (self.kind == "late" and self.calls > self.at):
                self.mean.lerp_(mean, 0.2)
            if self.kind == "assigned":
                self.mean = self.mean * 0.8 + mean * 0.2
            if self.kind == "unfreezing" and self.calls > self.at:
                self.layer.requires_grad_(True)
        return outputs + inputs


class Drawn(nn.Module):
    def __init__(self, kinds: list[tuple[str, int]]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Part(kind, at) for kind, at in kinds)
        tied = [part for part in self.parts if part.kind == "tied"]
        for part in tied[1:]:
            part.layer.weight = tied[0].layer.weight
        self.last = nn.Linear(4, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        for part in self.parts:
            inputs = part(inputs)
        return self.last(inputs).squeeze(-1)


@dataclass(frozen=True)
class Drawing:
    kinds: list[tuple[str, int]]
    micro_batch_size: int | None
    adam: bool
    clips: bool


def made(drawing: Drawing) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(2)
    model = Drawn(drawing.kinds).double()
    if drawing.adam:
        return model, torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, eps=1e-3)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def by_hand(drawing: Drawing) -> dict[str, Tensor]:
    model, optimizer = made(drawing)
    inputs, targets = data()
    for _ in range(EPOCHS):
        for start in range(0, NUM_EXAMPLES, SIZE):
            rows = slice(start, start + SIZE)
            optimizer.zero_grad()
            squared(model, (inputs[rows], targets[rows])).losses.mean().backward()
            if drawing.clips:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
    return state(model, None)


def by_workers(workers: mbgd.Workers, drawings: list[Drawing]) -> list[dict[str, Any]]:
    results = []
    for drawing in drawings:
        of_drawing = {}
        for averaging in ("ddp", "shared_memory", "reproducible"):
            model, optimizer = made(drawing)
            run = mbgd.Settings(
                epochs=EPOCHS,
                batch=mbgd.Batch(size=SIZE, micro_batch_size=drawing.micro_batch_size),
                precision="fp64",  # type: ignore[arg-type]
                averaging=mbgd.Averaging(averaging, find_unused_parameters=True),  # type: ignore[arg-type]
                max_grad_norm=0.1 if drawing.clips else None,
                check=mbgd.Check(replicas_every_steps=1),
            )
            examples = mbgd.Data(train=mbgd.InMemory(*data()), shuffle=False)
            mbgd.Trainer(model, squared, optimizer, examples, run, workers).fit()
            of_drawing[averaging] = state(model, None)
        results.append(of_drawing)
    return results


drawings = st.builds(
    Drawing,
    kinds=st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 4)), min_size=1, max_size=4),
    micro_batch_size=st.sampled_from([None, 3, 2]),
    adam=st.booleans(),
    clips=st.booleans(),
)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_any_module_is_plain_torch(num_workers: int) -> None:
    @settings(
        max_examples=2,
        derandomize=True,
        deadline=None,
        database=None,
        phases=(Phase.generate,),  # each example starts processes; shrinking would take for ever
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(drawings, min_size=6, max_size=6))
    def compare(drawn: list[Drawing]) -> None:
        for got in run_workers(by_workers, num_workers, drawn):
            for drawing, of_drawing in zip(drawn, got, strict=True):
                wanted = by_hand(drawing)
                for averaging, tensors in of_drawing.items():
                    for name, value in wanted.items():
                        message = f"{drawing}, {averaging}: {name}"
                        assert torch.allclose(tensors[name], value, rtol=1e-10, atol=1e-12), message

    compare()
