"""What is planned: targets, profiles, many samples; and what is refused before anything runs."""

import json
import re
import resource
import sys

import pytest
import stand_in_conda
import yaml
from programs import ENVIRONMENT, ROOT, run
from small_run import counted_jobs, small_config

from celldetr.config.base import merge
from celldetr.config.segmentation import PACKAGES, missing_packages

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CPU_SECONDS = 30
SLIDES, SAMPLES = 200, 50


def plan(folder, changes, *targets, base=None, environment=None):
    """Dry-run the small example, or another configuration, in an empty folder with some changes."""
    text = json.dumps(merge(base or small_config(), changes)) if isinstance(changes, dict) else changes
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    command = ["snakemake", "--snakefile", ROOT / "workflow" / "Snakefile", "--configfile", path]
    command += ["--directory", folder, "--cores", 1, "--dry-run"]
    return run(*command, *(targets or ["all"]), environment=environment)


def jobs_of(done):
    assert done.returncode == 0, done.stdout[-3000:]
    return counted_jobs(done.stdout)


def paper():
    return yaml.safe_load((ROOT / "config" / "config.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"epocs": 2}}, "training.epocs: unknown key; did you mean 'epochs'?"),
        ({"xenium": {"samples": "xenium.tsv"}}, "row 2: sample: got '../drawn_2'"),
        ("seed: 1\nseed: 2\n", "config.yaml: line 2: got 'seed' again (also in line 1)"),
        ({"cells": {"model": "celldetr_q"}}, "cells.model: got ['celldetr_q'], expected names of experiments"),
        ({"cells": {"model": "deformable_detr"}}, "cells.model: got ['deformable_detr'], expected experiments with"),
        ({"cells": {"split": 2}}, "cells.split: got 2, expected one of [1]"),
        ({"cells": {"sheet": "none.tsv"}}, "none.tsv: cannot be read"),
        ({"cells": {"sheet": "cells.tsv"}}, "row 2: slide: got 'DRAWN_slide_2' twice"),
        ({"imagenet": {"bytes": "https://me:S3cret@host/?sig=S3cret"}}, "imagenet.bytes: got 'https://***@host/?***'"),
    ],
)
def test_a_mistake_stops_before_anything_runs(tmp_path, changes, message):
    text = (ROOT / "config" / "example" / "xenium.tsv").read_text(encoding="utf-8")
    (tmp_path / "xenium.tsv").write_text(text.replace("drawn_2\tyes", "../drawn_2\tyes"), encoding="utf-8")
    text = (ROOT / "config" / "example" / "cells.tsv").read_text(encoding="utf-8")
    (tmp_path / "cells.tsv").write_text(text.replace("drawn_slide_1\tyes", "DRAWN_slide_2\tyes"), encoding="utf-8")
    done = plan(tmp_path, changes)
    assert done.returncode != 0
    assert message in done.stdout
    assert "S3cret" not in done.stdout
    assert not (tmp_path / "results").exists()


def test_braces_in_texts_of_the_user_are_no_wildcards(tmp_path):
    titles = {name: {"title": f"{{x}} of {name} {{"} for name in small_config()["experiments"]}
    jobs = jobs_of(plan(tmp_path, {"experiments": titles, "imagenet": {"urls": ["my{x}.pth"]}}))
    assert {"figure3", "figure4b", "figure4c", "figure5b", "table", "overlays"} <= set(jobs)


def test_a_single_target_builds_only_its_ancestors(tmp_path):
    jobs = jobs_of(plan(tmp_path, {}, "results/pannuke/split1.tsv"))
    assert set(jobs) == {"make_example", "download_pannuke", "convert_pannuke", "split_pannuke"}
    done = plan(tmp_path, {}, "results/table3.tsv")
    assert jobs_of(done)["train"] == 2
    assert not re.search("celldetr_[sp]|deformable_detr", done.stdout)


def test_every_file_of_cells_is_a_target_of_its_own(tmp_path):
    kinds = {"h5ad": "h5ad", "geojson.gz": "geojson", "cellvit.geojson": "cellvit", "zarr": "spatialdata"}
    for kind, rule in ((kind, f"cells_{name}") for kind, name in kinds.items()):
        jobs = jobs_of(plan(tmp_path, {}, f"results/cells/drawn_slide_2.{kind}"))
        assert {name for name in jobs if "cell" in name} == {"download_cell_slide", "find_cells", "join_cells", rule}
        assert (jobs["find_cells"], jobs["train"]) == (small_config()["cells"]["jobs"], 1)
    jobs = jobs_of(plan(tmp_path, {"cells": {"outputs": []}}))
    assert {name for name in jobs if name.startswith("cells_")} == {"cells_page"}
    jobs = jobs_of(plan(tmp_path, {}, "all_cells"))
    assert {"cells_h5ad", "cells_page"} <= set(jobs)
    assert not {"table", "score", "download_xenium"} & set(jobs)


