"""Examples for containers: valid by their own linters, and what they must not do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKER = ROOT / "deploy" / "kubernetes-worker.yaml"


def _lint(module: str, *words: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip(module, reason="install graftline[test] for this test")
    command = [str(Path(sys.executable).with_name(module.replace("_", "-"))), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_compose_file_is_valid(tmp_path: Path) -> None:
    words = ("--builtin-schema", "vendor.compose-spec")
    done = _lint("check_jsonschema", *words, str(ROOT / "compose.yaml"))
    assert done.returncode == 0, done.stdout
    wrong = tmp_path / "compose.yaml"
    wrong.write_text((ROOT / "compose.yaml").read_text().replace("image:", "imago:"))
    assert _lint("check_jsonschema", *words, str(wrong)).returncode != 0


def test_kubernetes_example_is_valid(tmp_path: Path) -> None:
    done = _lint("kubernetes_validate", "--strict", str(WORKER))
    assert done.returncode == 0, done.stdout
    wrong = tmp_path / "worker.yaml"
    wrong.write_text(WORKER.read_text().replace("replicas:", "replicates:"))
    assert _lint("kubernetes_validate", "--strict", str(wrong)).returncode != 0


def test_ports_are_published_on_loopback_alone() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    published = [port for each in services.values() for port in each.get("ports", ())]
    assert published
    assert all(str(port).startswith("127.0.0.1:") for port in published)
