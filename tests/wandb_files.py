"""Reads what wandb writes to disk: records of protobuf in LevelDB's log format, after a header of its own."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER, RECORD = 32768, 7, struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file, in their order."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    content = path.read_bytes()
    assert content[:4] == b":W&B", content[:HEADER]
    position, parts = HEADER, b""
    while position + RECORD.size <= len(content):
        left = BLOCK - position % BLOCK
        if left < RECORD.size:
            position += left
            continue
        _, length, kind = RECORD.unpack_from(content, position)
        position += RECORD.size
        part, position = content[position : position + length], position + length
        parts = part if kind in (FULL, FIRST) else parts + part
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(parts)
            yield record


def read(path: Path) -> dict[str, Any]:
    """A run's id, config, history, summary, alerts, axes, and exit code (None: it has not ended)."""
    found: dict[str, Any] = {"config": {}, "history": [], "summary": {}, "metrics": {}, "exit": None}
    found |= {"alerts": [], "artifacts": []}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found |= {"id": record.run.run_id, "group": record.run.run_group, "tags": list(record.run.tags)}
            found |= {"name": record.run.display_name, "project": record.run.project}
            found["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            items = record.history.item
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            found["history"].append({name: value for name, value in row.items() if not name.startswith("_")})
        elif kind == "summary":
            items = record.summary.update
            found["summary"] |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
        elif kind == "alert":
            found["alerts"].append((record.alert.title, record.alert.text))
        elif kind == "metric":
            found["metrics"][record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
        elif kind == "request" and record.request.HasField("log_artifact"):
            artifact = record.request.log_artifact.artifact
            found["artifacts"].append((artifact.name, sorted(artifact.aliases)))
        elif kind == "artifact":
            found["artifacts"].append((record.artifact.name, sorted(record.artifact.aliases)))
        elif kind == "preempting":
            found["preempting"] = True
    return found
