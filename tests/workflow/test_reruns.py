"""What runs again after files were lost, code was edited or times were wrong, and that it gives the same bytes."""

import csv
import functools
import os
import random
import re
import time

import pytest
from run_job import checksum

pytest_plugins = ["small_run"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

INTERMEDIATES = {
    "results/raw/pannuke/fold_2.zip": "download_pannuke",
    "results/pannuke/fold3.zarr": "convert_pannuke",
    "results/pannuke/split1.tsv": "split_pannuke",
    "results/raw/xenium/drawn_1/outs": "download_xenium",
    "results/references/drawn.h5ad": "prepare_reference",
    "results/xenium/drawn_1/registration.json": "register_xenium",
    "results/xenium/drawn_2/cells.parquet": "annotate_xenium",
    "results/xenium/drawn_1/drawn_1.zarr": "extract_xenium",
    "results/xenium/test.zarr": "split_xenium",
    "results/slides/drawn_slide_2/detected.parquet": "detect_slide",
    "results/slides/drawn_slide_1/drawn_slide_1.zarr": "extract_slide",
    "results/slides/split.tsv": "choose_slide_patches",
    "results/models/celldetr_p/split1/model.pt": "train",
    "results/predictions/celldetr_p/split1.parquet": "predict",
    "results/scores/celldetr_p/split1.tsv": "score",
    "results/attention/celldetr_p/split1.npz": "attention",
}
CHEAP = (
    *("make_example_reference", "download_pannuke", "download_slide", "convert_pannuke", "split_pannuke"),
    *("split_xenium", "choose_slide_patches", "score", "table", "figure3", "figure4b", "figure5b"),
)
STAMP = ".snakemake_timestamp"


def lose(path):
    """Rename an output, as if it had been deleted; return its new name."""
    return path.rename(path.with_name(f"lost_{path.name}"))


def outputs_by_depth(run):
    """First outputs of all jobs and their rules, by depth: none of a depth is made from another of it."""
    done = run.snakemake("all", "--detailed-summary")
    table = done.stdout[done.stdout.index("output_file\t") :]
    rows = [row for row in csv.DictReader(table.splitlines(), delimiter="\t") if row["plan"]]
    made_from = {row["output_file"]: [name for name in row["input-file(s)"].split(",") if name] for row in rows}

    @functools.cache
    def depth(path):
        return 1 + max([depth(name) for name in made_from[path] if name in made_from], default=-1)

    first = {}
    for row in rows:
        first.setdefault((row["rule"], row["log-file(s)"]), row["output_file"])
    found = {}
    for (rule, _), path in first.items():
        found.setdefault(depth(path), {})[path] = rule
    return [found[key] for key in sorted(found)]


def test_lost_intermediates_come_back_to_the_byte(finished, work):
    for path in INTERMEDIATES:
        lose(work.work / path)
    assert set(INTERMEDIATES.values()) <= set(work.planned(*INTERMEDIATES))
    done = work.snakemake(*INTERMEDIATES)
    assert done.returncode == 0, done.stdout[-4000:]
    different = [path for path in INTERMEDIATES if checksum(work.work / path) != checksum(finished.work / path)]
    assert different == []
    assert work.planned(*INTERMEDIATES) == {}


def test_one_lost_output_is_made_by_its_job_alone_to_the_byte(finished, work):
    """Outputs of one depth are lost together, which is as good as one by one: none is made from another."""
    depths = outputs_by_depth(work)
    assert len(depths) > 8
    assert set(INTERMEDIATES.values()) <= {rule for depth in depths for rule in depth.values()}
    for depth in depths:
        lost = {path: lose(work.work / path) for path in depth}
        rules = list(depth.values())
        assert work.planned(*depth) == {rule: rules.count(rule) for rule in rules}
        for path, kept in lost.items():
            kept.rename(work.work / path)
    made = set()
    for depth in reversed(depths):  # other outputs of a job get a new time, which concerns what is made from them
        cheap = {rule: path for path, rule in depth.items() if rule in CHEAP}
        for path in cheap.values():
            lose(work.work / path)
        if cheap:
            done = work.snakemake(*cheap.values())
            assert done.returncode == 0, done.stdout[-4000:]
        for path in cheap.values():
            assert checksum(work.work / path) == checksum(finished.work / path), path
        made |= set(cheap)
    assert made == set(CHEAP)


AFTER_TRAINING = {
    *("train", "predict", "score", "table", "attention", "overlays", "similarity", "detect_slide"),
    *("frozen_features", "learning_curves"),
    *("extract_slide", "choose_slide_patches", "figure3", "figure4b", "figure4c", "figure5b"),
}
AFTER_EXTRACTION = {
    *("extract_xenium", "split_xenium", "train", "learning_curves", "predict", "score", "table", "overlays"),
    *("figure5a", "figure5b"),
}
EDITS = {
    "evaluation/scoring.py": {"score", "table", "figure5a", "figure5b"},
    "report/tables.py": {"table"},
    "evaluation/metrics.py": AFTER_TRAINING | {"figure5a"},  # validation chooses the epoch by it
    "training/losses.py": AFTER_TRAINING,
    "report/curves.py": {"learning_curves", "figure4b", "figure4c"},
    "data/registration/gate.py": {"register_xenium"} | AFTER_EXTRACTION,
    "data/celltypes/annotators.py": {"annotate_xenium"} | AFTER_EXTRACTION,
    "data/splits.py": {"split_pannuke", "split_xenium"} | AFTER_TRAINING,
}
DATA = {"convert_pannuke", "register_xenium", "annotate_xenium", "prepare_reference", "extract_xenium"}


def test_an_edit_of_the_library_reruns_what_it_affects_and_nothing_else(work):
    library = work.source / "scripts" / "celldetr"
    assert work.planned("all") == {}
    for name, rules in EDITS.items():
        text = (library / name).read_text(encoding="utf-8")
        (library / name).write_text(f"{text}\nEDITED = True\n", encoding="utf-8")
        assert set(work.planned("all")) == rules, name
        (library / name).write_text(text, encoding="utf-8")
    assert not EDITS["training/losses.py"] & DATA
    assert work.planned("all") == {}


def test_comments_a_fresh_checkout_and_a_moved_folder_rerun_nothing(work):
    for path in work.source.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        path.write_text(f"# A comment.\n{text}\n# Another one.\n", encoding="utf-8")
    for path in (work.source / "config").rglob("*.yaml"):
        path.write_text(f"{path.read_text(encoding='utf-8')}\n# A comment.\n", encoding="utf-8")
    for path in work.source.rglob("*"):
        if path.is_file() and not path.is_relative_to(work.source / "config"):
            os.utime(path)
    moved = work.work.parent.with_name("moved")
    work.work.parent.rename(moved)
    work.work, work.source = moved / work.work.name, moved / work.source.name
    try:
        assert work.planned("all") == {}
    finally:
        moved.rename(moved.with_name("run"))


def test_files_copied_without_their_times_are_declared_up_to_date_with_touch(finished, work):
    draw = random.Random(4)
    for path in (work.work / "results").rglob("*"):
        if path.is_file() and (path.name == STAMP or ".zarr" not in str(path)):
            os.utime(path, (time.time() - draw.uniform(1, 10_000),) * 2)
    assert set(work.planned("all")) >= {"predict", "split_pannuke"}
    done = work.snakemake("all", "--touch")
    assert done.returncode == 0, done.stdout[-4000:]
    assert work.planned("all") == {}
    for path in INTERMEDIATES:
        assert checksum(work.work / path) == checksum(finished.work / path)


def test_training_on_files_of_another_time_is_not_repeated(finished, work):
    """The stores look newer than the model; the finished run writes its results again."""
    for fold in (1, 2, 3):
        os.utime(work.work / "results" / "pannuke" / f"fold{fold}.zarr" / STAMP)
    model = "results/models/celldetr_p/split1/model.pt"
    assert "train" in work.planned(model)
    done = work.snakemake(model)
    assert done.returncode == 0, done.stdout[-4000:]
    log = (work.work / "results" / "logs" / "train" / "celldetr_p_split1.log").read_text(encoding="utf-8")
    assert re.search(r"going on from .* at step (\d+)", log)
    assert "epoch 1 of" not in log
    assert checksum(work.work / model) == checksum(finished.work / model)
    assert work.planned(model) == {}


def test_an_input_from_the_future_is_named_before_any_work(finished, work):
    stamp = work.work / "results" / "pannuke" / "fold1.zarr" / STAMP
    os.utime(stamp, (time.time() + 86_400,) * 2)
    split = "results/pannuke/split1.tsv"
    done = work.snakemake(split)
    assert done.returncode != 0
    assert "error: results/pannuke/fold1.zarr: was changed at" in done.stdout
    assert f"touch results/pannuke/fold1.zarr/{STAMP}" in done.stdout
    assert "clock skew" not in done.stdout
    os.utime(stamp)
    assert work.snakemake(split).returncode == 0
    assert checksum(work.work / split) == checksum(finished.work / split)
    assert work.planned(split) == {}
