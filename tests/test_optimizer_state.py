"""Whatever state an optimizer keeps comes back as it was, or is refused by name; nothing of it is shared."""

import json
from collections import OrderedDict, deque
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mbgd
from mbgd.checkpoints import format as checkpoint
from mbgd.checkpoints.snapshot import Snapshot, SnapshotMemory
from mbgd.files.state_tree import Flattening, unflatten
from mbgd.step.optimizer_state import OptimizerState

NUM_EXAMPLES = 24


class Shampoo(torch.optim.Optimizer):
    """A matrix for each dimension, in a list; their inverse roots, in a tuple, from the second step on."""

    def __init__(self, parameters: Any, lr: float = 0.05) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": 0.9})
        self.epsilon = 1e-4  # an attribute beside state and groups

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["preconditioners"] = [self.epsilon * torch.eye(size, dtype=p.dtype) for size in p.shape]
                    state["roots"] = None
                    state["step"] = numpy.int64(0)
                    state["kind"] = "shampoo"
                for dimension, preconditioner in enumerate(state["preconditioners"]):
                    unfolded = p.grad.transpose(0, dimension).reshape(p.shape[dimension], -1)
                    preconditioner += unfolded @ unfolded.T
                state["step"] += numpy.int64(1)
                if state["step"] >= 2:
                    state["roots"] = tuple(_inverse_root(m, 2 * p.dim()) for m in state["preconditioners"])
                update = p.grad
                for dimension, root in enumerate(state["roots"] or ()):
                    update = torch.tensordot(root, update.transpose(0, dimension), 1).transpose(0, dimension)
                assert state["kind"] == "shampoo"
                p.sub_(group["lr"] * update)


def _inverse_root(matrix: Tensor, power: int) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = vectors @ torch.diag(values.clamp(min=1e-6) ** (-1 / power)) @ vectors.T
    return root


class Soap(torch.optim.Optimizer):
    """Adam in a rotated basis: dicts within lists within a dict, and values of the groups that move."""

    def __init__(self, parameters: Any, lr: float = 0.01) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.95), "seen": 0, "scale": torch.ones(())})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            group["seen"] += 1
            group["betas"] = (min(0.9, 0.5 + 0.1 * group["seen"]), 0.95)
            group["scale"] *= 0.95
            for p in group["params"]:
                state, size = self.state[p], p.shape[0]
                if not state:
                    state["bases"] = [{"gram": p.new_zeros(size, size), 0: torch.eye(size, dtype=p.dtype)}]
                    state["moments"] = torch.zeros_like(p), torch.zeros_like(p)
                    state["norms"] = deque(maxlen=3)
                basis = state["bases"][0]
                flat = p.grad.reshape(size, -1)
                basis["gram"].lerp_(flat @ flat.T, 0.1)
                if group["seen"] % 2 == 0:
                    basis[0] = torch.linalg.qr(basis["gram"] @ basis[0] + 1e-3 * basis[0]).Q
                rotated = (basis[0].T @ flat).view_as(p)
                first, second = state["moments"]
                first.lerp_(rotated, 1 - group["betas"][0])
                second.lerp_(rotated.square(), 1 - group["betas"][1])
                state["norms"].append(rotated.norm())
                clip = min(1.0, float(sum(state["norms"])) + 0.1)
                update = basis[0] @ (first / (second.sqrt() + 1e-8)).reshape(size, -1)
                p.sub_(clip * group["lr"] * group["scale"] * update.view_as(p))


class LowPrecisionMomentum(torch.optim.Optimizer):
    """Keeps momentum as int8 with a scale: state of another type than the parameter's."""

    def __init__(self, parameters: Any, lr: float = 0.05) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            before = state["momentum"].to(p.dtype) * state["scale"] if state else torch.zeros_like(p)
            now = 0.9 * before + p.grad
            state["scale"] = now.abs().max().float() / 127
            state["momentum"] = (now / state["scale"]).round().to(torch.int8)
            p.sub_(group_lr(self) * now)


def group_lr(optimizer: torch.optim.Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])


OPTIMIZERS = {
    "shampoo": Shampoo,
    "soap": Soap,
    "int8": LowPrecisionMomentum,
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "fused momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
    "muon": lambda p: torch.optim.Muon([one for one in p if one.dim() == 2], lr=0.01),
}


