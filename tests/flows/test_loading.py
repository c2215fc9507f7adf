"""What a command must not have loaded when its server starts."""

import subprocess
import sys

import pytest

CODE = """
import sys
import flows.running

def stop(*_args, **_named):
    print("prefect" in sys.modules)
    raise SystemExit(0)

flows.running.run_comparison = flows.running.run_recipe = flows.running.run_several = stop
from flows.cli import app
sys.argv = ["graftline", *sys.argv[1:]]
app()
"""


@pytest.mark.parametrize("command", ["run", "compare", "search"])
def test_prefect_learns_of_its_server_before_it_is_loaded(command: str) -> None:
    """Loaded earlier, it knows no server, starts one of its own, and leaves it behind."""
    words = [sys.executable, "-c", CODE, command, "params/tiny.yaml"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.split() == ["False"], done.stderr
