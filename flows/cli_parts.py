"""`graftline take-apart` and `combine`: finished multimodal models as parts, and as one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.options import console, out


def take_apart(
    folder: Annotated[
        Path, typer.Argument(help="A `transformers` folder: LLaVA, Qwen2-Audio or Voxtral.")
    ],
    target: Annotated[Path, typer.Option("--out", help="Folder to make.")],
) -> None:
    """Take a multimodal model apart into backbone, encoder and connector, and check them."""
    from graftline.asking.bundle import DESCRIPTION
    from graftline.exchange.taking_apart import take_apart as carry_out

    difference = carry_out(folder, target)
    what = f"{target}: backbone, encoder and connector; together they give the whole's logits "
    out.print(
        f"{what}(largest difference {difference:.2g})",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if (target / DESCRIPTION).is_file():
        out.print(
            f'It is a model: graftline ask {target} "..."; graftline add RECIPE {target} --out NEW',
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def combine(
    base: Annotated[
        Path, typer.Argument(help="The LLM that all backbones were trained from: a folder.")
    ],
    models: Annotated[
        list[Path],
        typer.Argument(help="Models as `export` and `take-apart` make them; two or more."),
    ],
    target: Annotated[Path, typer.Option("--out", help="Folder to make.")],
    rule: Annotated[
        str, typer.Option(help="mmer and emr keep a mask a model; average, ties ... keep none.")
    ] = "mmer",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A parameter of the rule, e.g. scale=0.5."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of random choices (dare-ties).")] = 0,
) -> None:
    """Make one model of several that were trained from one LLM, each with its own modalities."""
    from graftline.exchange.combining import combine as carry_out
    from graftline.progress import shown
    from graftline.settings.reading import parse_override

    given = dict(parse_override(text) for text in settings or [])
    with shown(console):
        report = carry_out(base, models, target, rule=rule, parameters=given, seed=seed)
    for warning in report.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)
    out.print(
        f'{target}: {len(models)} models in one; graftline ask {target} "..."',
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