def make_trainer(name: str, *, steps: int = 6, precision: str = "fp64") -> mbgd.Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 1))
    if name == "muon":
        model.requires_grad_(False)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.dim() == 2)
    inputs = torch.randn(NUM_EXAMPLES, 12)
    return mbgd.Trainer(
        model,
        mbgd.MeanSquaredError(),
        OPTIMIZERS[name](model.parameters()),  # type: ignore[no-untyped-call]
        mbgd.Data(train=mbgd.InMemory(inputs, inputs[:, :1].sin())),
        mbgd.Settings(steps=steps, batch=mbgd.Batch(8), precision=mbgd.Precision(precision)),
    )


class StopAt:
    def __init__(self, step: int) -> None:
        self._step = step

    def agreed(self, step: int) -> bool:
        return step == self._step


def weights(trainer: mbgd.Trainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.setup.model.parameters()])


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("stop", [1, 3])
def test_any_state_is_saved_and_resumed(tmp_path: Path, name: str, stop: int) -> None:
    """Through a checkpoint on disk, after the first step and after the third, to the bits of a run without a stop."""
    whole = make_trainer(name)
    whole.fit()
    stopped = make_trainer(name)
    with pytest.raises(mbgd.errors.Preempted):
        stopped.fit(stop=StopAt(stop))
    path = checkpoint.write(tmp_path, stopped.snapshot(), {})
    resumed = make_trainer(name)
    resumed.restore(checkpoint.read(path)[0])
    assert nested(resumed.setup.optimizer.state_dict()["state"]) == nested(
        stopped.setup.optimizer.state_dict()["state"]
    )
    resumed.fit()
    assert torch.equal(weights(resumed), weights(whole))
    assert not torch.equal(weights(resumed), weights(stopped))


def nested(value: Any) -> Any:
    """With types and bits in place of tensors, for a comparison with =="""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.flatten().tolist()
    if isinstance(value, dict):
        return {key: nested(one) for key, one in value.items()}
    if isinstance(value, list | tuple | deque):
        return type(value), getattr(value, "maxlen", None), [nested(one) for one in value]
    return type(value), value


def test_kinds_of_values() -> None:
    shared = torch.arange(3.0)
    values = {
        "numbers": [None, True, 3, -0.5, 2**70, 1 + 2j, float("inf")],
        "texts": ("a.b", b"\x00\xff", ""),
        "numpy": [numpy.float32(0.1), numpy.float64(0.1), numpy.int8(-3), numpy.bool_(True), numpy.complex64(1j)],
        "arrays": numpy.arange(6, dtype=numpy.int16).reshape(2, 3),
        "keys": {0: "int", (1, "b"): "tuple", None: "None", 1.5: "float", True: "bool", "x.y": {}},
        "sets": [{1, 2}, frozenset({"a"})],
        "ordered": OrderedDict(b=1, a=2),
        "deque": deque([torch.zeros(2)], maxlen=4),
        "size": torch.Size([2, 3]),
        "shared": [shared, shared],
        "complex": torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex128),
        "odd": [torch.zeros(0, 3), torch.tensor(7, dtype=torch.uint8), torch.ones(2, dtype=torch.bfloat16)],
        "empty": [[], (), {}, deque()],
    }
    flattening = Flattening()
    tree = json.loads(json.dumps(flattening(values, "0"), allow_nan=False))
    loaded = {
        name: one.clone() if name != "0.complex" else torch.view_as_complex(one.clone())
        for name, one in flattening.tensors.items()
    }
    back = unflatten(tree, lambda name, is_complex: loaded[name])
    assert nested({k: v for k, v in back.items() if k != "arrays"}) == nested(
        {k: v for k, v in values.items() if k != "arrays"}
    )
    assert numpy.array_equal(back["arrays"], values["arrays"])
    assert back["arrays"].dtype == numpy.int16
    assert list(map(type, back["numpy"])) == list(map(type, values["numpy"]))
    assert back["shared"][0] is back["shared"][1], "one tensor stays one"
    assert [list(back["ordered"]), type(back["ordered"])] == [["b", "a"], OrderedDict]


class Holds(torch.optim.SGD):
    held: Any = None

    def step(self, closure: Any = None) -> Any:
        super().step()
        first = self.param_groups[0]["params"][0]
        self.state[first]["parts"] = [0, {"odd": first if self.held == "parameter" else self.held}]


