"""Steps of a plan that go beyond MERA's four; see docs/beyond.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftline.planning.plan import Model, Planner, Reference

MASK_RULE = "mmer"
"""How stages' task vectors are decoupled."""


class RealignPlanner(Planner):
    """A planner that knows them."""

    def merge(self, previous: Reference, vanilla: Reference, stage: int) -> Reference:
        """MERA step 3, with the recipe's coefficients where it names any."""
        given = self.recipe.merge
        return self.merge_by(previous, vanilla, stage, given.coefficient, given.depth)

    def merge_by(
        self,
        previous: Reference,
        vanilla: Reference,
        stage: int,
        coefficient: float | None,
        depth: float,
    ) -> Reference:
        """The running average with other coefficients; the recipe's own merge without any.

        Args:
            previous: theta_{i-1}.
            vanilla: theta_i^v.
            stage: i.
            coefficient: what theta_i takes of theta_i^v; 1/i if `None`.
            depth: slope of the coefficient over the layers.
        """
        if coefficient is None and depth == 0.0:
            return super().merge(previous, vanilla, stage)
        parameters = {"coefficient": coefficient or 1.0 / stage, "depth": depth}
        parents = {"previous": previous, "vanilla": vanilla}
        return self._add("weighted-merge", parameters, parents, "merge by weights", stage)

    def statistics(self, model: Model, modality: str, stage: int) -> Reference:
        """What is recorded of a modality's media when its connector has been trained."""
        parameters = {
            "modality": modality,
            "clusters": self.recipe.distil.clusters,
            "seed": self.recipe.seed,
        }
        parents = {
            f"connector.{modality}": model.connectors[modality],
            f"features.{modality}": self.features(modality),
        }
        return self._add("statistics", parameters, parents, f"{modality}: statistics", stage)

    def correct(self, model: Model, modality: str, old: Reference, stage: int) -> Reference:
        """A connector corrected in closed form.

        Args:
            model: the merged backbone and the connectors.
            modality: whose connector.
            old: the backbone that it was trained beside.
            stage: i.
        """
        settings = self.recipe.correction.model_dump()
        parameters = {"modality": modality, "seed": self.recipe.seed, **settings}
        parents = {
            "backbone": model.backbone,
            "old": old,
            f"connector.{modality}": model.connectors[modality],
        }
        return self._add("correct", parameters, parents, f"{modality}: correct", stage)

    def distil(
        self,
        model: Model,
        modality: str,
        stage: int,
        old: Model,
        statistics: Reference | None,
        replay: float = 0.0,
    ) -> Reference:
        """A connector realigned from the old model.

        Args:
            model: the merged backbone and the connectors.
            modality: whose connector.
            stage: i.
            old: the model that teaches it.
            statistics: what is drawn from. Without any the modality is the stage's own: its
                training rows are all there, and nothing of them is kept.
            replay: share of the modality's rows that was kept and is seen, too.
        """
        settings = self.recipe.distil
        parameters = self._training(settings)
        del parameters["clusters"], parameters["own"], parameters["teacher"]
        parameters["modality"] = modality
        parents = {
            "backbone": model.backbone,
            "old": old.backbone,
            f"connector.{modality}": model.connectors[modality],
            f"taught.{modality}": old.connectors[modality],
        }
        if statistics is not None:
            parameters["max_new_tokens"] = self.recipe.evaluation.max_new_tokens
            parents[f"statistics.{modality}"] = statistics
        else:
            del parameters["samples"]
        if replay:
            parameters["fraction"] = replay
        if replay or statistics is None:
            parents[f"features.{modality}"] = self.features(modality)
        return self._add("distil", parameters, parents, f"{modality}: distil", stage)

    def decouple(self, vanillas: Mapping[str, Model]) -> Model:
        """The stages' task vectors merged, with a mask a modality; MMER on a chain.

        Args:
            vanillas: modality -> theta_j^v of its stage, with the connectors.
        """
        composed = self.compose(MASK_RULE, vanillas)
        return Model(composed, base=self.backbone(), text="modality")

    def realign_masked(self, model: Model, modality: str, stage: int) -> Reference:
        """MERA step 4 beside a modality's decoupled weights."""
        parameters: dict[str, Any] = {
            **self._training(self.recipe.realign),
            "modality": modality,
            "fraction": self.recipe.replay.fraction,
        }
        parents = {
            "backbone": model.backbone,
            "base": model.base or self.backbone(),
            f"connector.{modality}": model.connectors[modality],
            f"features.{modality}": self.features(modality),
        }
        return self._add("realign-masked", parameters, parents, f"{modality}: realign", stage)
