"""Methods: what turns the old model and a new modality into the next model.

A method says in which order the planner's steps are called, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from graftline.planning.plan import Model, Planner


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        index: from 1.
        modality: the modality that it adds.
        final: the model at its end.
        vanilla: the model after naive fine-tuning, where the method has one.
        merged: the model after the merge and before realigning, where the method merges.
    """

    index: int
    modality: str
    final: Model
    vanilla: Model | None = None
    merged: Model | None = None


Method = Callable[[Planner, Sequence[str]], list[Stage]]


def add_modality(planner: Planner, model: Model, modality: str, stage: int) -> Model:
    """Steps 1 and 2 of every continual method: align a new connector, then fine-tune with it."""
    connector = planner.align(model.backbone, modality, stage)
    return planner.fine_tune(model.with_connector(modality, connector), (modality,), stage)


def start(planner: Planner) -> Model:
    """theta_0 without any connector."""
    return Model(planner.backbone())


def method_named(name: str) -> Method:
    """The method that a recipe names; a merge rule's name is the composition by that rule."""
    from graftline.merging.rules import RULES
    from graftline.methods import connector_only, experts, finetune, joint, mera
    from graftline.methods.attention_only import attention_only
    from graftline.methods.composition import composition, route
    from graftline.methods.der import der
    from graftline.methods.ewc import ewc
    from graftline.methods.lwf import lwf
    from graftline.methods.mera_corrected import mera_corrected
    from graftline.methods.mera_distilled import mera_distilled
    from graftline.methods.mera_masks import mera_masks
    from graftline.methods.mera_plus import mera_plus
    from graftline.methods.o_lora import o_lora
    from graftline.methods.pathweave import pathweave
    from graftline.methods.replay import replay

    methods: dict[str, Method] = {
        **{rule: composition(rule) for rule in RULES},
        "route": route,
        "mera": mera.mera,
        "merge-only": mera.merge_only,
        "realign-only": mera.realign_only,
        "finetune": finetune.finetune,
        "connector-only": connector_only.connector_only,
        "joint": joint.joint,
        "experts": experts.experts,
        "replay": replay,
        "ewc": ewc,
        "lwf": lwf,
        "der": der,
        "attention-only": attention_only,
        "o-lora": o_lora,
        "pathweave": pathweave,
        "mera+": mera_plus,
        "mera-corrected": mera_corrected,
        "mera-distilled": mera_distilled,
        "mera-masks": mera_masks,
    }
    return methods[name]
