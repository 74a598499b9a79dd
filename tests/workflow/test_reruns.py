"""What runs again after a change of a setting, code or files; what comes back has the same bytes."""

import contextlib
import json
import os
import random
import re
import shutil
import time

import pytest
from run_job import checksum
from small_run import OTHERS

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
    "results/raw/sthelar/drawn_s0": "download_sthelar",
    "results/xenium/drawn_s0/drawn_s0.zarr": "extract_sthelar",
    "results/xenium/test.zarr": "split_xenium",
    "results/slides/drawn_slide_2/detected.parquet": "detect_slide",
    "results/slides/drawn_slide_1/drawn_slide_1.zarr": "extract_slide",
    "results/slides/split.tsv": "choose_slide_patches",
    "results/cells/drawn_slide_1.geojson.gz": "cells_geojson",
    "results/models/celldetr_p/split1/model.pt": "train",
    "results/predictions/celldetr_p/split1.parquet": "predict",
    "results/scores/celldetr_p/split1.tsv": "score",
    "results/attention/celldetr_p/split1.npz": "attention",
}
STAMP = ".snakemake_timestamp"


def lose(path):
    """Rename an output, as if it had been deleted; return its new name."""
    return path.rename(path.with_name(f"lost_{path.name}"))


AFTER_TRAINING = {"train", "learning_curves", "predict", "score", "table", "overlays"}
AFTER_XENIUM = {"split_xenium", "figure5a", "figure5b"} | AFTER_TRAINING
AFTER_SLIDES = {"similarity", "figure4b", "figure4c", "frozen_features"} | AFTER_TRAINING
PICTURES = {"figure3", "figure4b", "figure4c", "figure5a", "figure5b", "learning_curves", "overlays"}
FIGURES = (PICTURES | {"attention", "similarity"}) - {"figure5a"}
DETECTED = {"detect_slide", "extract_slide", "choose_slide_patches"}  # a slide's nuclei are found by celldetr_p
FILES_OF_CELLS = {"cells_h5ad", "cells_geojson", "cells_spatialdata", "cells_page"}
CELLS = {"find_cells", "join_cells"} | FILES_OF_CELLS
EVERY_MODEL = AFTER_TRAINING | AFTER_SLIDES | FIGURES | DETECTED | CELLS
SEGMENTS = {"train_segmentation", "predict_segmentation"} if OTHERS else set()
AFTER_SEGMENTS = SEGMENTS | {"learning_curves", "score", "table", "overlays"} if OTHERS else set()
STORES = {"convert_pannuke", "extract_xenium", "extract_sthelar", "extract_slide"}


@pytest.fixture(scope="module")
def planner(finished, tmp_path_factory):
    """Copy the finished run for dry runs; a test puts back what it edits."""
    copy = finished.copy(tmp_path_factory.mktemp("planner"))
    yield copy
    shutil.rmtree(copy.work.parent)


@contextlib.contextmanager
def edited(run, edits):
    """Edit files of the workflow's copy: name of a file below scripts/celldetr or config -> (old text, new text)."""
    before = {}
    try:
        for name, (old, new) in edits.items():
            path = run.source / ("config" if name.endswith(".tsv") else "scripts/celldetr") / name
            before[path] = path.read_text(encoding="utf-8")
            assert old in before[path], name
            path.write_text(before[path].replace(old, new, 1), encoding="utf-8")
        yield
    finally:
        for path, text in before.items():
            path.write_text(text, encoding="utf-8")


def test_words_and_speed_repeat_nothing(planner):
    """Texts of errors, log lines, descriptions, docstrings and comments; loader processes, threads, a sheet's note."""
    words = {
        "runtime/rule.py": ("the disk is full; free some space", "no space is left; free some"),
        "runtime/files.py": ('"""Write JSON values."""', '"""Write values."""  # as JSON'),
        "pannuke/convert.py": ('log.info("', 'log.info("fold: '),
        "config/experiment.py": ('description="learning rate"', 'description="the rate of learning"'),
        "example/xenium.tsv": ("its alignment is not used", "without its alignment"),
    }
    assert planner.planned() == {}
    with edited(planner, words):
        assert planner.planned("all", "--set-threads", "train=3", changes={"training": {"workers": 1}}) == {}


CODE_EDITS = {
    "store/writer.py": STORES | AFTER_XENIUM | EVERY_MODEL | SEGMENTS | {"split_pannuke"},
    "evaluation/scoring.py": {"score", "table", "figure5a", "figure5b"},
    "report/curves.py": {"learning_curves", "figure4b", "figure4c"},
    "report/tables.py": {"table"},
    "report/style.py": PICTURES | {"cells_page", "table"},
    "cells/qupath.py": {"cells_geojson"},
    "cells/h5ad.py": {"cells_h5ad", "cells_spatialdata"},
    "cells/join.py": {"join_cells"} | FILES_OF_CELLS | DETECTED | AFTER_SLIDES,
    "report/cells.py": {"cells_page"},
    "training/losses.py": EVERY_MODEL,
    "training/loop.py": EVERY_MODEL | SEGMENTS,
    "segmentation/hover_net.py": AFTER_SEGMENTS,
    "xenium/registration/gate.py": {"register_xenium", "extract_xenium"} | AFTER_XENIUM,
    "xenium/celltypes/annotate.py": {"annotate_xenium", "extract_xenium"} | AFTER_XENIUM,
}


@pytest.mark.parametrize("name", CODE_EDITS)
def test_an_edit_of_code_repeats_what_it_affects(planner, name):
    with edited(planner, {name: ("\n\n\n", "\n\n\nEDITED = True\n")}):
        assert set(planner.planned()) == CODE_EDITS[name]


