"""The gpt and the data that need more than a table in memory: exact, and the same on any number of workers."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from numpy.typing import NDArray
from torch import Tensor, nn

import mbgd
from mbgd.batches.order import Order
from mbgd.building.build import build_trainer, typed
from mbgd.checkpoints.fingerprint import weights_sha256
from mbgd.config import AveragingName
from mbgd.data import TokenWindows, text, tokens
from mbgd.models import GPT, MLP, Linear

import reference
from experiments import goal
from processes import run_workers

ROOT = Path(__file__).parent.parent
DOCUMENTS = {
    "a.txt": b"one",
    "b/c.txt": bytes(range(256)) * 2,
    "d.txt": b"x",
    "e.md": b"\xff\x00" * 37,
    "empty.txt": b"",
    **{f"short/{size}": b"abcdefghijklmno"[:size] for size in range(1, 15)},
}
END, PADDING = 256, -100


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for name, content in DOCUMENTS.items():
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "corpus"


def corpus_windows(split: str, corpus: Path, **options: Any) -> TokenWindows:
    windows = text(split, 10, str(corpus), **options)
    assert windows is not None
    return windows


# text


@pytest.mark.parametrize("evaluation_share", [0.0, 0.3])
def test_every_byte_is_predicted_once_from_those_before_it(corpus: Path, evaluation_share: float) -> None:
    splits = ["train", "evaluation"] if evaluation_share else ["train"]
    stream: list[int] = []
    for split in splits:
        for inputs, targets in iter(corpus_windows(split, corpus, evaluation_share=evaluation_share)):
            counts = targets != PADDING
            assert counts.any()
            assert counts.tolist() == sorted(counts.tolist(), reverse=True)
            assert torch.equal(inputs[1:][counts[1:]], targets[:-1][counts[1:]])
            assert inputs[0] == (stream[-1] if stream else END)
            stream += targets[counts].tolist()
    documents = bytes(token if token != END else 10 for token in stream)
    assert stream.count(END) == len(DOCUMENTS) - 1
    assert len(stream) == sum(map(len, DOCUMENTS.values())) + len(DOCUMENTS) - 1
    assert all(content + b"\n" in documents for content in DOCUMENTS.values() if content)
    assert text("evaluation", 10, str(corpus), evaluation_share=0) is None


def test_a_document_begins_a_window_of_its_own(corpus: Path) -> None:
    windows = corpus_windows("train", corpus, evaluation_share=0)
    assert len(windows) == sum(-(-(len(content) + 1) // 10) for content in DOCUMENTS.values() if content)
    inputs, targets = windows.gather(torch.arange(len(windows)))
    for index in (0, 7, len(windows) - 1):
        assert torch.equal(windows[index][0], inputs[index])
        assert torch.equal(windows[index][1], targets[index])
    assert not (inputs[:, 1:][targets[:, 1:] != PADDING] == END).any()


def test_text_is_packed_once_and_again_when_it_changes(corpus: Path, own_cache: Path) -> None:
    def packed() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in own_cache.glob("mbgd/*/*")}

    first = corpus_windows("train", corpus)[0][1].tolist()
    once = packed()
    assert len(once) == 2
    assert corpus_windows("train", corpus)[0][1].tolist() == first
    assert packed() == once
    times = (corpus / "a.txt").stat()
    (corpus / "a.txt").write_bytes(b"two")
    os.utime(corpus / "a.txt", ns=(times.st_atime_ns, times.st_mtime_ns))
    everything = corpus_windows("train", corpus, evaluation_share=0)
    assert bytearray(b"two") in bytearray(
        t for _, targets in iter(everything) for t in targets.tolist() if 0 <= t < 256
    )
    assert len(packed()) == 4


def test_names_that_match_are_taken(corpus: Path) -> None:
    assert len(corpus_windows("train", corpus, pattern="*.md", evaluation_share=0)) == 8
    assert len(corpus_windows("train", corpus / "a.txt", evaluation_share=0)) == 1


def test_the_standard_library_is_the_default() -> None:
    windows = text("evaluation", 64)
    assert windows is not None
    inputs, _ = windows.gather(torch.arange(len(windows)))
    assert b"def __init__(self" in inputs.numpy().astype(np.uint8).tobytes()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda corpus: text("train", 10, str(corpus / "none.txt")), r"none.txt: there is no such file"),
        (lambda corpus: text("train", 10, str(corpus), pattern="*.pdf"), r"holds no text.*\*.pdf"),
        (lambda corpus: text("train", 10, str(corpus / "empty.txt")), r"holds no text"),
        (lambda corpus: text("train", 0, str(corpus)), r"data.context=0"),
        (lambda corpus: text("train", 10, str(corpus), evaluation_share=1), r"data.evaluation_share=1"),
        (lambda corpus: text("train", 10, str(corpus), ignore_index=7), r"data.ignore_index=7 is a token"),
        (lambda corpus: text("test", 10, str(corpus)), r"no split 'test'"),
    ],
)
def test_text_that_cannot_be_used(corpus: Path, make: Callable[[Path], Any], message: str) -> None:
    with pytest.raises(mbgd.UsageError, match=message):
        make(corpus)


def test_a_damaged_cache_is_named(corpus: Path, own_cache: Path) -> None:
    corpus_windows("train", corpus)
    [tokens] = own_cache.glob("mbgd/*/tokens.bin")
    os.truncate(tokens, 100)
    with pytest.raises(mbgd.UsageError, match=f"{tokens.parent} is damaged.*Delete it"):
        corpus_windows("train", corpus)
    own_cache.joinpath("file").touch()
    os.environ["XDG_CACHE_HOME"] = str(own_cache / "file")
    with pytest.raises(mbgd.UsageError, match="Set XDG_CACHE_HOME"):
        corpus_windows("train", corpus)


def test_text_that_changes_while_it_is_packed_is_told_as_that(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = text.__globals__["_read"]

    def read_then_grow(documents: dict[str, Path], *write: Any) -> str:
        digest: str = read(documents, *write)
        (corpus / "a.txt").write_bytes(b"more")
        return digest

    monkeypatch.setitem(text.__globals__, "_read", read_then_grow)
    with pytest.raises(mbgd.UsageError, match=r"^the text changed while it was read"):
        corpus_windows("train", corpus)


# tokens


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_tokens_of_a_file_are_each_predicted_once(tmp_path: Path, dtype: type[np.unsignedinteger[Any]]) -> None:
    ids = np.random.default_rng(0).integers(0, 500, 87).astype(dtype)
    ids.tofile(tmp_path / "train.bin")
    windows = tokens(str(tmp_path / "train.bin"), 10, 500, dtype=dtype.__name__)
    inputs, targets = windows.gather(torch.arange(len(windows)))
    assert (len(windows), windows.input_shape, windows.num_outputs) == (9, (10,), 500)
    assert targets[targets != PADDING].tolist() == ids[1:].tolist()
    assert inputs[targets != PADDING].tolist() == ids[:-1].tolist()
    assert (targets == PADDING).sum() == 4


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (np.array([1, 2, 50], np.uint16), {}, r"train.bin: token 50 at position 2; .*0 to 49.*data.vocabulary"),
        (np.arange(50, dtype=np.uint16), {"dtype": "uint32"}, r"token 65536 at position 0"),
        (np.arange(3, dtype=np.uint16), {"dtype": "uint32"}, r"6 bytes; .*4 bytes each \(uint32\)"),
        (np.arange(1, dtype=np.uint16), {}, r"at least 2 tokens"),
        (np.arange(3, dtype=np.uint16), {"dtype": "int8"}, r"data.dtype=int8"),
        (np.arange(3, dtype=np.uint16), {"vocabulary": 0}, r"data.vocabulary=0"),
        (None, {}, r"no such file of tokens"),
    ],
)
def test_tokens_that_cannot_be_used(
    tmp_path: Path, content: NDArray[Any] | None, options: dict[str, Any], message: str
) -> None:
    if content is not None:
        content.tofile(tmp_path / "train.bin")
    with pytest.raises(mbgd.UsageError, match=message):
        tokens(str(tmp_path / "train.bin"), **{"context": 8, "vocabulary": 50, **options})


def test_a_wrong_token_is_found_wherever_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tokens.__globals__, "PIECE_TOKENS", 8)
    ids = np.zeros(100, np.uint16)
    ids[83] = 51
    ids.tofile(tmp_path / "train.bin")
    with pytest.raises(mbgd.UsageError, match="token 51 at position 83"):
        tokens(str(tmp_path / "train.bin"), 8, 50)


# gpt


def make_gpt(num_outputs: int, dropout: float, dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT((10,), num_outputs, num_layers=2, num_heads=2, width=16, dropout=dropout).to(dtype)


def test_a_token_is_predicted_from_those_up_to_its_own() -> None:
    torch.manual_seed(0)
    model = make_gpt(257, 0.0, torch.float64)
    tokens = torch.randint(257, (3, 10))
    other = tokens.clone()
    other[:, 6:] = torch.randint(257, (3, 4))
    changed = ~torch.isclose(model(tokens), model(other), rtol=1e-10).all(-1)
    assert changed.all(0).tolist() == [False] * 6 + [True] * 4
    assert sorted(model.state_dict()) == sorted(name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GPT((1, 8, 8), 10), "sequences of token ids"),
        (lambda: GPT((8,), 10, width=10, num_heads=3), "model.num_heads=3"),
        (
            lambda: GPT((8,), 10)(torch.ones(2, 9, dtype=torch.int64)),
            "sequences of 9 tokens, but it has a context of 8",
        ),
        (lambda: GPT((8,), 10)(torch.randn(2, 8)), "torch.float32; it takes token ids"),
        (lambda: MLP((8,), 10)(torch.ones(2, 8, dtype=torch.int64)), "the mlp got inputs of dtype torch.int64"),
        (
            lambda: Linear((8,), 10)(torch.ones(2, 8, dtype=torch.int64)),
            "the linear model got inputs of dtype torch.int64",
        ),
    ],
)
def test_what_a_gpt_cannot_be(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(mbgd.UsageError, match=message):
        make()


@pytest.mark.parametrize("which", ["train", "evaluation"])
def test_more_tokens_than_the_model_has_vectors_for_are_refused(which: str) -> None:
    model = GPT((4,), 9, num_layers=1, num_heads=1, width=4)

    def windows(vocabulary: int) -> TokenWindows:
        ids, boundaries = np.arange(9, dtype=np.uint16), np.array([0, 9])
        return TokenWindows(ids, boundaries, context=4, vocabulary=vocabulary, ignore_index=-100)

    def in_memory(*ids: int) -> mbgd.InMemory:
        return mbgd.InMemory(torch.tensor([[*ids]]), torch.tensor([[0, 1, 2, 3]]))

    for other, message in (
        (windows(10), "a vocabulary of 9 tokens, but the data of 10"),
        (in_memory(0, 3, 12, 8), "a vocabulary of 9 tokens, but the data of 13"),
        (in_memory(0, 3, -1, 8), "the data's inputs hold -1; a token id is at least 0"),
    ):
        with pytest.raises(mbgd.UsageError, match=message):
            mbgd.Trainer(
                model,
                mbgd.CrossEntropy(ignore_index=-100),
                torch.optim.SGD(model.parameters(), lr=0.1),
                mbgd.Data(**{"train": windows(9), "evaluation": windows(9)} | {which: other}),
                mbgd.Settings(steps=1, batch=mbgd.Batch(1)),
            )


SIZE, SEED, NUM_STEPS = 13, 5, 10


@dataclass(frozen=True)
class Case:
    dropout: float = 0.0
    averaging: str = "ddp"
    precision: str = "fp64"
    micro_batch_size: int | None = None


EXACT = [Case(), Case(micro_batch_size=3)]
SAME_BITS = [Case(0.2, "reproducible", "fp32"), Case(0.0, "reproducible", "fp32")]


def train_gpt(workers: mbgd.Workers, corpus: Path, case: Case) -> tuple[str, dict[str, float], list[Tensor]]:
    """Weights' hash, metrics and parameters of a gpt trained on ragged windows."""
    splits = ("train", "evaluation")
    train, evaluation = (text(split, 10, str(corpus), evaluation_share=0.2) for split in splits)
    precision = mbgd.Precision(case.precision)
    model = make_gpt(257, case.dropout, torch.float64 if precision is mbgd.Precision.fp64 else torch.float32)
    settings = mbgd.Settings(
        seed=SEED,
        steps=NUM_STEPS,
        batch=mbgd.Batch(SIZE, case.micro_batch_size),
        precision=precision,
        averaging=mbgd.Averaging(AveragingName(case.averaging)),
        evaluation=mbgd.Evaluation(batch_size=4),
        log_every_steps=1,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    data = mbgd.Data(train=train, evaluation=evaluation)
    result = mbgd.Trainer(model, mbgd.CrossEntropy(ignore_index=PADDING), optimizer, data, settings, workers).fit()
    metrics = {name: value for name, value in result.metrics.items() if "second" not in name}
    return weights_sha256(model), metrics, [p.detach() for p in model.parameters()]


def train_gpts(workers: mbgd.Workers, corpus: Path, cache: Path, cases: list[Case]) -> list[Any]:
    os.environ["XDG_CACHE_HOME"] = str(cache)  # workers come from a server that does not know of it
    return [train_gpt(workers, corpus, case) for case in cases]


def next_tokens(model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    inputs, targets = batch
    losses = F.cross_entropy(model(inputs).movedim(-1, 1), targets.clamp(min=0), reduction="none")
    return losses, (targets >= 0).double()


@pytest.fixture
def trained(corpus: Path, own_cache: Path) -> dict[int, list[list[Any]]]:
    """For each number of workers, for each worker, what the cases came to."""
    return {n: run_workers(train_gpts, n, corpus, own_cache, EXACT + SAME_BITS) for n in (3, 2, 1)}


def test_a_gpt_on_text(corpus: Path, own_cache: Path, trained: dict[int, list[list[Any]]]) -> None:
    """The mean over ragged tokens equals one plain process; with dropout and reproducible averaging, the same bits."""
    assert len(list(own_cache.glob("mbgd/*/tokens.bin"))) == 1
    model, metrics = trained_by_the_reference(corpus)
    before = make_gpt(257, 0.0, torch.float64)
    for of_workers in trained.values():
        for of_worker in of_workers:
            for _, got, parameters in of_worker[: len(EXACT)]:
                assert {name: got[name] for name in metrics} == pytest.approx(metrics, rel=1e-12)
                for ours, theirs, first in zip(parameters, model.parameters(), before.parameters(), strict=True):
                    assert torch.linalg.norm(ours - theirs.detach()) <= 1e-12 * torch.linalg.norm(theirs.detach())
                    assert not torch.equal(ours, first)
            for got, wanted in zip(of_worker[len(EXACT) :], trained[1][0][len(EXACT) :], strict=True):
                assert got[0] == wanted[0]
                assert of_training(got[1]) == of_training(wanted[1])
    assert len({weights for weights, _, _ in trained[1][0]}) == len(EXACT + SAME_BITS)


def of_training(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith("time/")}


def trained_by_the_reference(corpus: Path) -> tuple[nn.Module, dict[str, float]]:
    train, evaluation = (corpus_windows(split, corpus, evaluation_share=0.2) for split in ("train", "evaluation"))
    data = train.gather(torch.arange(len(train)))
    assert len(set((data[1] >= 0).sum(1).tolist())) > 5
    order, per_epoch = Order(len(train), SEED), -(-len(train) // SIZE)
    assert per_epoch < NUM_STEPS
    minibatches = []
    for step in range(NUM_STEPS):
        epoch, start = step // per_epoch, step % per_epoch * SIZE
        minibatches.append(order.indices(epoch, start, min(start + SIZE, len(train))).tolist())
    model = make_gpt(257, 0.0, torch.float64)
    losses = reference.train(
        model, next_tokens, data, minibatches, lambda parameters: torch.optim.SGD(parameters, lr=0.3, momentum=0.9)
    )
    with torch.no_grad():
        of_tokens, weights = next_tokens(model, evaluation.gather(torch.arange(len(evaluation))))
    return model, {"train/loss": losses[-1], "eval/loss": float((of_tokens * weights).sum() / weights.sum())}


# experiments


def reached() -> dict[str, float]:
    """What each experiment of the committed benchmark came to, by name."""
    lines = (ROOT / "benchmarks/results/experiments.txt").read_text().splitlines()
    found = (re.match(r"(\w+(?:, minibatch of 64)?) +eval/\w+ [≥≤] [\d.]+ +([\d.]+) +\d+ s$", line) for line in lines)
    return {match[1]: float(match[2]) for match in found if match}


def keeps(experiment: str, got: float) -> bool:
    _, relation, wanted = goal(experiment)
    return got >= wanted if relation == "≥" else got <= wanted


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (ROOT / "conf/experiment").glob("*.yaml")))
def test_the_committed_benchmark_reaches_what_the_experiment_states(experiment: str) -> None:
    assert keeps(experiment, reached()[experiment])


def test_a_large_minibatch_ends_within_half_a_point_of_a_small_one() -> None:
    large, small = reached()["large_batch"], reached()["large_batch, minibatch of 64"]
    assert abs(large - small) <= 0.005
    assert keeps("large_batch", small)


def test_digits_mlp_reaches_what_it_states() -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = typed(compose("train", ["experiment=digits_mlp"]))
    metrics = build_trainer(config, mbgd.Workers()).fit().metrics
    assert keeps("digits_mlp", metrics[goal("digits_mlp")[0]])
