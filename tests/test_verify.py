"""verify: right trainers pass; each wrong one is caught with its reason."""

import argparse
import ast
import json
import os
import string
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from mbgd import Workers
from mbgd.building.build import typed
from mbgd.building.composing import compose
from mbgd.cli.tools import verify as verify_tool
from mbgd.errors import UsageError
from mbgd.step.update import Update
from mbgd.task.objective import PerExample
from mbgd.verify import cluster, findings, wording
from mbgd.verify.verifying import verify

from processes import run_workers

ROOT = Path(__file__).parent.parent
NET = ("model=own", "model._target_=wrong_parts.Net", "batch.size=32")
SMALL_TEXT = ("data=text", "data.path=README.md", "data.context=16", "objective.ignore_index=-100")

RIGHT = {
    "mlp": ["model=mlp", "max_grad_norm=0.1", "optimizer=sgd"],
    "cnn": ["model=cnn", "batch.size=32", "batch.micro_batch_size=5"],
    "fewer examples than workers": ["batch.size=2"],
    "bf16": ["precision=bf16"],
    "fp64": ["precision=fp64", "averaging=ddp"],
    "regression": ["data=regression", "model=linear", "objective=mse", "batch.size=32"],
    "gpt": ["model=gpt", "model.width=16", "model.num_layers=1", "batch.size=8", *SMALL_TEXT],
    "reproducible": ["averaging=reproducible", "batch.size=32"],
    "dropout": [*NET, "+model.wrong=dropout"],
    "hook": [*NET, "+model.wrong=hook"],
    "unused": [*NET, "+model.wrong=unused"],
    "partly_detached": [*NET, "+model.wrong=partly_detached"],
    "kink": [*NET, "+model.wrong=kink"],
    "minibatch_norm": [*NET, "+model.wrong=batch_norm", "batch_norm=minibatch"],
    "resnet over the minibatch": ["model=resnet", "model.depth=8", "batch.size=31", "batch_norm=minibatch"],
    "minibatch_norm of one value": [*NET, "+model.wrong=batch_norm", "batch_norm=minibatch", "batch.size=3"],
    "minibatch_norm and dropout": [
        *("model=cnn", "model.batch_norm=true", "model.dropout=0.2", "model.channels=[4,8]", "batch.size=31"),
        "batch_norm=minibatch",
    ],
    "pair": [*NET, "objective=own", "objective._target_=wrong_parts.Contrastive", "precision=bf16"],
    "pair of random views": ["objective=info_nce", "objective.learn_temperature=true", "batch.micro_batch_size=5"],
    "transformers": [
        *("model=own", "model._target_=wrong_parts.gpt2", "data=own", "data.train._target_=wrong_parts.Ragged"),
        *("objective=own", "objective._target_=wrong_parts.next_token", "batch.size=13"),
    ],
}
HAS_TRANSFORMERS = find_spec("transformers") is not None
NOTES = {
    "dropout": {"keyed_randomness"},
    "pair of random views": {"keyed_randomness"},
    "hook": {"hooks"},
    "unused": {"unused_parameters"},
    "partly_detached": {"gradient_is_not_the_derivative"},
    "bf16": {"autocast"},
    "minibatch_norm": {"minibatch_norm", "moving_buffers"},
    "resnet over the minibatch": {"minibatch_norm", "moving_buffers"},
    "minibatch_norm of one value": {"minibatch_norm", "moving_buffers"},
    "minibatch_norm and dropout": {"minibatch_norm", "moving_buffers", "keyed_randomness"},
    "pair": {"autocast"},
}
WRONG = {
    "batch_norm": [*NET, "+model.wrong=batch_norm"],
    "resnet": ["model=resnet", "model.depth=8", "batch.size=32"],
    "detached": [*NET, "+model.wrong=detached"],
    "own_generator": [*NET, "+model.wrong=own_generator"],
    "rank_seeded": [*NET, "+model.wrong=rank_seeded"],
    "hidden_mean": [*NET, "objective=own", "objective._target_=wrong_parts.hidden_mean"],
    "divided": [*NET, "objective=own", "objective._target_=wrong_parts.divided"],
    "contrastive": [*NET, "objective=own", "objective._target_=wrong_parts.contrastive"],
    "coupled_pair": [
        *(*NET, "objective=own", "objective._target_=wrong_parts.Contrastive", "+objective.wrong=coupled")
    ],
    "data": [*NET, "data=own", "data.train._target_=wrong_parts.OfWorker", "data.evaluation=null"],
}
REFUSED = {"changes_parameters": [*NET, "+model.wrong=changes_parameters"]}
REASONS = {
    "batch_norm": {"batch_norm"},
    "resnet": {"batch_norm"},
    "detached": {"detached"},
    "own_generator": {"unkeyed_randomness"},
    "rank_seeded": {"depends_on_worker", "unkeyed_randomness"},
    "hidden_mean": {"reduced_loss"},
    "divided": {"reduced_loss"},
    "contrastive": {"coupled_losses"},
    "coupled_pair": {"coupled_encodings"},
    "data": {"data_depends_on_worker"},
}


