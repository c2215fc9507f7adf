"""Steps of a plan that keep a fine-tuning from forgetting: what the rivals of MERA are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from graftline.planning.plan import Model, Planner, Reference
from graftline.recipe import LoraSettings, RivalName


@dataclass(frozen=True)
class Guard:
    """What keeps a fine-tuning from forgetting.

    Attributes:
        name: the method.
        settings: its own, plain data.
        replayed: old modalities whose replay is seen again.
        parents: role -> what it knows of earlier stages.
        mode: which weights learn, where that is not the recipe's `fine_tune.mode`.
        lora: of mode `lora`, where it is not the recipe's.
    """

    name: RivalName
    settings: Mapping[str, Any] = field(default_factory=dict)
    replayed: tuple[str, ...] = ()
    parents: Mapping[str, Reference] = field(default_factory=dict)
    mode: Literal["attention", "lora"] | None = None
    lora: LoraSettings | None = None


class GuardPlanner(Planner):
    """A planner that knows them."""

    def guarded_fine_tune(self, model: Model, modality: str, stage: int, guard: Guard) -> Model:
        """Fine-tuning that a guard keeps from forgetting: what a rival does in place of step 2.

        With replay it takes as many more steps as rows are replayed, so that of the new modality
        as much is seen as in naive fine-tuning [ours].
        """
        settings = self.recipe.fine_tune
        parameters = {
            **self._training(settings),
            "modalities": [modality, *guard.replayed],
            "mode": guard.mode or settings.mode,
            "lora": (guard.lora or settings.lora).model_dump(include={"rank", "alpha"}),
            "guard": guard.name,
            "settings": dict(guard.settings),
        }
        if parameters["mode"] != "lora":
            del parameters["lora"]
        if guard.replayed:
            fraction = parameters["fraction"] = self.recipe.replay.fraction
            if guard.name == "replay":
                parameters["steps"] = round(settings.steps * (1 + fraction * len(guard.replayed)))
        parents = {"backbone": model.backbone, **guard.parents}
        for name in parameters["modalities"]:
            parents[f"connector.{name}"] = model.connectors[name]
            parents[f"features.{name}"] = self.features(name)
        label = f"{modality}: fine-tune ({guard.name})"
        tuned = self._add("guarded-fine-tune", parameters, parents, label, stage)
        learned = dict.fromkeys(parameters["modalities"], tuned)
        return Model(tuned, {**model.connectors, **learned})

    def fisher(
        self, model: Model, modality: str, stage: int, previous: Reference | None
    ) -> Reference:
        """How much each weight of a stage's model matters to it and, decayed, to those before."""
        ewc = self.recipe.rivals.ewc
        own = {
            "rows": ewc.fisher_rows,
            "decay": ewc.decay,
            "train_embeddings": self.recipe.fine_tune.train_embeddings,
        }
        earlier = {} if previous is None else {"previous": previous}
        title = f"{modality}: Fisher information"
        return self._read("fisher", own, model, modality, stage, earlier, title)

    def logits(self, model: Model, modality: str, stage: int) -> Reference:
        """What a stage's model says of those of its modality's rows that are kept for replay."""
        own = {"fraction": self.recipe.replay.fraction}
        return self._read("logits", own, model, modality, stage, {}, f"{modality}: logits")

    def _read(
        self,
        kind: str,
        own: Mapping[str, Any],
        model: Model,
        modality: str,
        stage: int,
        earlier: Mapping[str, Reference],
        title: str,
    ) -> Reference:
        """A step that reads from the model of a stage what later ones need to know."""
        parameters = {
            "modality": modality,
            **own,
            "batch_size": self.recipe.fine_tune.batch_size,
            "seed": self.recipe.seed,
            **self._numerics(),
        }
        parents = {
            "backbone": model.backbone,
            f"connector.{modality}": model.connectors[modality],
            f"features.{modality}": self.features(modality),
            **earlier,
        }
        return self._add(kind, parameters, parents, title, stage)
