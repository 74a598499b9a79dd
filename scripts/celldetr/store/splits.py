"""Split tables: which patch of which store trains, validates or tests; and splits that keep groups together.

A split table is a TSV with a row per patch: ``store`` (name of the store without suffix), ``patch`` (index in the
store), ``part`` (train, val, test). Patches that are in no part have no row.
"""

import os
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from celldetr.runtime.errors import InputError

PARTS = ("train", "val", "test")
COLUMNS = ("store", "patch", "part")


def read_split(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read a split table.

    Raises
    ------
    InputError
        Not a split table, an unknown part, or a patch that occurs twice.
    """
    try:
        table = pd.read_csv(path, sep="\t", dtype={"store": "str", "patch": "int64", "part": "str"}, na_filter=False)
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: cannot be read as a split table ({error}); make it again") from error
    if tuple(table.columns) != COLUMNS:
        raise InputError(f"{path}: got columns {list(table.columns)}, expected {list(COLUMNS)}; make it again")
    unknown = set(table["part"]) - set(PARTS)
    if unknown:
        raise InputError(f"{path}: column part: got {sorted(unknown)}, expected {', '.join(PARTS)}")
    twice = table.duplicated(["store", "patch"])
    if twice.any():
        row = table[twice].iloc[0]
        raise InputError(f"{path}: patch {row['patch']} of {row['store']} occurs twice; a patch has one part")
    return table


def split_groups(groups: Sequence[str], shares: Mapping[str, float], seed: int) -> dict[str, NDArray[np.int64]]:
    """Split patches so that no group is in two parts, as close to the shares as whole groups allow.

    Groups are shuffled; the largest go first, each to the part that lacks most patches.

    Parameters
    ----------
    groups
        Group (slide, block) of each patch (N,).
    shares
        Part -> share of the patches; they sum to 1.
    seed
        Seed of the shuffle.

    Returns
    -------
    dict
        Part -> sorted indices of its patches.

    Raises
    ------
    InputError
        Shares do not sum to 1, or there are fewer groups than parts.
    """
    if not np.isclose(sum(shares.values()), 1) or min(shares.values()) < 0:
        raise InputError(f"shares: got {dict(shares)}, expected numbers from 0 that sum to 1")
    names, member = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    wanted = [part for part, share in shares.items() if share > 0]
    if 0 < len(names) < len(wanted):
        raise InputError(f"groups: got {len(names)} ({', '.join(names[:5])}), expected one for each of {wanted}")
    size = np.bincount(member, minlength=len(names))
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(-size[order], kind="stable")]
    lacking = {part: shares[part] * len(member) for part in wanted}
    chosen: dict[str, list[int]] = {part: [] for part in shares}
    for group in order:
        part = max(lacking, key=lambda name: (not chosen[name], lacking[name]))
        chosen[part].append(int(group))
        lacking[part] -= size[group]
    return {part: np.flatnonzero(np.isin(member, ids)) for part, ids in chosen.items()}
