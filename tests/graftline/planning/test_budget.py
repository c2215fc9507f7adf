"""Which runs a comparison asks for, and what it says that they cost."""

from __future__ import annotations

from itertools import pairwise, permutations
from pathlib import Path

import pytest

from graftline.planning.budget import budget_of, plans_of
from graftline.planning.comparison import (
    CONTINUAL,
    ComparisonError,
    comparison_of,
    latin_orders,
    prefix_stages,
)
from graftline.planning.run import RunPlan
from graftline.store import Store
from tests.graftline.stored import publish_timed

USUAL = ("image", "audio", "video", "point_cloud")
TINY = Path(__file__).parents[3] / "params" / "tiny.yaml"
FILES = {name: {"train": f"{name}-train", "test": f"{name}-test"} for name in USUAL}


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
def test_latin_orders_put_each_modality_once_in_each_place(count: int) -> None:
    usual = tuple("abcdef"[:count])
    orders = latin_orders(usual)
    assert orders[0] == usual
    assert len(orders) == count
    for place in range(count):
        assert {order[place] for order in orders} == set(usual)
    follows = [pair for order in orders for pair in pairwise(order)]
    if count % 2 == 0:  # then each one follows each other one once
        assert sorted(follows) == sorted(permutations(usual, 2))


def test_all_orders_of_four_are_64_stages_and_not_96() -> None:
    wanted = comparison_of(USUAL, ["mera"], "0", "all")
    assert len(wanted.orders) == 24
    assert wanted.orders[0] == USUAL
    assert prefix_stages(wanted.orders) == 64
    assert prefix_stages(latin_orders(USUAL)) == 16
    assert prefix_stages([USUAL]) == 4


def test_other_orders_may_have_fewer_seeds() -> None:
    wanted = comparison_of(USUAL, [], "0,1,2", "latin", "0")
    assert wanted.methods == CONTINUAL
    assert [seed for order, seed in wanted.places if order == USUAL] == [0, 1, 2]
    assert len(wanted.places) == 3 + 3
    assert len(list(wanted.runs())) == 6 * len(CONTINUAL)
    listed = comparison_of(USUAL, ["mera"], "1", "point_cloud, audio, video, image")
    assert listed.places == ((("point_cloud", "audio", "video", "image"), 1),)


def test_every_mistake_is_named_at_once_with_the_nearest_name() -> None:
    with pytest.raises(ComparisonError) as caught:
        comparison_of(
            USUAL, ["merra", "mera", "mera"], "0,x,0", "imege,audio,video,video;audio,image", "-1"
        )
    text = str(caught.value)
    for words in (
        "'merra' is not one of", "did you mean 'mera'?", "methods: mera more than once",
        "seeds: 'x'", "seeds: 0 more than once", "order seeds: '-1'",
        "did you mean 'image'?", "video more than once", "point_cloud is missing",
        "order audio,image: video, point_cloud is missing",
    ):  # fmt: skip
        assert words in text, words
    with pytest.raises(ComparisonError, match="did you mean 'latin'"):
        comparison_of(USUAL, [], "0", "latine")


def _plans(orders: str) -> list[RunPlan]:
    wanted = comparison_of(USUAL, ["finetune"], "0", orders)
    return [plan for _, plan in plans_of(TINY, wanted, {"execution.slots": 2}, FILES)]


def test_a_budget_counts_stages_steps_and_seconds(tmp_path: Path) -> None:
    plans, store = _plans("all"), Store(tmp_path)
    nothing = budget_of(plans, store)
    assert (nothing.prefix_tree, nothing.without_tree) == (64, 96)
    assert nothing.stages == (64, 0)
    assert "64 stages, not 96" in nothing.text()
    assert "time: unknown" in nothing.text()
    first = next(plan for plan in plans if plan.recipe.order == USUAL)
    for step in first.steps.values():
        publish_timed(store, step, 30.0 if step.kind == "fine-tune" else 10.0)
    after = budget_of(plans, store)
    assert after.stages == (64, 4 + 3)  # the chain; as experts, the other first stages
    assert after.steps[0] == nothing.steps[0]
    assert after.steps[1] == len(first.steps)
    # 57 stages more: a fine-tuning of 30 s each, an alignment, and evaluations of 10 s each
    assert after.missing["fine-tune"] == after.missing["align"] == 57
    others = sum(count for kind, count in after.missing.items() if kind != "fine-tune")
    # one fine-tuning at once, so two slots do not halve it
    assert after.seconds == max(57 * 30.0, (57 * 30.0 + others * 10.0) / 2)
    assert after.untimed == ()
    everything = budget_of([first], store)
    assert everything.stages == (4, 4)
    assert everything.missing == {}
    assert "0 must run" in everything.text()
