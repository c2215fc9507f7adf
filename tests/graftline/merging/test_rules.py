"""The merge rules against their papers' formulas, written again in numpy's float64."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftline.merging.core import Block, Context, Merged, added, decoupled, rounded_once
from graftline.merging.dare_ties import drop_mask
from graftline.merging.rules import RULES, UnknownRule, parameters_for, rule_named
from graftline.merging.selection import order_statistics

ANY = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
TAME = st.integers(-256, 256).map(lambda n: n / 64)  # sums of some are exact in float32
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _parameters(name: str, experts: int = 2, **values):
    if "scope" in rule_named(name).parameters.model_fields:
        values.setdefault("scope", "tensor")
    return parameters_for(rule_named(name), values, experts)


def _merge(name: str, base, experts, context=Context(name="w"), **values) -> Merged:
    rule = rule_named(name)
    return rule.merge(base, experts, _parameters(name, len(experts), **values), context)


def _models(rows: list[tuple[float, ...]], dtype=torch.float32):
    columns = torch.tensor(rows, dtype=torch.float64).T.to(dtype)
    return columns[0].contiguous(), [column.contiguous() for column in columns[1:]]


def _random(count: int, size: int = 500, dtype=torch.bfloat16, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn(size, generator=generator) * 0.02).to(dtype)
    moves = [torch.randn(size, generator=generator) * 0.004 for _ in range(count)]
    return base, [(base.float() + move).to(dtype) for move in moves]


def _taus(base, experts) -> np.ndarray:
    return np.stack([(e.double() - base.double()).numpy() for e in experts])


def _nearest(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Rounds float64 once: of all values that a 16-bit dtype has, the nearest, halves to even."""
    if dtype == torch.float32:
        return torch.from_numpy(values.astype(np.float32))
    all_values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    all_values = all_values[torch.isfinite(all_values)]
    grid, order = all_values.double().sort(stable=True)
    target = torch.from_numpy(np.ascontiguousarray(values))
    above = torch.searchsorted(grid, target).clamp(1, len(grid) - 1)
    low, high = target - grid[above - 1], grid[above] - target
    even = all_values[order[above - 1]].view(torch.int16) & 1 == 0
    down = (low < high) | ((low == high) & even)
    return all_values[order[torch.where(down, above - 1, above)]]


# --- rounding and sums ---------------------------------------------------------------------


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=30))
def test_rounding_once_gives_the_nearest_value(values):
    for dtype in (torch.bfloat16, torch.float16):
        got = rounded_once(torch.tensor(values, dtype=torch.float64), dtype)
        assert torch.equal(got, _nearest(np.array(values), dtype))


def test_where_torch_rounds_twice():
    half = 1 + 2**-8  # between two bf16 values; float32 loses what lies above it
    value = torch.tensor([half + 2**-40], dtype=torch.float64)
    assert value.to(torch.bfloat16).item() == 1.0
    assert rounded_once(value, torch.bfloat16).item() == 1 + 2**-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_average_and_task_arithmetic_are_a_float64_reference_rounded_once(dtype, count):
    base, experts = _random(count, 3000, dtype)
    stacked = np.stack([expert.double().numpy() for expert in experts])
    average = added(base, _merge("average", base, experts).tau)
    exact = np.array([math.fsum(column) / count for column in stacked.T])
    assert torch.equal(average, _nearest(exact, dtype))
    arithmetic = added(base, _merge("task-arithmetic", base, experts, scale=0.3).tau)
    exact = base.double().numpy() + 0.3 * np.array(
        [math.fsum(column) for column in _taus(base, experts).T]
    )
    assert torch.equal(arithmetic, _nearest(exact, dtype))


