"""Each rule against its paper: formulas written again here, in float64, and worked examples."""

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

from graftline.merging.core import Block, Context, decoupled, walk_over
from graftline.merging.dare_ties import drop_mask
from graftline.merging.rules import rule_named
from graftline.merging.ties import elected_mean
from tests.graftline.merging.models import (
    DTYPES,
    TAME,
    merged_by,
    models_of,
    parameters_of,
    random_models,
    taus_of,
)

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
    base, experts = models_of(rows)
    expected = _numpy_ties(taus_of(base, experts), density).astype(np.float32)
    assert np.array_equal(merged_by("ties", base, experts, density=density).tau.numpy(), expected)


@given(
    st.lists(st.tuples(TAME, TAME, TAME), min_size=1, max_size=12),
    st.sampled_from([0.1, 0.5, 1.0]),
)
@settings(deadline=None)
def test_ties_of_two_is_the_papers_formula_too(rows, density):
    base, experts = models_of(rows)
    expected = _numpy_ties(taus_of(base, experts), density).astype(np.float32)
    assert np.array_equal(merged_by("ties", base, experts, density=density).tau.numpy(), expected)


FLOATS = st.floats(-(2.0**126), 2.0**126, width=32)  # their sums lie within float32
PAIRS = FLOATS.flatmap(lambda x: st.tuples(st.just(x), FLOATS | st.sampled_from([x, -x, 0.0])))
ALONE = st.tuples(FLOATS, st.just(0.0)) | st.tuples(st.just(0.0), FLOATS)


@given(st.lists(PAIRS, min_size=1, max_size=12), st.lists(ALONE, max_size=24))
@settings(deadline=None)
def test_electing_among_two_needs_no_float64(pairs, alone):
    left, right = torch.tensor(pairs + alone, dtype=torch.float32).T.contiguous()
    short = elected_mean([left, right], 1.0).numpy()
    general = elected_mean([left, right, torch.zeros_like(left)], 1.0).numpy()
    expected = _numpy_election(np.stack([left, right]).astype(np.float64)).astype(np.float32)
    assert np.array_equal(short, expected)
    assert np.array_equal(short.view(np.int32), general.view(np.int32))  # no negative zero


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_on_real_sizes(dtype):
    base, experts = random_models(3, 20_000, dtype)
    taus = taus_of(base, experts).astype(np.float32).astype(np.float64)
    expected = _numpy_ties(taus, 0.2)
    tau = merged_by("ties", base, experts).tau
    assert np.array_equal(tau.numpy(), expected.astype(np.float32))
    assert 0.3 < np.count_nonzero(expected) / 20_000 < 0.6


def test_ties_worked_example():
    """Trim to two of four, elect, average: by hand."""
    base = torch.zeros(4)
    experts = [torch.tensor([4.0, -3.0, 1.0, 0.5]), torch.tensor([2.0, 5.0, -0.5, 0.0])]
    tau = merged_by("ties", base, experts, density=0.5, scale=2.0).tau
    # kept: (4, -3, 0, 0) and (2, 5, 0, 0); signs +, +; means 3 and 5
    assert tau.tolist() == [6.0, 10.0, 0.0, 0.0]


def test_a_drawn_vote_elects_nobody():
    tau = merged_by("ties", torch.zeros(1), [torch.ones(1), -torch.ones(1)], density=1.0).tau
    assert tau.item() == 0.0


def test_global_thresholds_reach_over_tensors():
    """The k largest of both tensors together lie in the second: nothing of the first stays."""
    rule, parameters = rule_named("ties"), parameters_of("ties", 1, density=0.5, scope="global")
    small, large = torch.arange(1.0, 5.0) / 100, torch.arange(1.0, 5.0)
    blocks = [Block(torch.zeros(4), (tau,), 4) for tau in (small, large)]
    found = rule.statistics(walk_over(blocks), parameters)
    assert found == {"threshold": (1.0,)}
    merged = [
        rule.merge(b.base, b.experts, parameters, Context(statistics=found)).tau for b in blocks
    ]
    assert merged[0].tolist() == [0, 0, 0, 0]
    assert merged[1].tolist() == [1, 2, 3, 4]


def test_dare_is_the_papers_formula_on_its_own_masks():
    base, experts = random_models(3, 5000)
    context = Context("layer.0", 0, 7)
    merged = merged_by("dare-ties", base, experts, context, drop=0.5)
    stays = np.stack([drop_mask(5000, 0.5, i, context).numpy() for i in range(3)])
    taus = np.where(stays, taus_of(base, experts).astype(np.float32).astype(np.float64), 0.0)
    expected = _numpy_election(taus) * (1.0 / 0.5)
    assert np.array_equal(merged.tau.numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.5, 0.9])