def verified(workers: Workers, cases: dict[str, list[str]], num_steps: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, overrides in cases.items():
        torch.use_deterministic_algorithms(False)
        try:
            results[name] = verify(typed(compose(overrides)), workers, num_steps, seconds=0.1)
        except UsageError as error:
            results[name] = str(error)
    return results


def wrong_trainers(workers: Workers) -> list[Any]:
    """The configuration of a right run, on trainers that average wrongly."""
    right = Update.backward_weights
    size, results = 31, []

    def of_mean(self: Update, terms: PerExample, *, is_stand_in: bool) -> torch.Tensor:
        return right(self, terms, is_stand_in=is_stand_in) * size / (workers.num_workers * len(terms.losses))

    def twice(self: Update, terms: PerExample, *, is_stand_in: bool) -> torch.Tensor:
        return right(self, terms, is_stand_in=is_stand_in) * 2

    for wrong in (of_mean, twice):
        Update.backward_weights = wrong  # type: ignore[method-assign]
        results.append(verify(typed(compose([*NET, f"batch.size={size}"])), workers, 2, seconds=0.1))
    Update.backward_weights = right  # type: ignore[method-assign]
    return results


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    cases = RIGHT | WRONG | REFUSED
    if not HAS_TRANSFORMERS:
        del cases["transformers"]
    found: dict[str, Any] = run_workers(verified, 3, cases, 1, timeout_seconds=400)[0]
    return found


@pytest.mark.parametrize("name", RIGHT)
def test_right_ones_pass(results: dict[str, Any], name: str) -> None:
    if name == "transformers" and not HAS_TRANSFORMERS:
        pytest.skip("the package transformers is not installed")
    result = results[name]
    assert result["verdict"] in ("exact", "within rounding"), result
    assert result["comparisons"][0]["error"] < 1e-12
    kinds = {finding["kind"] for finding in result["findings"]}
    assert kinds == NOTES.get(name, set())
    assert result["same_bits"] is (True if name == "reproducible" else None)
    assert all(len(line) <= 80 for line in wording.describe(result).splitlines()), wording.describe(result)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_ones_are_caught_with_their_reason(results: dict[str, Any], name: str) -> None:
    result = results[name]
    assert result["verdict"] == "WRONG", result
    assert {one["kind"] for one in result["findings"] if one["severity"] == "wrong"} == REASONS[name]
    assert all(len(line) <= 80 for line in wording.describe(result).splitlines()), wording.describe(result)


def test_what_the_trainer_refuses_is_said_in_its_words(results: dict[str, Any]) -> None:
    assert "the forward changes parameters in place (last.weight)" in results["changes_parameters"]


def test_the_command_starts_workers_and_ends_with_the_verdict(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "mbgd", "verify", "--workers", "2", "--steps", "1", "--json", "-"]
    command += [*NET, "+model.wrong=batch_norm"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stderr
    result = json.loads(done.stdout)
    assert result["verdict"] == "WRONG"
    assert len(result["cluster"]["workers"]) == 2
    parsed = argparse.Namespace(overrides=[], workers=0, steps=1, seconds=1.0, step=None, json=None)
    with pytest.raises(UsageError, match="--workers and --steps are whole numbers"):
        verify_tool.main(parsed)


def test_every_kind_of_finding_is_found_somewhere_and_given_what_its_text_shows() -> None:
    """A place without a value would end verify with a KeyError where it has found something."""
    kinds = {name: kind for name, kind in vars(findings).items() if isinstance(kind, findings.Kind)}
    calls = [
        (node.func.attr, {str(keyword.arg) for keyword in node.keywords})
        for path in (ROOT / "mbgd/verify").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if isinstance(node.func.value, ast.Name) and node.func.value.id == "findings"
    ]
    assert {name for name, _ in calls} == set(kinds)
    for name, given in calls:
        assert given == {field for _, field, _, _ in string.Formatter().parse(kinds[name].what) if field}, name


def test_wrong_trainers_are_caught_with_their_reason() -> None:
    of_means, twice = run_workers(wrong_trainers, 3)[0]
    assert of_means["verdict"] == twice["verdict"] == "WRONG"
    assert [one["kind"] for one in of_means["findings"]] == ["mean_of_means"]
    assert [one["kind"] for one in twice["findings"]] == ["scaled"]
    assert "2 times as long" in twice["findings"][0]["what"]


def test_stragglers_and_other_versions_are_named() -> None:
    alike = {"host": "a", "matmul_flops": 1e9, "clock_skew_seconds": 0.0, "torch": "2", "python": "3", "threads": 1}
    alike["device"] = "cpu"
    assert cluster.warnings([alike, alike, alike]) == []
    slow = {**alike, "host": "b", "matmul_flops": 0.5e9, "clock_skew_seconds": 3.0, "torch": "1"}
    straggler, clock, versions = cluster.warnings([alike, slow, alike])
    assert straggler.startswith("worker 1 on b is a straggler: it computes 2.0 times as slowly")
    assert clock == "the clock of worker 1 on b is +3.0 s off."
    assert versions.startswith("torch: 2, but 1 on worker 1")