# --- properties of all rules ---------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.symmetric])
@given(rows=st.lists(st.tuples(ANY, ANY, ANY, ANY), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None)
def test_the_order_of_the_experts_changes_no_byte(name, rows):
    base, experts = _models(rows)
    first = _merge(name, base, experts)
    for order in itertools.permutations(range(3)):
        other = _merge(name, base, [experts[i] for i in order])
        assert other.tau.numpy().tobytes() == first.tau.numpy().tobytes()
        if first.masks and other.masks:
            assert all(torch.equal(other.masks[n], first.masks[i]) for n, i in enumerate(order))


@pytest.mark.parametrize("name", RULES)
def test_any_cutting_gives_the_same_bytes(name):
    base, experts = _random(3, 1000)
    rule, parameters = rule_named(name), _parameters(name, 3)
    blocks = [
        Block(base[a:b], tuple(e[a:b] for e in experts), 1000)
        for a, b in itertools.pairwise([0, 1, 13, 64, 500, 1000])
    ]
    whole = rule.statistics(lambda: [Block(base, tuple(experts), 1000)], parameters)
    found = rule.statistics(lambda: blocks, parameters)
    if name == "emr":  # sums of float64, each block's rounded
        assert found["scale"] == pytest.approx(whole["scale"], rel=1e-12)
    else:
        assert found == whole
    merged = rule.merge(base, experts, parameters, Context("w", statistics=whole)).tau
    offsets = [0, 1, 13, 64, 500]
    pieces = [
        rule.merge(b.base, b.experts, parameters, Context("w", offset, 0, whole)).tau
        for b, offset in zip(blocks, offsets, strict=True)
    ]
    assert torch.equal(torch.cat(pieces), merged)


@pytest.mark.parametrize("name", RULES)
def test_the_number_of_threads_changes_no_byte(name):
    base, experts = _random(2, 200_000)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            merged = _merge(name, base, experts)
            results.append((merged.tau.numpy().tobytes(), merged.scales))
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1]


@pytest.mark.parametrize("name", RULES)
def test_experts_equal_to_the_base_change_nothing(name):
    base, _ = _random(1)
    merged = _merge(name, base, [base.clone(), base.clone()])
    assert torch.equal(added(base, merged.tau), base)
    assert torch.equal(decoupled(base, merged, 1), base)


@pytest.mark.parametrize("name", RULES)
def test_one_expert_whole_is_that_expert(name):
    base, (expert,) = _random(1)
    full = {
        "average": {},
        "task-arithmetic": {"scale": 1.0},
        "ties": {"density": 1.0},
        "dare-ties": {"drop": 0.0},
        "emr": {},
        "consensus": {"scale": 1.0, "agreement": 1},
        "mmer": {"density": 1.0},
    }
    if name in full:
        assert torch.equal(decoupled(base, _merge(name, base, [expert], **full[name]), 0), expert)


@pytest.mark.parametrize("name", RULES)
def test_shapes_must_agree(name):
    with pytest.raises(ValueError, match=r"\(3,\)"):
        _merge(name, torch.zeros(2), [torch.zeros(3)])
    with pytest.raises(ValueError, match="no expert"):
        _merge(name, torch.zeros(2), [])


@pytest.mark.parametrize("name", ["ties", "mmer", "emr", "pcb"])
def test_global_scope_needs_statistics(name):
    with pytest.raises(ValueError, match="statistics"):
        _merge(name, torch.zeros(2), [torch.ones(2)], scope="global")


# --- selection -----------------------------------------------------------------------------


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40),
    st.integers(1, 40),
    st.integers(1, 7),
)
def test_order_statistics_are_exact(values, rank, step):
    tensor = torch.tensor(values)
    found = order_statistics(
        lambda: (
            [tensor[i : i + step], -tensor[i : i + step]] for i in range(0, len(values), step)
        ),
        lambda count: [rank, count],
    )
    rank = min(rank, len(values))
    assert found[0] == (sorted(values)[-rank], sorted(-v for v in values)[-rank])
    assert found[1] == (min(values), -max(values))


# --- ties, dare, mmer, emr, consensus, pcb -------------------------------------------------


