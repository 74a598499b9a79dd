"""What runs again after files were lost, and that it gives the same bytes."""

import shutil

import pytest
from run_job import checksum
from small_run import small_run

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


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return small_run(tmp_path_factory)


@pytest.fixture
def work(finished, tmp_path):
    copy = finished.copy(tmp_path / "work")
    yield copy
    shutil.rmtree(copy.work)


def lose(path):
    """Rename an output, as if it had been deleted."""
    path.rename(path.with_name(f"lost_{path.name}"))


def test_lost_intermediates_come_back_to_the_byte(finished, work):
    for path in INTERMEDIATES:
        lose(work.work / path)
    assert set(INTERMEDIATES.values()) <= set(work.planned(*INTERMEDIATES))
    done = work.snakemake(*INTERMEDIATES)
    assert done.returncode == 0, done.stdout[-4000:]
    different = [path for path in INTERMEDIATES if checksum(work.work / path) != checksum(finished.work / path)]
    assert different == []
    assert work.planned(*INTERMEDIATES) == {}
