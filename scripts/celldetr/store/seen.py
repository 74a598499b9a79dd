"""What a model has seen in training and validation, and the refusal to test on it.

It is told by groups (column ``group`` of the stores): ``GROUP`` if the whole group trains, validates or is unused,
``GROUP@DIGEST`` if the split with this digest tests on other patches of it. A model file states those of its run and of
the models that this started from (`celldetr.model.weights.trained_on`). `celldetr.config.workflow` refuses what can be
known before anything runs.
"""

from collections.abc import Collection, Iterable, Sequence

import numpy as np
import pandas as pd

from celldetr.runtime.errors import InputError
from celldetr.store.reader import PatchStore
from celldetr.store.splits import split_digest


def groups_of(split: pd.DataFrame, stores: Sequence[PatchStore], *parts: str) -> set[str]:
    """Return the groups with patches in these parts; a store that is not given counts as a group of its own."""
    rows = split[split["part"].isin(parts)]
    found = set(rows["store"]) - {store.path.stem for store in stores}
    for store in stores:
        chosen = np.isin(np.arange(len(store)), rows.loc[rows["store"] == store.path.stem, "patch"])
        found |= set(store.patches["group"][chosen])
    return found


def seen_groups(split: pd.DataFrame, stores: Sequence[PatchStore]) -> set[str]:
    """Return the groups whose patches train or validate, as a model file names them (see the top of this module)."""
    tested, digest = groups_of(split, stores, "test"), split_digest(split)
    return {f"{name}@{digest}" if name in tested else name for name in groups_of(split, stores, "train", "val")}


def has_seen(seen: Iterable[str], group: str) -> bool:
    """Whether a model has seen patches of a group, as a whole or in part."""
    return any(group in (entry, entry.rpartition("@")[0]) for entry in seen if group)


def refuse_seen(seen: Iterable[str], groups: Collection[str], digest: str | None, model: str, test: str) -> None:
    """Refuse to test on groups that a model has seen, unless the split with this digest keeps their patches apart.

    Raises
    ------
    InputError
        It names the model and the test.
    """
    own = {f"{name}@{digest}" for name in groups}
    leaked = [entry for entry in seen if entry in groups or (entry.rpartition("@")[0] in groups and entry not in own)]
    if leaked:
        raise InputError(
            f"{model}: it, or a model that it started from, was trained or validated on {sorted(leaked)}, expected "
            f"none of the groups that {test} tests; start from other initial weights, or test on other data"
        )


def refuse_seen_store(seen: Iterable[str], store: PatchStore, model: str) -> None:
    """Refuse to test on a store, see `refuse_seen`; a test part says in its attributes which split chose it."""
    refuse_seen(seen, set(store.patches["group"]), store.attrs.get("split", {}).get("digest"), model, str(store.path))
