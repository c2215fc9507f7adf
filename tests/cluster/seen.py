"""What a lab's servers, its store and its machines' reports say."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import pytest

from tests.cluster.conftest import Lab, Machine
from tests.flows.conftest import TIMES
from tests.object_store import BUCKET

SHARED = f"s3://{BUCKET}/artifacts"
ON_WORKERS = ["--set", f"store={SHARED}", "--set", "execution.where=workers"]
NOT_BITS = {"timing.json"}  # how long it took


def metrics(machine: Machine, path: str) -> dict[str, Any]:
    content = json.loads((machine.folder / "reports/tiny" / path / "metrics.json").read_text())
    return {name: value for name, value in content.items() if name not in TIMES}


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


def bits(manifests: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Artifact -> file -> sha256, of what must be the same everywhere."""
    return {
        f"{each['kind']}/{each['fingerprint']}": {
            name: entry["sha256"] for name, entry in each["files"].items() if name not in NOT_BITS
        }
        for each in manifests
    }


def published(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    import s3fs

    for name, value in lab.environment.items():
        monkeypatch.setenv(name, value)
    files = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    found = files.glob(f"{BUCKET}/artifacts/*/*/manifest.json")
    return [json.loads(files.cat_file(path)) for path in found]
