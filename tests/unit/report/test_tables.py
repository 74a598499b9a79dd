"""Tables: published rows as printed, means over splits, missing values, and what people are shown."""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from markdown_it import MarkdownIt

from celldetr.config.classes import PANNUKE_CLASSES
from celldetr.evaluation.metrics import COUNTS, METRICS, VALUES, row_names, scores
from celldetr.evaluation.panoptic import PANOPTIC
from celldetr.evaluation.scoring import write_scores
from celldetr.report.rendering import caption, html, markdown
from celldetr.report.style import BANNER, DASH
from celldetr.report.tables import (
    System,
    build_table,
    published_classes,
    read_frozen_features,
    read_published,
    read_scores,
    slips,
)
from celldetr.runtime.errors import InputError
from celldetr.runtime.files import write_tsv

PUBLISHED = Path(__file__).parents[3] / "config" / "published"
ORDER = ("Neoplastic", "Epithelial", "Inflammatory", "Connective", "Necrotic", "Detection")
SYSTEMS = [System("deformable_detr", "Deformable DETR"), System("celldetr_s", "CellDETR-S")]


def score_file(folder, experiment, split, values, **settings):
    """Write scores; `values` maps class -> F; classes left out are 0.5 (0.49 by the other metric)."""
    names = row_names(PANNUKE_CLASSES)
    frames = []
    for offset, metric in enumerate(METRICS):
        f1 = np.array([values.get(name, 0.5) for name in names]) - 0.01 * offset
        there = ~np.isnan(f1)
        counts = pd.DataFrame(0, index=range(len(names)), columns=list(COUNTS))
        counts["n_truth"], counts["tp"] = 1000 * there, np.nan_to_num(1000 * f1).round().astype(int)
        counts["fp_unpaired"], counts["fn_unpaired"] = (1000 + d - counts["tp"] for d in (-20 * there, 20 * there))
        counts.loc[~there, ["fp_unpaired", "fn_unpaired"]] = 0
        columns = {"metric": metric, "class": list(names)}
        for name, value in zip(VALUES, scores(counts.to_numpy(), metric).T, strict=True):
            columns |= {name: value, f"{name}_lo": value - 0.05, f"{name}_hi": value + 0.05}
        frames.append(pd.DataFrame(columns).join(counts))
    common = {
        **dict.fromkeys(PANOPTIC, np.nan),
        "absent": False,
        "images": 12,
        "mode": "sequential",
        "score_rule": "both_thresholds",
        "nucleus_threshold": 0.4,
        "class_threshold": 0.4,
        "radius": 12.0,
        "centres": "box",
        "resamples": 10,
    }
    frame = pd.concat(frames).assign(**{**common, **settings})
    path = folder / f"{experiment}_{split}.tsv"
    write_scores(path, frame, experiment=experiment, split=split, test_store=f"fold{split + 1}")
    return path


def make_scores(folder, values=None, splits=(1, 2)):
    values = values or {}
    return [
        score_file(folder, system.experiment, split, values.get((system.experiment, split), {}))
        for system in SYSTEMS
        for split in splits
    ]


def make_table(paths, *, name="table1", metric="strict", systems=SYSTEMS, **options):
    published = read_published(PUBLISHED / f"{name}.tsv")
    scores = read_scores(paths, ORDER)
    return build_table(name, published, scores, systems, metric=metric, protocol="celldetr", **options)


# ---- published rows


def test_published_files_are_complete_and_in_the_papers_order():
    expected = {"table1": (7, 5), "table2": (2, 0), "table3": (2, 0)}
    for name, (paper, other) in expected.items():
        table = read_published(PUBLISHED / f"{name}.tsv")
        assert published_classes(table.columns) == ORDER
        assert (table["source"] == "paper").sum() == paper
        assert (table["source"] != "paper").sum() == other
        assert (table["source"].str.len() > 0).all()


def test_known_slips_are_found_and_flagged_and_nothing_else():
    found = {name: slips(read_published(PUBLISHED / f"{name}.tsv")) for name in ("table1", "table2", "table3")}
    assert found == {
        "table1": [("Micro-Net", "Connective"), ("Deformable DETR", "Connective")],
        "table2": [],
        "table3": [("Zero Shot", "Neoplastic")],
    }
    for name, rows in found.items():
        table = read_published(PUBLISHED / f"{name}.tsv").set_index("system")
        assert table["note"].str.contains(r"_F: printed").sum() == len(rows)
        for system, of_class in rows:
            assert table.loc[system, "note"].startswith(f"{of_class}_F: printed {table.loc[system, f'{of_class}_F']}")


