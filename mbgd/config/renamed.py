"""Keys that have new names, which a mistake in an old one is told."""

RENAMED = {
    "batch.last": "batch.drop_last (keep is false, drop is true)",
    "clip_norm": "max_grad_norm",
    "checkpoint.memory_every": "checkpoint.memory_every_steps",
    "resume_force": "resume.force",
}

RENAMED_BEGINS = "It is called"


def new_name(key: str) -> str:
    """What to say of an unknown key: a space and its new name; empty where it never was one."""
    return f" {RENAMED_BEGINS} {RENAMED[key]} now." if key in RENAMED else ""
