"""The wheel, built from a copy of the sources, works away from them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_wheel_works_in_a_clean_environment(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("flows", "tasks", "graftline"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, *build, "--wheel-dir", str(tmp_path), str(source)], check=True)
    [wheel] = tmp_path.glob("*.whl")

    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = environment / "lib" / version / "site-packages"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--prefix", str(environment)]
    subprocess.run([*pip, *install, "--ignore-installed", str(wheel)], check=True)
    # the dependencies are the ones of this environment; nothing is downloaded
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

    # what asks for a compiler is no requirement of the wheel
    metadata = next(site.glob("graftline-*.dist-info")) / "METADATA"
    required = [
        line for line in metadata.read_text().splitlines() if line.startswith("Requires-Dist")
    ]
    assert [line for line in required if "tinysoundfont" in line and "extra ==" not in line] == []
    assert any("torch" in line for line in required)

    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    python = environment / "bin" / "python"
    code = (
        "import flows.cli, flows.continual, tasks.steps, graftline.steps.execution\n"
        "from pathlib import Path\n"
        "home = Path(graftline.__file__).parent\n"
        "print(home)\n"
        "assert list(home.glob('evaluation/*.txt'))\n"
        "assert list(home.glob('evaluation/*.html'))"
    )
    done = subprocess.run(
        [str(python), "-c", code], cwd=tmp_path, env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == site / "graftline"
    script = environment / "bin" / "graftline"
    assert script.exists()
    done = subprocess.run(
        [str(python), str(script), "--help"],
        cwd=tmp_path,
        env=clean,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "compare" in done.stdout
