"""Recipe sections of the methods that go beyond MERA; see docs/beyond.md."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from graftline.recipe_parts import Part, PhaseSettings


class CorrectionSettings(Part):
    """The closed-form correction of a connector after a merge."""

    layers: int = Field(1, ge=1, description="first layers whose readings of a token are kept")
    ridge: float = Field(
        0.1,
        gt=0.0,
        description="pull towards leaving tokens alone, as a share of what the layers read",
    )


class DistilSettings(PhaseSettings):
    """Realigning from the old model instead of from old rows."""

    steps: int = Field(80, ge=1, description="optimiser steps")
    batch_size: int = Field(8, ge=1)
    learning_rate: float = Field(1.5e-4, gt=0.0, description="peak, reached after the warm-up")
    samples: int = Field(480, ge=1, description="tokens drawn from what was recorded of them")
    clusters: int = Field(128, ge=1, description="centres that are recorded of a modality")
    temperature: float = Field(1.0, gt=0.0, description="of both models' distributions")
    answers: float = Field(
        0.0, ge=0.0, description="weight of the answers themselves beside the distributions"
    )
    teacher: Literal["before", "first"] = Field(
        "before",
        description="who teaches an old modality: the model at the end of the stage before, or of "
        "the stage that learned it, whose backbone must be kept for that (`first`)",
    )
    own: Literal["drawn", "rows", "answers"] = Field(
        "answers",
        description="what the new modality's connector learns from: as old ones (`drawn`); its "
        "stage's rows, which are all at hand then, from naive fine-tuning's model (`rows`) or from "
        "their answers, as MERA realigns (`answers`)",
    )


class MeraPlusSettings(Part):
    """The combination that `mera+` is; `graftline search --rule mera+` chooses among them."""

    coefficient: float | None = Field(
        None, gt=0.0, le=1.0, description="as merge.coefficient; what merge says if left out"
    )
    depth: float = Field(0.0, ge=-1.0, le=1.0, description="as merge.depth")
    correct: bool = Field(False, description="start from the closed-form correction")
    replay: float = Field(
        0.0, ge=0.0, le=0.01, description="share of old rows that is seen beside what is drawn"
    )