@pytest.mark.parametrize(
    ("held", "what"),
    [
        (object(), "of type builtins.object"),
        (print, "of type builtins.builtin_function_or_method"),
        (torch.zeros(2, 2).to_sparse(), "layout torch.sparse_coo"),
        ("parameter", "a parameter"),
        ({torch.zeros(1): 1}, "a dict with a tensor as key"),
        (torch.empty(2, device="meta"), "on meta"),
    ],
)
def test_what_cannot_be_held_is_refused_with_its_path(held: Any, what: str) -> None:
    model = nn.Linear(2, 1)
    optimizer = Holds(model.parameters(), lr=0.1)
    optimizer.held = held
    state = OptimizerState(optimizer, has_schedule=True)
    assert state.problems() == []
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    (problem,) = state.problems()
    assert "optimizer state 0.parts.1.odd is" in problem
    assert what in problem
    with pytest.raises(mbgd.UsageError, match=r"optimizer state 0\.parts\.1\.odd"):
        state.tensors()


def changed(taken: Snapshot, name: str, tensor: Tensor | None) -> Snapshot:
    tensors = {file: dict(of_file) for file, of_file in taken.tensors.items()}
    if tensor is None:
        del tensors["optimizer"][name]
    else:
        tensors["optimizer"][name] = tensor
    return Snapshot(taken.step, tensors, taken.values)


@pytest.mark.parametrize(
    ("optimizer", "name", "tensor", "message"),
    [
        ("fused adamw", "0.exp_avg", torch.zeros(5, 1), r"0\.exp_avg: shape \(5, 1\), .*makes \(5, 12\)"),
        ("fused adamw", "0.exp_avg", torch.zeros(5, 12).double(), "float64 .*, where this optimizer makes float32"),
        ("fused adamw", "0.step", torch.zeros(5, 12), r"0\.step: shape \(5, 12\), .*makes \(\)"),
        ("fused momentum", "1.momentum_buffer", torch.zeros(()), r"1\.momentum_buffer: shape \(\)"),
        ("adafactor", "0.row_var", torch.zeros(5, 12), r"0\.row_var: shape .*makes \(5, 1\)"),
        ("shampoo", "0.preconditioners.1", torch.zeros(5, 5), r"0\.preconditioners\.1: .*makes \(12, 12\)"),
        ("soap", "1.moments.0", torch.zeros(6), r"1\.moments\.0: .*makes \(5,\)"),
        ("amsgrad", "2.max_exp_avg_sq", None, "cannot be read"),
    ],
)
def test_shapes_are_compared_with_what_the_optimizer_makes(
    optimizer: str, name: str, tensor: Tensor | None, message: str
) -> None:
    trainer = make_trainer(optimizer, steps=3, precision="fp32")
    trainer.fit()
    taken = trainer.snapshot()
    fresh = make_trainer(optimizer, steps=3, precision="fp32")
    before = weights(fresh)
    with pytest.raises(mbgd.UsageError, match=message):
        fresh.restore(changed(taken, name, tensor))
    assert torch.equal(weights(fresh), before)
    assert nested(fresh.setup.optimizer.state_dict()["state"]) == nested(
        make_trainer(optimizer).setup.optimizer.state_dict()["state"]
    )
    fresh.restore(taken)


def test_a_tree_cannot_pass_one_tensor_off_as_another() -> None:
    """Each is of the right shape for its name, but the nesting puts a number where fused AdamW reads a matrix."""
    trainer = make_trainer("fused adamw", steps=1, precision="fp32")
    trainer.fit()
    taken = trainer.snapshot()
    values = json.loads(json.dumps(dict(taken.values)).replace('"0.exp_avg"', '"0.step"'))
    with pytest.raises(mbgd.UsageError, match=r"0\.exp_avg"):
        trainer.restore(Snapshot(1, taken.tensors, values))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([[0, {"nonsense": 1}]], "no kind of value"),
        ([[0, {"tensor": "nowhere"}]], "cannot be read"),
        ([[0]], "cannot be read"),
        (7, "cannot be read"),
        ([], "nothing says what it is"),
    ],
)
def test_values_that_make_no_sense_are_refused(state: Any, message: str) -> None:
    trainer = make_trainer("momentum", steps=1)
    trainer.fit()
    taken = trainer.snapshot()
    values = {**taken.values, "optimizer": {**taken.values["optimizer"], "state": state}}
    with pytest.raises(mbgd.UsageError, match=message):
        trainer.restore(Snapshot(1, taken.tensors, values))


