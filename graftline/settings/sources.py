"""Where a modality's own rows come from: the part `modalities.<name>.data` of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from graftline.recipe_parts import Part, Place, Split

Paths = Place | tuple[Place, ...]
SplitPaths = Paths | dict[Split, Paths]
Columns = str | tuple[str, ...] | None
Name = Annotated[str, Field(min_length=1)]
SOURCES = ("folder", "parquet", "arrow", "hub", "conversations")


class ColumnSettings(Part):
    """Which columns hold what; names that are left out are looked for."""

    media: Name | None = Field(None, description="file name, bytes or {bytes, path}")
    question: Name | None = Field(None, description="found by itself if called question")
    answer: Columns = Field(None, description="one column or several; found if called answer(s)")
    caption: Columns = Field(None, description="one column or several; found if called caption(s)")
    split: Name | None = Field(None, description="says train, validation (val, dev) or test")
    group: Name | None = Field(
        None, description="rows of one value (a patient, a speaker) stay in one split"
    )


class FractionSettings(Part):
    """How rows that bring no split are divided: seeded, all rows of a medium together."""

    seed: int = Field(0, ge=0)
    validation: float = Field(0.1, gt=0.0, lt=1.0)
    test: float = Field(0.1, gt=0.0, lt=1.0)

    @model_validator(mode="after")
    def _some_are_left_to_train_on(self) -> FractionSettings:
        if self.validation + self.test >= 1.0:
            raise ValueError("validation and test together leave nothing to train on")
        return self


class SourceSettings(Part):
    """One source of rows; give one of folder, parquet, arrow, hub and conversations."""

    folder: SplitPaths | None = Field(
        None, description="folder with media and metadata.csv or metadata.jsonl"
    )
    parquet: SplitPaths | None = Field(None, description="parquet files; * stands for any name")
    arrow: SplitPaths | None = Field(None, description="arrow files, as datasets saves them")
    hub: str | None = Field(None, pattern=r"^[\w.-]+(/[\w.-]+)?$", description="owner/name")
    conversations: SplitPaths | None = Field(None, description="LLaVA's JSON, or JSON lines")
    revision: str | None = Field(
        None, pattern=r"^[0-9a-f]{40}$", description="of hub: the full commit, 40 digits"
    )
    config: str | None = Field(None, description="of hub: which of its data sets")
    media_folder: Place | None = Field(
        None, description="what file names are relative to; the table's own folder if left out"
    )
    columns: ColumnSettings = ColumnSettings()
    question: str | None = Field(None, description="asked where a row has no question")
    caption_question: str = Field("Describe this.", description="asks for a caption")
    fractions: FractionSettings = FractionSettings()
    bad_rows: Literal["stop", "skip"] = Field(
        "stop", description="skip: go on without them; they are listed as warnings"
    )
    max_pixels: int | None = Field(
        None, ge=64, description="of a picture, all its frames together; 64 Mi, which is the most"
    )
    max_seconds: float = Field(
        120.0, gt=0.0, description="of a sound; longer ones are an error; at most 1,800"
    )

    @property
    def kind(self) -> str:
        """Which source it is."""
        return next(name for name in SOURCES if getattr(self, name) is not None)

    @model_validator(mode="after")
    def _one_source(self) -> SourceSettings:
        given = [name for name in SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            named = " and ".join(given) or "none"
            raise ValueError(f"give one of {', '.join(SOURCES)} (given: {named})")
        if self.hub is not None and self.revision is None:
            raise ValueError(
                "hub needs a revision: the commit's 40 hexadecimal digits, from the data set's "
                "page, Files and versions, History"
            )
        if self.hub is None and (self.revision is not None or self.config is not None):
            raise ValueError("revision and config belong to hub")
        return self
