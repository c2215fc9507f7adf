"""A run as it stood at the end of an earlier stage."""

from __future__ import annotations

from dataclasses import replace

from graftline.evaluation.report import RunScores


def ended_at(run: RunScores, stage: int) -> RunScores:
    """What a run had measured when a stage ended.

    Args:
        run: the whole run.
        stage: from 1. The last one gives the run itself.

    Returns:
        The run with the modalities learned by then; costs and times stay the whole run's.
    """
    if stage >= len(run.order):
        return run
    order = run.order[:stage]
    cells = tuple(
        cell
        for cell in run.cells
        if cell.modality in order and (cell.point == "expert" or cell.stage <= stage)
    )
    return replace(run, order=order, cells=cells, text_perplexity_after=None)