def test_cells_of_the_slides_of_the_other_sheets_with_a_model_file(tmp_path):
    """Nothing is trained, and nothing is downloaded but the slides."""
    (tmp_path / "my.pt").touch()
    changes = {"cells": {"sheet": None, "model": "my.pt"}}
    jobs = jobs_of(plan(tmp_path, changes, "results/cells/drawn_slide_1.h5ad", "results/cells/drawn_2.parquet"))
    assert jobs["download_slide"] == jobs["download_he"] == 1
    assert "train" not in jobs
    assert "download_cell_slide" not in jobs


def test_profiles_plan_from_a_clone_as_typed(tmp_path):
    jobs = jobs_of(run("snakemake", "--profile", "slurm", "-n", "all"))
    assert (jobs["train"], jobs["download_pannuke"], jobs["register_xenium"], jobs["extract_slide"]) == (20, 3, 4, 15)
    assert "make_example" in jobs_of(run("snakemake", "--profile", "example", "--directory", tmp_path, "-n", "all"))


def test_sthelar_is_planned_beside_the_samples_or_alone(tmp_path):
    shipped = {"sthelar": {}}
    jobs = jobs_of(plan(tmp_path, {"xenium": shipped}, "results/xenium/split.tsv", base=paper()))
    assert (jobs["download_sthelar"], jobs["extract_sthelar"], jobs["extract_xenium"]) == (25, 25, 4)
    jobs = jobs_of(plan(tmp_path, {"xenium": {**shipped, "samples": None}}, base=paper()))
    assert (jobs["extract_sthelar"], jobs["split_xenium"], jobs["figure5b"]) == (25, 1, 1)
    assert not {"extract_xenium", "register_xenium"} & set(jobs)


def test_what_goes_beyond_the_paper_runs_when_it_is_listed(tmp_path):
    table = {"ours": ["celldetr_plus"], "others": []}
    jobs = jobs_of(plan(tmp_path, {"tables": {"table1": table}}, base=paper()))
    assert (jobs["train"], jobs["score"], jobs["overlays"]) == (23, 25, 25)


OTHERS_ALONE = {"base": "none", "figure3": None, "xenium": None, "slides": None, "cells": None}


def with_packages(folder, *names):
    """Set of variables for a Python that finds these packages; importing one fails."""
    for name in names:
        (folder / f"{name}.py").write_text("raise SystemExit('planning imports this package')", encoding="utf-8")
    return {"PYTHONPATH": str(folder)}


def test_other_systems_run_where_their_packages_are(tmp_path):
    given = ("--directory", tmp_path, "-n", "results/table1.tsv")
    installed = with_packages(tmp_path, *PACKAGES)
    done = run("snakemake", *given, environment=installed)
    jobs = jobs_of(done)
    assert (jobs["train"], jobs["train_segmentation"], jobs["predict_segmentation"], jobs["score"]) == (9, 12, 12, 21)
    assert (jobs["download_weights"], jobs["download_imagenet"]) == (2, 1)
    assert "Left out" not in done.stdout
    table = {"tables": {"table1": {"others": ["cellvit_sam_b"]}}}
    jobs = jobs_of(plan(tmp_path, table, base=paper(), environment=installed))
    assert (jobs["train_segmentation"], jobs["overlays"], jobs["learning_curves"]) == (3, 25, 23)
    wanted = "results/figures/overlays_cellvit_sam_b_split2.png"
    jobs = jobs_of(plan(tmp_path, {}, wanted, base=paper(), environment=installed))
    assert {name for name in jobs if name.startswith(("train", "predict", "download_w"))} == {
        *("train_segmentation", "predict_segmentation", "download_weights")
    }


def test_other_systems_are_left_out_without_their_packages(tmp_path):
    if not missing_packages():
        pytest.skip("the packages of the other systems are installed")
    done = plan(tmp_path, {}, base=paper())
    jobs = jobs_of(done)
    assert not {"train_segmentation", "predict_segmentation", "download_weights"} & set(jobs)
    assert (jobs["table"], jobs["score"], jobs["overlays"]) == (3, 22, 22)
    [line] = [line for line in done.stdout.splitlines() if "Left out" in line]
    assert re.match(
        r"Left out of the tables: mask_rcnn, micro_net, hover_net, cellvit_256; .* need .*torchvision", line
    )
    assert "`make baselines`" in line
    assert "--sdm conda" in line
    for wanted in ("results/scores/micro_net/split1.tsv", "results/models/cellvit_sam_b/split1/curves.png"):
        done = plan(tmp_path, {}, wanted, base=paper())
        assert done.returncode != 0
        assert re.search(
            r"(micro_net|cellvit_sam_b) cannot be trained: .* need .*torchvision.*`make baselines`", done.stdout
        )
    done = plan(tmp_path, {"tables": {"table1": {"others": []}}}, base=paper())
    assert jobs_of(done) == jobs
    assert "Left out" not in done.stdout


