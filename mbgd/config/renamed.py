"""Renamed keys: errors about an old key name the new one."""

RENAMED = {
    "batch.last": "batch.drop_last (keep is false, drop is true)",
    "clip_norm": "max_grad_norm",
    "checkpoint.memory_every": "checkpoint.memory_every_steps",
    "resume_force": "resume.force",
}

RENAMED_BEGINS = "It is called"


def new_name(key: str) -> str:
    """For an unknown key that was renamed: a space and a sentence with the new name; otherwise empty."""
    return f" {RENAMED_BEGINS} {RENAMED[key]} now." if key in RENAMED else ""