def test_a_fused_optimizers_state_lies_in_memory_as_its_parameters(tmp_path: Path) -> None:
    """Fused kernels go through both in the order of memory; files hold rows in order."""

    def after(num_steps: int, state: Path | None) -> tuple[Tensor, OptimizerState]:
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
        optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
        kept = OptimizerState(optimizer, has_schedule=False)
        if state is not None:
            with torch.no_grad():
                parameter.copy_(load_file(state)["parameter"])
            tensors = {name: one for name, one in load_file(state).items() if name != "parameter"}
            values = json.loads(state.with_suffix(".json").read_text())
            assert kept.mismatches(tensors, values) == []
            kept.restore(tensors, values)
        for step in range(num_steps):
            generator = torch.Generator().manual_seed(step + (0 if state is None else 1))
            gradient = torch.randn(2, 3, 4, 5, generator=generator)
            parameter.grad = gradient.to(memory_format=torch.channels_last)
            optimizer.step()
        return parameter.detach(), kept

    whole, _ = after(2, None)
    stopped, kept = after(1, None)
    file = tmp_path / "state.safetensors"
    save_file({name: one.contiguous() for name, one in {**kept.tensors(), "parameter": stopped}.items()}, file)
    file.with_suffix(".json").write_text(json.dumps(kept.values()))
    assert torch.equal(after(1, file)[0], whole)


def test_parameters_are_found_again_by_name() -> None:
    first, second = (nn.Parameter(torch.zeros(3)) for _ in range(2))

    def state(parameters: list[nn.Parameter], **names: nn.Parameter) -> OptimizerState:
        optimizer = torch.optim.SGD(parameters, lr=1.0, momentum=0.5)
        return OptimizerState(optimizer, has_schedule=False, names={one: name for name, one in names.items()})

    before = state([first, second], first=first, second=second)
    first.grad, second.grad = torch.ones(3), torch.full((3,), 2.0)
    before._optimizer.step()
    tensors, values = {name: one.clone() for name, one in before.tensors().items()}, before.values()
    swapped = state([second, first], first=first, second=second)
    assert swapped.mismatches(tensors, values) == []
    swapped.restore(tensors, values)
    assert swapped._optimizer.state[first]["momentum_buffer"].tolist() == [1.0] * 3
    assert swapped._optimizer.state[second]["momentum_buffer"].tolist() == [2.0] * 3
    (problem,) = state([first], first=first).mismatches(tensors, values)
    assert problem == "optimizer parameter second: before, not now"
    shorter = state([nn.Parameter(torch.zeros(2)), second])
    assert "shapes [[3], [3]] before, [[2], [3]] now" in shorter.mismatches(tensors, values)[0]


def test_state_of_an_earlier_version_is_read() -> None:
    """Flat names, beside the tensors, for what is no tensor."""
    parameter = nn.Parameter(torch.zeros(3))
    kept = OptimizerState(torch.optim.SGD([parameter], lr=1.0, momentum=0.5), has_schedule=False)
    tensors = {"0.momentum_buffer": torch.ones(3)}
    values = {"state": {"0.count": 4}, "groups": [{"momentum": 0.75}], "skipped_steps": 0}
    assert kept.mismatches(tensors, values) == []
    kept.restore(tensors, values)
    assert kept._optimizer.state[parameter]["count"] == 4
    assert kept._optimizer.state[parameter]["momentum_buffer"].tolist() == [1.0] * 3
    assert kept._optimizer.param_groups[0]["momentum"] == 0.75


@pytest.mark.parametrize("name", ["fused adamw", "soap"])
def test_what_is_restored_shares_nothing_with_the_snapshot(name: str) -> None:
    trainer = make_trainer(name, steps=6)
    with pytest.raises(mbgd.errors.Preempted):
        trainer.fit(stop=StopAt(3))
    wanted = make_trainer(name, steps=6)
    wanted.fit()
    taken = trainer.snapshot()
    copies = {file: {key: one.clone() for key, one in of_file.items()} for file, of_file in taken.tensors.items()}
    trainer.restore(taken)
    trainer.fit()
    for file, of_file in copies.items():
        for key, one in of_file.items():
            assert torch.equal(taken.tensors[file][key], one), key
    assert torch.equal(weights(trainer), weights(wanted))
    trainer.restore(taken)
    trainer.restore(trainer.snapshot())  # whose memory is free again at once
    before = nested(trainer.setup.optimizer.state_dict()["state"])
    for parameter in trainer.setup.model.parameters():
        parameter.data += 1
    trainer.snapshot()
    assert nested(trainer.setup.optimizer.state_dict()["state"]) == before


