"""Planning the workflow stays quick and small, for the paper and for many more samples than it has."""

import json
import re
import sys

import pytest
import yaml
from programs import ROOT, run

pytestmark = pytest.mark.slow

SECONDS = 30
BYTES = 1 << 30
SLIDES, SAMPLES = 200, 50
MEASURE = """
import json, resource, subprocess, sys
status = subprocess.run(sys.argv[2:]).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
usage = {"seconds": used.ru_utime + used.ru_stime, "bytes": used.ru_maxrss * 1024}
open(sys.argv[1], "w").write(json.dumps(usage))
sys.exit(status)
"""


def widen(sheet, key, count, folder):
    """Write a sheet with `count` rows in use, each a copy of one of the paper's under a name of its own."""
    lines = (ROOT / "config" / sheet).read_text(encoding="utf-8").splitlines()
    columns, *rows = (line.split("\t") for line in lines if line.strip() and not line.startswith("#"))
    used = [row for row in (dict(zip(columns, row, strict=False)) for row in rows) if row["use"] == "yes"]
    written = ["\t".join(columns)]
    for number in range(count):
        row = {**used[number % len(used)], key: f"{key}_{number}", "group": f"group_{number}"}
        written.append("\t".join(row.get(column, "") for column in columns))
    path = folder / sheet
    path.write_text("\n".join(written) + "\n", encoding="utf-8")
    return str(path)


def plan(folder, config):
    """Dry-run everything; return jobs per rule, processor seconds (others may use the machine), and peak memory."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = ["snakemake", "--snakefile", str(ROOT / "workflow" / "Snakefile"), "--configfile", str(path)]
    command += ["--directory", str(folder / "run"), "--cores", "2", "--dry-run", "--quiet", "rules", "all"]
    # A new process counts the memory of the one that starts it as its own peak: a small one stands between this one,
    # which may have grown large in other tests, and the driver.
    measured = [sys.executable, "-c", MEASURE, str(folder / "usage.json"), *command]
    done = run(*measured)
    assert done.returncode == 0, done.stdout[-3000:]
    jobs = {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", done.stdout, re.M)}
    usage = json.loads((folder / "usage.json").read_text(encoding="utf-8"))
    return jobs, usage["seconds"], usage["bytes"]


@pytest.fixture
def paper():
    return yaml.safe_load((ROOT / "config" / "config.yaml").read_text(encoding="utf-8"))


def test_the_paper_is_planned_quickly(paper, tmp_path):
    jobs, seconds, memory = plan(tmp_path, paper)
    assert jobs["train"] == 20
    assert seconds < SECONDS
    assert memory < BYTES


def test_what_goes_beyond_the_paper_runs_when_it_is_listed(paper, tmp_path):
    assert "celldetr_plus" in paper["experiments"]
    paper["tables"]["table1"]["ours"] = ["celldetr_plus"]
    jobs, _, _ = plan(tmp_path, paper)
    assert (jobs["train"], jobs["score"], jobs["overlays"]) == (23, 25, 25)


def test_many_slides_and_samples_are_planned_quickly(paper, tmp_path):
    paper["slides"]["sheet"] = widen("slides.tsv", "slide", SLIDES, tmp_path)
    paper["xenium"]["samples"] = widen("xenium.tsv", "sample", SAMPLES, tmp_path)
    jobs, seconds, memory = plan(tmp_path, paper)
    assert jobs["extract_slide"] == SLIDES
    assert jobs["annotate_xenium"] == SAMPLES
    assert seconds < SECONDS
    assert memory < BYTES
