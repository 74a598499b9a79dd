"""Tables of the paper: published rows as printed, and rows measured here beside them.

A file of published rows (config/published/*.tsv) has a row per system with the values as text. Measured values come
from the files of the score and frozen_features rules, one per experiment and split, and are means over the splits in
which the class has true nuclei; `evaluation.metric` chooses their metric (`celldetr.evaluation.metrics`).
"""

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from celldetr.evaluation.metrics import COUNTS, METRICS, TRAINED, VALUES, scores
from celldetr.evaluation.panoptic import PANOPTIC
from celldetr.runtime.errors import InputError
from celldetr.runtime.files import MISSING

PAPER, OTHER, MEASURED, OURS, FROZEN = "paper", "other", "measured", "ours", "frozen_features"
"""Values of the column ``source``."""
CLASSIFIER_TITLES = {"knn": "Nearest neighbours", "linear": "Logistic regression"}
OTHERS = "Others"
"""Group of systems that ours are compared with."""
BEYOND_NOTE = "beyond the paper"
FROZEN_NOTE = "classes of true boxes from frozen embeddings: not to be compared with rows that detect"
LETTERS = dict(zip("PRF", VALUES, strict=True))
PRINTED_MISSING = ("-", "", "NA")
DECIMALS = 4
SPREAD = 0.01  # how far the mean F of folds may lie below the F of mean P and mean R, beyond rounding
_ROUNDING = 1e-5  # of values with six digits
_PUBLISHED_TEXT = ("source", "group", "system", "note")
_SCORED_WITH = ("score_rule", "nucleus_threshold", "class_threshold", "radius", "centres")
_AGAIN = "delete the file and start again"


@dataclass(frozen=True)
class System:
    """A measured row: an experiment and its title.

    `ours`: it goes beyond the paper. `others`: a system that ours are compared with, in the paper or beyond it.
    """

    experiment: str
    title: str
    ours: bool = False
    others: bool = False


@dataclass(frozen=True)
class Table:
    """A table and how it was made.

    Attributes
    ----------
    rows
        Text of the table, a row per system: ``source`` (paper, other, measured, ours, frozen_features), ``group`` (of a
        measured row: that of the published row of the same name), ``system``, ``experiment``, ``{Class}_{P,R,F}`` with
        NA for missing values, ``splits`` (number of averaged splits), ``citation``, ``note`` (with the panoptic quality
        of systems that give masks).
    splits
        All measured splits, metrics and classes with intervals and counts, a row each.
    """

    name: str  # e.g. table1
    rows: pd.DataFrame
    splits: pd.DataFrame
    classes: tuple[str, ...]  # column groups, in order
    metric: str  # of the measured rows
    protocol: str  # how folds were split
    synthetic: bool = False  # the measured rows are of synthetic images

    @property
    def scored_with(self) -> dict[str, Any]:
        """Settings of the scoring, the same for all splits."""
        return {key: self.splits[key].tolist()[0] for key in _SCORED_WITH}


