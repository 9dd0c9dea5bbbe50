"""compile, activation_checkpointing and matmul_precision: the same result, or refused by name."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mbgd
from mbgd.files.run_files import read_run
from mbgd.task.compiling import blocks, num_graphs

import runs
from processes import run_workers
from small_runs import StopAt

NUM_EXAMPLES, SIZE = 22, 10  # the last minibatch of an epoch has 2 examples


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.dropout = nn.Linear(6, 6), nn.LayerNorm(6), nn.Dropout(0.2)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.dropout(torch.tanh(self.layer(self.norm(inputs))))  # type: ignore[no-any-return]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(6, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        for block in self.blocks:
            inputs = block(inputs)
        return self.head(inputs)  # type: ignore[no-any-return]


class WithBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), nn.Linear(6, 6)])
        self.head = nn.Linear(6, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        for block in self.blocks:
            inputs = block(inputs)
        return self.head(inputs)  # type: ignore[no-any-return]


def trainer(workers: mbgd.Workers, make: type[nn.Module] = Net, **settings: Any) -> mbgd.Trainer:
    torch.manual_seed(0)
    model = make()
    inputs = torch.randn(NUM_EXAMPLES, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    data = mbgd.Data(train=mbgd.InMemory(inputs, inputs.sum(1, keepdim=True)))
    own = {"precision": "fp64", "batch": mbgd.Batch(SIZE), **settings}
    made = mbgd.Settings(steps=6, noise_scale=mbgd.NoiseScale(every_steps=None), **own)
    # AdamW would blow up the rounding of gradients that are 0 but for it, such as of a bias before BatchNorm.
    kind = torch.optim.SGD if make is WithBatchNorm else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=0.01)
    return mbgd.Trainer(model, mbgd.MeanSquaredError(), optimizer, data, made, workers)


def weights(made: mbgd.Trainer) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in made.setup.model.state_dict().items()}


def train(workers: mbgd.Workers, averaging: str, settings: dict[str, Any], cut: int | None = None) -> tuple[Any, str]:
    made = trainer(workers, averaging=mbgd.Averaging(averaging), **settings)  # type: ignore[arg-type]
    if cut is not None:
        with pytest.raises(mbgd.Preempted):
            made.fit(stop=StopAt(cut))
        snapshot = made.snapshot()
        made = trainer(workers, averaging=mbgd.Averaging(averaging), **settings)  # type: ignore[arg-type]
        made.restore(snapshot)
    made.fit()
    return weights(made), made.weights_sha256()


LAYERS = {"activation_checkpointing": mbgd.ActivationCheckpointing(["blocks.*"])}


@pytest.mark.parametrize("averaging", ["ddp", "shared_memory", "reproducible"])
def test_activations_computed_again_have_the_same_bits(averaging: str) -> None:
    plain = run_workers(train, 2, averaging, {})
    again = run_workers(train, 2, averaging, LAYERS)
    assert [sha256 for _, sha256 in plain] == [sha256 for _, sha256 in again]
    if averaging == "reproducible":
        alone = train(mbgd.Workers(), averaging, LAYERS)[1]
        assert {sha256 for _, sha256 in run_workers(train, 3, averaging, LAYERS, 4)} == {alone, plain[0][1]}


def test_activations_are_not_kept() -> None:
    kept: dict[str, int] = {}
    for name, settings in (("plain", {}), ("again", LAYERS)):
        made = trainer(mbgd.Workers(), **settings)
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, saved=saved: saved.append(tensor) or tensor, lambda x: x
        ):
            made.setup.model.train()(torch.randn(4, 6, dtype=torch.float64))
        kept[name] = len(saved)
    assert kept["again"] < kept["plain"] / 2


@pytest.mark.parametrize(
    ("make", "layers", "message"),
    [
        (Net, ["block.*"], "no layer's name matches 'block.*'. Layers of this model are blocks"),
        (Net, ["blocks"], "blocks is a ModuleList, which computes nothing itself. Name the layers in it: blocks.*"),
        (WithBatchNorm, ["blocks.*"], "the forward of blocks.0 changes the buffers blocks.0.1.running_mean"),
    ],
)
def test_layers_that_cannot_be_computed_again_are_refused(
    make: type[nn.Module], layers: list[str], message: str
) -> None:
    with pytest.raises(mbgd.UsageError) as refused:
        trainer(mbgd.Workers(), make, activation_checkpointing=mbgd.ActivationCheckpointing(layers))
    assert message in str(refused.value)


def test_only_the_outermost_layers_that_match_are_computed_again() -> None:
    made = trainer(mbgd.Workers(), activation_checkpointing=mbgd.ActivationCheckpointing(["*blocks*layer", "blocks.1"]))
    again = [name for name, module in made.setup.model.named_modules() if "forward" in vars(module)]
    assert again == ["blocks.0.layer", "blocks.1", "blocks.2.layer"]


@pytest.mark.parametrize(("how", "num_workers", "cut"), [("model", 3, 3), ("blocks", 2, None)])
def test_a_compiled_model_has_the_same_bits_on_any_number_of_workers(
    how: str, num_workers: int, cut: int | None
) -> None:
    eager = train(mbgd.Workers(), "reproducible", {})
    made = trainer(mbgd.Workers(), averaging=mbgd.Averaging("reproducible"), compile=how)  # type: ignore[arg-type]
    before = num_graphs()
    made.fit()
    assert num_graphs() > before
    assert set(weights(made)) == set(eager[0])  # plain names
    for found, sha256 in run_workers(train, num_workers, "reproducible", {"compile": how}, cut):
        assert sha256 == made.weights_sha256()
        assert found.keys() == eager[0].keys()


def test_a_compiled_model_is_trained_as_one_that_is_not() -> None:
    """Without dropout, whose random numbers the compiler draws in another way."""
    eager = trainer(mbgd.Workers(), WithBatchNorm, batch=mbgd.Batch(11))
    compiled = trainer(mbgd.Workers(), WithBatchNorm, batch=mbgd.Batch(11), compile="model")
    for made in (eager, compiled):
        made.fit()
    for name, tensor in weights(compiled).items():
        torch.testing.assert_close(tensor, weights(eager)[name], rtol=1e-12, atol=1e-14)


def test_blocks_are_the_parts_with_parts_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(Block(), Block()), nn.ModuleDict({"a": Block()}))
    assert [type(one) for one in blocks(model)] == [Block] * 3
    assert blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == []
    with pytest.raises(mbgd.UsageError, match="compile=blocks: the model has no blocks"):
        trainer(mbgd.Workers(), lambda: nn.Sequential(nn.Linear(6, 1)), compile="blocks")  # type: ignore[arg-type]


def test_a_missing_compiler_is_told_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mbgd", "train", "compile=model", f"run.dir={tmp_path / 'run'}"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "CXX": "no-such-compiler"}, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: compile=model on CPU workers needs a C++ compiler, and torch finds none.")
    assert len(done.stderr.splitlines()) == 1


def test_the_conditions_are_recorded_and_the_process_is_left_as_it_was(tmp_path: Path) -> None:
    before = torch.get_float32_matmul_precision()
    with mbgd.start_workers() as workers:
        made = trainer(workers, matmul_precision="high", precision="fp32")
        assert torch.get_float32_matmul_precision() == "high"
        assert made.setup.settings.matmul_precision is not None
    assert torch.get_float32_matmul_precision() == before
    runs.run(tmp_path / "run", "model=linear", "epochs=1")
    recorded = read_run(tmp_path / "run")["environment"]
    assert (recorded["compile"], recorded["matmul_precision"]) == ("none", before)


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm = nn.Embedding(7, 6), nn.LayerNorm(6)
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.tokens.weight  # tied
        self.dtypes: list[torch.dtype] = []

    def forward(self, tokens: Tensor) -> Tensor:
        stream = self.tokens(tokens)
        self.dtypes.append(stream.dtype)
        return self.head(stream + self.layer(self.norm(stream)))  # type: ignore[no-any-return]


def train_in_bf16(
    workers: mbgd.Workers, num_steps: int, precision: str = "bf16-true", averaging: str = "reproducible"
) -> tuple[dict[str, Tensor], str, Any]:
    torch.manual_seed(0)
    model = Embedded()
    tokens = torch.randint(7, (NUM_EXAMPLES, 5), generator=torch.Generator().manual_seed(1))
    settings = mbgd.Settings(
        steps=num_steps,
        batch=mbgd.Batch(SIZE),
        precision=precision,  # type: ignore[arg-type]
        averaging=mbgd.Averaging(averaging),  # type: ignore[arg-type]
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    data = mbgd.Data(train=mbgd.InMemory(tokens, tokens.roll(1, 1)))
    made = mbgd.Trainer(model, mbgd.CrossEntropy(class_dim=-1), optimizer, data, settings, workers)
    made.fit()
    return weights(made), made.weights_sha256(), (model.dtypes[-1], made.setup.loader.minibatch_indices(0))


def test_bf16_true_computes_with_matrices_in_bf16_and_steps_in_fp32() -> None:
    found, _, (dtype, indices) = train_in_bf16(mbgd.Workers(), 1, averaging="auto")
    assert dtype is torch.bfloat16
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    torch.manual_seed(0)
    model = Embedded()
    tokens = torch.randint(7, (NUM_EXAMPLES, 5), generator=torch.Generator().manual_seed(1))[torch.as_tensor(indices)]
    rounded = {name: p.detach().clone() for name, p in model.named_parameters()}
    rounded = {name: (p.bfloat16() if p.dim() > 1 else p).requires_grad_() for name, p in rounded.items()}
    with torch.autocast("cpu", torch.bfloat16):
        logits = torch.func.functional_call(model, rounded, (tokens,))
    losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.roll(1, 1).flatten(), reduction="sum")
    gradients = torch.autograd.grad(losses, list(rounded.values()))
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        expected = parameter.detach() - gradient.float() / (5 * SIZE)
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-7)
    several = train_in_bf16(mbgd.Workers(), 5)[1]
    assert several != train_in_bf16(mbgd.Workers(), 5, "bf16")[1]
    for num_workers in (2, 3):
        assert {sha256 for _, sha256, _ in run_workers(train_in_bf16, num_workers, 5)} == {several}


def test_bf16_true_is_not_compiled() -> None:
    with pytest.raises(mbgd.UsageError, match="precision=bf16-true with compile=model"):
        trainer(mbgd.Workers(), precision="bf16-true", compile="model")
