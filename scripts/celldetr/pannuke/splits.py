"""Which PanNuke folds, and which of their patches, train, validate and test in a split.

The workflow itself asks for the folds, in an environment that needs neither NumPy nor pandas: they are imported where a
split is made.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from celldetr.runtime.errors import ConfigError, InputError

if TYPE_CHECKING:
    import pandas as pd

FOLDS = (1, 2, 3)
PROTOCOLS = ("celldetr", "official")
_TEST_FOLD = {1: 2, 2: 1, 3: 3}
_OFFICIAL = {1: (1, 2, 3), 2: (2, 1, 3), 3: (3, 2, 1)}


def fold_parts(split: int, protocol: str) -> dict[str, tuple[int, ...]]:
    """Folds that each part (train, val, test) takes its patches from.

    Parameters
    ----------
    split
        1, 2 or 3.
    protocol
        ``celldetr``: split 1, 2, 3 tests on fold 2, 1, 3, and the two other folds train and validate together.
        ``official``: train, validate and test on folds 1/2/3, 2/1/3, 3/2/1.

    Raises
    ------
    ConfigError
        Unknown split or protocol.
    """
    if split not in _TEST_FOLD:
        raise ConfigError(f"pannuke.splits: got {split}, expected one of {sorted(_TEST_FOLD)}")
    if protocol == "official":
        train, val, test = _OFFICIAL[split]
        return {"train": (train,), "val": (val,), "test": (test,)}
    if protocol == "celldetr":
        others = tuple(fold for fold in FOLDS if fold != _TEST_FOLD[split])
        return {"train": others, "val": others, "test": (_TEST_FOLD[split],)}
    raise ConfigError(f"pannuke.protocol: got {protocol!r}, expected one of {', '.join(PROTOCOLS)}")


def pannuke_split(
    n_patches: Mapping[str, int], split: int, *, protocol: str, train_share: float, seed: int
) -> "pd.DataFrame":
    """Assign every patch of the folds to a part.

    Parameters
    ----------
    n_patches
        Number of patches of ``fold1``, ``fold2``, ``fold3``.
    split, protocol
        See `fold_parts`.
    train_share
        Share of the patches of the two other folds that trains; the rest validates (protocol celldetr).
    seed
        Seed of that draw; each split has its own draw.

    Returns
    -------
    DataFrame
        A split table, see `celldetr.store.splits`; a row per patch.

    Raises
    ------
    InputError
        A part would be empty.
    """
    import numpy as np
    import pandas as pd

    parts = fold_parts(split, protocol)
    frames = [
        pd.DataFrame({"store": f"fold{fold}", "patch": np.arange(n_patches[f"fold{fold}"]), "part": part})
        for part, folds in parts.items()
        for fold in folds
    ]
    table = pd.concat(frames, ignore_index=True)
    if protocol == "celldetr":
        table = table[table["part"] != "val"].reset_index(drop=True)
        pool = np.flatnonzero(table["part"] == "train")
        rng = np.random.default_rng([seed, split])
        validate = rng.permutation(pool)[round(train_share * len(pool)) :]
        table.loc[validate, "part"] = "val"
    for part in parts:
        if not (table["part"] == part).any():
            raise InputError(f"split {split}: got no patches for {part!r} from {dict(n_patches)}; use larger folds")
    return table.sort_values(["store", "patch"], ignore_index=True)
