"""The nearest valid name for a mistyped key or value."""

import difflib
from collections.abc import Iterable


def nearest(name: str, valid: Iterable[str], most: int = 2) -> list[str]:
    """Valid names spelled like `name`, best first; `name` may lack its section or its end."""
    valid = list(dict.fromkeys(valid))
    if other_case := [one for one in valid if one.casefold() == name.casefold()]:
        return other_case[:most]
    section, _, last = name.rpartition(".")
    last_parts = {one: one.rpartition(".")[2] for one in valid}
    same_last = [one for one in valid if last_parts[one] == last]
    siblings = {last_parts[one]: one for one in valid if one.rpartition(".")[0] == section}
    begun = [one for part, one in siblings.items() if len(last) > 2 and part.startswith(last)]
    misspelled = [siblings[one] for one in difflib.get_close_matches(last, siblings, n=most, cutoff=0.65)]
    elsewhere = difflib.get_close_matches(name, valid, n=most, cutoff=0.75)
    found = [*same_last, *misspelled, *begun, *elsewhere]
    found = found or difflib.get_close_matches(last, valid, n=most, cutoff=0.75)  # data.batch_size for batch.size
    return list(dict.fromkeys(found))[:most]


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """' Did you mean batch.micro_batch_size?', or empty if no valid name is near."""
    found = nearest(name, valid)
    return f" Did you mean {' or '.join(found)}?" if found else ""


def matching_none(
    setting: str, pattern: str, names: Iterable[str], kind: str = "parameter", listed: str = "Names"
) -> str:
    """The error about a pattern in a setting that matches no name. kind, listed: what has the names, for the text."""
    names = list(names)
    meant = nearest(pattern.strip("*."), names) or names[:5]
    return (
        f"{setting}: no {kind}'s name matches {pattern!r}. {listed} of this model are "
        f"{', '.join(meant)}{', …' if len(names) > len(meant) else ''}."
    )
