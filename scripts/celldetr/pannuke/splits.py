"""Which patches of PanNuke train, validate and test in a split."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from celldetr.config.pannuke import fold_parts
from celldetr.runtime.errors import InputError


def pannuke_split(
    n_patches: Mapping[str, int], split: int, *, protocol: str, train_share: float, seed: int
) -> pd.DataFrame:
    """Make a split table (see `celldetr.store.splits`): a row per patch of ``fold1``, ``fold2`` and ``fold3``.

    For `split` and `protocol` see `celldetr.config.pannuke.fold_parts`. With the protocol celldetr a `train_share` of
    the two other folds trains, the rest validates; each split has its own draw of `seed`.

    Raises
    ------
    InputError
        A part would be empty.
    """
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
