"""What a lab's servers, its store and its machines' reports say."""

from __future__ import annotations

import json
import time
import urllib.request
from typing import Any

import pytest

from tests.cluster.conftest import Lab
from tests.flows.conftest import bits_of
from tests.object_store import BUCKET

SHARED = f"s3://{BUCKET}/artifacts"
ON_WORKERS = ["--set", f"store={SHARED}", "--set", "execution.where=workers"]


def asked(lab: Lab, path: str, body: dict[str, Any] | None = None) -> Any:
    """What Prefect's server says."""
    request = urllib.request.Request(
        f"{lab.environment['PREFECT_API_URL']}/{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def runs_in(lab: Lab, *states: str) -> list[dict[str, Any]]:
    wanted = {"flow_runs": {"state": {"type": {"any_": list(states)}}}}
    return list(asked(lab, "flow_runs/filter", wanted))


def slots_taken(lab: Lab) -> int:
    return int(asked(lab, "v2/concurrency_limits/gpu")["active_slots"])


def wait_for_free_slots(lab: Lab, seconds: float = 120.0) -> None:
    """Waits until no slot is taken."""
    deadline = time.monotonic() + seconds
    while slots_taken(lab):
        assert time.monotonic() < deadline, "a slot stays taken"
        time.sleep(1)


def published(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, str]]:
    """What the store holds: artifact -> file -> sha256."""
    import s3fs

    for name, value in lab.environment.items():
        monkeypatch.setenv(name, value)
    files = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    found = files.glob(f"{BUCKET}/artifacts/*/*/manifest.json")
    return bits_of([json.loads(files.cat_file(path)) for path in found])
