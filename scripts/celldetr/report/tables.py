"""Tables of the paper: published rows and, never mixed with them, rows measured here.

A published file (config/published/*.tsv) holds a row per system with the values as printed. Scores come from
`celldetr.evaluation.scoring.score_fold`, one file per experiment and split. A measured value is the mean over
the splits in which the class has truth.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from celldetr.evaluation.metrics import COUNTS, METRICS
from celldetr.evaluation.scoring import MISSING, VALUES
from celldetr.runtime.errors import InputError
from celldetr.runtime.files import atomic

PAPER, OTHER, MEASURED, OURS, READOUT = "paper", "other", "measured", "ours", "readout"
READOUT_TITLES = {"knn": "Nearest neighbours", "logistic": "Logistic regression"}
LETTERS = dict(zip("PRF", VALUES, strict=True))
PRINTED_MISSING = ("-", "", "NA")
DECIMALS = 4
SPREAD = 0.01  # how far the mean F of folds may lie below the F of mean P and mean R, beyond rounding
_PUBLISHED_TEXT = ("source", "group", "system", "note")
_SCORED_WITH = ("score_rule", "nucleus_threshold", "class_threshold", "radius", "centres")
_SCORE_COLUMNS = (
    *("experiment", "split", "test_store", "metric", "class"),
    *(f"{value}{end}" for value in VALUES for end in ("", "_lo", "_hi")),
    *(*COUNTS, "absent", "images", *_SCORED_WITH, "resamples"),
)


@dataclass(frozen=True)
class System:
    """A measured row.

    Attributes
    ----------
    experiment
        Its name in the configuration.
    title
        Its name in the table.
    ours
        It goes beyond the paper.
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
        Text of the table, a row per system: ``source`` (paper, other, measured, ours, readout), ``group``, ``system``,
        ``experiment``, ``{Class}_{P,R,F}`` with NA for what does not exist, ``splits`` (how many were
        averaged), ``citation``, ``note``.
    splits
        Every measured split, metric and class with intervals and counts, a row each.
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


