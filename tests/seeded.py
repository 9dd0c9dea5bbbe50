"""Plays the schedules of seeds 0 to N − 1, each in its own folder, and writes a table; goes on where it stopped."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory


def main(
    purpose: str, play: Callable[[Path, int], object], describe: Callable[[Mapping[int, str]], str], progress: str
) -> None:
    """play(folder, seed) raises if a run did not end as it must. describe: seeds, each with the error or "" → table.

    progress: the default of the file with one line for each run. Those that failed are played again.
    """
    parser = argparse.ArgumentParser(description=purpose)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--parallel", type=int, default=max(1, (os.cpu_count() or 1) // 2))
    parser.add_argument("--progress", type=Path, default=Path(progress), help="one line for each run")
    parser.add_argument("--results", type=Path, help="a file for the table")
    arguments = parser.parse_args()
    arguments.progress.parent.mkdir(parents=True, exist_ok=True)
    arguments.progress.touch()
    done = {int(one["seed"]): str(one["error"]) for one in map(json.loads, arguments.progress.open())}
    wanted = [seed for seed in range(arguments.runs) if done.get(seed, "not yet")]

    def played(seed: int) -> tuple[int, str]:
        with TemporaryDirectory() as folder:
            try:
                play(Path(folder), seed)
            except Exception as error:
                return seed, f"{type(error).__name__}: {error}".splitlines()[0]
        return seed, ""

    with ThreadPoolExecutor(arguments.parallel) as pool, arguments.progress.open("a") as lines:
        for seed, error in pool.map(played, wanted):
            done[seed] = error
            lines.write(json.dumps({"seed": seed, "error": error}) + "\n")
            lines.flush()
            print(f"seed {seed}: {error or 'right'}", flush=True)
    table = describe({seed: error for seed, error in done.items() if seed < arguments.runs})
    print(table)
    if arguments.results:
        arguments.results.write_text(table + "\n")
    sys.exit(any(done.values()))
