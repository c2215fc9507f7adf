"""A model as one folder of its own: all but what is pinned elsewhere, and all of it sealed.

- `model.json`: what it is and how its parts go together
- `manifest.json`: sha256, size and tensors of every file, written last
- `README.md`: the model card
- `examples.csv`: what its run had measured by then, example by example, where it had
- `backbone/`: a plain `transformers` folder; what text meets
- `connectors/`: one a modality, with its record
- `base/`, `experts/<modality>/`, `adapters/<modality>/`: where media meet weights of their own
- `encoders/<modality>/`: encoders that were read from a folder; `encoder/` of a model taken apart
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graftline import durable
from graftline.asking.parts import Parts
from graftline.data.parts import (
    EFFICIENTNET_LITE0,
    MNIST_5K,
    SMOLLM2,
    TIMGM6MB,
    WHISPER_TINY_EN,
    Part,
)
from graftline.encoders import same_here
from graftline.encoders.own_class import check_stranger
from graftline.errors import GraftlineError
from graftline.evaluation.cells import ScoreCell, cells_in, examples_csv
from graftline.evaluation.report import EXAMPLES
from graftline.manifest import (
    FORMAT,
    MANIFEST,
    CorruptArtifact,
    fingerprint_of,
    read_manifest,
    seal,
    verify_folder,
)
from graftline.model.efficientnet import FrameEncoder, ImageEncoder
from graftline.model.pretrained import model_files
from graftline.model.whisper import WhisperAudioEncoder
from graftline.progress import track

DESCRIPTION, CARD = "model.json", "README.md"
KIND, INSIDE = "model", "./"
"""Of manifests; and how the name of a folder begins that lies in the model's own."""
TAKEN_APART = "taken-apart"
"""In place of a method, for a model whose parts were found and not trained."""
ENCODER_PARTS: Mapping[str, Part] = {
    ImageEncoder.name: EFFICIENTNET_LITE0,
    FrameEncoder.name: EFFICIENTNET_LITE0,
    WhisperAudioEncoder.name: WHISPER_TINY_EN,
}
"""Encoder -> the pinned part that holds its weights; who is not here needs none."""
DATA_PARTS: Mapping[str, Part] = {"image": MNIST_5K, "audio": TIMGM6MB, "video": MNIST_5K}
"""Modality -> the pinned part that the starter makes its rows of."""
BACKBONE_PARTS: Mapping[str, Part] = {"smollm2-135m-instruct": SMOLLM2}


