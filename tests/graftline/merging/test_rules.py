"""What holds for every merge rule: exactness, order, cutting, threads, and refusals."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftline.merging import core
from graftline.merging.core import (
    Block,
    Context,
    added,
    decoupled,
    ordered_sum,
    rounded_once,
    walk_over,
)
from graftline.merging.rules import RULES, UnknownRule, parameters_for, rule_named
from tests.graftline.merging.models import (
    ANY,
    DTYPES,
    merged_by,
    models_of,
    nearest,
    parameters_of,
    random_models,
    taus_of,
)


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=30))
def test_rounding_once_gives_the_nearest_value(values):
    for dtype in (torch.bfloat16, torch.float16):
        got = rounded_once(torch.tensor(values, dtype=torch.float64), dtype)
        assert torch.equal(got, nearest(np.array(values), dtype))


def test_where_torch_rounds_twice():
    half = 1 + 2**-8  # between two bf16 values; float32 loses what lies above it
    value = torch.tensor([half + 2**-40], dtype=torch.float64)
    assert value.to(torch.bfloat16).item() == 1.0
    assert rounded_once(value, torch.bfloat16).item() == 1 + 2**-7


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("power", [0, -60, -110, 127])
def test_beside_halves_of_bfloat16(power, sign):
    """Numbers that float32 cannot tell from halfway between two bf16 values."""
    step = 2.0 ** (power - 7)
    halves = np.array([2.0**power + (n + 0.5) * step for n in range(127)])
    hidden = 2.0**-30 * step
    values = sign * np.concatenate([halves - hidden, halves, halves + hidden])
    got = rounded_once(torch.from_numpy(values), torch.bfloat16)
    assert torch.equal(got, nearest(values, torch.bfloat16))
    below, even, above = got.abs().double().numpy().reshape(3, -1)
    assert (above - below == step).all() and ((even == below) ^ (even == above)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    rows=st.lists(st.tuples(*[st.tuples(st.integers(-255, 255), st.integers(-40, 40))] * 3)),
    tiny=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_sums_forget_the_order_near_the_limits_of_float64(dtype, rows, tiny):
    """Exponents that lie 53 bits apart, where some orders round and others do not."""
    numbers = [[float(n) * 2.0**e for n, e in row] for row in rows] + [[2.0**-12] * 3] * tiny
    terms = [column.contiguous() for column in torch.tensor(numbers).view(-1, 3).T.to(dtype)]
    terms = [torch.where(term.isfinite(), term, 1.0) for term in terms]
    first = ordered_sum(terms)
    for order in itertools.permutations(terms):
        assert ordered_sum(order).numpy().tobytes() == first.numpy().tobytes()
    for got, column in zip(first.tolist(), torch.stack(terms).double().T.tolist(), strict=True):
        assert got == pytest.approx(
            math.fsum(column), rel=1e-15, abs=2.0**-50 * max(map(abs, column))
        )


def test_what_float64_holds_is_not_sorted():
    one, edge, beyond = torch.tensor([1.0]), torch.tensor([2.0**-43]), torch.tensor([2.0**-44])
    for smallest, exact in ((edge, True), (beyond, False)):
        terms = [term.bfloat16() for term in (one, -one, one, smallest)]
        assert core._sum_exactly(terms) == exact
    assert core._sum_exactly([torch.zeros(3), torch.zeros(3), -torch.zeros(3)])
    assert core._sum_exactly([torch.full((2,), 2.0**-149)] * 3)


@given(seed=st.integers(0, 2**32 - 1), scale=st.integers(-20, 20))
def test_a_sum_in_bfloat16_is_rounded_once(seed: int, scale: int) -> None:
    """Against float64, with sums of which float32 makes exactly half a step."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(5, 40, generator=generator).bfloat16()
    tau = torch.randn(5, 40, generator=generator) * 2.0**scale
    base[0], tau[0] = 1.0, torch.tensor([1.0, -1.0] * 20) * (2.0**-8 + 2.0**-31)
    base[1], tau[1] = 1.0 + 2.0**-7, tau[0]
    base[2], tau[2] = 2.0**-126, 2.0**-135
    expected = rounded_once(base.double() + tau, torch.bfloat16)
    assert torch.equal(added(base, tau), expected)
    assert added(base, tau)[0, 0].item() == 1 + 2**-7, "and not 1, which is even"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_average_and_task_arithmetic_are_a_float64_reference_rounded_once(dtype, count):
    base, experts = random_models(count, 3000, dtype)
    stacked = np.stack([expert.double().numpy() for expert in experts])
    average = added(base, merged_by("average", base, experts).tau)
    exact = np.array([math.fsum(column) / count for column in stacked.T])
    assert torch.equal(average, nearest(exact, dtype))
    arithmetic = added(base, merged_by("task-arithmetic", base, experts, scale=0.3).tau)
    exact = base.double().numpy() + 0.3 * np.array(
        [math.fsum(column) for column in taus_of(base, experts).T]
    )
    assert torch.equal(arithmetic, nearest(exact, dtype))


# --- properties of all rules ---------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.symmetric])
@given(rows=st.lists(st.tuples(ANY, ANY, ANY, ANY), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None)
def test_the_order_of_the_experts_changes_no_byte(name, rows):
    base, experts = models_of(rows)
    first = merged_by(name, base, experts)
    for order in itertools.permutations(range(3)):
        other = merged_by(name, base, [experts[i] for i in order])
        assert other.tau.numpy().tobytes() == first.tau.numpy().tobytes()
        if first.masks and other.masks:
            assert all(torch.equal(other.masks[n], first.masks[i]) for n, i in enumerate(order))


@pytest.mark.parametrize("name", RULES)
def test_any_cutting_gives_the_same_bytes(name):
    base, experts = random_models(3, 1000)
    rule, parameters = rule_named(name), parameters_of(name, 3)
    blocks = [
        Block(base[a:b], tuple(e[a:b] for e in experts), 1000)
        for a, b in itertools.pairwise([0, 1, 13, 64, 500, 1000])
    ]
    whole = rule.statistics(walk_over([Block(base, tuple(experts), 1000)]), parameters)
    found = rule.statistics(
        lambda work, *, sparse=False: map(work, [blocks[:2], blocks[2:]]), parameters
    )
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
    base, experts = random_models(2, 200_000)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            merged = merged_by(name, base, experts)
            results.append((merged.tau.numpy().tobytes(), merged.scales))
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1]


@pytest.mark.parametrize("name", RULES)
def test_experts_equal_to_the_base_change_nothing(name):
    base, _ = random_models(1)
    merged = merged_by(name, base, [base.clone(), base.clone()])
    assert torch.equal(added(base, merged.tau), base)
    assert torch.equal(decoupled(base, merged, 1), base)


@pytest.mark.parametrize("name", RULES)
def test_one_expert_whole_is_that_expert(name):
    base, (expert,) = random_models(1)
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
        assert torch.equal(
            decoupled(base, merged_by(name, base, [expert], **full[name]), 0), expert
        )


@pytest.mark.parametrize("name", RULES)
def test_shapes_must_agree(name):
    with pytest.raises(ValueError, match=r"\(3,\)"):
        merged_by(name, torch.zeros(2), [torch.zeros(3)])
    with pytest.raises(ValueError, match="no expert"):
        merged_by(name, torch.zeros(2), [])


@pytest.mark.parametrize("name", ["ties", "mmer", "emr", "pcb"])
def test_global_scope_needs_statistics(name):
    with pytest.raises(ValueError, match="statistics"):
        merged_by(name, torch.zeros(2), [torch.ones(2)], scope="global")


# --- selection -----------------------------------------------------------------------------


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