def test_spot_checks_against_the_printed_tables():
    first, second, third = (read_published(PUBLISHED / f"table{n}.tsv").set_index("system") for n in (1, 2, 3))
    assert first.loc["CellDETR-S", ["Necrotic_P", "Necrotic_R", "Necrotic_F"]].tolist() == ["0.49", "0.40", "0.43"]
    assert first.loc["CellViT-SAM-H", ["Neoplastic_P", "Detection_F"]].tolist() == ["0.718", "0.829"]
    assert second.loc["Full fine-tuning", ["Epithelial_F", "Detection_F"]].tolist() == ["0.72", "0.83"]
    assert third.loc["Zero Shot", "Necrotic_P"] == "NA"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0.76\t0.68\t0.72", "0.76\t0.68\t0.82", "Mask-RCNN, Detection_F does not follow"),
        ("Connective_F: printed", "printed", "Micro-Net, Connective_F does not follow"),
        ("0.76\t0.68\t0.72", "0.76\tx\t0.72", "Mask-RCNN, Detection_R: got 'x', expected a number"),
        ("0.76\t0.68\t0.72", "76\t0.68\t0.72", "Mask-RCNN, Detection_P: got '76'"),
        ("Necrotic_R", "Necrotic", r"columns: got unknown \['Necrotic'\] and missing \['Necrotic_R'\]"),
    ],
)
def test_a_wrong_published_file_is_refused(tmp_path, old, new, message):
    path = tmp_path / "published.tsv"
    path.write_text((PUBLISHED / "table1.tsv").read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InputError, match=f"published.tsv: {message}"):
        read_published(path)


# ---- measured rows


def test_measured_values_are_means_over_the_splits(tmp_path):
    values = {("celldetr_s", 1): {"Neoplastic": 0.6}, ("celldetr_s", 2): {"Neoplastic": 0.7}}
    table = make_table(make_scores(tmp_path, values))
    row = table.rows[table.rows["experiment"] == "celldetr_s"].iloc[0]
    assert [row[f"Neoplastic_{letter}"] for letter in "PRF"] == ["0.6633", "0.6373", "0.6500"]
    assert row["splits"] == "2"
    assert list(table.rows["source"]) == ["paper"] * 7 + ["other"] * 5 + ["measured"] * 2


def test_what_goes_beyond_the_paper_says_so(tmp_path):
    values = {("celldetr_s", 1): {"Neoplastic": 0.6}}
    systems = [SYSTEMS[0], System("celldetr_s", "CellDETR+", ours=True)]
    table = make_table(make_scores(tmp_path, values, splits=(1,)), systems=systems)
    assert list(table.rows["source"])[-2:] == ["measured", "ours"]
    assert list(table.rows["group"])[-2:] == ["Others", ""]
    page = Page(html(table))
    shown = [row[0] for row, measured in zip(page.rows, page.measured, strict=True) if measured]
    assert shown == ["Deformable DETR", "CellDETR+"]
    assert ("CellDETR+", 3, "0.600") in page.bold  # compared with the other measured rows
    lines = [line.split("|")[1].strip() for line in markdown(table).splitlines() if line.startswith("|")]
    assert lines[lines.index("CellDETR+") - 1] == "**Measured here: ours, beyond the paper**"


def masks_of(path, mpq=0.5, **values):
    """Give the scores of a file panoptic qualities, in rows with truth."""
    frame = pd.read_csv(path, sep="\t").assign(mode="segmentation", **{"pq": 0.6, "dq": 0.75, "sq": 0.8} | values)
    frame.loc[frame["n_truth"] == 0, ["pq", "dq", "sq"]] = np.nan
    frame.loc[frame["class"] == "Detection", "mpq"] = mpq
    write_tsv(path, frame)
    return path


