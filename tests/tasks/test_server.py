"""A Prefect server of the user's is waited for, for a while."""

from __future__ import annotations

import resource
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from flows.cli_lab import deploy
from graftline.durable import why_unwritable
from graftline.errors import GraftlineError
from graftline.steps.supervised import start_child
from tasks import server
from tasks.ui import free_port


class _Health(BaseHTTPRequestHandler):
    """Answers as a server whose database is away, then as one that is well."""

    asked: list[str]

    def do_GET(self):
        self.asked.append(self.path)
        self.send_response(503 if len(self.asked) < 3 else 200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def port():
    return free_port()


def _configured(port, patch):
    patch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{port}/api")
    patch.setattr(server.time, "sleep", lambda seconds: time.monotonic())
    return server.Server()


def test_a_server_that_comes_back_is_waited_for(port, monkeypatch):
    handler = type("Handler", (_Health,), {"asked": []})
    http = HTTPServer(("127.0.0.1", port), handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        with _configured(port, monkeypatch) as running:
            assert running.wait() == f"http://127.0.0.1:{port}/api"
    finally:
        http.shutdown()
        http.server_close()
    assert handler.asked == ["/api/health"] * 3


def test_one_that_does_not_is_named(port, monkeypatch):
    monkeypatch.setattr(server, "_ANSWER_SECONDS", 0.2)
    with (
        _configured(port, monkeypatch) as running,
        pytest.raises(GraftlineError, match=f"127.0.0.1:{port}/api does not answer. Start it"),
    ):
        running.wait()


def test_an_address_that_is_no_url_is_refused_at_once(monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "localhost:4200/api")
    with pytest.raises(GraftlineError, match="PREFECT_API_URL: .*write http://localhost:4200/api"):
        server.Server()


def test_who_deploys_waits_for_the_server_too(port, monkeypatch):
    monkeypatch.setattr(server, "_ANSWER_SECONDS", 0.2)
    _configured(port, monkeypatch)
    with pytest.raises(GraftlineError, match=f"127.0.0.1:{port}/api does not answer. Start it"):
        deploy()


def test_where_prefect_cannot_write_is_named_before_it_is_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("PREFECT_API_URL", "PREFECT_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_PROFILES_PATH", str(tmp_path / "none.toml"))
    (tmp_path / ".prefect").write_text("in the way")
    monkeypatch.setattr(server, "start_child", lambda *_: pytest.fail("was started"))
    with (
        pytest.raises(GraftlineError, match=r"\.prefect: cannot be written \(Not a directory\)"),
        server.Server(),
    ):
        pass
    monkeypatch.delenv("PREFECT_HOME", raising=False)


@pytest.mark.parametrize(
    ("child", "told"),
    [
        ("import time; time.sleep(60)", r"did not start within 1 s: this machine may be too busy"),
        ("raise SystemExit(1)", r"did not start\. To see why"),
    ],
)
def test_a_server_that_is_slow_is_told_from_one_that_ends(tmp_path, monkeypatch, child, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setenv("PREFECT_PROFILES_PATH", str(tmp_path / "none.toml"))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr(server, "START_SECONDS", 1.0 if "sleep" in child else 300.0)
    monkeypatch.setattr(server, "start_child", lambda *_: start_child(["-c", child], {}))
    with pytest.raises(GraftlineError, match=told), server.Server():
        pass


def test_a_disk_that_takes_an_empty_file_alone_is_full(tmp_path):
    assert why_unwritable(tmp_path / "to" / "be" / "made") is None
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        assert why_unwritable(tmp_path) == "File too large"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
