"""Servers on loopback for the real wandb: one that works, and those that do not."""

import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar


class WorkingServer(ThreadingHTTPServer):
    """As much of W&B's interface as a run needs; keeps what is sent to it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.history: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        """The variables of each request that makes or changes a run."""
        self.operations: list[str] = []
        self.exit_code: int | None = None
        self.takes_history = threading.Event()
        """Unset: requests that bring the history are never answered."""
        self.takes_history.set()

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        assert found is not None, query
        name = found[1]
        self.operations.append(name)
        if name == "RunResumeStatus" and self.runs:
            return {"model": {"id": "p", "name": "mbgd", "entity": {"id": "e", "name": "me"}, "bucket": self._bucket()}}
        if name == "UpsertBucket":
            self.runs.append(variables)
            project = {"id": "p", "name": "mbgd", "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "b", "name": variables["name"], "config": "{}", "project": project, "historyLineCount": 0}
            return {"upsertBucket": {"bucket": bucket, "inserted": len(self.runs) == 1}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/upload"} for file in variables["files"]]
            return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
        return {}

    def file_stream(self, sent: dict[str, Any]) -> None:
        self.takes_history.wait()
        for line in sent.get("files", {}).get("wandb-history.jsonl", {}).get("content", []):
            self.history.append(json.loads(line))
        if sent.get("complete"):
            self.exit_code = sent["exitcode"]

    def _bucket(self) -> dict[str, Any]:
        return {
            "id": "b",
            "name": self.runs[0]["name"],
            "summaryMetrics": "{}",
            "logLineCount": 0,
            "historyLineCount": len(self.history),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in self.history[-1:]]),
            "eventsTail": "[]",
            "config": "{}",
            "tags": [],
            "wandbConfig": '{"t": {}}',
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WorkingServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer: dict[str, Any] = {}
        if self.path == "/graphql":
            asked = json.loads(body)
            answer = {"data": self.server.graphql(asked["query"], asked.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            self.server.file_stream(json.loads(body))
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST  # noqa: N815

    def log_message(self, *arguments: object) -> None:
        pass


class _BrokenHandler(BaseHTTPRequestHandler):
    requests: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_error(500)

    do_GET = do_PUT = do_POST  # noqa: N815

    def log_message(self, *arguments: object) -> None:
        self.requests.append(self.path)


@contextmanager
def working() -> Iterator[WorkingServer]:
    server = WorkingServer()
    with _served(server):
        yield server


@contextmanager
def answering_with_errors() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _BrokenHandler)
    server.daemon_threads = True
    with _served(server):
        yield f"http://127.0.0.1:{server.server_address[1]}"


@contextmanager
def never_answering() -> Iterator[str]:
    """Connections are made, by the kernel, and nothing ever comes back."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def refusing() -> Iterator[str]:
    """Nobody listens on the port, and nobody else can get it meanwhile."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


@contextmanager
def _served(server: ThreadingHTTPServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
