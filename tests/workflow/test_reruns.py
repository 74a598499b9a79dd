"""What runs again after a setting or code changed, files were lost or times are wrong; the bytes stay the same."""

import os
import random
import re
import time

import pytest
from run_job import checksum

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
STAMP = ".snakemake_timestamp"

FIGURES = {"attention", "figure3", "figure4c", "figure5b"}
AFTER_TRAINING = {"learning_curves", "predict", "score", "table", "overlays"}
AFTER_PATCHES = {"split_xenium", "figure5a", "figure5b", "train"} | AFTER_TRAINING
AFTER_SLIDES = {"train", "figure4b", "figure4c", "similarity", "frozen_features"} | AFTER_TRAINING
DATA = {"convert_pannuke", "register_xenium", "annotate_xenium", "prepare_reference", "extract_xenium"}


def lose(path):
    """Rename an output, as if it had been deleted; return its new name."""
    return path.rename(path.with_name(f"lost_{path.name}"))


def test_nothing_reruns_when_nothing_changed(work):
    assert work.planned() == {}


@pytest.mark.parametrize(
    ("changes", "rules"),
    [
        (
            {"evaluation": {"radius_um": 5.0}},  # the chosen epoch of every model, and what a model detects on a slide
            {"detect_slide", "extract_slide", "choose_slide_patches"} | AFTER_SLIDES | FIGURES,
        ),
        ({"evaluation": {"metric": "hovernet_compat"}}, {"table"}),
        ({"figure3": {"nuclei": 1}}, {"attention", "figure3"}),
        (
            {"inference": {"batch_size": 4}},
            {"predict", "score", "table", "overlays", "similarity", "frozen_features"} | FIGURES,
        ),
        (
            {"experiments": {"deformable_detr": {"training": {"lr": 5.0e-4}}}},
            {"train"} | AFTER_TRAINING,
        ),
        ({"xenium": {"registration": {"regions": 3}}}, {"register_xenium", "extract_xenium"} | AFTER_PATCHES),
        ({"xenium": {"cell_types": {"min_margin": 0.3}}}, {"annotate_xenium", "extract_xenium"} | AFTER_PATCHES),
        ({"xenium": {"split": {"block_um": 96.0}}}, AFTER_PATCHES - {"figure5a"}),
        ({"slides": {"total": 30}}, {"choose_slide_patches"} | AFTER_SLIDES),
        ({"figure4": {"patches": 1}}, {"similarity", "figure4c"}),
        ({"experiments": {"celldetr_p": {"title": "a|b *c* <b> {x} _d_ $e$"}}}, {"table", "figure3"}),
        ({"experiments": {"ssl_pretrain": {"title": "a|b *c* <b> {x} _d_ $e$"}}}, {"figure4b", "figure4c"}),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, dict) else "",
)
def test_a_setting_reruns_what_depends_on_it(work, changes, rules):
    assert set(work.planned(changes=changes)) == rules


def test_an_experiments_setting_leaves_the_others_alone(work):
    changes = {"experiments": {"deformable_detr": {"training": {"lr": 5.0e-4}}}}
    assert work.planned("results/predictions/celldetr_p/split1.parquet", changes=changes) == {}


def test_lost_intermediates_come_back_to_the_byte(finished, work):
    for path in INTERMEDIATES:
        lose(work.work / path)
    assert set(INTERMEDIATES.values()) <= set(work.planned(*INTERMEDIATES))
    done = work.snakemake(*INTERMEDIATES)
    assert done.returncode == 0, done.stdout[-4000:]
    different = [path for path in INTERMEDIATES if checksum(work.work / path) != checksum(finished.work / path)]
    assert different == []
    assert work.planned(*INTERMEDIATES) == {}


EDITS = {  # file of the library -> rules that must run again, rules that must not
    "evaluation/scoring.py": ({"score", "table"}, DATA | {"train", "predict"}),
    "report/curves.py": ({"learning_curves"}, DATA | {"train", "predict", "score"}),
    "report/tables.py": ({"table"}, DATA | {"train", "predict", "score"}),
    "training/losses.py": ({"train", "predict", "score", "table"}, DATA - {"extract_xenium"}),
    "xenium/registration/gate.py": (
        {"register_xenium", "extract_xenium"},
        DATA - {"register_xenium", "extract_xenium"},
    ),
    "xenium/celltypes/annotate.py": ({"annotate_xenium", "extract_xenium"}, {"register_xenium", "convert_pannuke"}),
}


def test_an_edit_of_the_library_reruns_what_it_affects_and_nothing_else(work):
    library = work.source / "scripts" / "celldetr"
    for name, (must, must_not) in EDITS.items():
        text = (library / name).read_text(encoding="utf-8")
        (library / name).write_text(f"{text}\nEDITED = True\n", encoding="utf-8")
        planned = set(work.planned("all"))
        assert must <= planned, name
        assert not must_not & planned, name
        (library / name).write_text(text, encoding="utf-8")
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
