"""Split tables: which patch of which store trains, validates or tests; and splits that keep groups together.

A split table is a TSV with a row for every patch: ``store`` (name of the store without suffix), ``patch`` (index in the
store), ``part`` (train, val, test, unused).
"""

import hashlib
import os
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from celldetr.runtime.errors import InputError
from celldetr.store.reader import PatchStore

PARTS = ("train", "val", "test")
UNUSED = "unused"
COLUMNS = ("store", "patch", "part")


def complete_split(table: pd.DataFrame, sizes: Mapping[str, int]) -> pd.DataFrame:
    """Add the unused patches to a split table; `sizes` are the numbers of patches of all stores."""
    rows = [(name, patch, UNUSED) for name, size in sizes.items() for patch in range(size)]
    everything = pd.concat([table[list(COLUMNS)], pd.DataFrame(rows, columns=COLUMNS)])
    return everything.drop_duplicates(["store", "patch"]).sort_values(["store", "patch"], ignore_index=True)


def split_digest(table: pd.DataFrame) -> str:
    """Identity of a split: 16 hex digits."""
    return hashlib.sha256(table.to_csv(sep="\t", index=False).encode()).hexdigest()[:16]


def read_split(path: str | os.PathLike[str], stores: Sequence[PatchStore] = ()) -> pd.DataFrame:
    """Read a split table.

    Raises
    ------
    InputError
        Not a split table, an unknown part, a patch that occurs twice, or a patch of `stores` that has no row.
    """
    try:
        table = pd.read_csv(path, sep="\t", dtype={"store": "str", "patch": "int64", "part": "str"}, na_filter=False)
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: cannot be read as a split table ({error}); make it again") from error
    if tuple(table.columns) != COLUMNS:
        raise InputError(f"{path}: got columns {list(table.columns)}, expected {list(COLUMNS)}; make it again")
    unknown = set(table["part"]) - {*PARTS, UNUSED}
    if unknown:
        raise InputError(f"{path}: column part: got {sorted(unknown)}, expected {', '.join((*PARTS, UNUSED))}")
    twice = table.duplicated(["store", "patch"])
    if twice.any():
        row = table[twice].iloc[0]
        raise InputError(f"{path}: patch {row['patch']} of {row['store']} occurs twice; a patch has one part")
    for store in stores:
        patches = table.loc[table["store"] == store.path.stem, "patch"]
        if not np.array_equal(np.sort(patches), np.arange(len(store))):
            raise InputError(
                f"{path}: got {len(patches)} rows of store {store.path.stem}, expected one for each of its "
                f"{len(store)} patches; make the split again"
            )
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
