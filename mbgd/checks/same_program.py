"""Compares, before training, the program that each worker runs, and names what differs before anything can hang."""

import functools
import hashlib
import platform
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from mbgd.batches.describing import attributes, content, description, form, kind, may_differ, module_of
from mbgd.batches.loader import Data
from mbgd.batches.randomness import key_reading, undisturbed
from mbgd.config import AveragingName, Settings
from mbgd.errors import UsageError
from mbgd.workers.group import Workers

MOST_DIFFERENCES = 20
"""Named in one error; the rest is only counted."""

MOST_WORKERS = 8
"""Named for one difference."""

NUM_LOOKS = 8
"""How often an example is read, to see whether reading draws from a generator of the dataset's own."""

OF_THE_MAIN_WORKER = frozenset({"run", "tracking"})
"""Sections of the configuration that only the main worker uses."""


def check_same_program(
    workers: Workers, model: nn.Module, objective: Any, optimizer: Optimizer, data: Data, settings: Settings
) -> dict[str, str]:
    """UsageError, on every worker, where something that the course of training depends on differs between workers.

    The values of parameters and buffers are not compared: every worker gets them from the main one. Returns what was
    compared by name, without the examples.
    """
    program = dict(_program(model, objective, optimizer, data, settings))
    if workers.num_workers == 1:
        return program
    if settings.averaging.name is AveragingName.reproducible:
        _check_same_processor(workers)
    examples = dict(_examples(data))
    looks = {name: _look(dataset, end) for name, (_, dataset, end) in examples.items()}
    found = _differences(workers, program | looks)
    for name, (length, dataset, end) in examples.items():
        if length in found:
            found.pop(name, None)  # the length explains the difference
        elif name in found and not _differs(workers, dataset, end):
            del found[name]
    _refuse(found)
    return program


def check_same_config(workers: Workers, config: Mapping[str, Any]) -> dict[str, str]:
    """UsageError, on every worker, where the resolved configuration differs between workers, paths aside.

    Returns what was compared by name.
    """
    mine = dict(_of_config(config))
    if workers.num_workers > 1:
        _refuse(_differences(workers, mine))
    return mine


def check_newcomer(mine: Mapping[str, str], of_others: Mapping[str, str]) -> None:
    """UsageError where a worker that comes in place of a lost one does not run the program that the others run.

    mine and of_others: what the functions above return.
    """
    found = {name: (value, of_others.get(name, "nothing")) for name, value in mine.items()}
    told = [f"{name}: {value}, not {others}" for name, (value, others) in found.items() if value != others]
    if told:
        raise UsageError(
            f"a new worker does not run the program that the others run: {_shortened(told)}. They go on without it. "
            "Files have changed since the run began: put them back for the next new worker, or start the run again to "
            "train with the new ones."
        )


def _check_same_processor(workers: Workers) -> None:
    """UsageError, on every worker, where processors differ on which the bits of a micro-batch depend."""
    if workers.device.type == "cuda":
        mine = torch.cuda.get_device_name(workers.device)
    else:
        mine = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    if of_workers := workers.gather_if_unlike(mine):
        raise UsageError(
            f"averaging=reproducible on different processors: {_who_has_what(of_workers)}. There a micro-batch has "
            "other bits, so the result would depend on which worker computes it. Use hosts of one kind, or "
            "averaging=auto; where only the vector instructions differ, set ATEN_CPU_CAPABILITY alike on every host."
        )


def _differences(workers: Workers, mine: Mapping[str, str]) -> dict[str, list[str]]:
    """Name → values by rank, for everything that differs between workers, in the order of `mine`."""
    of_workers = workers.gather_if_unlike(dict(mine))
    names = dict.fromkeys(name for of_worker in of_workers for name in of_worker)
    by_name = {name: [of_worker.get(name, "nothing") for of_worker in of_workers] for name in names}
    return {name: values for name, values in by_name.items() if len(set(values)) > 1}


def _refuse(found: Mapping[str, list[str]]) -> None:
    """UsageError where there are differences."""
    if found:
        told = [f"{name}: {_who_has_what(values)}" for name, values in found.items()]
        raise UsageError(
            f"the workers do not run the same program: {_shortened(told)}. Start every worker with the same code, "
            "configuration and data. Every worker needs the whole dataset: the trainer chooses which examples each "
            "worker computes."
        )


def _shortened(told: list[str]) -> str:
    more = [f"and {len(told) - MOST_DIFFERENCES} more"] if len(told) > MOST_DIFFERENCES else []
    return "; ".join([*told[:MOST_DIFFERENCES], *more])


def _who_has_what(values: list[str]) -> str:
    """Names the workers that differ from the majority, or all if no two agree. values: by rank."""
    (commonest, count), *_ = Counter(values).most_common(1)
    named = [rank for rank, value in enumerate(values) if value != commonest or count == 1]
    parts = [f"{values[rank]} on worker {rank}" for rank in named[:MOST_WORKERS]]
    parts += [f"other values on {len(named) - MOST_WORKERS} more"] if len(named) > MOST_WORKERS else []
    parts += [f"{commonest} on the others"] if count > 1 else []
    return ", ".join(parts)


