"""Settings of PanNuke: its archives, and which folds train, validate and test."""

import re
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field

from celldetr.config.base import Bytes, Settings, Splits

FOLDS = (1, 2, 3)
_TEST_FOLD = {1: 2, 2: 1, 3: 3}
_OFFICIAL = {1: (1, 2, 3), 2: (2, 1, 3), 3: (3, 2, 1)}


def fold_parts(split: int, protocol: str) -> dict[str, tuple[int, ...]]:
    """Folds that each part (train, val, test) takes its patches from.

    Parameters
    ----------
    split
        1, 2 or 3.
    protocol
        ``celldetr``: split 1, 2, 3 tests on fold 2, 1, 3; the two others train and validate together.
        ``official``: train, validate and test on folds 1/2/3, 2/1/3, 3/2/1.
    """
    if protocol == "official":
        train, val, test = _OFFICIAL[split]
        return {"train": (train,), "val": (val,), "test": (test,)}
    others = tuple(fold for fold in FOLDS if fold != _TEST_FOLD[split])
    return {"train": others, "val": others, "test": (_TEST_FOLD[split],)}


def misspelt_folds(names: Iterable[str]) -> list[str]:
    """Names that mean PanNuke or folds of it, but are none of fold1, fold2 and fold3."""
    meant = re.compile(r"[\W_]*(pan[\W_]*nuke|folds?)([\W_\d]|$)", re.IGNORECASE)
    return [name for name in names if meant.match(name) and name not in [f"fold{fold}" for fold in FOLDS]]


class SourceSettings(Settings):
    """A raw file: where to get it, and how to check that it is complete."""

    urls: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        min_length=1, description="http(s) URLs, file URLs or local paths, tried in order"
    )
    bytes: Bytes | None = Field(None, description="size of the file, bytes; null: not checked")
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")] | None = Field(
        None, description="SHA-256 in hex, the first 8 digits or more; null: not checked"
    )


class PanNukeSettings(Settings):
    """PanNuke archives and how their folds are split."""

    protocol: Literal["celldetr", "official"] = Field(
        "celldetr",
        description="celldetr: split n tests on fold 2, 1, 3, the other two train and validate together; official: "
        "split n trains, validates and tests on folds 1/2/3, 2/1/3, 3/2/1",
    )
    splits: Splits = Field((1, 2, 3), description="splits that are run")
    train_share: float = Field(
        0.8, gt=0, lt=1, description="share of the two folds that trains; the rest validates (protocol celldetr)"
    )
    fold1: SourceSettings = Field(description="archive of fold 1")
    fold2: SourceSettings = Field(description="archive of fold 2")
    fold3: SourceSettings = Field(description="archive of fold 3")

    def fold(self, number: int) -> SourceSettings:
        """Archive of fold 1, 2 or 3."""
        source: SourceSettings = getattr(self, f"fold{number}")
        return source
