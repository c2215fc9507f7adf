"""The one training loop: align, fine-tune and realign are three ways to call it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from graftline.durable import file_sha256, publish_folder, temporary_sibling
from graftline.errors import GraftlineError
from graftline.model.multimodal import Batch, MultimodalModel
from graftline.progress import track
from graftline.recipe import PhaseSettings
from graftline.team import Team, current
from graftline.training.optimizer import MasterAdamW, ParameterGroup
from graftline.training.sharding import ShardedAdamW

_CHECKPOINT = "checkpoint-"


class NotFinite(GraftlineError):
    """A loss or gradient became NaN or infinite."""


class BrokenCheckpoint(GraftlineError):
    """A training checkpoint does not match its own record."""


@dataclass
class History:
    """What happened at each step: the loss before it and the gradients' norm."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    tokens: int = 0


def train(
    model: MultimodalModel,
    groups: Sequence[ParameterGroup],
    batch_of: Callable[[int], Batch],
    settings: PhaseSettings,
    work: Path,
    label: str,
) -> History:
    """Trains `groups` in place; a killed call, made again, ends in the same bits on CPU.

    The batch of a step is a pure function of the step, and nothing else is random, so a
    checkpoint is the optimiser's state and the history. On a GPU, whose sums have no fixed order
    (attention's backward pass), it ends there up to rounding.

    Args:
        model: the model; parameters outside `groups` stay as they are.
        groups: what is trained, with learning rates.
        batch_of: step (from 0) -> batch.
        settings: steps, schedule, clipping and checkpoint interval.
        work: folder for checkpoints, kept between calls.
        label: what the progress bar says.

    Raises:
        NotFinite: names the step and the last good checkpoint, which is kept.
        BrokenCheckpoint: names the checkpoint and what to do.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for group in groups:
        for parameter in group.parameters:
            parameter.requires_grad_(True)
    model.train()
    team = current()
    forward, optimizer = _prepared(model, groups, settings, team)
    work = team.checkpoints(work)
    start, history = _resume(work, optimizer, team)
    with track(label, settings.steps, start) as advance:
        for step in range(start, settings.steps):
            batch = batch_of(step).to(model.device)
            loss = forward(batch) * batch.weight
            loss.backward()  # type: ignore[no-untyped-call]
            norm = optimizer.step(rate_factor(step, settings))
            summed, tokens = team.sums(loss.item(), batch.tokens if batch.weight else 0)
            value = summed / team.size
            if not (math.isfinite(value) and math.isfinite(norm)):
                raise NotFinite(_not_finite(label, step, value, norm, work))
            history.losses.append(value)
            history.norms.append(norm)
            history.tokens += int(tokens)
            advance(f"loss {value:.3f}")
            if (step + 1) % settings.checkpoint_every == 0 and step + 1 < settings.steps:
                _save(work, step + 1, optimizer, history, team)
    if isinstance(optimizer, ShardedAdamW):
        optimizer.gather()
    model.eval()
    return history


def _prepared(
    model: MultimodalModel, groups: Sequence[ParameterGroup], settings: PhaseSettings, team: Team
) -> tuple[Callable[[Batch], Tensor], MasterAdamW | ShardedAdamW]:
    """What gives a batch's loss, and what makes a step of its gradients."""
    decay, norm = settings.weight_decay, settings.clip_norm
    if team.size == 1:
        return model, MasterAdamW(groups, decay, norm)
    if team.shard:
        return model, ShardedAdamW(model, groups, decay, norm, team.device)

    from accelerate import Accelerator, DistributedDataParallelKwargs

    # A part of a batch may hold no medium of one of several modalities: its connector is not used.
    several = len(model.connectors) > 1
    unused = DistributedDataParallelKwargs(find_unused_parameters=several)
    accelerator = Accelerator(cpu=model.device.type == "cpu", kwargs_handlers=[unused])
    forward = accelerator.prepare_model(model)  # moves parameters, so the optimiser comes after it
    return forward, MasterAdamW(groups, decay, norm)


def rate_factor(step: int, settings: PhaseSettings) -> float:
    """Linear warm-up, then cosine to zero: the share of the peak learning rate at `step`."""
    warmup = round(settings.steps * settings.warmup_fraction)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, settings.steps - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _not_finite(label: str, step: int, loss: float, norm: float, work: Path) -> str:
    kept = _checkpoints(work)
    last = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was written yet"
    return (
        f"{label}: step {step + 1} has loss {loss} and gradient norm {norm}; training stopped, "
        f"{last}. Lower the learning rate, or use precision: float32, and run again."
    )


def _save(
    work: Path, step: int, optimizer: MasterAdamW | ShardedAdamW, history: History, team: Team
) -> None:
    """Publishes `checkpoint-<step>` whole or not at all; when all have, drops the one before."""
    writes = team.first or team.shard
    if writes:
        _publish(work, step, optimizer, history)
    team.wait()
    if writes:
        for older in _checkpoints(work)[:-1]:
            shutil.rmtree(older)


def _publish(
    work: Path, step: int, optimizer: MasterAdamW | ShardedAdamW, history: History
) -> None:
    target = _checkpoint(work, step)
    temporary = temporary_sibling(target)
    temporary.mkdir(parents=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in optimizer.state().items()}
    save_file(tensors, temporary / "optimizer.safetensors")
    record = {
        "step": step,
        "sha256": file_sha256(temporary / "optimizer.safetensors"),
        "losses": history.losses,
        "norms": history.norms,
        "tokens": history.tokens,
    }
    (temporary / "record.json").write_text(json.dumps(record), encoding="utf-8")
    publish_folder(temporary, target)


def _resume(work: Path, optimizer: MasterAdamW | ShardedAdamW, team: Team) -> tuple[int, History]:
    """Goes on from the newest checkpoint that the whole team has."""
    steps = [int(each.name.removeprefix(_CHECKPOINT)) for each in _checkpoints(work)]
    agreed = team.least(max(steps, default=0))
    for ahead in (step for step in steps if step > agreed):
        shutil.rmtree(_checkpoint(work, ahead))  # not all of the team had come so far
    if agreed == 0:
        return 0, History()
    last = _checkpoint(work, agreed)
    try:
        record = json.loads((last / "record.json").read_text(encoding="utf-8"))
        if file_sha256(last / "optimizer.safetensors") != record["sha256"]:
            raise ValueError("optimizer.safetensors does not have the recorded sha256")
        optimizer.load(load_file(last / "optimizer.safetensors"))
    except (OSError, ValueError, KeyError) as error:
        raise BrokenCheckpoint(
            f"{last}: {error}. Delete this folder and run again; training goes on from the "
            "checkpoint before it, or from the start."
        ) from error
    return int(record["step"]), History(record["losses"], record["norms"], record["tokens"])


def _checkpoints(work: Path) -> list[Path]:
    return sorted(work.glob(f"{_CHECKPOINT}[0-9]*"))


def _checkpoint(work: Path, step: int) -> Path:
    return work / f"{_CHECKPOINT}{step:08d}"