def _program(
    model: nn.Module, objective: Any, optimizer: Optimizer, data: Data, settings: Settings
) -> Iterator[tuple[str, str]]:
    yield "version of torch", torch.__version__
    yield "version of Python", platform.python_version()
    yield "code of mbgd", code_of_package()
    yield from _of_settings(settings, fields(Settings))
    yield from _of_optimizer(optimizer, model)
    yield from _of_part("objective", objective)
    for name, module in model.named_modules():
        yield f"model.{name}" if name else "model", description(module)
    datasets = _datasets(data)
    for name, dataset in datasets.items():
        yield from _of_dataset(name, dataset)
    for key, value in vars(data).items():
        if key not in ("train", "evaluation") and not may_differ(key):
            is_order = key == "order" and value is not None
            yield f"data.{key}", value.described() if is_order else description(value)
    yield from _of_code(*model.modules(), objective, optimizer, *datasets.values(), settings.schedule)


def _datasets(data: Data) -> dict[str, Any]:
    """By the name that errors use."""
    sets = data.evaluation_sets or {"": None}
    return {"training": data.train} | {f"evaluation {name}".rstrip(): dataset for name, dataset in sets.items()}


def _of_settings(settings: Any, its_fields: Iterable[Field[Any]], prefix: str = "") -> Iterator[tuple[str, str]]:
    for field in its_fields:
        value = getattr(settings, field.name)
        if is_dataclass(value):
            yield from _of_settings(value, fields(value), f"{prefix}{field.name}.")
        elif callable(value):
            yield from _of_part(f"{prefix}{field.name}", value)
        elif isinstance(value, Mapping):
            for key, one in value.items():
                yield f"{prefix}{field.name}.{key}", kind(one)
        else:
            yield f"{prefix}{field.name}", description(value)


def _of_optimizer(optimizer: Optimizer, model: nn.Module) -> Iterator[tuple[str, str]]:
    yield "optimizer", kind(optimizer)
    groups = optimizer.param_groups
    held = {id(parameter) for group in groups for parameter in group["params"]}
    yield "parameters of the model that the optimizer lacks", str(sum(id(p) not in held for p in model.parameters()))
    for number, group in enumerate(groups):
        prefix = f"optimizer.param_groups[{number}]" if len(groups) > 1 else "optimizer"
        if len(groups) > 1:
            yield f"{prefix}.params", str(len(group["params"]))
        for name, value in group.items():
            if name != "params":
                yield f"{prefix}.{name}", description(value)


def _of_part(name: str, part: Any) -> Iterator[tuple[str, str]]:
    yield name, kind(part)
    for attribute, value in attributes(part):
        yield f"{name}.{attribute}", description(value)


def _of_dataset(name: str, dataset: Any) -> Iterator[tuple[str, str]]:
    yield f"the {name} dataset", "none" if dataset is None else kind(dataset)
    yield _length(name), "none" if dataset is None else str(len(dataset))


def _length(name: str) -> str:
    return f"number of {name} examples"


def _examples(data: Data) -> Iterator[tuple[str, tuple[str, Any, str]]]:
    """Name of each compared example → (name of its dataset's length, the dataset, "first" or "last")."""
    for name, dataset in _datasets(data).items():
        for end in ("first", "last"):
            yield f"the {end} {name} example", (_length(name), dataset, end)


def _look(dataset: Any, end: str) -> str:
    return " of content ".join(filter(None, _form_and_content(dataset, end)))


def _form_and_content(dataset: Any, end: str) -> tuple[str, str]:
    if dataset is None:
        return "none", ""
    try:
        example = _read(dataset, 0 if end == "first" else len(dataset) - 1)
    except Exception as error:  # the trial before training raises it again, on every worker
        return f"{type(error).__name__}: {error}", ""
    return form(example), content(example)


def of_training_examples(data: Data) -> dict[str, str]:
    """The forms and contents of the first and the last training example, by which other data can be told later.

    Without those that a generator of the dataset's own changes from one reading to the next.
    """
    found = {end: {_look(data.train, end) for _ in range(NUM_LOOKS)} for end in ("first", "last")}
    return {end: looks.pop() for end, looks in found.items() if len(looks) == 1}


def _differs(workers: Workers, dataset: Any, end: str) -> bool:
    """Whether an example really differs, and not only by what a generator of the dataset's own draws."""
    looks = [_form_and_content(dataset, end) for _ in range(NUM_LOOKS)]
    of_workers = workers.gather_values([sorted(set(seen)) for seen in zip(*looks, strict=True)])
    if all(len(contents) == 1 for _, contents in of_workers):
        return True
    forms = [forms for forms, _ in of_workers]
    return all(len(seen) == 1 for seen in forms) and forms.count(forms[0]) < len(forms)


def _read(dataset: Any, index: int) -> Any:
    """As training reads it, with the index as the key of its randomness."""
    with undisturbed():
        key_reading(index)
        if hasattr(dataset, "augmented"):
            return dataset.augmented(index, index)
        return dataset.gather(torch.tensor([index])) if hasattr(dataset, "gather") else dataset[index]


@functools.cache
def code_of_package() -> str:
    """A short hash of mbgd's own files."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def _of_code(*parts: Any) -> Iterator[tuple[str, str]]:
    """A short hash of each file that defines one of these parts, except torch's and mbgd's."""
    for name in sorted({module_of(part) for part in parts}):
        path = Path(getattr(sys.modules.get(name), "__file__", None) or "")
        if path.suffix == ".py" and path.is_file() and name.partition(".")[0] not in ("torch", "mbgd"):
            yield f"code of {name}", _hash_of_code(path)


@functools.cache
def _hash_of_code(path: Path) -> str:
    """As it was when first asked for: this process goes on with that code, whatever becomes of the file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8]


def _of_config(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if key in OF_THE_MAIN_WORKER or may_differ(key):
            continue
        if isinstance(value, Mapping):
            yield from _of_config(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", description(value)