def test_systems_to_compare_with_stand_in_the_group_of_their_published_row(tmp_path):
    systems = [System("deformable_detr", "CellViT", others=True), System("celldetr_s", "CellViT-X", others=True)]
    paths = make_scores(tmp_path, {("celldetr_s", 1): {"Necrotic": np.nan}})
    for path, mpq in zip(paths[2:], (0.4, 0.5), strict=True):
        masks_of(path, mpq, pq=0.62 if mpq == 0.4 else 0.6)
    table = make_table(paths, systems=systems)
    rows = table.rows[table.rows["experiment"] != ""]
    assert rows[["source", "group", "system"]].to_numpy().tolist() == [
        ["measured", "Others", "CellViT"],
        ["measured", "Others", "CellViT-X"],
    ]
    quality = "panoptic quality of its masks: bPQ 0.610, mPQ 0.450"
    assert rows["note"].tolist() == ["", f"beyond the paper; Necrotic: truth in 1 of 2 splits; {quality}"]
    text = markdown(table)
    lines = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    at = lines.index("**Measured here: Others**")
    assert lines[at + 1 :] == ["CellViT", lines[-1]]
    assert lines[-1].startswith("CellViT-X (")
    assert quality in text
    assert "class score ≥ 0.4, of a system that segments nuclei always" in caption(table)
    assert "always" not in caption(make_table(paths[:2], systems=SYSTEMS[:1]))
    groups = make_table(paths, name="table2", systems=[System("deformable_detr", "Linear probing"), SYSTEMS[1]]).rows
    assert groups["group"].tolist()[-2:] == ["Fine-tuning setting", ""]


@pytest.mark.parametrize(
    ("column", "value"),
    [("pq", 0.7501), ("pq", 0.3749), ("pq", np.nan), ("sq", 0.5), ("sq", 80), ("dq", -0.75), ("dq", "x"), ("mpq", 1.1)]
    + [("mpq", np.nan), ("n_truth", 0)],
)
def test_panoptic_qualities_that_contradict_each_other_are_refused(tmp_path, column, value):
    path = masks_of(score_file(tmp_path, "celldetr_s", 1, {"Necrotic": np.nan}))
    read_scores([path], ORDER)
    frame = pd.read_csv(path, sep="\t").astype({column: object})
    frame.loc[6, column] = value
    write_tsv(path, frame)
    with pytest.raises(InputError, match=rf"^{path}: line 8, Detection: (got pq|precision)"):
        read_scores([path], ORDER)


def test_a_class_whose_nuclei_are_hidden_in_the_maps_has_no_panoptic_quality(tmp_path):
    path = masks_of(score_file(tmp_path, "celldetr_s", 1, {}))
    frame = pd.read_csv(path, sep="\t")
    frame.loc[frame["class"] == "Necrotic", ["pq", "dq", "sq"]] = np.nan
    write_tsv(path, frame)
    found = read_scores([path], ORDER)
    assert found.loc[found["class"] == "Necrotic", "f1"].notna().all()


def test_the_metric_that_is_asked_for_is_shown_beside_the_rows_as_printed(tmp_path):
    paths, published = make_scores(tmp_path), read_published(PUBLISHED / "table1.tsv")
    columns = [name for name in published.columns if name[-2:] in ("_P", "_R", "_F")]
    for metric, shown in zip(METRICS, ("0.5000", "0.4900"), strict=True):
        rows = make_table(paths, metric=metric).rows
        assert rows["Detection_F"].iloc[-1] == shown
        assert rows.loc[: len(published) - 1, columns].equals(published[columns])


def test_a_class_without_truth_in_a_split_is_left_out_of_the_mean(tmp_path):
    values = {
        ("celldetr_s", 1): {"Necrotic": np.nan, "Epithelial": np.nan},
        ("celldetr_s", 2): {"Necrotic": 0.3, "Epithelial": np.nan},
    }
    row = make_table(make_scores(tmp_path, values)).rows.iloc[-1]
    assert row["Necrotic_F"] == "0.3000"
    assert row["Epithelial_F"] == "NA"
    assert row["note"] == "Epithelial: truth in 0 of 2 splits; Necrotic: truth in 1 of 2 splits"


def test_the_table_comes_back_as_written_with_every_split_metric_and_class(tmp_path):
    table = make_table(make_scores(tmp_path, {("celldetr_s", 1): {"Necrotic": np.nan}}))
    write_tsv(tmp_path / "table1.tsv", table.rows)
    back = pd.read_csv(tmp_path / "table1.tsv", sep="\t", dtype=str, keep_default_na=False)
    pd.testing.assert_frame_equal(back, table.rows)
    keys = table.splits[["system", "split", "metric", "class"]]
    assert len(keys) == len(keys.drop_duplicates()) == 2 * 2 * 2 * 6
    assert {*COUNTS, "f1_lo", "f1_hi", "images", "test_store", "radius"} <= set(table.splits)