def test_dare_drops_its_share_and_keeps_the_mean(drop):
    count = 200_000
    stays = drop_mask(count, drop, 0, Context("w"))
    error = 5 * math.sqrt(max(drop * (1 - drop), 1e-12) / count)
    assert stays.double().mean().item() == pytest.approx(1 - drop, abs=error)
    tau = merged_by("dare-ties", torch.zeros(count), [torch.ones(count)], drop=drop).tau
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
    base, experts = models_of(rows)
    merged = merged_by("mmer", base, experts, density=0.5, lambdas=strictness, alphas=(0.5, 2.0))
    taus, star = taus_of(base, experts), _numpy_ties(taus_of(base, experts), 0.5)
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
    base, experts = models_of(rows)
    merged = merged_by("mmer", base, experts, density=0.5)
    star = merged.tau.double()
    for expert, mask in zip(experts, merged.masks, strict=True):
        tau = expert.double() - base.double()
        distance = (tau - mask * star).abs()
        assert torch.equal(distance, torch.minimum(tau.abs(), (tau - star).abs()))


def test_a_lenient_mmer_mask_lets_no_other_direction_in():
    base = torch.zeros(2)
    experts = [torch.tensor([-1.0, 4.0]), torch.tensor([2.0, 4.0])]
    merged = merged_by("mmer", base, experts, density=1.0, lambdas=0.2)
    assert merged.tau.tolist() == [2.0, 4.0]
    assert merged.masks[0].tolist() == [False, True]  # 1 >= 0.2 * 3, but the sign differs


def test_emr_worked_example():
    base = torch.zeros(3)
    experts = [torch.tensor([1.0, -2.0, 3.0]), torch.tensor([3.0, 1.0, -5.0])]
    merged = merged_by("emr", base, experts)
    assert merged.tau.tolist() == [3.0, -2.0, -5.0]
    assert [mask.tolist() for mask in merged.masks] == [[True, True, False], [True, False, True]]
    assert merged.scales == pytest.approx((6 / 5, 9 / 8))
    assert decoupled(base, merged, 0).tolist() == pytest.approx([3.6, -2.4, 0.0])


def test_emrs_global_rescalers_weigh_each_tensor_alike():
    rule, parameters = rule_named("emr"), parameters_of("emr", 2, scope="global")
    one = Block(torch.zeros(1), (torch.tensor([1.0]), torch.tensor([3.0])), 1)
    two = Block(torch.zeros(2), (torch.tensor([2.0, 2.0]), torch.tensor([-1.0, 1.0])), 2)
    found = rule.statistics(walk_over([one, two]), parameters)
    # elected: 3 | 2 (signs: mean 0.5, 1.5), 2; expert 0 keeps all, expert 1 the first and last
    assert found["scale"] == pytest.approx(((1 + 2) / (3 + 2), (3 + 1) / (3 + 1)))


def test_consensus_worked_example():
    base = torch.zeros(3)
    experts = [torch.tensor([1.0, 5.0, 1.0]), torch.tensor([1.0, 0.1, -2.0])]
    merged = merged_by("consensus", base, experts, lambdas=0.5, scale=1.0)
    # sums 2, 5.1, -1; uses: (1 > .5, 1 > .5), (5 > .05, .1 > 2.5 no), (1 > 1 no, 2 > .5)
    assert merged.tau.tolist() == [2.0, 0.0, 0.0]
    assert merged.masks is None
    all_used = merged_by("consensus", base, experts, agreement=0, scale=1.0).tau
    assert all_used.tolist() == pytest.approx([2.0, 5.1, -1.0], rel=1e-7)


def test_pcb_is_the_reference_codes_formula():
    base, experts = random_models(3, 4000, torch.float32)
    taus = taus_of(base, experts).astype(np.float32).astype(np.float64)
    n, d = taus.shape
    ordered = np.sort(np.abs(taus))
    low, high = ordered[:, int(d * 0.0001)], ordered[:, int(d * (1 - 0.0001) - 1)]
    size = np.clip(np.abs(taus), low[:, None], high[:, None])
    norm = (size - low[:, None]) / (high - low)[:, None]
    score = np.exp(n * norm**2) * np.tanh(taus * taus.sum(0))
    bound = np.sort(score)[:, int(d * (1 - 0.1))][:, None]
    weight = (np.maximum(score, bound) - bound) / (score.max(1)[:, None] - bound)
    expected = 1.2 * (weight * np.sign(taus) * size).sum(0) / np.maximum(weight.sum(0), 1e-12)
    got = merged_by("pcb", base, experts).tau.double().numpy()
    settled = (weight.sum(0) > 1e-4) | (weight.sum(0) == 0)  # elsewhere 0/0 magnifies rounding
    assert settled.mean() > 0.99
    assert np.allclose(got[settled], expected[settled], rtol=1e-3, atol=1e-9)
    assert 0.1 < np.count_nonzero(got) / d < 0.35


# --- the registry --------------------------------------------------------------------------
