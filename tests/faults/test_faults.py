"""Faults at the worst moments: each ends in a clear error or is recovered from, and no output is damaged.

Faults tested elsewhere: broken transfers, wrong checksums and full disks in a download (tests/unit/fetch), damaged
archives and pickles (tests/unit/pannuke, tests/fuzz), killed and stopped training, losses that are not finite, states
of other runs (tests/unit/training), sheets and settings (tests/unit/config).
"""

import os
import random
import re
import shutil
import subprocess
import zipfile

import anndata
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from run_job import checksum

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

WAITS_FOR_A_THREAD = re.compile(r'threading\.py", line \d+ in start$|/pyarrow/', re.M)  # not ours: README, limits


def leftovers(folder):
    """Temporary files and folders below a folder."""
    files = [path for part in ("results", "example-input") for path in (folder / part).rglob(".*")]
    return [path for path in files if ".incomplete." in path.name or path.name.endswith(".part")]


def fails(attempt, *words):
    """Check that an attempt ended in an error for people, with all of some words, and gave no output."""
    assert attempt["status"] == 1, attempt["text"][-3000:]
    assert "Traceback" not in attempt["text"], attempt["text"][-3000:]
    error = attempt["text"].partition("error: ")[2]
    assert all(word in error for word in words), error
    assert set(attempt["outputs"].values()) == {None}


def undamaged(finished, rule, attempt):
    """Check that an output that is there is the one of the finished run."""
    for path, content in attempt["outputs"].items():
        assert content in (None, checksum(finished.work / path)), f"{path} is damaged"


def recovers(finished, rule, attempt):
    """Check that an attempt gave the outputs of the finished run and left nothing else."""
    assert attempt["status"] == 0, attempt["text"][-3000:]
    assert None not in attempt["outputs"].values()
    undamaged(finished, rule, attempt)


@pytest.mark.parametrize("rule", ["download_xenium", "convert_pannuke", "extract_slide", "train", "table"])
def test_a_killed_job_leaves_no_damage_and_the_next_try_gives_the_same(work, rule):
    draw = random.Random(rule)
    moments = [f"kill_change={draw.random():.3f}", f"kill_change={draw.random():.3f}", "kill_change=1"]
    first, *killed, last = work.run_job(rule, "none", *moments, f"kill_seconds={draw.random():.3f}", "none")
    assert first["status"] == 0, first["text"][-3000:]
    wanted = first["outputs"]
    assert None not in wanted.values()
    for attempt in killed:
        assert attempt["status"] in (-9, 0), attempt["text"][-3000:]  # 0: it had ended before that moment
        for path, content in attempt["outputs"].items():
            assert content in (None, wanted[path]), f"{path} is damaged after {attempt['fault']}"
    assert killed[0]["status"] == -9
    assert last["status"] == 0, last["text"][-3000:]
    assert last["outputs"] == wanted
    assert leftovers(work.work) == []


def test_a_killed_search_for_cells_goes_on_and_finds_the_same(work):
    """Its parts state how long they took: their rows are compared."""
    folder = work.work / work.job("find_cells")[1].output[0]

    def rows():
        return pa.concat_tables(
            [pq.read_table(path).replace_schema_metadata() for path in sorted(folder.glob("*.parquet"))]
        )

    (first,) = work.run_job("find_cells", "none")
    assert first["status"] == 0, first["text"][-3000:]
    wanted = rows()
    assert len(wanted)
    _, *killed, last = work.run_job(
        "find_cells", "none", "kill_change=0.5", "kill_seconds=0.7", "kill_change=1", "none"
    )
    assert killed[0]["status"] == -9
    for attempt in killed:
        assert attempt["status"] in (-9, 0), attempt["text"][-3000:]  # 0: little was left to do after an earlier kill
        assert set(attempt["outputs"].values()) == {None} or attempt["status"] == 0
    assert last["status"] == 0, last["text"][-3000:]
    assert rows().equals(wanted)
    assert list(folder.parent.glob(".*")) == []
    assert leftovers(work.work) == []


@pytest.mark.parametrize("rule", ["download_xenium", "predict", "cells_h5ad", "cells_geojson"])
def test_a_limit_on_the_size_of_files_is_named_and_nothing_half_written_gets_a_name(finished, work, rule):
    full, after = work.run_job(rule, "file_bytes=1500", "none")
    assert full["status"] == 1
    assert "Traceback" not in full["text"], full["text"][-3000:]
    assert re.search(r"error: [\s\S]*(larger than the system allows|File too large)", full["text"])
    undamaged(finished, rule, full)
    recovers(finished, rule, after)
    assert leftovers(work.work) == []


@pytest.fixture
def disk():
    """Put an empty disk of a size on a folder, or change its options; skipped where the user may not mount."""
    mounted = []

    def put(folder, options):
        if folder in mounted:
            options = f"remount,{options}"
        elif folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        if folder not in mounted:
            mounted.append(folder)

    yield put
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_and_a_read_only_one_are_named(finished, work, disk):
    folder = work.work / "results" / "pannuke"
    disk(folder, "size=64k")
    (full,) = work.run_job("convert_pannuke", "none")
    fails(full, ".zarr", "the disk is full; free some space and start again")
    assert list(folder.iterdir()) == []
    disk(folder, "ro,size=64m")
    (read_only,) = work.run_job("convert_pannuke", "none")
    fails(read_only, str(folder.relative_to(work.work)), "the file system is read-only")
    disk(folder, "rw,size=64m")
    (after,) = work.run_job("convert_pannuke", "none")
    recovers(finished, "convert_pannuke", after)


