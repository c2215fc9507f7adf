"""The model card of an exported model: what it is, what it scored, whose parts it holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from graftline.asking.bundle import DATA_PARTS, TAKEN_APART, Description, describe_part
from graftline.methods import method_named
from graftline.settings.models import StarterBackbone

_HEADLINES = {
    "brg": "BRG",
    "kept": "BRG over the last stage",
    "frg_mean": "FRG",
    "retention": "retention",
}


def model_card(description: Description, metrics: Mapping[str, Any] | None) -> str:
    """The card as Markdown.

    Args:
        description: what the model is.
        metrics: `metrics.json` of the run whose last stage it is; None where it was not measured.
    """
    order = " → ".join(description.order[: description.stage])
    lines = [
        f"# {description.recipe}, {description.method}, seed {description.seed}",
        "",
        f"A multimodal LLM made by Graftline: {description.backbone} learned {order}.",
        "",
        "Ask it: `graftline ask FOLDER --" + _option(description) + ' "What is this?"`',
        "",
        "| | |",
        "|---|---|",
        f"| recipe | {description.recipe} |",
        f"| method | {_method(description.method)} |",
        f"| seed | {description.seed} |",
        f"| order | {order} |",
        f"| stage | {description.stage} of {len(description.order)} |",
        f"| data (md5) | {description.data_md5} |",
        f"| run | {description.run_fingerprint} |",
        f"| precision | {description.precision} |",
        *([f"| grown from | {description.grown_from} |"] if description.grown_from else []),
        "",
        "## Scores",
        "",
        *(_scores(metrics) if metrics else ["This stage's model was not measured by a report."]),
        "",
        "## Parts and licences",
        "",
        *_licences(description),
        "",
        "Connectors, and what the backbone learned, are the run's own. Encoders whose weights are",
        "not in this folder are fetched once, pinned by version and sha256. Rows of other data",
        "than the starter's have the licence that their maker gave them.",
    ]
    return "\n".join(lines) + "\n"


def _method(name: str) -> str:
    """A method's name and the first line of what its code says of it."""
    if name == TAKEN_APART:
        return f"{name}: not trained here, but the parts of a finished model"
    said = (method_named(name).__doc__ or "").strip().splitlines()
    return f"{name}: {said[0].rstrip('.')}" if said else name


def _option(description: Description) -> str:
    first = next(iter(description.encoders), "image")
    options = {"point_cloud": "points", "image": "image", "audio": "audio", "video": "video"}
    return f"{options[first]} FILE" if first in options else f"show {first}=FILE"


def _scores(metrics: Mapping[str, Any]) -> list[str]:
    """Scores x 100 of every modality, and the gains in per cent, with their intervals."""
    lines = [
        "Test rows, 95 % bootstrap intervals over rows.",
        "",
        "| | value | 95 % interval | n |",
        "|---|---|---|---|",
    ]
    for modality, score in metrics["scores"].items():
        found = metrics["intervals"].get(f"scores.{modality}")
        lines.append(_line(modality, 100 * score, found, 100.0, metrics["n"].get(modality)))
    if metrics.get("joint") is not None:
        found = metrics["intervals"].get("joint")
        lines.append(_line("joint questions", 100 * metrics["joint"], found, 100.0, None))
    for key, name in _HEADLINES.items():
        if metrics.get(key) is not None:
            lines.append(_line(name, metrics[key], metrics["intervals"].get(key), 1.0, None))
    after = metrics.get("text_perplexity_after")
    if after is not None:
        lines.append(f"| text perplexity | {after:.2f} | | |")
    return lines


def _line(
    name: str, value: float, interval: Mapping[str, Any] | None, scale: float, n: int | None
) -> str:
    known = interval is not None and interval["low"] is not None
    bounds = (
        f"{scale * interval['low']:.2f} to {scale * interval['high']:.2f}"
        if interval is not None and known
        else ""
    )
    return f"| {name} | {value:.2f} | {bounds} | {'' if n is None else n} |"


def _licences(description: Description) -> list[str]:
    lines = ["| part | from | licence |", "|---|---|---|"]
    backbone = description.backbone_part
    if backbone is not None:
        lines.append(_licence(f"backbone: {description.backbone}", backbone))
    elif description.backbone in get_args(StarterBackbone):
        lines.append(f"| backbone: {description.backbone} | made by Graftline | |")
    else:
        lines.append(f"| backbone: {description.backbone} | the user | as its own |")
    for modality, encoder in description.encoders.items():
        if encoder.part is not None:
            lines.append(_licence(f"{modality} encoder: {encoder.name}", encoder.part))
        elif encoder.own is None:
            lines.append(f"| {modality} encoder: {encoder.name} | Graftline, no weights | |")
        else:
            source = encoder.own["settings"]["source"]
            lines.append(
                f"| {modality} encoder: {encoder.name} | the user, {source} | as its own |"
            )
    for modality in description.encoders:
        part = describe_part(DATA_PARTS.get(modality))
        if part is not None:
            lines.append(_licence(f"{modality} rows, where they are the starter's", part))
    return lines


def _licence(name: str, part: Mapping[str, str]) -> str:
    return f"| {name} | {part['package']} {part['version']} | {part['licence']} |"