def test_cut_and_foreign_scores_are_refused(tmp_path):
    paths = make_scores(tmp_path)
    other = score_file(tmp_path, "celldetr_p", 1, {}, radius=6.0)
    with pytest.raises(InputError, match=r"radius differs between files: .*\('celldetr_p', 1\): 6"):
        read_scores([*paths, other], ORDER)
    with pytest.raises(InputError, match=r"table1: got scores of celldetr_s on splits \[2\], expected \[1, 2\]"):
        make_table([*paths[:2], paths[3]])
    with pytest.raises(InputError, match=r"celldetr_s on splits \[1, 1, 2\]"):
        make_table([*paths[:3], paths[2], paths[3]])
    text = paths[2].read_text()
    for changed, message in (
        ("".join(text.splitlines(keepends=True)[:7]), r"got 6 rows .*, expected 12 .*; delete the file"),
        ("", "got No columns"),
        (text.replace("Necrotic", "Dead"), r".*'Dead'.*give the table a file of published rows"),
        (text.replace("\ttp\t", "\ttp_\t"), r"got no columns \['tp'\]"),
    ):
        paths[2].write_text(changed)
        with pytest.raises(InputError, match=rf"^{paths[2]}: {message}"):
            read_scores(paths, ORDER)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("f1", -5.0, "f1: got -5.0, expected 0.[0-9]+ by the counts of this row; delete the file"),
        ("f1", 0.9876, "f1: got 0.9876, expected 0.[0-9]+"),
        ("f1", np.nan, "f1: got nan, expected 0.[0-9]+"),
        ("recall", "high", "recall: got nan, expected 0.[0-9]+"),
        ("precision", 0.5101, "precision: got 0.5101, expected 0.[0-9]+"),
        ("tp", 900, "precision: got 0.[0-9]+, expected 0.[0-9]+"),
        ("tp", "x", "precision: got 0.[0-9]+, expected (0|nan)"),
    ],
)
def test_scores_that_contradict_their_counts_are_refused(tmp_path, metric, column, value, message):
    path = score_file(tmp_path, "celldetr_s", 1, {"Necrotic": 0.3123, "Epithelial": np.nan})
    read_scores([path], ORDER)
    frame = pd.read_csv(path, sep="\t").astype({column: object})
    row = frame.index[(frame["metric"] == metric) & (frame["class"] == "Connective")][0]
    frame.loc[row, column] = value
    write_tsv(path, frame)
    with pytest.raises(InputError, match=rf"^{path}: line {row + 2}, Connective: {message}"):
        read_scores([path], ORDER)


# ---- for people


