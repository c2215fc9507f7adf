"""What a lab's servers, its store and its machines' reports say."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

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
    found: list[dict[str, Any]] = []
    while True:
        wanted = {"flow_runs": {"state": {"type": {"any_": list(states)}}}, "offset": len(found)}
        page = asked(lab, "flow_runs/filter", {**wanted, "limit": 200, "sort": "ID_DESC"})
        found += page
        if len(page) < 200:
            return found


def slots_taken(lab: Lab) -> int:
    return int(asked(lab, "v2/concurrency_limits/gpu")["active_slots"])


def wait_for_free_slots(lab: Lab, seconds: float = 120.0) -> None:
    """Waits until no slot is taken."""
    deadline = time.monotonic() + seconds
    while slots_taken(lab):
        assert time.monotonic() < deadline, "a slot stays taken"
        time.sleep(1)


def objects(lab: Lab) -> Any:
    """The object store, as a file system."""
    import s3fs

    given = lab.environment
    return s3fs.S3FileSystem(
        key=given["AWS_ACCESS_KEY_ID"],
        secret=given["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=given["AWS_ENDPOINT_URL"],
        skip_instance_cache=True,
        use_listings_cache=False,
    )


def _manifests(files: Any) -> dict[str, dict[str, Any]]:
    """`<kind>/<fingerprint>` -> manifest, of all that is published."""
    found = files.glob(f"{BUCKET}/artifacts/*/*/manifest.json")
    read = {path: json.loads(files.cat_file(path)) for path in found}
    return {"/".join(path.split("/")[-3:-1]): manifest for path, manifest in read.items()}


def published(lab: Lab) -> dict[str, dict[str, str]]:
    """What the store holds: artifact -> file -> sha256; but for rows, which machines alone have."""
    found = _manifests(objects(lab))
    return bits_of([each for name, each in found.items() if not name.startswith("rows/")])


def holds(lab: Lab, artifact: str) -> bool:
    """Whether an artifact (`<kind>/<fingerprint>`) is published."""
    return bool(objects(lab).exists(f"{BUCKET}/artifacts/{artifact}/manifest.json"))


def half_published(lab: Lab) -> list[str]:
    """Artifacts that can be seen although parts of them are missing."""
    files = objects(lab)
    manifests = _manifests(files)  # before the parts: what is published meanwhile has them all
    there = set(files.find(f"{BUCKET}/artifacts"))
    return [
        name
        for name, manifest in manifests.items()
        for entry in manifest["files"].values()
        if f"{BUCKET}/artifacts/{name}/parts/{entry['sha256']}" not in there
    ]


def sent_steps(lab: Lab, flow_run: str) -> str:
    """Which steps a flow run carries out: the same for a run that was sent again."""
    parameters = asked(lab, f"flow_runs/{flow_run}")["parameters"]
    return f"{parameters.get('references')} {parameters.get('share')}"


def checkpoints(lab: Lab, *names: str) -> set[Path]:
    """What fine-tunings have left on some machines, those of killed machines' former lives, too."""
    found = (
        lab.folder.glob(f"{name}-home/store/*/.work/fine-tune-*/checkpoint-*") for name in names
    )
    return {path for each in found for path in each}


def computed_by(lab: Lab, name: str, worker: subprocess.Popen[bytes]) -> Iterator[str]:
    """Artifacts (`<kind>/<fingerprint>`) that a machine has begun to compute."""
    for holder in lab.folder.glob(f"{name}-home/store/*/.locks/*.holder"):
        step = holder.name.removesuffix(".holder")
        kind, _, fingerprint = step.rpartition("-")
        kind = kind.partition(".share-")[0]
        with suppress(OSError, ValueError, KeyError):
            mine = os.getpgid(json.loads(holder.read_text())["pid"]) == worker.pid
            if mine and (holder.parents[1] / ".work" / f"{kind}-{fingerprint}").exists():
                yield f"{kind}/{fingerprint}"
