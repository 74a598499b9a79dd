"""Tables of the paper: published rows as printed, and rows measured here beside them.

A file of published rows (config/published/*.tsv) has a row per system with the values as text. Measured values come
from the files of the score and frozen_features rules, one per experiment and split, and are means over the splits in
which the class has true nuclei.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from celldetr.evaluation.scoring import MISSING, VALUES
from celldetr.runtime.errors import InputError

PAPER, OTHER, MEASURED, OURS, FROZEN = "paper", "other", "measured", "ours", "frozen_features"
"""Values of the column ``source``."""
CLASSIFIER_TITLES = {"knn": "Nearest neighbours", "linear": "Logistic regression"}
FROZEN_NOTE = "classes of true boxes from frozen embeddings: not to be compared with rows that detect"
LETTERS = dict(zip("PRF", VALUES, strict=True))
PRINTED_MISSING = ("-", "", "NA")
DECIMALS = 4
SPREAD = 0.01  # how far the mean F of folds may lie below the F of mean P and mean R, beyond rounding
_PUBLISHED_TEXT = ("source", "group", "system", "note")
_SCORED_WITH = ("score_rule", "nucleus_threshold", "class_threshold", "radius", "centres")


@dataclass(frozen=True)
class System:
    """A measured row.

    Attributes
    ----------
    experiment
        Name in the configuration.
    title
        Name in the table.
    ours
        The experiment goes beyond the paper.
    """

    experiment: str
    title: str
    ours: bool = False


@dataclass(frozen=True)
class Table:
    """A table and how it was made.

    Attributes
    ----------
    name
        Name of the table, e.g. ``table1``.
    rows
        Text of the table, a row per system: ``source`` (paper, other, measured, ours, frozen_features), ``group``,
        ``system``, ``experiment``, ``{Class}_{P,R,F}`` with NA for missing values, ``splits`` (number of averaged
        splits), ``citation``, ``note``.
    splits
        All measured splits, metrics and classes with intervals and counts, a row each.
    classes
        Names of the column groups, in order.
    metric
        Metric of the measured rows.
    protocol
        How folds were split.
    synthetic
        The measured rows are of synthetic images.
    """

    name: str
    rows: pd.DataFrame
    splits: pd.DataFrame
    classes: tuple[str, ...]
    metric: str
    protocol: str
    synthetic: bool = False

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
        bad = ((table[name] != MISSING) & numbers.isna()) | (numbers < 0) | (numbers > 1)
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
    """Find printing errors: F differs from 2PR/(P+R) by more than rounding and averaging explain.

    Each of P, R and F may be off by half of its last digit. The mean of the folds' F is at most the F of the mean P
    and R, because the harmonic mean is concave, and at most `SPREAD` below it for folds that differ as those of
    PanNuke do.

    Returns
    -------
    list
        (system, class) of each error.
    """
    found = []
    for _, row in published.iterrows():
        for name in published_classes(published.columns):
            printed = [str(row[f"{name}_{letter}"]) for letter in LETTERS]
            if set(printed) & set(PRINTED_MISSING):
                continue
            half = [0.5 * 10.0 ** -len(text.partition(".")[2]) for text in printed]
            precision, recall, f1 = map(float, printed)
            highest = _f1(precision + half[0], recall + half[1]) + half[2]
            lowest = _f1(max(precision - half[0], 0), max(recall - half[1], 0)) - half[2] - SPREAD
            if not lowest <= f1 <= highest:
                found.append((str(row["system"]), name))
    return found


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def read_scores(paths: Iterable[str | os.PathLike[str]]) -> pd.DataFrame:
    """Read the files of the score rule, one per experiment and split, into one long table.

    Raises
    ------
    InputError
        Files were scored with different settings.
    """
    scores = _read_measured(paths, "score")
    for key in _SCORED_WITH:
        if scores[key].nunique() > 1:
            got = scores.groupby(["experiment", "split"])[key].first().to_dict()
            raise InputError(f"scores: {key} differs between files: {got}; score all again")
    return scores


def read_frozen_features(paths: Iterable[str | os.PathLike[str]]) -> pd.DataFrame:
    """Read the files of the frozen_features rule, one per experiment and split, into one long table."""
    return _read_measured(paths, "frozen_features")


def _read_measured(paths: Iterable[str | os.PathLike[str]], rule: str) -> pd.DataFrame:
    """Read and join files of a rule; every file must have the same number of rows, or one of them was cut off."""
    frames = {path: _read_tsv(path, f"a file of the {rule} rule", na_values=[MISSING]) for path in paths}
    rows = max(map(len, frames.values()))
    for path, frame in frames.items():
        if len(frame) < rows:
            raise InputError(f"{path}: got {len(frame)} rows, expected {rows}; delete the file and start again")
    return pd.concat(frames.values(), ignore_index=True)


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
    """Put published and measured rows side by side.

    Parameters
    ----------
    name
        Name of the table.
    published
        Result of `read_published`; its columns set the order of the classes.
    scores
        Result of `read_scores`.
    systems
        Measured rows, in order.
    metric
        One of `celldetr.evaluation.metrics.METRICS`.
    protocol
        How folds were split, for the caption.
    frozen_features
        Result of `read_frozen_features`: rows of their own, without values for Detection.
    synthetic
        The measured rows are of synthetic images.

    Raises
    ------
    InputError
        The scores have other classes than the published rows.
    """
    classes = published_classes(published.columns)
    got = set(scores["class"])
    if got != set(classes):
        raise InputError(
            f"{name}: scores have classes {sorted(got)}, the published rows {sorted(classes)}; give the table "
            "a file of published rows with the columns of these classes"
        )
    rows = [_published_row(row, classes) for _, row in published.iterrows()]
    for system in systems:
        chosen = scores[(scores["experiment"] == system.experiment) & (scores["metric"] == metric)]
        rows.append(_measured_row(system, chosen, classes))
    if frozen_features is not None:
        for (experiment, classifier), chosen in frozen_features.groupby(["experiment", "classifier"], sort=False):
            if classifier in CLASSIFIER_TITLES:
                title = CLASSIFIER_TITLES[classifier]
                rows.append(_row(FROZEN, title, str(experiment), chosen, classes, FROZEN_NOTE))
    columns = ["source", "group", "system", "experiment", *value_columns(classes), "splits", "citation", "note"]
    by_system = [scores[scores["experiment"] == system.experiment] for system in systems]
    splits = [
        frame.sort_values("split", kind="stable").assign(system=system.title)[["system", *frame.columns]]
        for system, frame in zip(systems, by_system, strict=True)
    ]
    table = pd.DataFrame(rows, columns=columns)
    return Table(name, table, pd.concat(splits, ignore_index=True), classes, metric, protocol, synthetic)


def _published_row(row: pd.Series, classes: Sequence[str]) -> dict[str, str]:
    paper = row["source"] == PAPER
    return {
        "source": PAPER if paper else OTHER,
        "group": row["group"],
        "system": row["system"],
        "experiment": "",
        **{name: row[name] for name in value_columns(classes)},
        "splits": MISSING,
        "citation": "" if paper else row["source"],
        "note": row["note"],
    }


def _measured_row(system: System, scores: pd.DataFrame, classes: Sequence[str]) -> dict[str, str]:
    n_splits = scores["split"].nunique()
    notes = []
    for name in classes:
        of_class = scores[scores["class"] == name]
        known = int(of_class[VALUES[-1]].notna().sum())
        if of_class["absent"].any():
            notes.append(f"{name}: the model has no such class")
        elif known < n_splits:
            notes.append(f"{name}: truth in {known} of {n_splits} splits")
    source = OURS if system.ours else MEASURED
    return _row(source, system.title, system.experiment, scores, classes, "; ".join(notes))


def _row(
    source: str, system: str, experiment: str, scores: pd.DataFrame, classes: Sequence[str], note: str
) -> dict[str, str]:
    """Return a row of means over the splits; a class that is not in `scores` has no values."""
    values = {}
    for name in classes:
        means = scores.loc[scores["class"] == name, list(VALUES)].mean()
        for letter, value in LETTERS.items():
            values[f"{name}_{letter}"] = MISSING if np.isnan(means[value]) else f"{means[value]:.{DECIMALS}f}"
    return {
        **{"source": source, "group": "", "system": system, "experiment": experiment},
        **values,
        **{"splits": str(scores["split"].nunique()), "citation": "", "note": note},
    }
