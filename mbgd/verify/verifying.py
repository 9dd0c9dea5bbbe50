"""From a configuration to verify's result, on each worker."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mbgd.config import Config, Precision
from mbgd.errors import UsageError
from mbgd.verify import cluster
from mbgd.verify.comparing import Comparison, compare, same_bits
from mbgd.verify.findings import Severity
from mbgd.workers.group import Workers


def verify(config: Config, workers: Workers, num_steps: int, seconds: float) -> dict[str, Any]:
    """The whole result as plain values; complete only on the main worker.

    seconds: limit for measuring the workers. UsageError if the trainer refuses the configuration.
    """
    if config.steps == 0:
        raise UsageError("steps=0 trains nothing, so there is nothing to compare; leave it out.")
    exact = compare(config, workers, num_steps, Precision.fp64)
    comparisons = [exact]
    if config.precision is not Precision.fp64:
        comparisons.append(compare(config, workers, num_steps, config.precision, exact))
    bits = same_bits(config, workers, num_steps)
    found = list(dict.fromkeys(one for comparison in comparisons for one in comparison.found))
    found.sort(key=lambda one: one.severity is not Severity.wrong)
    verdict, why = _verdict(comparisons, bits, num_wrong=sum(one.severity is Severity.wrong for one in found))
    last = comparisons[-1]
    return {
        "verdict": verdict,
        "why": why,
        "about": last.about,
        "comparisons": [
            {
                "precision": one.precision.value,
                "verdict": one.verdict,
                "error": one.error,
                "allowed": one.allowed,
                "steps": [asdict(row) for row in one.rows],
            }
            for one in comparisons
        ],
        "same_bits": bits,
        "findings": [one.values() for one in found],
        "cluster": cluster.look(workers, last.num_bytes, seconds),
    }


def _verdict(comparisons: Sequence[Comparison], bits: bool | None, *, num_wrong: int) -> tuple[str, str]:
    exact, last = comparisons[0], comparisons[-1]
    errors = f"relative error {exact.error:.1e} in float64"
    if last is not exact:
        errors += f", {last.error:.1e} in {last.precision.value}"
    if num_wrong or bits is False or any(one.verdict == "WRONG" for one in comparisons):
        reasons = f"{num_wrong} reason{'s' if num_wrong != 1 else ''} found" if num_wrong else "no reason was found"
        return "WRONG", f"{errors}; {reasons}."
    if exact.verdict != "exact":
        return "within rounding", f"{errors}: the model computes in float32 inside."
    if last is exact:
        return "exact", f"{errors}, against the whole minibatch in one backward on one worker."
    return "within rounding", f"{errors}: exact in float64, and as one worker rounds in {last.precision.value}."
