"""A model as plain data that says where its parts lie: for whoever loads it without copying it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graftline.asking.parts import Parts
from graftline.encoders import same_here
from graftline.errors import GraftlineError
from graftline.manifest import MANIFEST, read_manifest, verify_folder


def links_of(parts: Parts) -> dict[str, Any]:
    """A model's parts as plain data, every folder by its absolute path."""
    return {
        "name": parts.name,
        "backbone": _link(parts.backbone),
        "connectors": {name: _link(folder) for name, folder in parts.connectors.items()},
        "encoders": {name: dict(each) for name, each in parts.encoders.items()},
        "precision": parts.precision,
        "attention": parts.attention,
        "system_prompt": parts.system_prompt,
        "max_new_tokens": parts.max_new_tokens,
        "base": _link(parts.base) if parts.base is not None else None,
        "experts": {name: _link(folder) for name, folder in parts.experts.items()},
        "adapters": {name: _link(folder) for name, folder in parts.adapters.items()},
        "text": parts.text,
        "kinds": dict(parts.kinds),
    }


def follow_links(links: Mapping[str, Any]) -> Parts:
    """The parts that links lead to, compared with the manifests that they were published with.

    Raises:
        GraftlineError: a folder is not there any more, or an encoder is another one now.
        CorruptArtifact: a folder is damaged.
    """
    found = Parts(
        **{
            **links,
            "backbone": _followed(links["backbone"]),
            "connectors": {name: _followed(path) for name, path in links["connectors"].items()},
            "base": _followed(links["base"]) if links["base"] is not None else None,
            "experts": {name: _followed(path) for name, path in links["experts"].items()},
            "adapters": {name: _followed(path) for name, path in links["adapters"].items()},
        }
    )
    for modality, encoder in found.encoders.items():
        if same_here(encoder) != encoder["sha256"]:
            raise GraftlineError(
                f"{found.name}: its {modality} encoder {encoder['name']} has the digest "
                f"{encoder['sha256'][:12]}, this version of Graftline has another. Use the version "
                "that made the model."
            )
    return found


def _link(folder: Path) -> str:
    return str(folder.absolute())


def _followed(path: str) -> Path:
    folder = Path(path)
    sealed = next((each for each in (folder, folder.parent) if (each / MANIFEST).is_file()), None)
    if not folder.is_dir() or sealed is None:
        raise GraftlineError(
            f"{path}: this part of the model is not there any more; its weights are linked, not "
            "copied. Put the artifact store back, or run the recipe and register the model again."
        )
    manifest = read_manifest(sealed)
    verify_folder(sealed, str(manifest["kind"]), str(manifest["fingerprint"]), full=True)
    return folder