@pytest.mark.parametrize(
    ("changes", "rules"),
    [
        ({"evaluation": {"radius_um": 5.0}}, EVERY_MODEL | SEGMENTS),  # validation chooses an epoch by it, too
        ({"training": {"matching": {"l1": 4.0}}}, EVERY_MODEL),  # systems that segment nuclei do not read it
        ({"evaluation": {"metric": "hovernet_compat"}}, {"table"}),
        ({"figure3": {"nuclei": 1}}, {"attention", "figure3"}),
        ({"figure4": {"patches": 1}}, {"similarity", "figure4c"}),
        ({"overlays": {"patches": 1}}, {"overlays"}),
        ({"experiments": {"deformable_detr": {"training": {"losses": {"l1": 2.0}}}}}, AFTER_TRAINING),
        ({"experiments": {"celldetr_p": {"title": "a|b *c* <b> {x} _d_ $e$"}}}, {"table", "figure3"}),
        ({"experiments": {"ssl_pretrain": {"title": "a|b *c* <b> {x} _d_ $e$"}}}, {"figure4b", "figure4c"}),
        ({"xenium": {"registration": {"regions": 3}}}, {"register_xenium", "extract_xenium"} | AFTER_XENIUM),
        ({"xenium": {"cell_types": {"min_margin": 0.3}}}, {"annotate_xenium", "extract_xenium"} | AFTER_XENIUM),
        ({"xenium": {"split": {"block_um": 96.0}}}, AFTER_XENIUM - {"figure5a"}),
        ({"xenium": {"sthelar": {"min_dice": 0.5}}}, {"extract_sthelar"} | AFTER_XENIUM),
        ({"xenium": {"patches": {"min_tissue": 0.3}}}, {"extract_xenium"} | AFTER_XENIUM),
        ({"cells": {"nucleus_threshold": 0.02}}, CELLS),
        ({"cells": {"class_threshold": 0.02}}, {"join_cells"} | FILES_OF_CELLS),
        ({"cells": {"jobs": 3}}, CELLS),
        ({"cells": {"batch_size": 4}}, set()),
        ({"cells": {"outputs": ["h5ad"]}}, set()),
        ({"cells": {"embeddings": "float16"}}, CELLS),
        ({"cells": {"image": "link"}}, {"cells_spatialdata"}),
        ({"slides": {"total": 30}}, {"choose_slide_patches"} | AFTER_SLIDES),
        (
            {"inference": {"batch_size": 4}},
            {"predict", "score", "table", "overlays", "similarity", "frozen_features", "attention", "figure3"}
            | {"figure4c", "figure5b"},
        ),
    ],
    ids=lambda value: json.dumps(value).strip("{}").replace('"', "") if isinstance(value, dict) else "",
)
def test_a_setting_repeats_what_depends_on_it(planner, changes, rules):
    assert set(planner.planned(changes=changes)) == rules


def test_a_row_of_a_sheet_repeats_the_sample_and_what_it_is_in(planner):
    with edited(planner, {"example/xenium.tsv": ("drawn_2\tyes\tdrawn", "drawn_2\tyes\tother")}):
        planned = planner.planned()
    assert set(planned) == {"extract_xenium"} | AFTER_XENIUM
    assert planned["extract_xenium"] == 1


def test_a_row_of_cells_repeats_its_slide_alone(planner):
    with edited(planner, {"example/cells.tsv": ("drawn_slide_2\tyes\tdrawn_slide_2", "drawn_slide_2\tyes\tother")}):
        assert planner.planned() == dict.fromkeys(CELLS, 1) | {"find_cells": 2}
    with edited(planner, {"example/cells.tsv": ("the example's model finds its cells", "no note")}):
        assert planner.planned() == {}


def test_a_sheet_of_another_name_repeats_nothing(planner):
    """Messages name it, results do not depend on that."""
    changes = {"xenium": {}, "slides": {}, "cells": {}}
    for block, key, name in (
        *(("xenium", "samples", "xenium"), ("xenium", "references", "references")),
        *(("slides", "sheet", "slides"), ("cells", "sheet", "cells")),
    ):
        shutil.copy(planner.source / "config" / "example" / f"{name}.tsv", planner.work / f"my_{name}.tsv")
        changes[block][key] = f"my_{name}.tsv"
    assert planner.planned(changes=changes) == {}


def test_another_experiment_runs_alone(planner):
    added = {"title": "Mine", "mode": "sequential", "initial": "none"}
    tables = {"table1": {"experiments": ["deformable_detr", "celldetr_p", "mine"]}}
    planned = planner.planned(changes={"experiments": {"mine": added}, "tables": tables})
    assert planned == dict.fromkeys(("train", "learning_curves", "predict", "score", "overlays", "table"), 1)
    changes = {"experiments": {"deformable_detr": {"training": {"lr": 5.0e-4}}}}
    assert planner.planned("results/predictions/celldetr_p/split1.parquet", changes=changes) == {}


def test_lost_intermediates_come_back_to_the_byte(finished, work):
    for path in INTERMEDIATES:
        lose(work.work / path)
    assert set(INTERMEDIATES.values()) <= set(work.planned(*INTERMEDIATES))
    done = work.snakemake(*INTERMEDIATES)
    assert done.returncode == 0, done.stdout[-4000:]
    different = [path for path in INTERMEDIATES if checksum(work.work / path) != checksum(finished.work / path)]
    assert different == []
    assert work.planned(*INTERMEDIATES) == {}


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
    assert work.planned("all") != {}
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
    assert re.search(r"continuing from .* at step (\d+)", log)
    assert "epoch 1 of" not in log
    assert checksum(work.work / model) == checksum(finished.work / model)
    assert work.planned(model) == {}
