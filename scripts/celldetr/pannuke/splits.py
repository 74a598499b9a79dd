"""Which patches of PanNuke train, validate and test in a split."""

import os
from collections.abc import Mapping

import numpy as np
import pandas as pd

from celldetr.runtime.errors import ConfigError, InputError

FOLDS = (1, 2, 3)
PARTS = ("train", "val", "test")
PROTOCOLS = ("celldetr", "official")
COLUMNS = ("store", "patch", "part")
_TEST_FOLD = {1: 2, 2: 1, 3: 3}
_OFFICIAL = {1: (1, 2, 3), 2: (2, 1, 3), 3: (3, 2, 1)}


def fold_parts(split: int, protocol: str) -> dict[str, tuple[int, ...]]:
    """Folds that each part takes its patches from.

    Parameters
    ----------
    split
        1, 2 or 3.
    protocol
        ``celldetr``: split 1, 2, 3 tests on fold 2, 1, 3, and the two others train and validate together.
        ``official``: train, validate and test on folds 1/2/3, 2/1/3, 3/2/1.

    Raises
    ------
    ConfigError
        Unknown split or protocol.
    """
    if split not in _TEST_FOLD:
        raise ConfigError(f"pannuke.splits: got {split}, expected one of {sorted(_TEST_FOLD)}")
    if protocol == "official":
        return {part: (fold,) for part, fold in zip(PARTS, _OFFICIAL[split], strict=True)}
    if protocol == "celldetr":
        others = tuple(fold for fold in FOLDS if fold != _TEST_FOLD[split])
        return {"train": others, "val": others, "test": (_TEST_FOLD[split],)}
    raise ConfigError(f"pannuke.protocol: got {protocol!r}, expected one of {', '.join(PROTOCOLS)}")


def pannuke_split(
    n_patches: Mapping[str, int], split: int, *, protocol: str, train_share: float, seed: int
) -> pd.DataFrame:
    """Assign every patch of the folds to a part.

    Parameters
    ----------
    n_patches
        Number of patches of ``fold1``, ``fold2``, ``fold3``.
    split, protocol
        See `fold_parts`.
    train_share
        Share of the two non-test folds that trains, the rest validates (protocol celldetr).
    seed
        Seed of that draw; each split has a draw of its own.

    Returns
    -------
    DataFrame
        ``store`` (fold1, ...), ``patch`` (index in the store), ``part`` (train, val, test); a row per patch.

    Raises
    ------
    InputError
        A part that trains, validates or tests would be empty.
    """
    frames = []
    for part, folds in fold_parts(split, protocol).items():
        for fold in folds:
            name = f"fold{fold}"
            frames.append(pd.DataFrame({"store": name, "patch": np.arange(n_patches[name]), "part": part}))
    table = pd.concat(frames, ignore_index=True)
    if protocol == "celldetr":
        table = table[table["part"] != "val"].reset_index(drop=True)
        pool = np.flatnonzero(table["part"] == "train")
        rng = np.random.default_rng([seed, split])
        validate = rng.permutation(pool)[round(train_share * len(pool)) :]
        table.loc[validate, "part"] = "val"
    table = table.sort_values(["store", "patch"], ignore_index=True)
    for part in PARTS:
        if not (table["part"] == part).any():
            raise InputError(f"split {split}: got no patches for {part!r} from {dict(n_patches)}; use larger folds")
    return table


def read_split(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read a split file and check it.

    Raises
    ------
    InputError
        Not a split file, an unknown part, a patch that no store has, or one that occurs twice.
    """
    try:
        table = pd.read_csv(
            path,
            sep="\t",
            dtype={"store": "str", "patch": "int64", "part": "str"},
            keep_default_na=False,
            na_values={"store": [""]},
        )
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: cannot be read as a split ({error}); make it again") from error
    if tuple(table.columns) != COLUMNS:
        raise InputError(f"{path}: got columns {list(table.columns)}, expected {list(COLUMNS)}")
    bad = table["store"].isna() | (table["patch"] < 0)
    if bad.any():
        row = table[bad].iloc[0]
        raise InputError(f"{path}: got patch {row['patch']} of {row['store']}, expected a store and its patch from 0")
    unknown = set(table["part"]) - set(PARTS)
    if unknown:
        raise InputError(f"{path}: column part: got {sorted(map(str, unknown))}, expected {', '.join(PARTS)}")
    twice = table.duplicated(["store", "patch"])
    if twice.any():
        row = table[twice].iloc[0]
        raise InputError(f"{path}: patch {row['patch']} of {row['store']} occurs twice; a patch has one part")
    return table
