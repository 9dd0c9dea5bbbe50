"""A page that follows runs while they train, for this machine's own browser.

Only the loopback address answers, under a random path that other users of the machine do not know, and only where the
browser was asked for the loopback host: a page from elsewhere, whose host name was made to lead here, is refused.
"""

import hashlib
import secrets
import signal
import threading
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mbgd.errors import UsageError
from mbgd.files import strict_json
from mbgd.report.data import page_data
from mbgd.report.finding import Runs
from mbgd.report.page import render
from mbgd.report.writing import title_of

ADDRESS = "127.0.0.1"
SECONDS_FOR_REQUEST = 10
TEXT = "text/plain; charset=utf-8"


class Server(ThreadingHTTPServer):
    """Serves the page and its data; port 0: one that is free."""

    daemon_threads = True

    def __init__(self, folders: Sequence[Path], port: int = 0) -> None:
        self._runs, self._folders = Runs(folders), folders
        self._lock = threading.Lock()  # the runs are read by one request at a time
        self.data()  # UsageError before anything is served
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            raise UsageError(
                f"--port {port} cannot be used: {error.strerror}. Leave it out for a port that is free."
            ) from error
        self.prefix = f"/{secrets.token_urlsafe(16)}/"

    @property
    def address(self) -> str:
        return f"http://{ADDRESS}:{self.server_port}{self.prefix}"

    @property
    def hosts(self) -> tuple[str, str]:
        """What a browser on this machine calls the server."""
        return f"{ADDRESS}:{self.server_port}", f"localhost:{self.server_port}"

    def data(self) -> dict[str, Any]:
        with self._lock:
            found = self._runs.read(may_grow=True)
            title = title_of(found, self._folders)
            return page_data(found, title, problems=self._runs.problems, watched=True)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = SECONDS_FOR_REQUEST

    def do_GET(self) -> None:
        if self.headers.get("Host") not in self.server.hosts:
            self._answer(HTTPStatus.FORBIDDEN, b"This address answers to 127.0.0.1 and localhost alone.\n")
        elif self.path == self.server.prefix:
            self._data(lambda data: render(data).encode(), "text/html; charset=utf-8")
        elif self.path == f"{self.server.prefix}data.json":
            self._data(lambda data: strict_json.dumps(data, is_compact=True).encode(), "application/json")
        else:
            self._answer(HTTPStatus.NOT_FOUND, b"Nothing is here. `mbgd report --watch` prints the address.\n")

    def _data(self, content: Any, kind: str) -> None:
        try:
            data = self.server.data()
        except UsageError as error:  # the run's folder has been removed
            self._answer(HTTPStatus.GONE, f"{error}\n".encode())
            return
        written = data.pop("written")
        version = '"' + hashlib.sha256(strict_json.dumps(data).encode()).hexdigest() + '"'
        if self.headers.get("If-None-Match") == version:
            self._answer(HTTPStatus.NOT_MODIFIED, b"")
            return
        self._answer(HTTPStatus.OK, content({**data, "written": written}), kind, version)

    def _answer(
        self, status: HTTPStatus, body: bytes, kind: str = "text/plain; charset=utf-8", version: str = ""
    ) -> None:
        self.send_response_only(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Referrer-Policy", "no-referrer")
        if version:
            self.send_header("ETag", version)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def watch(folders: Sequence[Path], port: int) -> None:
    """Print the page's address and serve it until Ctrl-C, or SIGTERM."""
    with Server(folders, port) as server:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            print(f"watching    {server.address}\nCtrl-C ends this; the run goes on.", flush=True)
            server.serve_forever()
        except KeyboardInterrupt:
            print()