def test_other_systems_are_in_with_conda(tmp_path):
    run(sys.executable, stand_in_conda.__file__, "install", tmp_path / "here")
    path = {"PATH": f"{tmp_path / 'here' / 'bin'}:{ENVIRONMENT['PATH']}"}
    done = run("snakemake", "--directory", tmp_path, "-n", "results/table1.tsv", "--sdm", "conda", environment=path)
    assert (jobs_of(done)["train_segmentation"], jobs_of(done)["predict_segmentation"]) == (12, 12)
    assert "Left out" not in done.stdout


def test_a_configuration_may_have_no_system_or_nothing_else(tmp_path):
    config = merge(small_config(["celldetr_p"]), OTHERS_ALONE)
    config["experiments"]["celldetr_p"] |= {"initial": "none"}
    config["tables"] = {}
    assert "train" not in jobs_of(plan(tmp_path, {}, base=config))
    jobs = jobs_of(plan(tmp_path, {}, "results/scores/celldetr_p/split1.tsv", base=config))
    assert (jobs["train"], jobs["predict"]) == (1, 1)
    block = {"title": "M", "stage": "segmentation", "initial": "none", "segmentation": {"system": "micro_net"}}
    config["experiments"] = {"mine": block}
    packages = with_packages(tmp_path, *PACKAGES)
    done = plan(tmp_path, {}, "results/scores/mine/split1.tsv", base=config, environment=packages)
    assert (jobs_of(done)["train_segmentation"], jobs_of(done)["predict_segmentation"]) == (1, 1)


def widen(sheet, key, count, folder):
    """Write a sheet with `count` rows in use, each a copy of one of the paper's under a name of its own."""
    lines = (ROOT / "config" / sheet).read_text(encoding="utf-8").splitlines()
    columns, *rows = (line.split("\t") for line in lines if line.strip() and not line.startswith("#"))
    used = [row for row in (dict(zip(columns, row, strict=False)) for row in rows) if row["use"] == "yes"]
    written = ["\t".join(columns)]
    for number in range(count):
        row = {**used[number % len(used)], key: f"{key}_{number}", "group": f"group_{number}"}
        own = {"outs": f"https://example.org/{number}.zip", "he": f"https://example.org/{number}.tif"}
        row |= {"hest": f"TENX{number}"} if key == "slide" else own
        written.append("\t".join(row.get(column, "") for column in columns))
    path = folder / sheet
    path.write_text("\n".join(written) + "\n", encoding="utf-8")
    return str(path)


def test_many_slides_and_samples_are_planned_quickly(tmp_path):
    def used():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    sheets = {
        "slides": {"sheet": widen("slides.tsv", "slide", SLIDES, tmp_path)},
        "xenium": {"samples": widen("xenium.tsv", "sample", SAMPLES, tmp_path)},
    }
    before = used()
    jobs = jobs_of(plan(tmp_path, sheets, base=paper()))
    assert used() - before < CPU_SECONDS
    assert (jobs["extract_slide"], jobs["annotate_xenium"]) == (SLIDES, SAMPLES)


def test_a_refused_file_is_named_by_its_row_and_not_tried_again_before_the_next_start(tmp_path):
    """The attempts after the first end at once; those of the next start look at the file again."""
    sheet = (ROOT / "config" / "example" / "references.tsv").read_text(encoding="utf-8")
    (tmp_path / "mine.tsv").write_text(sheet.replace("example-input/xenium/reference.h5ad", "my.h5ad"))
    (tmp_path / "my.h5ad").write_bytes(b"\x89HDF\r\n\x1a\n and no more")
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(merge(small_config(), {"xenium": {"references": "mine.tsv"}})), encoding="utf-8")
    command = ["snakemake", "--configfile", path, "--directory", tmp_path, "--cores", 1, "--retries", 2]
    for _ in range(2):
        done = run(*command, "results/references/drawn.h5ad")
        assert done.returncode != 0
        assert "error: my.h5ad: cannot be read" in done.stdout
        assert "(my.h5ad: row drawn, column file of mine.tsv)" in done.stdout
        assert done.stdout.count("Refused by an earlier attempt in this run of Snakemake") == 2


def test_slurm_without_accounting_stops_before_a_job_is_sent(tmp_path):
    """Snakemake asks sacct for the state of its jobs; if that fails, it would wait for ever."""
    programs = {"sbatch": f"touch {tmp_path}/sent; echo 1", "squeue": "exit 0", "scontrol": "exit 0", "sinfo": "exit 0"}
    programs["sacct"] = 'case "$*" in *version*) ;; *) echo "accounting storage is disabled" >&2; exit 1;; esac'
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "config.yaml").write_text(json.dumps(small_config()), encoding="utf-8")
    given = ["--profile", "slurm", "--configfile", tmp_path / "config.yaml", "--directory", tmp_path / "work"]
    environment = {"PATH": f"{tmp_path}:{run('sh', '-c', 'printf %s $PATH').stdout}"}
    done = run("snakemake", *given, "results/references/drawn.h5ad", environment=environment, timeout=200)
    assert done.returncode != 0
    assert "sacct fails (accounting storage is disabled)" in done.stdout
    assert "set `slurm-status-command: squeue` in the profile" in done.stdout
    assert not (tmp_path / "sent").exists()
