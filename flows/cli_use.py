"""`graftline ask`, `chat`, `export` and `init`: a model in use, and a recipe to begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from flows.options import Method, Seed, Settings, console, out, overrides_of
from graftline.errors import GraftlineError

MEDIA_OPTIONS = {
    "image": "--image",
    "audio": "--audio",
    "video": "--video",
    "point_cloud": "--points",
}
"""Kind of media -> its option."""
SHOW_OPTION = "--show"
"""The option of media whose modality has a name of its own."""

Model = Annotated[
    str,
    typer.Argument(
        help="An exported folder, a report's folder, a recipe, or a registered model "
        "(<recipe>@<method>)."
    ),
]
Stage = Annotated[
    int | None, typer.Option(min=1, help="Which stage's model; the last one's if left out.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")]
Longest = Annotated[
    int | None,
    typer.Option("--max-new-tokens", min=1, help="Longest answer; as evaluated if left out."),
]
Media = list[Path] | None


def _named(value: str) -> tuple[str, Path]:
    """(modality, file) of NAME=FILE.

    Raises:
        GraftlineError: there is no `=`.
    """
    name, equals, file = value.partition("=")
    if not equals or not name or not file:
        raise GraftlineError(f"{SHOW_OPTION} {value!r}: write NAME=FILE, e.g. xray=scan.png")
    return name, Path(file)


class MediaCommand(TyperCommand):
    """A command that keeps the order of media among different options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Notes (modality, file) in the order of the command line in `ctx.meta`."""
        names = {option: modality for modality, option in MEDIA_OPTIONS.items()}
        found: list[tuple[str, Path]] = []
        words = iter(args)
        for word in words:
            if word == "--":
                break
            option, equals, value = word.partition("=")
            if option in (*names, SHOW_OPTION):
                value = value if equals else next(words, "")
                found.append(
                    _named(value) if option == SHOW_OPTION else (names[option], Path(value))
                )
        ctx.meta["graftline.media"] = found
        return list(super().parse_args(ctx, args))


def ask(
    context: typer.Context,
    model: Model,
    question: Annotated[
        str | None, typer.Argument(help='The question, e.g. "What is this?"')
    ] = None,
    image: Annotated[Media, typer.Option("--image", help="A picture: PNG, JPEG ...")] = None,
    audio: Annotated[Media, typer.Option("--audio", help="A sound: WAV.")] = None,
    video: Annotated[
        Media, typer.Option("--video", help="Moving pictures: animated PNG, GIF, WebP.")
    ] = None,
    points: Annotated[Media, typer.Option("--points", help="A point cloud: PLY.")] = None,
    show: Annotated[
        list[str] | None,
        typer.Option(
            SHOW_OPTION, metavar="NAME=FILE", help="A medium of the modality that is called so."
        ),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(help="A CSV of questions: `question`, and a column a modality with files."),
    ] = None,
    answers: Annotated[
        Path | None, typer.Option("--out", help="With --table: the CSV to write.")
    ] = None,
    method: Method = None,
    seed: Seed = None,
    settings: Settings = None,
    stage: Stage = None,
    device: Device = "auto",
    longest: Longest = None,
) -> None:
    """Ask a finished model about media, in the order given; or every question of a CSV."""
    del image, audio, video, points, show  # their order among each other is in the context
    media: list[tuple[str, Path]] = context.meta["graftline.media"]
    if table is not None and (question is not None or media):
        raise GraftlineError("--table holds the questions and names the media; give nothing else")
    if table is None and question is None:
        raise GraftlineError('ask a question, e.g. "What is this?", or give --table questions.csv')
    if (table is None) != (answers is None):
        raise GraftlineError("--table questions.csv and --out answers.csv belong together")
    from flows import using

    overrides = overrides_of(method, seed, settings)
    asker = using.open_model(model, overrides, stage, device=device, max_new_tokens=longest)
    if table is not None and answers is not None:
        count = using.ask_table(asker, table, answers, console)
        out.print(f"{answers}: {count} answers", markup=False, highlight=False, soft_wrap=True)
        return
    text = using.ask(asker, media, str(question), console)
    out.out(text, highlight=False)  # what a model says is no markup and holds no emoji codes


def chat(
    model: Model,
    method: Method = None,
    seed: Seed = None,
    settings: Settings = None,
    stage: Stage = None,
    device: Device = "auto",
    longest: Longest = None,
) -> None:
    """Talk with a finished model; /image FILE and the like show media, /help says more."""
    from flows import chatting, using

    overrides = overrides_of(method, seed, settings)
    asker = using.open_model(model, overrides, stage, device=device, max_new_tokens=longest)

    def say(answer: str) -> None:
        out.out(answer, highlight=False)

    conversation = chatting.Chat(asker, say, console)
    console.print(f"{asker.parts.name}. {conversation.help()}", markup=False, soft_wrap=True)
    chatting.converse(conversation, chatting.typed_lines(console))


def export(
    model: Model,
    folder: Annotated[Path, typer.Option("--out", help="Folder to make.")],
    method: Method = None,
    seed: Seed = None,
    settings: Settings = None,
    stage: Stage = None,
) -> None:
    """Write a finished model into one folder of its own, with a model card."""
    from flows import using

    name = using.export(model, overrides_of(method, seed, settings), stage, folder, console)
    out.print(f"{folder}: {name}", markup=False, highlight=False, soft_wrap=True)


def init(
    file: Annotated[Path, typer.Option("--out", help="The recipe to write.")] = Path("recipe.yaml"),
    name: Annotated[
        str | None, typer.Option(help="The recipe's name; the file's own if left out.")
    ] = None,
    method: Annotated[str, typer.Option(help="As `graftline run --method`.")] = "mera",
    modalities: Annotated[
        str,
        typer.Option(
            help="Separated by commas, in the order in which they are learned; name:kind for a "
            "modality of your own, e.g. xray:image."
        ),
    ] = "image,audio,video,point_cloud",
    backbone: Annotated[str, typer.Option(help="The LLM.")] = "smollm2-135m-instruct",
    data: Annotated[str, typer.Option(help="Folder of <modality>/<split>.parquet.")] = "data",
    source: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER",
            help="A modality's own media: a folder with metadata.csv or metadata.jsonl.",
        ),
    ] = None,
    brief: Annotated[
        bool, typer.Option("--brief", help="Write what was chosen alone, without comments.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Write a recipe that runs, with a comment at every key."""
    from graftline.durable import atomic_write_text
    from graftline.settings.drafting import draft

    if file.is_dir():
        raise GraftlineError(f"{file}: is a folder; choose a file as --out")
    if file.exists() and not force:
        raise GraftlineError(f"{file}: is there already; choose another --out, or add --force")
    chosen = [word.strip() for word in modalities.split(",") if word.strip()]
    pairs = [text.partition("=") for text in source or []]
    wrong = [name for name, equals, folder in pairs if not (name and equals and folder)]
    if wrong:
        raise GraftlineError(f"--source {wrong[0]!r}: write NAME=FOLDER, e.g. xray=my/scans")
    sources = {name: folder for name, _, folder in pairs}
    text = draft(name or file.stem, method, chosen, backbone, data, sources, brief=brief)
    atomic_write_text(file, text)
    out.print(
        f"{file} is written. Price it: graftline plan {file}    Run it: graftline run {file}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def register(app: typer.Typer) -> None:
    """Adds these commands to the command line."""
    app.command(cls=MediaCommand)(ask)
    app.command()(chat)
    app.command()(export)
    app.command()(init)
