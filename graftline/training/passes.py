"""How long realigning may go on where few rows were kept."""

from __future__ import annotations

import math

from graftline.recipe import PhaseSettings


def within_passes(settings: PhaseSettings, passes: float, kept: int) -> PhaseSettings:
    """Settings of the loop with as many steps as so many passes over the kept rows allow.

    Few rows that are seen again and again are learned by heart, and the connector with them: on the
    starter, 80 steps over 32 rows end below no realigning at all.

    Args:
        settings: as the recipe has them.
        passes: most passes over the rows.
        kept: rows that are replayed.
    """
    most = math.ceil(passes * math.ceil(kept / settings.batch_size))
    return settings.model_copy(update={"steps": min(settings.steps, most)})
