"""docs/coming_from.md: every option of ours that it names is composed, and a trainer is built from it."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_configuration import composed

import mbgd
from mbgd.building.build import build_trainer, typed

PAGE = Path(__file__).parent.parent / "docs/coming_from.md"


def commands() -> Iterator[list[str]]:
    """The options of each alternative: those with nothing but a space between them belong together."""
    for line in PAGE.read_text().splitlines():
        if not line.startswith("| "):
            continue
        together: list[str] = []
        for between, option in re.findall(r"([^`]*)`([^`]+)`", line.strip("| ").rpartition(" | ")[2]):
            if between != " " and together:
                yield together
                together = []
            if re.match(r"'?[a-z_.]+=", option) and "RUN" not in option:
                together += shlex.split(option)
        if together:
            yield together


COMMANDS = list(commands())


@pytest.mark.parametrize("overrides", COMMANDS, ids=" ".join)
def test_every_option_exists_and_makes_a_trainer(overrides: list[str]) -> None:
    build_trainer(typed(composed("model=mlp", "data=digits", *overrides)), mbgd.Workers())


def test_the_tables_are_read() -> None:
    assert len(COMMANDS) > 50
    assert ["batch.size=256", "batch.micro_batch_size=64"] in COMMANDS
    assert ["evaluation.every_steps=2 epochs"] in COMMANDS