def read_published(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read published rows as the text that is printed.

    Returns
    -------
    DataFrame
        ``source``, ``group``, ``system``, ``note`` and ``{Class}_{P,R,F}``, all text; NA where nothing is printed.

    Raises
    ------
    InputError
        A column is missing, a value is not a number in [0, 1], or an F does not follow from its P and R and the note
        does not say so.
    """
    table = _read_tsv(path, "a table of published values", dtype=str)
    values = [name for name in table.columns if name not in _PUBLISHED_TEXT]
    wanted = {*_PUBLISHED_TEXT, *value_columns(published_classes(values))}
    if set(table.columns) != wanted:
        raise InputError(
            f"{path}: columns: got unknown {sorted(set(table.columns) - wanted)} and missing "
            f"{sorted(wanted - set(table.columns))}; expected {', '.join(_PUBLISHED_TEXT)} and "
            "{Class}_P, {Class}_R, {Class}_F for each class"
        )
    table[values] = table[values].replace(list(PRINTED_MISSING), MISSING)
    for name in values:
        numbers = pd.to_numeric(table[name].replace(MISSING, "nan"), errors="coerce")
        bad = (table[name] != MISSING) & ~numbers.between(0, 1)
        if bad.any():
            row = table[bad].iloc[0]
            raise InputError(f"{path}: {row['system']}, {name}: got {row[name]!r}, expected a number in [0, 1]")
    for system, name in slips(table):
        notes = table.loc[table["system"] == system, "note"]
        if not notes.str.contains(f"{name}_F", regex=False).any():
            raise InputError(
                f"{path}: {system}, {name}_F does not follow from {name}_P and {name}_R; correct it, or if it is "
                f"printed like this, begin the note of the row with '{name}_F: '"
            )
    return table


def published_classes(columns: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the column groups in the order of the columns."""
    return tuple(dict.fromkeys(name.rpartition("_")[0] for name in columns if name[-2:] in ("_P", "_R", "_F")))


def value_columns(classes: Iterable[str]) -> list[str]:
    """Return the columns ``{Class}_{P,R,F}``."""
    return [f"{name}_{letter}" for name in classes for letter in LETTERS]


def slips(published: pd.DataFrame) -> list[tuple[str, str]]:
    """Find printing errors (system, class): F differs from 2PR/(P+R) by more than rounding and averaging explain.

    Each of P, R and F may be off by half of its last digit. The mean of the folds' F is at most the F of the mean P
    and R, because the harmonic mean is concave, and at most `SPREAD` below it for folds that differ as those of
    PanNuke do.
    """
    found = []
    for _, row in published.iterrows():
        for name in published_classes(published.columns):
            printed = [str(row[f"{name}_{letter}"]) for letter in LETTERS]
            if set(printed) & set(PRINTED_MISSING):
                continue
            half = np.array([0.5 * 10.0 ** -len(text.partition(".")[2]) for text in printed])
            values = np.array(printed, dtype=float)
            highest = _f1(*(values + half)[:2]) + half[2]
            lowest = _f1(*(values - half)[:2].clip(0)) - half[2] - SPREAD
            if not lowest <= values[2] <= highest:
                found.append((str(row["system"]), name))
    return found


def _f1(precision: Any, recall: Any) -> Any:
    """Harmonic mean; 0 if both are 0."""
    return 2 * precision * recall / np.maximum(precision + recall, 1e-12)


def read_scores(paths: Iterable[str | os.PathLike[str]], classes: Sequence[str]) -> pd.DataFrame:
    """Read the files of the score rule, one per experiment and split, into one long table.

    Raises
    ------
    InputError
        A file lacks rows of the `classes`, P, R or F contradict the counts of their row, PQ, DQ and SQ contradict each
        other, or files were scored with different settings.
    """
    frames = []
    for path in paths:
        frame = _read_measured(path, "score", ["metric", "class", "mode"], (*COUNTS, *PANOPTIC))
        _check_rows(path, frame[["metric", "class"]], itertools.product(METRICS, classes))
        counts, strict = frame[list(COUNTS)].to_numpy(), (frame["metric"] == METRICS[0]).to_numpy()
        expected = np.where(strict[:, None], *(scores(counts, metric) for metric in METRICS))
        _check_values(path, frame, expected, "the counts of this row")
        _check_panoptic(path, frame)
        frames.append(frame)
    found = pd.concat(frames, ignore_index=True)
    for key in _SCORED_WITH:
        if found[key].nunique() > 1:
            got = found.groupby(["experiment", "split"])[key].first().to_dict()
            raise InputError(f"scores: {key} differs between files: {got}; score all again")
    return found


def read_frozen_features(paths: Iterable[str | os.PathLike[str]], classes: Sequence[str]) -> pd.DataFrame:
    """Read the rows of `classes` in the files of the frozen_features rule, one per experiment and split.

    Raises
    ------
    InputError
        A file lacks rows of the `classes`, or F does not follow from P and R.
    """
    frames = []
    for path in paths:
        frame = _read_measured(path, "frozen_features", ["weights", "classifier", "class"], ("n",))
        frame = frame[frame["classifier"].isin(CLASSIFIER_TITLES) & ~frame["class"].isin(("Accuracy", "Macro"))]
        weights = set(frame["weights"]) if frame["weights"].nunique() > 1 else {TRAINED, "random"}
        keys = itertools.product(weights, CLASSIFIER_TITLES, [name for name in classes if name != "Detection"])
        _check_rows(path, frame[["weights", "classifier", "class"]], keys)
        values = frame[list(VALUES)].to_numpy().clip(0, 1)
        values[:, 2] = _f1(values[:, 0], values[:, 1])
        _check_values(path, frame, np.where(frame[["n"]] > 0, values, np.nan), "P and R in [0, 1]")
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def _read_measured(path: str | os.PathLike[str], rule: str, keys: list[str], numbers: Sequence[str]) -> pd.DataFrame:
    """Read a file of a rule; what should be a number and is not becomes NaN."""
    frame = _read_tsv(path, f"a file of the {rule} rule", na_values=[MISSING])
    numeric = [*VALUES, *numbers]
    if missing := {"experiment", "split", *keys, *numeric} - set(frame):
        raise InputError(f"{path}: got no columns {sorted(missing)}, expected a file of the {rule} rule; {_AGAIN}")
    frame[numeric] = frame[numeric].apply(pd.to_numeric, errors="coerce")
    return frame


def _check_rows(path: str | os.PathLike[str], keys: pd.DataFrame, expected: Iterable[tuple[str, ...]]) -> None:
    """Refuse a file that was cut off, or has other classes than the table."""
    got, wanted = sorted(keys.astype(str).itertuples(index=False, name=None)), sorted(expected)
    if got != wanted or not wanted:
        raise InputError(
            f"{path}: got {len(got)} rows with classes {sorted({key[-1] for key in got})}, expected {len(wanted)} with "
            f"those of the published rows, {sorted({key[-1] for key in wanted})}; {_AGAIN}, or give the table a file "
            "of published rows with the columns of these classes"
        )


def _check_values(path: str | os.PathLike[str], frame: pd.DataFrame, expected: NDArray[np.float64], by: str) -> None:
    """Refuse P, R, F (rows, 3) other than `expected`, but for rounding."""
    wrong = ~np.isclose(frame[list(VALUES)], expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        at = frame.iloc[row]
        raise InputError(
            f"{path}: line {frame.index[row] + 2}, {at['class']}: {VALUES[column]}: got {at[VALUES[column]]}, expected "
            f"{expected[row, column]:.6g} by {by}; {_AGAIN}"
        )


def _check_panoptic(path: str | os.PathLike[str], frame: pd.DataFrame) -> None:
    """Refuse PQ, DQ and SQ that are means of no images: in each PQ = DQ x SQ, and SQ is in (0.5, 1], or 0 if DQ is.

    A class with true nuclei has no values if all of these are hidden below others in the instance maps.
    """
    values = frame[list(PANOPTIC)].to_numpy()
    given, detection = ~np.isnan(values), (frame["class"] == "Detection").to_numpy()
    expected = np.tile((given.any() & (frame["n_truth"] > 0)).to_numpy()[:, None], len(PANOPTIC))
    expected[:, -1] &= detection
    pq, dq, sq, mpq = np.nan_to_num(values).T
    expected[~detection & ~given.any(axis=1)] = False
    wrong = (given != expected).any(axis=1)
    wrong |= (np.minimum(dq, mpq) < 0) | (np.max([dq, sq, mpq], axis=0) > 1 + _ROUNDING)
    wrong |= (pq < dq / 2 - _ROUNDING) | (pq > np.minimum(dq, sq) + _ROUNDING)
    if wrong.any():
        row = int(np.argmax(wrong))
        at = frame.iloc[row]
        got = ", ".join(f"{name} {at[name]:g}" for name in PANOPTIC)
        raise InputError(
            f"{path}: line {row + 2}, {at['class']}: got {got} with {at['n_truth']:g} true nuclei, expected dq / 2 <= "
            "pq <= dq <= 1, pq <= sq <= 1 and an mpq for Detection in rows with true nuclei, or in none; "
            f"{_AGAIN}"
        )


def _read_tsv(path: str | os.PathLike[str], expected: str, **options: Any) -> pd.DataFrame:
    """Read a TSV file; empty cells are empty texts."""
    try:
        return pd.read_csv(path, sep="\t", keep_default_na=False, **options)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: got {error}, expected {expected} (TSV)") from error


def build_table(
    name: str,
    published: pd.DataFrame,
    scores: pd.DataFrame,
    systems: Sequence[System],
    *,
    metric: str,
    protocol: str,
    frozen_features: pd.DataFrame | None = None,
    synthetic: bool = False,
) -> Table:
    """Put published and measured rows side by side; the columns of the published rows set the order of the classes.

    `frozen_features` are rows of their own, without values for Detection.

    Raises
    ------
    InputError
        A system, or frozen features, were not scored once on each split.
    """
    classes, splits = published_classes(published.columns), sorted(set(scores["split"].tolist()))
    groups = dict(zip(published["system"], published["group"], strict=True))
    rows, by_system = [_published_row(row, classes) for _, row in published.iterrows()], []
    for system in systems:
        chosen = scores[scores["experiment"] == system.experiment].sort_values("split", kind="stable")
        by_system.append(chosen.assign(system=system.title)[["system", *chosen.columns]])
        chosen = chosen[chosen["metric"] == metric]
        if (got := chosen["split"].tolist()) != np.repeat(splits, len(classes)).tolist():
            raise InputError(
                f"{name}: got scores of {system.experiment} on splits {got[:: len(classes)]}, expected {splits}; score "
                "it again"
            )
        row = _row(OURS if system.ours else MEASURED, system.title, system.experiment, chosen, classes)
        rows.append(row | _place(system, groups, _notes(chosen, classes, len(splits))))
    if frozen_features is not None:
        by_model = frozen_features.groupby(["experiment", "weights", "classifier"], sort=False)
        for key, chosen in by_model:
            experiment, weights, classifier = map(str, key)
            if sorted(chosen["split"]) != np.repeat(splits, chosen["class"].nunique()).tolist():
                got = chosen["split"].unique().tolist()
                raise InputError(
                    f"{name}: got frozen features of {experiment} on splits {got}, expected each of {splits}; {_AGAIN}"
                )
            title = CLASSIFIER_TITLES[classifier] + ("" if weights == TRAINED else f", {weights} weights")
            rows.append(_row(FROZEN, title, experiment, chosen, classes) | {"note": FROZEN_NOTE})
    columns = ["source", "group", "system", "experiment", *value_columns(classes), "splits", "citation", "note"]
    table = pd.DataFrame(rows, columns=columns)
    return Table(name, table, pd.concat(by_system, ignore_index=True), classes, metric, protocol, synthetic)


def _published_row(row: pd.Series, classes: Sequence[str]) -> dict[str, str]:
    paper = row["source"] == PAPER
    return {
        **{"source": PAPER if paper else OTHER, "group": row["group"], "system": row["system"], "experiment": ""},
        **{name: row[name] for name in value_columns(classes)},
        **{"splits": MISSING, "citation": "" if paper else row["source"], "note": row["note"]},
    }


def _place(system: System, groups: Mapping[str, str], notes: list[str]) -> dict[str, str]:
    """Group and note of a measured row, by the groups of the published rows."""
    if system.others and system.title not in groups:
        return {"group": OTHERS, "note": "; ".join([BEYOND_NOTE, *notes])}
    return {"group": "" if system.ours else groups.get(system.title, ""), "note": "; ".join(notes)}


def _notes(scores: pd.DataFrame, classes: Sequence[str], n_splits: int) -> list[str]:
    """Say which classes have no truth in some split, or are unknown to the model, and how good its masks are."""
    notes = []
    for name in classes:
        of_class = scores[scores["class"] == name]
        known = int((of_class["n_truth"] > 0).sum())
        if of_class["absent"].any():
            notes.append(f"{name}: the model has no such class")
        elif known < n_splits:
            notes.append(f"{name}: truth in {known} of {n_splits} splits")
    quality = scores.loc[scores["class"] == "Detection", ["pq", "mpq"]].mean()
    if quality.notna().all():
        notes.append(f"panoptic quality of its masks: bPQ {quality['pq']:.3f}, mPQ {quality['mpq']:.3f}")
    return notes


def _row(source: str, system: str, experiment: str, scores: pd.DataFrame, classes: Sequence[str]) -> dict[str, str]:
    """Return a row of means over the splits; a class that is not in `scores` has no values."""
    means = scores.groupby("class")[list(VALUES)].mean().reindex(list(classes)).to_numpy().ravel()
    values = [MISSING if np.isnan(value) else f"{value:.{DECIMALS}f}" for value in means]
    return {
        **{"source": source, "group": "", "system": system, "experiment": experiment},
        **dict(zip(value_columns(classes), values, strict=True)),
        **{"splits": str(scores["split"].nunique()), "citation": "", "note": ""},
    }
