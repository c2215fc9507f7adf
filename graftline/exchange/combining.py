"""Several finished models of one base become one: their backbones composed, their connectors kept.

By a rule with a mask an expert (MMER, arXiv 2505.17110; EMR) media meet what their own model has
learned, and so does the text behind them; a prompt without media meets the merged weights. By any
other rule there is one backbone for all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graftline import durable
from graftline.asking.bundle import (
    Description,
    EncoderDescription,
    encoder_place,
    read_description,
    refuse_existing,
    sealed_as,
    write_description,
)
from graftline.asking.card import model_card
from graftline.asking.parts import read_tokenizer
from graftline.errors import GraftlineError
from graftline.exchange.kinship import require_kin
from graftline.manifest import seal
from graftline.merging.checkpoints import INDEX, open_checkpoint
from graftline.merging.companions import companions_of
from graftline.merging.rules import rule_named
from graftline.merging.streaming import MergeReport, MergeRequest, merge_checkpoints


@dataclass(frozen=True)
class _Member:
    """One of the models.

    Attributes:
        folder: as `export` or `take-apart` made it.
        description: what it is, with its own encoders found from anywhere.
    """

    folder: Path
    description: Description

    @property
    def backbone(self) -> Path:
        """Its expert weights."""
        return self.folder / "backbone"

    @property
    def modalities(self) -> tuple[str, ...]:
        """What it takes."""
        return tuple(self.description.encoders)

    def own_encoder(self, modality: str) -> Path | None:
        """The folder of an encoder whose weights the model holds itself."""
        weights = (self.description.encoders[modality].own or {}).get("weights", {})
        folder = Path(str(weights.get("folder", "")))
        return folder if folder.is_relative_to(self.folder.resolve()) else None


def combine(
    base: Path,
    models: Sequence[Path],
    out: Path,
    *,
    rule: str = "mmer",
    parameters: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> MergeReport:
    """Writes one model that takes what all of some models take.

    Args:
        base: `transformers` folder of the LLM that their backbones were trained from.
        models: folders as `graftline export` and `graftline take-apart` make them.
        out: folder to make; a model like them.
        rule: how their backbones are composed.
        parameters: of the rule.
        seed: of the rule's random choices.

    Returns:
        What the composition did. Prompts are written by the first model's chat template; a warning
        says so where the models' templates differ.

    Raises:
        GraftlineError: lists what stands against it: a modality in two models, one that is routed
            already, one of another base, unlike system prompts. Or a model has no tokenizer.
    """
    refuse_existing(out)
    members = [_Member(folder, read_description(folder)) for folder in models]
    masked = rule_named(rule).one_per_expert
    _refuse(members)
    ours = open_checkpoint(base).entries
    for member in members:
        theirs = open_checkpoint(member.backbone).entries
        require_kin(ours, theirs, (base, member.folder))
    templates = [read_tokenizer(each.backbone).chat_template for each in members]
    with durable.new_folder(out) as temporary:
        request = MergeRequest(
            rule=rule,
            base=base,
            experts=tuple(member.backbone for member in members),
            out=temporary / "backbone",
            parameters=parameters or {},
            seed=seed,
            names={base: base.name, **{each.backbone: each.folder.name for each in members}},
        )
        report = merge_checkpoints(request)
        warnings = _give_template(members, templates, temporary / "backbone")
        if masked:
            _copy_checkpoint(base, temporary / "base")
            places = {name: n for n, each in enumerate(members) for name in each.modalities}
            (temporary / "experts.json").write_text(json.dumps(places), encoding="utf-8")
        description = _described(members, base, rule, seed, masked)
        _copy_parts(members, temporary)
        write_description(temporary, description, model_card(description, None))
        seal(temporary, sealed_as(description))
    return replace(report, warnings=(*report.warnings, *warnings))


def _copy_checkpoint(folder: Path, out: Path) -> None:
    """Copies a checkpoint, and nothing that lies beside it."""
    out.mkdir()
    files = {entry.file for entry in open_checkpoint(folder).entries.values()}
    for file in [*sorted(files), *companions_of(folder), folder / INDEX]:
        if file.is_file():
            shutil.copyfile(file, out / file.name)


def _give_template(
    members: Sequence[_Member], texts: Sequence[str | None], backbone: Path
) -> list[str]:
    """Gives the new model its first member's chat template; warns where others had another."""
    if texts[0]:
        (backbone / "chat_template.jinja").write_text(texts[0], encoding="utf-8")
    others = [
        each.folder.name for each, text in zip(members, texts, strict=True) if text != texts[0]
    ]
    if not others:
        return []
    return [
        f"{', '.join(others)}: had another chat template than {members[0].folder.name}, whose is "
        "used; name the model first whose prompts matter most"
    ]


def _refuse(members: Sequence[_Member]) -> None:
    """Raises what stands against putting models together, all at once."""
    problems = [
        f"{each.folder}: its media meet weights of their own already; one backbone is wanted"
        for each in members
        if each.description.masked or each.description.experts or each.description.adapters
    ]
    holders: dict[str, Path] = {}
    for member in members:
        for name in member.modalities:
            if name in holders:
                problems.append(f"{name}: both {holders[name]} and {member.folder} take it")
            holders[name] = member.folder
    for key in ("system_prompt", "precision"):
        found = {getattr(each.description, key) for each in members}
        if len(found) > 1:
            problems.append(f"{key}: they differ ({', '.join(map(repr, sorted(found)))})")
    if len(members) < 2:
        problems.append("one model is no combination; give two or more")
    if problems:
        raise GraftlineError("these models cannot become one:\n  - " + "\n  - ".join(problems))


def _described(
    members: Sequence[_Member], base: Path, rule: str, seed: int, masked: bool
) -> Description:
    order = tuple(name for member in members for name in member.modalities)
    first = members[0].description
    encoders = {name: _placed(member, name) for member in members for name in member.modalities}
    return Description(
        recipe=" + ".join(each.description.recipe for each in members),
        method=rule,
        seed=seed,
        stage=len(order),
        order=order,
        data_md5="",
        run_fingerprint="",
        backbone=base.name,
        backbone_part=None,
        encoders=encoders,
        experts=(),
        adapters=(),
        masked=masked,
        precision=first.precision,
        attention="auto",
        system_prompt=first.system_prompt,
        text="modality",
        kinds={k: v for each in members for k, v in each.description.kinds.items()},
        max_new_tokens=max(each.description.max_new_tokens for each in members),
    )


def _placed(member: _Member, modality: str) -> EncoderDescription:
    """An encoder as the new model records it; one that a model holds itself has a folder there."""
    encoder = member.description.encoders[modality]
    if member.own_encoder(modality) is None:
        return encoder
    return encoder.inside(modality)


def _copy_parts(members: Sequence[_Member], out: Path) -> None:
    (out / "connectors").mkdir()
    for member in members:
        for name in member.modalities:
            for ending in ("json", "safetensors"):
                file = f"connector-{name}.{ending}"
                shutil.copyfile(member.folder / "connectors" / file, out / "connectors" / file)
            own = member.own_encoder(name)
            if own is not None:
                shutil.copytree(own, out / encoder_place(name))