def _numpy_ties(taus: np.ndarray, density: float) -> np.ndarray:
    """Yadav et al.: keep the k largest, gamma = sgn(sum), mean over those that agree."""
    k = max(1, round(density * taus.shape[1]))
    kept = np.where(np.abs(taus) >= np.sort(np.abs(taus))[:, -k][:, None], taus, 0.0)
    return _numpy_election(kept)


def _numpy_election(kept: np.ndarray) -> np.ndarray:
    gamma = np.sign([math.fsum(column) for column in kept.T])
    agree = (np.sign(kept) == gamma) & (gamma != 0)
    sums = np.array([math.fsum(column) for column in np.where(agree, kept, 0.0).T])
    return sums / np.maximum(agree.sum(0), 1)


@given(
    st.lists(st.tuples(TAME, TAME, TAME, TAME), min_size=1, max_size=12),
    st.sampled_from([0.1, 0.2, 0.5, 1.0]),
)
@settings(deadline=None)
def test_ties_is_the_papers_formula(rows, density):
    base, experts = _models(rows)
    expected = _numpy_ties(_taus(base, experts), density).astype(np.float32)
    assert np.array_equal(_merge("ties", base, experts, density=density).tau.numpy(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_on_real_sizes(dtype):
    base, experts = _random(3, 20_000, dtype)
    taus = _taus(base, experts).astype(np.float32).astype(np.float64)
    expected = _numpy_ties(taus, 0.2)
    tau = _merge("ties", base, experts).tau
    assert np.array_equal(tau.numpy(), expected.astype(np.float32))
    assert 0.3 < np.count_nonzero(expected) / 20_000 < 0.6


def test_ties_worked_example():
    """Trim to two of four, elect, average: by hand."""
    base = torch.zeros(4)
    experts = [torch.tensor([4.0, -3.0, 1.0, 0.5]), torch.tensor([2.0, 5.0, -0.5, 0.0])]
    tau = _merge("ties", base, experts, density=0.5, scale=2.0).tau
    # kept: (4, -3, 0, 0) and (2, 5, 0, 0); signs +, +; means 3 and 5
    assert tau.tolist() == [6.0, 10.0, 0.0, 0.0]


def test_a_drawn_vote_elects_nobody():
    tau = _merge("ties", torch.zeros(1), [torch.ones(1), -torch.ones(1)], density=1.0).tau
    assert tau.item() == 0.0


def test_global_thresholds_reach_over_tensors():
    """The k largest of both tensors together lie in the second: nothing of the first stays."""
    rule, parameters = rule_named("ties"), _parameters("ties", 1, density=0.5, scope="global")
    small, large = torch.arange(1.0, 5.0) / 100, torch.arange(1.0, 5.0)
    blocks = [Block(torch.zeros(4), (tau,), 4) for tau in (small, large)]
    found = rule.statistics(lambda: blocks, parameters)
    assert found == {"threshold": (1.0,)}
    merged = [
        rule.merge(b.base, b.experts, parameters, Context(statistics=found)).tau for b in blocks
    ]
    assert merged[0].tolist() == [0, 0, 0, 0]
    assert merged[1].tolist() == [1, 2, 3, 4]


def test_dare_is_the_papers_formula_on_its_own_masks():
    base, experts = _random(3, 5000)
    context = Context("layer.0", 0, 7)
    merged = _merge("dare-ties", base, experts, context, drop=0.5)
    stays = np.stack([drop_mask(5000, 0.5, i, context).numpy() for i in range(3)])
    taus = np.where(stays, _taus(base, experts).astype(np.float32).astype(np.float64), 0.0)
    expected = _numpy_election(taus) * (1.0 / 0.5)
    assert np.array_equal(merged.tau.numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.5, 0.9])
def test_dare_drops_its_share_and_keeps_the_mean(drop):
    count = 200_000
    stays = drop_mask(count, drop, 0, Context("w"))
    error = 5 * math.sqrt(max(drop * (1 - drop), 1e-12) / count)
    assert stays.double().mean().item() == pytest.approx(1 - drop, abs=error)
    tau = _merge("dare-ties", torch.zeros(count), [torch.ones(count)], drop=drop).tau
    assert tau.mean().item() == pytest.approx(1.0, abs=error / (1 - drop) + 1e-6)


def test_dares_masks_are_independent():
    """Of seed, name and expert: two masks agree as often as two coins."""
    contexts = [(0, Context("a")), (1, Context("a")), (0, Context("b")), (0, Context("a", seed=1))]
    masks = [drop_mask(100_000, 0.5, index, context) for index, context in contexts]
    for first, second in itertools.combinations(masks, 2):
        assert (first == second).double().mean().item() == pytest.approx(0.5, abs=0.01)
    # the neighbour's number says nothing
    assert (masks[0][1:] == masks[0][:-1]).double().mean().item() == pytest.approx(0.5, abs=0.01)


def test_dare_does_not_depend_on_the_hash_seed():
    code = (
        "from graftline.merging.dare_ties import *; import hashlib;"
        "print(hashlib.sha256(drop_mask(1000, .5, 1, Context('w', 3, 5)).numpy()).hexdigest())"
    )
    root = Path(__file__).resolve().parents[3]
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert len(seen) == 1


@given(
    st.lists(st.tuples(TAME, TAME, TAME), min_size=1, max_size=12),
    st.sampled_from([0.25, 0.5, 1.0, 2.0]),
)
@settings(deadline=None)
def test_mmer_is_the_papers_formula(rows, strictness):
    base, experts = _models(rows)
    merged = _merge("mmer", base, experts, density=0.5, lambdas=strictness, alphas=(0.5, 2.0))
    taus, star = _taus(base, experts), _numpy_ties(_taus(base, experts), 0.5)
    assert np.array_equal(merged.tau.numpy(), star.astype(np.float32))
    assert merged.masks is not None and merged.scales == (0.5, 2.0)
    for index, tau in enumerate(taus):
        mask = (np.sign(tau) == np.sign(star)) & (np.abs(tau) >= strictness * np.abs(star - tau))
        assert np.array_equal(merged.masks[index].numpy(), mask)
        own = base.double().numpy() + (0.5, 2.0)[index] * mask * star.astype(np.float32)
        assert np.array_equal(decoupled(base, merged, index).numpy(), own.astype(np.float32))


@given(st.lists(st.tuples(TAME, TAME, TAME, TAME), min_size=1, max_size=8))
@settings(deadline=None)
def test_mmers_mask_is_the_nearest_in_l1(rows):
    """Lambda = 1: no other mask brings base + mask * tau* nearer to the expert."""
    base, experts = _models(rows)
    merged = _merge("mmer", base, experts, density=0.5)
    star = merged.tau.double()
    for expert, mask in zip(experts, merged.masks, strict=True):
        tau = expert.double() - base.double()
        distance = (tau - mask * star).abs()
        assert torch.equal(distance, torch.minimum(tau.abs(), (tau - star).abs()))


def test_a_lenient_mmer_mask_lets_no_other_direction_in():
    base = torch.zeros(2)
    experts = [torch.tensor([-1.0, 4.0]), torch.tensor([2.0, 4.0])]
    merged = _merge("mmer", base, experts, density=1.0, lambdas=0.2)
    assert merged.tau.tolist() == [2.0, 4.0]
    assert merged.masks[0].tolist() == [False, True]  # 1 >= 0.2 * 3, but the sign differs


def test_emr_worked_example():
    base = torch.zeros(3)
    experts = [torch.tensor([1.0, -2.0, 3.0]), torch.tensor([3.0, 1.0, -5.0])]
    merged = _merge("emr", base, experts)
    assert merged.tau.tolist() == [3.0, -2.0, -5.0]
    assert [mask.tolist() for mask in merged.masks] == [[True, True, False], [True, False, True]]
    assert merged.scales == pytest.approx((6 / 5, 9 / 8))
    assert decoupled(base, merged, 0).tolist() == pytest.approx([3.6, -2.4, 0.0])


def test_emrs_global_rescalers_weigh_each_tensor_alike():
    rule, parameters = rule_named("emr"), _parameters("emr", 2, scope="global")
    one = Block(torch.zeros(1), (torch.tensor([1.0]), torch.tensor([3.0])), 1)
    two = Block(torch.zeros(2), (torch.tensor([2.0, 2.0]), torch.tensor([-1.0, 1.0])), 2)
    found = rule.statistics(lambda: [one, two], parameters)
    # elected: 3 | 2 (signs: mean 0.5, 1.5), 2; expert 0 keeps all, expert 1 the first and last
    assert found["scale"] == pytest.approx(((1 + 2) / (3 + 2), (3 + 1) / (3 + 1)))


def test_consensus_worked_example():
    base = torch.zeros(3)
    experts = [torch.tensor([1.0, 5.0, 1.0]), torch.tensor([1.0, 0.1, -2.0])]
    merged = _merge("consensus", base, experts, lambdas=0.5, scale=1.0)
    # sums 2, 5.1, -1; uses: (1 > .5, 1 > .5), (5 > .05, .1 > 2.5 no), (1 > 1 no, 2 > .5)
    assert merged.tau.tolist() == [2.0, 0.0, 0.0]
    assert merged.masks is None
    all_used = _merge("consensus", base, experts, agreement=0, scale=1.0).tau
    assert all_used.tolist() == pytest.approx([2.0, 5.1, -1.0], rel=1e-7)


def test_pcb_is_the_reference_codes_formula():
    base, experts = _random(3, 4000, torch.float32)
    taus = _taus(base, experts).astype(np.float32).astype(np.float64)
    n, d = taus.shape
    ordered = np.sort(np.abs(taus))
    low, high = ordered[:, int(d * 0.0001)], ordered[:, int(d * (1 - 0.0001) - 1)]
    size = np.clip(np.abs(taus), low[:, None], high[:, None])
    norm = (size - low[:, None]) / (high - low)[:, None]
    score = np.exp(n * norm**2) * np.tanh(taus * taus.sum(0))
    bound = np.sort(score)[:, int(d * (1 - 0.1))][:, None]
    weight = (np.maximum(score, bound) - bound) / (score.max(1)[:, None] - bound)
    expected = 1.2 * (weight * np.sign(taus) * size).sum(0) / np.maximum(weight.sum(0), 1e-12)
    got = _merge("pcb", base, experts).tau.double().numpy()
    settled = (weight.sum(0) > 1e-4) | (weight.sum(0) == 0)  # elsewhere 0/0 magnifies rounding
    assert settled.mean() > 0.99
    assert np.allclose(got[settled], expected[settled], rtol=1e-3, atol=1e-9)
    assert 0.1 < np.count_nonzero(got) / d < 0.35


# --- the registry --------------------------------------------------------------------------


def test_unknown_rules_and_parameters_are_named_at_once():
    with pytest.raises(UnknownRule, match="did you mean 'ties'"):
        rule_named("tie")
    with pytest.raises(UnknownRule) as error:
        parameters_for(rule_named("mmer"), {"densty": 0.1, "scale": -1, "alphas": (1.0, 99)}, 2)
    text = str(error.value)
    assert all(part in text for part in ("did you mean 'density'", "scale:", "alphas:"))
    with pytest.raises(UnknownRule, match="lambdas: 3 values for 2 experts"):
        parameters_for(rule_named("mmer"), {"lambdas": [1, 1, 1]}, 2)


def test_each_rule_says_where_it_comes_from():
    assert {
        "average",
        "task-arithmetic",
        "ties",
        "dare-ties",
        "emr",
        "consensus",
        "pcb",
        "mmer",
    } == (set(RULES))
    assert all("arXiv" in rule.paper for rule in RULES.values())
    assert [name for name, rule in RULES.items() if rule.one_per_expert] == ["emr", "mmer"]
