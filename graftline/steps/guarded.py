"""Carrying out the steps of methods that fine-tune against forgetting."""

from __future__ import annotations

from collections.abc import Iterator

from graftline.data.examples import ExampleSet, TrainingSet, replay_rows
from graftline.model.loading import LoadedModel, assemble, read_connector, read_record
from graftline.model.multimodal import Batch
from graftline.progress import track
from graftline.recipe import LoraSettings
from graftline.steps.work import Work, call_of, phase_settings
from graftline.training.elastic import fisher_diagonal, save_fisher, weighed_parameters
from graftline.training.guarded import GuardCall
from graftline.training.guarded import guarded_fine_tune as train_guarded
from graftline.training.memory import record_logits
from graftline.training.phases import examples_of


def guarded_fine_tune(work: Work) -> None:
    """Fine-tunes on a new modality with what the method sets against forgetting."""
    parameters = work.step.parameters
    fisher_artifact = work.parents.get("fisher")
    guard = GuardCall(
        parameters["guard"],
        parameters["settings"],
        fraction=parameters.get("fraction"),
        fisher=fisher_artifact.folder if fisher_artifact else None,
        earlier=list(work.role("subspace").values()),
        logits=work.role("logits"),
    )
    train_guarded(
        call_of(work),
        phase_settings(parameters),
        {name: work.role("connector")[name] for name in parameters["modalities"]},
        guard,
        mode=parameters["mode"],
        lora=LoraSettings(**parameters.get("lora", {})),
        connector_learning_rate=parameters["connector_learning_rate"],
        train_embeddings=parameters["train_embeddings"],
        result_fingerprint=work.step.reference.fingerprint,
    )


def logits(work: Work) -> None:
    """Records what a stage's model says of the rows of its modality that are kept for replay."""
    parameters = work.step.parameters
    loaded, [examples] = _learned(work, parameters["modality"])
    kept = replay_rows(len(examples), parameters["fraction"], parameters["seed"])
    record_logits(loaded, examples, kept, parameters["batch_size"], work.out, work.step.title)


def _learned(work: Work, modality: str) -> tuple[LoadedModel, list[ExampleSet]]:
    """A step's model with the connector of one modality, and that one's training rows."""
    call, folder = call_of(work), work.role("connector")[modality]
    record = read_record(folder, modality)
    loaded = assemble(call.backbone, [(record, read_connector(folder, record))], call.system_prompt)
    return loaded, examples_of(call, loaded, [modality])


def fisher(work: Work) -> None:
    """Reads a stage's Fisher information from a seeded share of its training rows."""
    parameters = work.step.parameters
    loaded, examples = _learned(work, parameters["modality"])
    count = len(examples[0])
    share = min(1.0, parameters["rows"] / count)
    kept = replay_rows(count, share, parameters["seed"])
    rows = TrainingSet(examples, parameters["batch_size"], parameters["seed"], [kept])
    weighed = weighed_parameters(loaded, parameters["train_embeddings"])
    batches = -(-len(kept) // parameters["batch_size"])

    def seen() -> Iterator[Batch]:
        with track(work.step.title, batches) as advance:
            for number in range(batches):
                yield rows.batch(number)
                advance("")

    found = fisher_diagonal(loaded.model, list(weighed.values()), seen())
    previous = work.parents.get("previous")
    save_fisher(
        work.out,
        dict(zip(weighed, found, strict=True)),
        previous.folder if previous else None,
        parameters["decay"],
        len(kept),
    )
