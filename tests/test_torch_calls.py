"""Calls of torch that leave torch._dynamo out: each test in a process of its own, in which nothing has imported it."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mbgd.workers.process_settings import OF_INDUCTOR


def run(program: str, folder: Path) -> None:
    code = textwrap.dedent(program)
    environment = {name: value for name, value in os.environ.items() if name != OF_INDUCTOR}  # other tests set it
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["precision=bf16", "model=cnn", "ema.decay=0.9", "max_grad_norm=1"],
        ["averaging=reproducible", "optimizer=sgd", "checkpoint.every_steps=1"],
        ["optimizer=lamb", "precision=fp16"],
    ],
)
def test_training_imports_neither_dynamo_nor_symbols(tmp_path: Path, settings: list[str]) -> None:
    run(
        f"""
        import sys
        from mbgd.cli.train import train
        assert train(["steps=2", "tracking.report=false", "run.dir=run", *{settings}]) == 0
        assert not {{"torch._dynamo", "torch._inductor", "sympy"}} & sys.modules.keys()
        """,
        tmp_path,
    )


def test_steps_are_those_of_torch(tmp_path: Path) -> None:
    run(
        """
        import sys
        import torch
        from mbgd.task.torch_calls import backward, put_off_dynamo, step_of

        put_off_dynamo()
        kinds = [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.Muon]

        def made(kind):
            torch.manual_seed(0)
            weight = torch.nn.Parameter(torch.randn(6, 5))
            return weight, kind([weight], lr=0.1)

        def trained(weight, optimizer, backward, step):
            for number in range(3):
                losses = (weight * number).sin().sum(1)
                backward([losses], [torch.arange(6.0)])
                step()
                assert torch.is_grad_enabled()
                optimizer.zero_grad()
            return weight.detach()

        def all_trained(is_ours):
            found = []
            for kind in kinds:
                weight, optimizer = made(kind)
                ways = (backward, step_of(optimizer)) if is_ours else (torch.autograd.backward, optimizer.step)
                found.append(trained(weight, optimizer, *ways))
                optimizer.load_state_dict(optimizer.state_dict())
            return found

        ours = all_trained(True)
        assert "torch._dynamo" not in sys.modules
        theirs = all_trained(False)
        assert "torch._dynamo" in sys.modules
        after = all_trained(True)
        for one, other, third in zip(ours, theirs, after, strict=True):
            assert torch.equal(one, other) and torch.equal(one, third)
        """,
        tmp_path,
    )


def test_a_step_that_fails_leaves_gradients_on(tmp_path: Path) -> None:
    run(
        """
        import sys
        import torch
        from mbgd.task.torch_calls import put_off_dynamo, step_of

        put_off_dynamo()
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([weight], lr=0.1, foreach=False)
        optimizer.param_groups[0]["lr"] = "fast"
        weight.grad = torch.ones(3)
        try:
            step_of(optimizer)()
        except TypeError:
            pass
        else:
            raise AssertionError("it made the step")
        assert torch.is_grad_enabled() and "torch._dynamo" not in sys.modules
        """,
        tmp_path,
    )


def test_dynamo_stays_out_of_optimizers_once_it_is_there(tmp_path: Path) -> None:
    run(
        """
        import torch
        from torch.optim import Optimizer
        from mbgd.task.torch_calls import put_off_dynamo

        put_off_dynamo()
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        import torch._dynamo
        optimizer.zero_grad()
        instead = getattr(Optimizer.zero_grad.__wrapped__, "__dynamo_disable")
        assert instead._torchdynamo_disable
        """,
        tmp_path,
    )


def test_the_compiler_is_told_that_algorithms_are_deterministic_however_late_it_comes(tmp_path: Path) -> None:
    run(
        """
        import os
        import torch
        from mbgd.workers.process_settings import OF_INDUCTOR, remembered, set_deterministic

        put_back = remembered()
        set_deterministic(2)
        assert torch.are_deterministic_algorithms_enabled()
        import torch._inductor.config as of_inductor
        assert of_inductor.deterministic is True
        put_back()
        assert of_inductor.deterministic is False
        assert not torch.are_deterministic_algorithms_enabled() and OF_INDUCTOR not in os.environ
        set_deterministic(1)
        assert of_inductor.deterministic is True and torch.is_deterministic_algorithms_warn_only_enabled()
        """,
        tmp_path,
    )