def read_published(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read published rows as the text that is printed.

    Returns
    -------
    DataFrame
        ``source``, ``group``, ``system``, ``note`` and ``{Class}_{P,R,F}``, all text; NA where nothing is printed.

    Raises
    ------
    InputError
        A column is missing, a value is no number in [0, 1], or an F cannot come from its P and R and the note
        does not say so.
    """
    table = _read_tsv(path, "a table of published values", dtype=str)
    values = [name for name in table.columns if name not in _PUBLISHED_TEXT]
    classes = published_classes(values)
    wanted = {*_PUBLISHED_TEXT, *value_columns(classes)}
    if set(table.columns) != wanted:
        raise InputError(
            f"{path}: columns: got {sorted(set(table.columns) - wanted)} too much and "
            f"{sorted(wanted - set(table.columns))} too few; expected {', '.join(_PUBLISHED_TEXT)} and "
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
                f"printed so, begin the note of the row with '{name}_F: '"
            )
    return table


def published_classes(columns: Iterable[str]) -> tuple[str, ...]:
    """Names of the column groups in the order of the columns."""
    return tuple(dict.fromkeys(name.rpartition("_")[0] for name in columns if name[-2:] in ("_P", "_R", "_F")))


def value_columns(classes: Iterable[str]) -> list[str]:
    """Columns ``{Class}_{P,R,F}``."""
    return [f"{name}_{letter}" for name in classes for letter in LETTERS]


def slips(published: pd.DataFrame) -> list[tuple[str, str]]:
    """Find values that cannot be right: F and 2PR/(P+R) differ by more than rounding and averaging explain.

    Each of P, R and F may be off by half of its last digit. The mean of the folds' F is at most the F of the
    mean P and R, because the harmonic mean is concave, and lies below it by `SPREAD` at most for folds that
    differ as those of PanNuke do.

    Returns
    -------
    list
        (system, class) of each slip.
    """
    found = []
    for _, row in published.iterrows():
        for name in published_classes(published.columns):
            printed = [str(row[f"{name}_{letter}"]) for letter in LETTERS]
            if MISSING in printed or set(printed) & set(PRINTED_MISSING):
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
    """Read score files, one per experiment and split, into one long table.

    Raises
    ------
    InputError
        A file is no score file, or files were scored with different settings.
    """
    frames = []
    for path in paths:
        frame = _read_tsv(path, "a file of the score rule", na_values=[MISSING])
        missing = [name for name in _SCORE_COLUMNS if name not in frame.columns]
        if missing or frame.empty:
            raise InputError(
                f"{path}: got {'no rows' if frame.empty else f'no columns {missing}'}, expected a file of the "
                "score rule; score this split again"
            )
        _check_whole(path, frame, "metric", METRICS)
        frames.append(frame.loc[:, list(_SCORE_COLUMNS)])
        for key in _SCORED_WITH:
            first, here = frames[0][key].tolist()[0], frame[key].unique().tolist()
            if here != [first]:
                raise InputError(f"{path}: {key}: got {here}, but the first file has {first}; score all again")
    if not frames:
        raise InputError("got no score files, expected one per experiment and split")
    return pd.concat(frames, ignore_index=True)


def build_table(
    name: str,
    published: pd.DataFrame,
    scores: pd.DataFrame,
    systems: Sequence[System],
    *,
    splits: Sequence[int],
    metric: str,
    protocol: str,
    readouts: pd.DataFrame | None = None,
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
    splits
        Splits that each system must have been scored on.
    metric
        One of `celldetr.evaluation.metrics.METRICS`.
    protocol
        How folds were split, for the caption.
    readouts
        Result of `read_readouts`: further rows, of frozen embeddings of true boxes, without values of detection.
    synthetic
        Say that the measured rows are of synthetic images.

    Raises
    ------
    InputError
        A split of a system is missing or there twice, or its classes are not those of the table.
    """
    if metric not in METRICS:
        raise InputError(f"metric: got {metric!r}, expected one of {', '.join(METRICS)}")
    classes = published_classes(published.columns)
    _check_complete(scores, systems, splits)
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
    if readouts is not None:
        rows += _readout_rows(readouts, classes, splits)
    columns = [
        *("source", "group", "system", "experiment"),
        *(*value_columns(classes), "splits", "citation", "note"),
    ]
    titles = {system.experiment: system.title for system in systems}
    order = {experiment: index for index, experiment in enumerate(titles)}
    long = scores[scores["experiment"].isin(titles)].assign(
        system=lambda frame: frame["experiment"].map(titles),
        order=lambda frame: frame["experiment"].map(order),
    )
    long = long.sort_values(["order", "split"], kind="stable").drop(columns="order")
    long.insert(0, "system", long.pop("system"))
    table = pd.DataFrame(rows, columns=columns)
    return Table(name, table, long.reset_index(drop=True), classes, metric, protocol, synthetic)


def _check_complete(scores: pd.DataFrame, systems: Sequence[System], splits: Sequence[int]) -> None:
    rows = scores.groupby(["experiment", "split", "metric", "class"]).size()
    if (rows > 1).any():
        experiment, split = rows[rows > 1].index[0][:2]
        raise InputError(f"scores of {experiment}, split {split}: got two files, expected one")
    have = set(scores[["experiment", "split"]].itertuples(index=False, name=None))
    want = {(system.experiment, int(split)) for system in systems for split in splits}
    if have != want:
        raise InputError(
            f"scores: missing {sorted(want - have) or 'none'}, not asked for {sorted(have - want) or 'none'} "
            "(experiment, split)"
        )


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
    values, notes = {}, []
    for name in classes:
        of_class = scores[scores["class"] == name]
        for letter, value in LETTERS.items():
            mean = of_class[value].mean()
            values[f"{name}_{letter}"] = MISSING if np.isnan(mean) else f"{mean:.{DECIMALS}f}"
        known = int(of_class[VALUES[-1]].notna().sum())
        if of_class["absent"].any():
            notes.append(f"{name}: the model has no such class")
        elif known < n_splits:
            notes.append(f"{name}: truth in {known} of {n_splits} splits")
    return {
        "source": OURS if system.ours else MEASURED,
        "group": "",
        "system": system.title,
        "experiment": system.experiment,
        **values,
        "splits": str(n_splits),
        "citation": "",
        "note": "; ".join(notes),
    }


def read_readouts(paths: Iterable[str | os.PathLike[str]]) -> pd.DataFrame:
    """Read files of the readout rule, one per experiment and split, into one table.

    Raises
    ------
    InputError
        A file is none of that rule.
    """
    frames = []
    for path in paths:
        frame = _read_tsv(path, "a file of the readout rule", na_values=[MISSING])
        missing = [name for name in ("experiment", "split", "readout", "class", *VALUES) if name not in frame.columns]
        if missing:
            raise InputError(f"{path}: got no columns {missing}, expected a file of the readout rule; make it again")
        _check_whole(path, frame, "readout", tuple(READOUT_TITLES))
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def _read_tsv(path: str | os.PathLike[str], expected: str, **options: Any) -> pd.DataFrame:
    """Read a table whose empty cells are texts; one that cannot be read is refused."""
    try:
        return pd.read_csv(path, sep="\t", keep_default_na=False, **options)
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: got {error}, expected {expected} (TSV)") from error


def _check_whole(path: str | os.PathLike[str], frame: pd.DataFrame, column: str, kinds: Sequence[str]) -> None:
    """Refuse a file that was cut off or changed: a file has one experiment and split, and each kind all classes."""
    classes = {kind: frame.loc[frame[column] == kind, "class"].tolist() for kind in kinds}
    found = []
    if not all(names and names == classes[kinds[0]] for names in classes.values()):
        found += [f"{len(names)} rows of {kind}" for kind, names in classes.items()]
    found += [f"{name} {frame[name].tolist()}" for name in ("experiment", "split") if frame[name].nunique() != 1]
    wanted = {**dict.fromkeys(VALUES, "fi"), "absent": "b"}
    found += [
        f"{name} {frame[name].tolist()}"
        for name in wanted
        if name in frame and frame[name].dtype.kind not in wanted[name]
    ]
    if not Path(path).read_bytes().endswith(b"\n"):
        found.append("an unfinished last line")
    if found:
        raise InputError(
            f"{path}: got {', '.join(found)}; expected one experiment and split, numbers, and a row of each class for "
            f"each {column}: the file was cut off or changed; delete it and start again"
        )


def _readout_rows(readouts: pd.DataFrame, classes: Sequence[str], splits: Sequence[int]) -> list[dict[str, str]]:
    """Rows of the readouts: means over the splits, no values for Detection."""
    rows = []
    for experiment in dict.fromkeys(readouts["experiment"]):
        for kind, title in READOUT_TITLES.items():
            chosen = readouts[(readouts["experiment"] == experiment) & (readouts["readout"] == kind)]
            there = sorted({int(split) for split in chosen["split"]})
            if there != sorted(splits):
                raise InputError(
                    f"readout {kind} of {experiment}: got splits {there}, expected "
                    f"{sorted(splits)}; make the files of the readout rule again"
                )
            values: dict[str, str] = {}
            for name in classes:
                mean = chosen.loc[chosen["class"] == name, list(VALUES)].mean()
                values |= {
                    f"{name}_{letter}": MISSING if np.isnan(mean[value]) else f"{mean[value]:.{DECIMALS}f}"
                    for letter, value in LETTERS.items()
                }
            rows.append(
                {
                    **{"source": READOUT, "group": "", "system": title, "experiment": experiment},
                    **values,
                    **{"splits": str(len(splits)), "citation": ""},
                    "note": "classes of true boxes from frozen embeddings: not to be compared with rows that detect",
                }
            )
    return rows


def scored_with(splits: pd.DataFrame) -> Mapping[str, object]:
    """Return the settings that all splits were scored with, as JSON values."""
    return {key: splits[key].tolist()[0] for key in _SCORED_WITH}


def write_tsv(path: str | os.PathLike[str], frame: pd.DataFrame) -> None:
    """Write rows as TSV; values that do not exist are NA."""
    with atomic(path) as temporary:
        frame.to_csv(temporary, sep="\t", index=False, na_rep=MISSING)
