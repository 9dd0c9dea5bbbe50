"""`mbgd report RUN --watch`: who is answered, with what, and how it ends."""

import http.client
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from mbgd.errors import UsageError
from mbgd.report.watch import Server

from report_runs import data_of, line_of, make_run, write_lines


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", num_steps=20)


@pytest.fixture
def server(run: Path) -> Iterator[Server]:
    with Server([run]) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def ask(server: Server, path: str, method: str = "GET", **headers: str) -> tuple[int, http.client.HTTPMessage, str]:
    """(status, headers, body)"""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, answer.headers, body


def test_the_page_and_its_data_are_served_and_nothing_else(server: Server, run: Path) -> None:
    assert server.server_address[0] == "127.0.0.1"
    status, headers, page = ask(server, server.prefix)
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert "connect-src 'self'" in page
    assert data_of(page)["runs"][0]["name"] == "run"
    status, headers, body = ask(server, f"{server.prefix}data.json")
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert json.loads(body)["runs"][0]["curves"]["train/loss"]["num"] == 20
    for path in ("/", "/data.json", "/x/data.json", server.prefix + "run.json", server.prefix + "../run.json"):
        assert ask(server, path)[0] == 404, path
        assert "run" not in ask(server, path)[2].replace("`mbgd report --watch`", "")
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert ask(server, server.prefix, method)[0] == 501, method
    assert len(server.prefix) > 20
    with Server([run]) as other:
        assert other.prefix != server.prefix


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "localhost.evil:{port}"]
)
def test_a_host_name_that_was_made_to_lead_here_is_refused(server: Server, host: str) -> None:
    given = host.format(port=server.server_port)
    status, _, body = ask(server, server.prefix, Host=given)
    assert (status, body) == (403, "This address answers to 127.0.0.1 and localhost alone.\n")
    assert ask(server, server.prefix, Host=f"localhost:{server.server_port}")[0] == 200


def test_data_are_sent_again_only_where_they_have_changed(server: Server, run: Path) -> None:
    _, headers, _ = ask(server, f"{server.prefix}data.json")
    again = ask(server, f"{server.prefix}data.json", If_None_Match=headers["ETag"])
    assert (again[0], again[2]) == (304, "")
    write_lines(run, [line_of(21)], "a")
    status, _, body = ask(server, f"{server.prefix}data.json", If_None_Match=headers["ETag"])
    assert (status, json.loads(body)["runs"][0]["curves"]["train/loss"]["num"]) == (200, 21)


def test_a_run_that_is_removed_and_a_port_that_is_taken_are_told(server: Server, run: Path) -> None:
    with pytest.raises(UsageError, match=f"--port {server.server_port} cannot be used"):
        Server([run], server.server_port)
    shutil.rmtree(run)
    status, _, body = ask(server, f"{server.prefix}data.json")
    assert status == 410
    assert "is not the folder of a run" in body
    with pytest.raises(UsageError, match="is not the folder of a run"):
        Server([run])


def test_a_new_run_under_the_folder_is_found(tmp_path: Path, run: Path) -> None:
    with Server([tmp_path]) as server:
        assert [one["name"] for one in server.data()["runs"]] == ["run"]
        make_run(tmp_path / "another")
        assert [one["name"] for one in server.data()["runs"]] == ["another", "run"]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_the_command_ends_cleanly(run: Path, stop: signal.Signals) -> None:
    command = [sys.executable, "-m", "mbgd", "report", str(run), "--watch"]
    # A shell starts what runs in the background with SIGINT ignored, and that is inherited.
    listens = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=listens) as started:
        assert started.stdout
        first = started.stdout.readline()
        assert re.fullmatch(r"watching    http://127\.0\.0\.1:\d+/[\w-]+/\n", first)
        assert started.stdout.readline() == "Ctrl-C ends this; the run goes on.\n"
        started.send_signal(stop)
        out, err = started.communicate(timeout=20)
    assert started.returncode == 0
    assert err == ""
    assert out.strip() == ""