def test_a_tensor_of_a_snapshot_outlives_it() -> None:
    memory = SnapshotMemory(torch.device("cpu"))
    kept = memory.snapshot(1, {"model": {"weight": torch.ones(3)}}, {}).tensors["model"]["weight"]
    later = memory.snapshot(2, {"model": {"weight": torch.zeros(3)}}, {})
    assert kept.tolist() == [1, 1, 1]
    assert later.tensors["model"]["weight"].tolist() == [0, 0, 0]


def test_trying_an_optimizer_out_leaves_no_trace() -> None:
    """Attributes, hooks, an instance's own `step`, random numbers, parameters: as they were."""
    parameter = nn.Parameter(torch.ones(2, 3))
    optimizer = Shampoo([parameter])
    calls: list[str] = []
    optimizer.register_step_post_hook(lambda *_: calls.append("hook"))
    optimizer.step = lambda: calls.append("own")  # type: ignore[method-assign,assignment]
    kept, random = OptimizerState(optimizer, has_schedule=False), torch.get_rng_state()
    assert kept._made is not None
    assert set(kept._made) == {"0.preconditioners.0", "0.preconditioners.1"}
    assert calls == []
    assert not optimizer.state
    assert parameter.grad is None
    assert torch.equal(parameter, torch.ones(2, 3))
    assert torch.equal(torch.get_rng_state(), random)


class ByColumns(torch.optim.SGD):
    """Keeps a matrix by columns, as torch.linalg.qr returns Q."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["basis"] = torch.arange(6.0).reshape(2, 3).t()
        super().step()


@pytest.mark.parametrize("order", [[1, 0], [0, 0], [0], ["1", "0"], 3, None])
def test_the_order_of_dimensions_in_memory_is_kept(order: Any) -> None:
    """Products with a matrix by columns may have other last bits than with the same matrix by rows."""
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = ByColumns([parameter], lr=1.0)
    parameter.grad = torch.ones(3)
    optimizer.step()
    before = OptimizerState(optimizer, has_schedule=False)
    tensors = {name: one.clone(memory_format=torch.contiguous_format) for name, one in before.tensors().items()}
    values = json.loads(json.dumps(before.values()))
    ((_, (_, node)),) = [(key, pairs["dict"][0]) for key, pairs in values["state"]]
    assert node == {"tensor": "0.basis", "order": [1, 0]}
    node["order"] = order
    fresh = ByColumns([parameter], lr=1.0)
    again = OptimizerState(fresh, has_schedule=False)
    if order != [1, 0]:
        assert "is no order of its 2 dimensions" in again.mismatches(tensors, values)[0]
        return
    assert again.mismatches(tensors, values) == []
    again.restore(tensors, values)
    basis = fresh.state[parameter]["basis"]
    assert basis.stride() == optimizer.state[parameter]["basis"].stride() == (1, 3)
    assert torch.equal(basis, optimizer.state[parameter]["basis"])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_state_made_before_the_parameters_were_cast_is_cast_with_them(momentum: float) -> None:
    """Adagrad makes its sums in its constructor: in precision=fp64 they are not left in float32, to 7 digits.

    So is the state of an optimizer that has made steps.
    """

    def made(dtype: torch.dtype) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2).to(dtype)
        if momentum == 0:
            return model, torch.optim.Adagrad(model.parameters(), lr=0.1, initial_accumulator_value=0.1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, 0.5)
        return model, optimizer

    inputs = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    targets = inputs[:, :2].exp()
    plain, optimizer = made(torch.float64)
    plain.load_state_dict({name: value.double() for name, value in made(torch.float32)[0].state_dict().items()})
    if momentum == 0:
        for state in optimizer.state.values():
            state["sum"].copy_(torch.tensor(0.1, dtype=torch.float32))  # that is what the constructor was asked for
    for _ in range(5):
        optimizer.zero_grad()
        (plain(inputs) - targets).square().mean().backward()
        optimizer.step()
    model, own = made(torch.float32)
    settings = mbgd.Settings(steps=5, batch=mbgd.Batch(4), precision="fp64")
    mbgd.Trainer(model, mbgd.MeanSquaredError(), own, mbgd.Data(train=mbgd.InMemory(inputs, targets)), settings).fit()
    for got, want in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
        assert {one.dtype for name, one in own.state[got].items() if name != "step"} == {torch.float64}
