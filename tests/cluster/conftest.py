"""A lab on one machine: PostgreSQL, an S3-speaking server, Prefect, MLflow, two workers.

Everything listens on loopback and ends with the process that runs the tests. Each worker, and the
laptop from which runs are started, has a working copy and a home folder of its own.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from graftline.data.build import build
from tests.flows.conftest import SIZES, Project
from tests.object_store import ObjectStore

ROOT = Path(__file__).resolve().parents[2]
PASSWORD = "planted-password-0815"
_START_SECONDS = 150.0
_BEGAN = time.monotonic()
_SECONDS = float(os.environ.get("GRAFTLINE_SECONDS", "inf"))
"""A test that would begin later than this after the first is skipped: CI ends, come what may."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    if time.monotonic() - _BEGAN > _SECONDS:
        pytest.skip(f"would begin more than {_SECONDS:.0f} s after the first (GRAFTLINE_SECONDS)")


@dataclass
class Server:
    """A process that listens on loopback.

    Attributes:
        command: what starts it.
        environment: its variables.
        log: where its output goes.
        answers: whether it does its work.
        ending: the signal that asks it to stop.
    """

    command: list[str]
    environment: Mapping[str, str]
    log: Path
    answers: Callable[[], bool]
    ending: signal.Signals = signal.SIGTERM
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it, and waits until it answers."""
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdout=file, stderr=file,
                cwd=self.log.parent, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + _START_SECONDS
        while not self.answers():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.3)

    def stop(self) -> None:
        """Asks it to end, and sees to it."""
        if self.process is None:
            return
        self.process.send_signal(self.ending)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        kill_group(self.process)
        self.process = None


@dataclass
class Machine(Project):
    """A working copy with a home folder of its own, which knows the lab's servers.

    Attributes:
        lab: variables that lead to them; empty for a machine that is alone.
    """

    lab: dict[str, str] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        home = self.folder.with_name(f"{self.folder.name}-home")
        home.mkdir(exist_ok=True)
        own = {"HOME": str(home), "GRAFTLINE_STORE_CACHE": str(home / "store")}
        parts = os.environ.get("GRAFTLINE_CACHE", "~/.cache/graftline/parts")
        own["GRAFTLINE_CACHE"] = str(Path(parts).expanduser())  # packages are fetched once
        return {**super().environment(), **own, **self.lab}


@dataclass
class Lab:
    """What the tests talk to.

    Attributes:
        folder: of everything.
        environment: variables that lead to the servers.
        database: folder of PostgreSQL's programs, and the URL of the server.
        servers: by name; each can be stopped and started again.
    """

    folder: Path
    environment: dict[str, str]
    database: tuple[Path, str]
    servers: dict[str, Server | ObjectStore]

    def machine(self, name: str) -> Machine:
        folder = self.folder / name
        if not folder.exists():
            folder.mkdir()
            shutil.copytree(ROOT / "params", folder / "params")
            for file in ("flows", "tasks", "graftline", "prefect.yaml"):
                (folder / file).symlink_to(ROOT / file)
        return Machine(folder, lab=self.environment)

    @contextmanager
    def worker(self, name: str) -> Iterator[subprocess.Popen[bytes]]:
        """A machine that works, as the leader of its process group."""
        machine = self.machine(name)
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                tied([sys.executable, "-m", "flows.cli", "work", "--name", name]),
                cwd=machine.folder,
                env=machine.environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                yield process
            finally:
                kill_group(process)

    def dump(self, name: str) -> str:
        """All that a database holds, as text."""
        programs, url = self.database
        command = [str(programs / "pg_dump"), f"{url}/{name}"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def tied(command: list[str], user: str | None = None) -> list[str]:
    """A command that is killed when the tests end, however they do.

    Where the tests are killed themselves, what the command started outlives it.
    """
    rights = ["--reuid", user, "--regid", user, "--init-groups"] if user else []
    return ["setpriv", "--pdeathsig", "KILL", *rights, *command]


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a worker and all that it started: the machine is switched off."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    programs = _postgres_programs()
    if programs is None or shutil.which("setpriv") is None:
        pytest.skip(
            "the cluster tests need PostgreSQL (`postgres` on the PATH or in "
            "/usr/lib/postgresql/*/bin) and setpriv (util-linux)"
        )
    pytest.importorskip("psycopg2", reason="install graftline[test] for the cluster tests")
    with running_lab(programs) as lab:
        yield lab


@contextmanager
def running_lab(programs: Path) -> Iterator[Lab]:
    """Starts all servers and deploys the flows; stops them at the end."""
    folder = Path(tempfile.mkdtemp(prefix="graftline-lab-"))
    folder.chmod(0o755)  # PostgreSQL runs as another user and looks into it
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        store = ObjectStore()
        stack.callback(store.stop)
        store.start()
        postgres, database = _postgres(programs, folder / "postgres")
        prefect, mlflow = _free_port(), _free_port()
        environment = {
            **store.environment,
            "PREFECT_API_URL": f"http://127.0.0.1:{prefect}/api",
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{mlflow}",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
        }
        servers = {
            "postgres": postgres,
            "prefect": _prefect(folder, prefect, database),
            "mlflow": _mlflow(folder, mlflow, database, store.environment),
        }
        for name, server in servers.items():
            stack.callback(server.stop)
            if name != "postgres":
                there = ["--maintenance-db", f"{database}/postgres"]
                subprocess.run([str(programs / "createdb"), *there, name], check=True)
            server.start()
        lab = Lab(folder, environment, (programs, database), {**servers, "store": store})
        laptop = lab.machine("laptop")
        build(laptop.folder / "data", sizes=SIZES)
        code, text = laptop.run("deploy", "--slots", "2")
        assert code == 0, text
        yield lab


@pytest.fixture(scope="session")
def alone(lab: Lab) -> Machine:
    """A machine that knows no servers."""
    folder = lab.machine("alone").folder
    shutil.copytree(lab.folder / "laptop" / "data", folder / "data")
    return Machine(folder)


def _postgres_programs() -> Path | None:
    found = shutil.which("postgres")
    if found:
        return Path(found).resolve().parent
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    return installed[-1].parent if installed else None


def _postgres(programs: Path, folder: Path) -> tuple[Server, str]:
    """A server of our own; it refuses to run as root, so root lends it another user's rights."""
    user = "postgres" if os.getuid() == 0 else None
    folder.mkdir()
    word = folder / "password"
    word.write_text(PASSWORD)
    if user:
        identity = pwd.getpwnam(user)
        for path in (folder, word):
            os.chown(path, identity.pw_uid, identity.pw_gid)
    data, port = folder / "data", _free_port()
    initdb = [str(programs / "initdb"), "--pgdata", str(data), "--username", "graftline"]
    initdb += ["--auth", "scram-sha-256", "--pwfile", str(word), "--no-sync"]
    subprocess.run(tied(initdb, user), check=True, capture_output=True, cwd=folder)
    command = [str(programs / "postgres"), "-D", str(data), "-p", str(port), "-k", str(folder)]
    command += ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
    ready = [str(programs / "pg_isready"), "--quiet", "-h", "127.0.0.1", "-p", str(port)]

    def answers() -> bool:
        return subprocess.run(ready, check=False).returncode == 0

    # SIGINT: it ends although others are connected, and leaves nothing to recover.
    log = folder.with_suffix(".log")
    server = Server(tied(command, user), os.environ, log, answers, signal.SIGINT)
    return server, f"postgresql://graftline:{PASSWORD}@127.0.0.1:{port}"