def test_training_on_a_disk_that_fills_up_keeps_its_checkpoint_and_goes_on(finished, work, disk):
    """The disk has room for the checkpoint of the first epoch, and not for a second one beside it."""
    model = next(path for path in work.job("train")[1].output if path.endswith("model.pt"))
    folder = (work.work / model).parent
    kept = (folder / "checkpoints" / "last.ckpt").stat().st_size
    best = next((folder / "checkpoints").glob("best*.ckpt")).stat().st_size
    disk(folder, f"size={kept + 2 * best + kept // 2}")
    (full,) = work.run_job("train", "none")
    assert full["status"] == 1
    assert "Traceback" not in full["text"], full["text"][-3000:]
    assert re.search(r"error: .*checkpoints/last\.ckpt: the disk is full; free some space", full["text"])
    assert full["outputs"][model] is None
    assert leftovers(work.work) == []
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["history"][-1]["epoch"] == 1
    disk(folder, "size=64m")
    (after,) = work.run_job("train", "none")
    assert after["status"] == 0, after["text"][-3000:]
    assert f"at step {state['step']}" in after["text"]
    assert after["outputs"][model] == checksum(finished.work / model)


def test_a_worker_killed_for_lack_of_memory_ends_the_job_at_once(finished, work):
    killed, after = work.run_job("make_example", "kill_worker", "none", timeout=120)
    assert killed["status"] == 1, killed["text"][-3000:]
    assert "Traceback" not in killed["text"], killed["text"][-3000:]
    assert "error: a worker process was killed" in killed["text"]
    undamaged(finished, "make_example", killed)
    recovers(finished, "make_example", after)
    assert leftovers(work.work) == []


@pytest.mark.parametrize("rule", ["convert_pannuke", "train"])
def test_too_little_memory_ends_the_job_and_damages_nothing(finished, work, rule):
    attempts = work.run_job(rule, *(f"more_memory={size << 20}" for size in (1, 16)), "none")
    for attempt in attempts:
        undamaged(finished, rule, attempt)
        if "Timeout (" in attempt["text"]:
            assert WAITS_FOR_A_THREAD.search(attempt["text"]), attempt["text"][-3000:]
        elif attempt["status"] == 1 and "libgomp: " not in attempt["text"]:  # that one ends the process by itself
            assert "Traceback" not in attempt["text"], attempt["text"][-3000:]
            assert "more mem_mb (--set-resources)" in attempt["text"]
    assert attempts[0]["status"] != 0
    assert attempts[-1]["status"] == 0, attempts[-1]["text"][-3000:]


def damage_archive(folder):
    """Change a bit inside the counts of each Xenium archive."""
    for path in (folder / "example-input" / "xenium").glob("*_outs.zip"):
        with zipfile.ZipFile(path) as archive:
            member = next(item for item in archive.infolist() if item.filename.endswith("cell_feature_matrix.h5"))
        content = bytearray(path.read_bytes())
        content[member.header_offset + 200 + member.compress_size // 2] ^= 16
        path.unlink()  # it may be linked to the original
        path.write_bytes(content)


class Hostile:
    """Would make a file when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("it-ran",)


def hostile_model(folder):
    for path in (folder / "results" / "models").rglob("model.pt"):
        torch.save({"format": 1, "settings": {}, "state": {}, "extra": Hostile()}, path)


def cut(pattern):
    """Return a damage: files lose their second half."""

    def damage(folder):
        for path in (folder / "results").rglob(pattern):
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content[: len(content) // 2])

    damage.__name__ = f"cut {pattern}"
    return damage


def edited(name, change):
    """Return a damage: an .h5ad below results that was changed."""

    def damage(folder):
        path = folder / "results" / name
        table = anndata.read_h5ad(path)
        change(table)
        path.unlink()
        table.write_h5ad(path)

    damage.__name__ = change.__name__
    return damage


def other_genes(table):
    table.var_names = table.var["gene_ids"] = [f"mouse_{number}" for number in range(table.n_vars)]


def other_labels(table):
    table.obs = table.obs.rename(columns={"cell_type": "kind"})


REFERENCE = "example-input/xenium/reference.h5ad: row drawn, column file of config/example/references.tsv"
SLIDE = "(example-input/slides/drawn_slide_2.tif: row drawn_slide_2, column file of config/example/"
DAMAGES = [  # files that users bring or that are downloaded
    ("download_xenium", damage_archive, "cell_feature_matrix.h5"),
    ("register_xenium", cut("he_image.tif"), "drawn_2_he_image", "row drawn_2, column he of config/example/xenium.tsv"),
    ("prepare_reference", cut("drawn.h5ad"), REFERENCE),
    ("prepare_reference", edited("raw/references/drawn.h5ad", other_labels), "correct column label_column", REFERENCE),
    (
        "annotate_xenium",
        edited("references/drawn.h5ad", other_genes),
        "0 genes in common",
        ", column reference of config/example/xenium.tsv, and row drawn of config/example/re",
    ),
    *((rule, cut("drawn_slide_2.tif"), SLIDE + "slides.tsv)") for rule in ("detect_slide", "extract_slide")),
    ("find_cells", cut("drawn_slide_2.tif"), SLIDE + "cells.tsv)"),
    ("predict", cut("model.pt"), "model.pt"),
    ("attention", hostile_model, "could run code"),
]


@pytest.mark.parametrize(
    ("rule", "damage", "words"),
    [(rule, damage, words) for rule, damage, *words in DAMAGES],
    ids=lambda value: getattr(value, "__name__", value if isinstance(value, str) else ""),
)
def test_a_damaged_input_is_refused_by_name(work, rule, damage, words):
    """A file of the user is called as in the sheet, and the row and the column are named."""
    damage(work.work)
    (attempt,) = work.run_job(rule, "none")
    fails(attempt, *words)
    assert "results/raw" not in attempt["text"]
    assert str(work.work) not in attempt["text"]
    assert not (work.work / "it-ran").exists()
