"""Steps side by side: what starts when, and that results do not depend on it."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Iterator

import pytest
import torch
from prefect import flow, task
from prefect.testing.utilities import prefect_test_harness

from flows.slots import Job, carry_out
from graftline.model.backbone import load_backbone, make_tiny
from tests.flows.conftest import PAIR, Project, assert_first_stages_of

_started: list[str] = []
_told: list[Hashable] = []
_at_once: dict[str, list[int]] = {"small": [], "large": []}
_busy = {"small": 0, "large": 0}
_lock = threading.Lock()


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=120):
        yield


def _work(name: str, kind: str) -> str:
    with _lock:
        _started.append(name)
        _busy[kind] += 1
        _at_once[kind].append(_busy[kind])
    time.sleep(0.2)
    with _lock:
        _busy[kind] -= 1
    if name == "breaks":
        raise ValueError(name)
    return name


SMALL = task(name="small", persist_result=False)(_work)
LARGE = task(name="large", persist_result=False)(_work)
HUGE = task(name="huge", persist_result=False)(_work)


def _job(name: str, *needs: str, kind: str = "small", weight: float = 1.0) -> Job:
    task = {"small": SMALL, "large": LARGE, "huge": HUGE}[kind]
    shared = "large" if kind == "huge" else None
    kind = shared or kind
    return Job(name, task, {"name": name, "kind": kind}, needs, weight, shared)


@flow(name="slots", persist_result=False)
def _run_groups(groups: list[list[Job]], slots: int, limit: int) -> list[str]:
    _started.clear()
    _told.clear()
    for counts in _at_once.values():
        counts.clear()
    done = carry_out(groups, slots, {"large": limit}, lambda job: _told.append(job.name))
    return [future.result() for future in done.values()]


def _run(jobs: list[Job], slots: int) -> list[str]:
    return _run_groups([jobs], slots, 1)


def test_the_longest_chain_starts_first_and_nothing_waits_in_a_slot(server: None) -> None:
    chain = [_job("c1"), _job("c2", "c1"), _job("c3", "c2"), _job("c4", "c3")]
    leaves = [_job(f"leaf{number}") for number in range(5)]
    assert len(_run([*leaves, *chain], 2)) == 9
    assert set(_started[:2]) == {"c1", "leaf0"}
    assert max(_at_once["small"]) == 2
    assert _started.index("c3") < _started.index("leaf3")


def test_a_chain_is_as_long_as_its_jobs_take(server: None) -> None:
    _run([_job("c1"), _job("c2", "c1"), _job("leaf"), _job("heavy", weight=5.0)], 2)
    assert set(_started[:2]) == {"heavy", "c1"}


def test_one_slot_keeps_the_given_order(server: None) -> None:
    _run([_job("a"), _job("b", "a"), _job("leaf"), _job("c", "b")], 1)
    assert _started == ["a", "b", "leaf", "c"]


def test_a_limit_holds_for_its_kind_only(server: None) -> None:
    jobs = [_job(f"l{number}", kind="large") for number in range(3)]
    _run([*jobs, *[_job(f"s{number}") for number in range(3)]], 3)
    assert max(_at_once["large"]) == 1
    assert max(_at_once["small"]) == 2


def test_kinds_may_share_a_limit(server: None) -> None:
    _run([_job("a", kind="large"), _job("b", kind="huge"), _job("c", kind="huge"), _job("d")], 3)
    assert max(_at_once["large"]) == 1
    assert len(_at_once["large"]) == 3


def test_a_limited_place_is_kept_for_the_longest_chain(server: None) -> None:
    """`expert` could start at once, and the chain would wait for it at each of its links."""
    jobs = [
        _job("one", kind="large"),
        _job("between", "one"),
        _job("two", "between", kind="large"),
        _job("last", "two"),
        _job("expert", kind="large"),
        _job("other"),
    ]
    _run(jobs, 2)
    assert [name for name in _started if name in ("one", "two", "expert")] == [
        "one",
        "two",
        "expert",
    ]
    assert max(_at_once["large"]) == 1


def _chain(name: str) -> list[Job]:
    return [
        _job(f"{name}1", kind="large"),
        _job(f"{name}2", f"{name}1"),
        _job(f"{name}3", f"{name}2", kind="large"),
    ]


def test_a_later_group_takes_the_slots_that_an_earlier_one_leaves(server: None) -> None:
    chains = [_chain(name) for name in "abc"]
    _run_groups(chains, 2, 2)
    assert set(_started[:2]) == {"a1", "b1"}
    assert [name for name in _started if name[0] == "a"] == ["a1", "a2", "a3"]
    assert _started.index("a3") < _started.index("c2")
    assert max(_at_once["large"]) == 2
    assert sorted(_told) == sorted(_started)


def test_a_place_that_is_kept_for_one_chain_leaves_the_others(server: None) -> None:
    """While `between` runs, one place of two is its chain's, and the other is free."""
    first = [_job("between"), _job("two", "between", kind="large")]
    _run_groups([first, [_job("other", kind="large")]], 2, 2)
    assert set(_started[:2]) == {"between", "other"}


def test_after_a_failure_nothing_more_starts(server: None) -> None:
    with pytest.raises(ValueError, match="breaks"):
        _run([_job("breaks"), _job("after", "breaks"), _job("a"), _job("b"), _job("c")], 2)
    assert "after" not in _started
    assert "c" not in _started


def test_a_failure_leaves_earlier_groups_to_their_end(server: None) -> None:
    later = [_job("breaks"), _job("after", "breaks")]
    with pytest.raises(ValueError, match="breaks"):
        _run_groups([_chain("a"), later, [_job("last")]], 2, 1)
    assert [name for name in _told if name in ("a1", "a2", "a3")] == ["a1", "a2", "a3"]
    assert not {"after", "last"} & set(_started)


def test_models_built_at_once_leave_the_default_dtype_alone(tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("backbone")
    make_tiny(folder, seed=0)
    dtypes: list[torch.dtype] = []

    def load() -> None:
        for _ in range(10):
            model, _ = load_backbone(folder, torch.bfloat16)
            dtypes.extend({parameter.dtype for parameter in model.parameters()})

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.get_default_dtype() == torch.float32
    assert set(dtypes) == {torch.bfloat16}
    assert len(dtypes) == 30


@pytest.mark.usefixtures("one_server")
def test_steps_side_by_side_give_the_same_bits(finished: Project, fresh: Project) -> None:
    code, text = fresh.run("run", "params/tiny.yaml", *PAIR, "--set", "execution.slots=3")
    assert code == 0, text
    assert_first_stages_of(finished, fresh)