class Page(HTMLParser):
    """Cells of an HTML table by row, bold cells, and classes of the rows; fails on tags that do not close."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.measured, self.bold, self.text = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag == "meta":
            return
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
            self.measured.append(("class", "measured") in attrs)
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if "sup" not in self.open and ("td" in self.open or "th" in self.open):
            self.rows[-1][-1] += data.strip()
            if "strong" in self.open:
                self.bold.append((self.rows[-1][0], len(self.rows[-1]) - 1, data))


def test_page_marks_measured_rows_and_their_best_values(tmp_path):
    values = {
        ("deformable_detr", 1): {"Neoplastic": 0.6, "Necrotic": np.nan},
        ("celldetr_s", 1): {"Neoplastic": 0.6001, "Epithelial": 0.7, "Detection": 0.2},
    }
    page = Page(html(make_table(make_scores(tmp_path, values, splits=(1,)))))
    shown = {row[0]: row for row, measured in zip(page.rows, page.measured, strict=True) if measured}
    assert set(shown) == {"Deformable DETR", "CellDETR-S"}
    assert shown["Deformable DETR"][13:16] == [DASH] * 3
    assert shown["CellDETR-S"][6] == "0.700"
    bold = {(system, column) for system, column, _ in page.bold}
    equal = {(system, column) for system in shown for column in (1, 2, 3, 7, 8, 9, 10, 11, 12)}
    better = {("CellDETR-S", column) for column in (4, 5, 6)} | {("Deformable DETR", column) for column in (16, 17, 18)}
    assert bold == equal | better  # equal as shown: both; one value alone: none
    assert ["CellDETR-S", "0.71", "0.70", "0.70"] in [row[:4] for row in page.rows]


def test_banner_stands_on_synthetic_tables_only(tmp_path):
    paths = make_scores(tmp_path)
    for synthetic in (True, False):
        table = make_table(paths, synthetic=synthetic)
        assert (BANNER in markdown(table)) == (BANNER in html(table)) == synthetic


def test_caption_says_how_it_was_measured(tmp_path):
    table = make_table(make_scores(tmp_path))
    text = caption(table)
    for word in (
        "mean over 2 splits",
        "protocol celldetr",
        "fold2 (split 1), fold3 (split 2)",
        "metric strict",
        "nucleus score ≥ 0.4 and class score ≥ 0.4",
        "12 px",
        "table1_splits.tsv",
    ):
        assert word in text
    assert json.loads(json.dumps(table.scored_with))["radius"] == 12
    assert text in markdown(table)
    assert text in "".join(Page(html(table)).text)


@pytest.mark.parametrize(
    "title", ["a|b *c* <b>d</b> {x} _e_ f_g [h](i) `j` &lt; $k$", "two\nlines\\", "-", "CellDETR-S"]
)
def test_titles_are_shown_as_they_are(tmp_path, title):
    table = make_table(make_scores(tmp_path), systems=[SYSTEMS[1], System("deformable_detr", title)])
    assert title.replace("\n", "") in [row[0].replace("\n", "") for row in Page(html(table)).rows]
    rendered = MarkdownIt("commonmark").enable("table").render(markdown(table))
    page = Page(rendered)
    assert page.rows[-1][0] == " ".join(title.split())
    assert {len(row) for row in page.rows} == {19}
    assert "a: Connective_F: printed 0.47" in "".join(page.text)
    assert "From result files of the CellViT repository" in "".join(page.text)


def test_classes_that_a_model_does_not_have_are_dashes_with_a_note(tmp_path):
    values = {("deformable_detr", split): {"Necrotic": np.nan} for split in (1, 2)}
    paths = make_scores(tmp_path, values)
    for path in paths[:2]:
        frame = pd.read_csv(path, sep="\t")
        frame.loc[frame["class"] == "Necrotic", "absent"] = True
        write_tsv(path, frame)
    table = make_table(paths)
    row = table.rows[table.rows["experiment"] == "deformable_detr"].iloc[0]
    assert row["Necrotic_F"] == "NA"
    assert row["note"] == "Necrotic: the model has no such class"
    assert DASH in markdown(table)


def frozen_files(folder):
    paths = []
    for split, right in ((1, 0.9), (2, 0.8)):
        rows = [
            {"experiment": "ssl", "split": split, "weights": weights, "classifier": kind, "class": name, "n": 5}
            | dict.fromkeys(VALUES, right if weights == "trained" else 0.4)
            for weights in ("trained", "random (seed 42)")
            for kind in ("knn", "linear", "majority")
            for name in ("Accuracy", "Macro", *row_names(PANNUKE_CLASSES)[1:])
        ]
        paths.append(folder / f"frozen_{split}.tsv")
        write_tsv(paths[-1], pd.DataFrame(rows))
    return paths


def test_frozen_features_are_rows_of_their_own_beside_those_of_random_weights_and_never_the_best(tmp_path):
    frozen = read_frozen_features(frozen_files(tmp_path), ORDER)
    table = make_table(make_scores(tmp_path), name="table2", frozen_features=frozen)
    rows = table.rows[table.rows["source"] == "frozen_features"]
    random = "random (seed 42) weights"
    names = ["Nearest neighbours", "Logistic regression"]
    assert rows["system"].tolist() == [*names, *(f"{name}, {random}" for name in names)]
    assert rows["Connective_F"].tolist() == ["0.8500"] * 2 + ["0.4000"] * 2
    assert (rows["Detection_F"] == "NA").all()
    assert (rows["splits"] == "2").all()
    text = markdown(table)
    assert "true boxes, frozen embeddings" in text
    assert "not to be compared with rows that detect" in text
    assert "**0.85**" not in text
    assert "0.85" in text
    twice = read_frozen_features([frozen_files(tmp_path)[0]] * 2, ORDER)
    with pytest.raises(
        InputError, match=r"table2: got frozen features of ssl on splits \[1\], expected each of \[1, 2\]"
    ):
        make_table(make_scores(tmp_path), name="table2", frozen_features=twice)


@pytest.mark.parametrize(("column", "value"), [("f1", 0.9876), ("f1", -5.0), ("precision", 5.0), ("n", 0)])
def test_frozen_features_that_contradict_themselves_are_refused(tmp_path, column, value):
    path = frozen_files(tmp_path)[0]
    frame = pd.read_csv(path, sep="\t").astype({column: float})
    frame.loc[3, column] = value
    write_tsv(path, frame)
    with pytest.raises(InputError, match=rf"^{path}: line 5, Inflammatory: \w+: got .* by P and R"):
        read_frozen_features([path], ORDER)
    for cut, rows in ((frame.drop(index=3), 19), (frame[frame["weights"] == "trained"], 10)):
        write_tsv(path, cut)
        with pytest.raises(InputError, match=rf"^{path}: got {rows} rows .*, expected 20"):
            read_frozen_features([path], ORDER)