def _prefect(folder: Path, port: int, database: str) -> Server:
    environment = {
        **os.environ,
        "PREFECT_HOME": str(folder / "prefect-home"),
        "PREFECT_API_DATABASE_CONNECTION_URL": (
            database.replace("postgresql:", "postgresql+asyncpg:") + "/prefect"
        ),
        # Leases that lie in memory are forgotten when the server starts anew, their slots are not.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
            "prefect.server.concurrency.lease_storage.filesystem"
        ),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_UI_ENABLED": "false",
    }
    command = ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    return Server(
        tied([sys.executable, *command]),
        environment,
        folder / "prefect.log",
        partial(_answers, f"http://127.0.0.1:{port}/api/health"),
    )


def _mlflow(folder: Path, port: int, database: str, s3: dict[str, str]) -> Server:
    environment = {
        **os.environ,
        **s3,
        "MLFLOW_S3_ENDPOINT_URL": s3["AWS_ENDPOINT_URL"],
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
        "--backend-store-uri", database.replace(":", "+psycopg2:", 1) + "/mlflow", "--workers", "1",
        "--artifacts-destination", "s3://lab/mlflow",
    ]  # fmt: skip
    return Server(
        tied(command),
        environment,
        folder / "mlflow.log",
        partial(_answers, f"http://127.0.0.1:{port}/health"),
    )


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