class _Described(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EncoderDescription(_Described):
    """An encoder: its name, the digest of weights and settings, and where the weights come from."""

    name: str
    sha256: str
    part: dict[str, str] | None
    own: dict[str, Any] | None = Field(None, description="of a user's encoder: how to open it")

    def recorded(self) -> dict[str, Any]:
        """As a plan records the encoder."""
        return {"name": self.name, "sha256": self.sha256, **(self.own or {})}

    def located(self, bundle: Path) -> EncoderDescription:
        """The same, found from anywhere, if its weights lie in the model's own folder."""
        if self.folder is None or not self.folder.startswith(INSIDE):
            return self
        folder = str((bundle / self.folder).resolve())
        return self.moved(folder, folder)

    @property
    def folder(self) -> str | None:
        """Where its weights lie, if they were read from a folder."""
        found = (self.own or {}).get("weights", {}).get("folder")
        return None if found is None else str(found)

    def moved(self, folder: str, called: str) -> EncoderDescription:
        """The same, with its weights in another folder, and called otherwise behind its library."""
        own = self.own or {}
        there = {key: {**own[key], "folder": folder} for key in ("settings", "weights")}
        name = f"{self.name.partition(':')[0]}:{called}"
        return self.model_copy(update={"name": name, "own": {**own, **there}})

    def inside(self, modality: str) -> EncoderDescription:
        """The same, with its weights where the model's own folder holds them."""
        return self.moved(f"{INSIDE}{encoder_place(modality)}", "encoder")

    def files(self) -> list[Path]:
        """What is read of the folder of its weights."""
        code = bool((self.own or {}).get("settings", {}).get("trust_remote_code"))
        return [] if self.folder is None else model_files(Path(self.folder), code)


class Description(_Described):
    """What `model.json` says of an exported model."""

    format: Literal[1] = 1
    recipe: str
    method: str
    seed: int
    stage: int
    order: tuple[str, ...]
    data_md5: str
    run_fingerprint: str = Field(description="of the run that made it")
    backbone: str = Field(description="as the recipe names it")
    backbone_part: dict[str, str] | None
    encoders: dict[str, EncoderDescription] = Field(description="by modality")
    experts: tuple[str, ...] = Field(description="modalities whose tokens meet their expert")
    adapters: tuple[str, ...] = Field(description="modalities whose tokens meet their adapters")
    masked: bool = Field(description="whether media meet masked weights around theta_0")
    precision: Literal["bfloat16", "float32"]
    attention: str
    system_prompt: str
    text: Literal["merged", "modality"]
    kinds: dict[str, str] = Field(
        default_factory=dict, description="modality -> what its media are, where not called so"
    )
    max_new_tokens: int
    tested: dict[str, dict[str, str]] = Field(
        default_factory=dict, description="by modality: whose scores `examples.csv` holds"
    )
    grown_from: str | None = Field(
        None, description="digest of the exported model that it was grown from"
    )


def encoder_place(modality: str) -> str:
    """Where a model's folder holds a modality's encoder."""
    return f"encoders/{modality}"


def describe_encoders(parts: Parts) -> dict[str, EncoderDescription]:
    """The encoders of a model by modality, each with its pinned part."""
    return {
        modality: EncoderDescription(
            name=encoder["name"],
            sha256=encoder["sha256"],
            part=describe_part(ENCODER_PARTS.get(encoder["name"])),
            own={k: v for k, v in encoder.items() if k not in ("name", "sha256")} or None,
        )
        for modality, encoder in parts.encoders.items()
    }


def describe_part(part: Part | None) -> dict[str, str] | None:
    """A pinned part as plain data."""
    if part is None:
        return None
    names = ("name", "package", "version", "wheel_sha256", "member", "member_sha256", "licence")
    return {name: getattr(part, name) for name in names}


def write_bundle(
    parts: Parts,
    description: Description,
    card: str,
    out: Path,
    measured: Sequence[ScoreCell] = (),
) -> None:
    """Copies a model's parts into one folder that appears whole or not at all.

    Encoders that were read from a folder go with it; those of a hub or the starter's are pinned.

    Args:
        parts: the model.
        description: what it is.
        card: its model card, Markdown.
        out: folder to make.
        measured: what its run had measured by then.

    Raises:
        GraftlineError: the folder is there already, or cannot be written.
    """
    refuse_existing(out)
    copies, held = _copies(parts), dict(description.encoders)
    for modality, encoder in description.encoders.items():
        if encoder.folder is not None:
            place = encoder_place(modality)
            copies += [(file, f"{place}/{file.name}") for file in encoder.files()]
            held[modality] = encoder.inside(modality)
    description = description.model_copy(update={"encoders": held})
    try:
        with durable.new_folder(out) as temporary:
            with track(f"export {out.name}", len(copies)) as advance:
                for source, name in copies:
                    target = temporary / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, target)
                    advance("")
            write_description(temporary, description, card)
            if measured:
                (temporary / EXAMPLES).write_text(examples_csv(measured), encoding="utf-8")
            seal(temporary, sealed_as(description))
    except FileExistsError as error:
        raise _exists(out) from error


def write_description(folder: Path, description: Description, card: str) -> None:
    """Writes what a model is, for programs and for people, into its folder."""
    text = json.dumps(description.model_dump(mode="json"), indent=2) + "\n"
    (folder / DESCRIPTION).write_text(text, encoding="utf-8")
    (folder / CARD).write_text(card, encoding="utf-8")


def refuse_existing(out: Path) -> None:
    """Raises a GraftlineError if there is something under a name already."""
    if os.path.lexists(out):
        raise _exists(out)


def _exists(out: Path) -> GraftlineError:
    return GraftlineError(f"{out}: is there already; choose another --out, or remove it")


