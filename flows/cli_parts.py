"""`graftline take-apart`: a finished multimodal model as the parts that it is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.options import out


def take_apart(
    folder: Annotated[
        Path, typer.Argument(help="A `transformers` folder: LLaVA, Qwen2-Audio or Voxtral.")
    ],
    target: Annotated[Path, typer.Option("--out", help="Folder to make.")],
) -> None:
    """Take a multimodal model apart into backbone, encoder and connector, and check them."""
    from graftline.asking.bundle import DESCRIPTION
    from graftline.taking_apart import take_apart as carry_out

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