def sealed_as(description: Description) -> dict[str, Any]:
    """What the manifest of an exported model says beside its files."""
    parameters = description.model_dump(mode="json")
    fingerprint = fingerprint_of(KIND, parameters=parameters, parents={}, code="")
    return {
        "format": FORMAT,
        "kind": KIND,
        "fingerprint": fingerprint,
        "parameters": parameters,
        "parents": {},
        "code": "",
    }


def _copies(parts: Parts) -> list[tuple[Path, str]]:
    """(file, its place in the bundle) of everything that is copied."""
    folders = {"backbone": parts.backbone}
    if parts.base is not None:
        folders["base"] = parts.base
    folders |= {f"experts/{name}": folder for name, folder in parts.experts.items()}
    folders |= {f"adapters/{name}": folder for name, folder in parts.adapters.items()}
    copies = [
        (file, f"{name}/{file.relative_to(folder).as_posix()}")
        for name, folder in folders.items()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    ]
    for modality, folder in parts.connectors.items():
        for ending in ("json", "safetensors"):
            name = f"connector-{modality}.{ending}"
            copies.append((folder / name, f"connectors/{name}"))
    order = parts.backbone.parent / "experts.json"
    return [*copies, (order, order.name)] if parts.base is not None else copies


def is_bundle(folder: Path) -> bool:
    """Whether a folder looks like an exported model."""
    return (folder / DESCRIPTION).is_file() or (folder / MANIFEST).is_file()


def read_description(folder: Path) -> Description:
    """Reads what an exported model is, after comparing every file with the manifest's sha256.

    Raises:
        GraftlineError: a file is missing, surplus or changed, or this version of Graftline has
            other encoders than the model was made with.
    """
    if not folder.is_dir():
        raise GraftlineError(f"{folder}: there is no such folder")
    try:
        manifest = read_manifest(folder)
        verify_folder(folder, KIND, str(manifest["fingerprint"]), full=True)
    except CorruptArtifact as error:
        what = str(error).partition(". Delete the folder")[0]
        raise GraftlineError(f"{what}. Export the model again, or copy it again.") from error
    path = folder / DESCRIPTION
    try:
        found = Description.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise GraftlineError(
            f"{path}: not what this version of Graftline exports ({error}); export it again"
        ) from error
    encoders = {name: each.located(folder) for name, each in found.encoders.items()}
    found = found.model_copy(update={"encoders": encoders})
    _check_encoders(folder, found)
    return found


def content_digest(folder: Path) -> str:
    """What tells an exported model from every other: a digest of all its files and records."""
    return str(read_manifest(folder)["digest"])


def measured_cells(folder: Path) -> tuple[ScoreCell, ...]:
    """What an exported model's run had measured by then; nothing where it had not."""
    path = folder / EXAMPLES
    return cells_in(path.read_text(encoding="utf-8")) if path.is_file() else ()


def read_bundle(folder: Path) -> Parts:
    """The parts of an exported model; see `read_description`."""
    found = read_description(folder)
    return Parts(
        name=f"{folder.name} ({found.recipe} · {found.method} · stage {found.stage})",
        backbone=folder / "backbone",
        connectors=dict.fromkeys(found.encoders, folder / "connectors"),
        encoders={modality: each.recorded() for modality, each in found.encoders.items()},
        precision=found.precision,
        attention=found.attention,
        system_prompt=found.system_prompt,
        max_new_tokens=found.max_new_tokens,
        base=folder / "base" if found.masked else None,
        experts={name: folder / "experts" / name for name in found.experts},
        adapters={name: folder / "adapters" / name for name in found.adapters},
        text=found.text,
        kinds=found.kinds,
    )


def _check_encoders(folder: Path, description: Description) -> None:
    for modality, encoder in description.encoders.items():
        try:
            check_stranger((encoder.own or {}).get("settings", {}))
        except GraftlineError as error:
            raise GraftlineError(f"{folder / DESCRIPTION}: {modality}: {error}") from error
        here = same_here(encoder.recorded())
        if here != encoder.sha256:
            raise GraftlineError(
                f"{folder}: its {modality} encoder {encoder.name} has the digest "
                f"{encoder.sha256[:12]}, this version of Graftline has {here[:12]}. Use the "
                "version that exported it, or train and export it again."
            )
