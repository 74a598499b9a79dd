"""Planning the workflow stays quick and small, for the paper and for many more samples than it has."""

import os
import re
import subprocess

import pytest
import yaml
from conftest import ENVIRONMENT, ROOT

pytestmark = pytest.mark.slow

SECONDS = 30
BYTES = 1 << 30
SLIDES, SAMPLES = 200, 50


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
    with (folder / "plan.txt").open("w") as output:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=output, stderr=output)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    text = (folder / "plan.txt").read_text(encoding="utf-8")
    assert status == 0, text[-3000:]
    jobs = {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", text, re.M)}
    return jobs, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


@pytest.fixture
def paper():
    return yaml.safe_load((ROOT / "config" / "config.yaml").read_text(encoding="utf-8"))


def test_the_paper_is_planned_quickly(paper, tmp_path):
    jobs, seconds, memory = plan(tmp_path, paper)
    assert jobs["train"] == 20
    assert seconds < SECONDS
    assert memory < BYTES


def test_many_slides_and_samples_are_planned_quickly(paper, tmp_path):
    paper["slides"]["sheet"] = widen("slides.tsv", "slide", SLIDES, tmp_path)
    paper["xenium"]["samples"] = widen("xenium.tsv", "sample", SAMPLES, tmp_path)
    jobs, seconds, memory = plan(tmp_path, paper)
    assert jobs["extract_slide"] == SLIDES
    assert jobs["annotate_xenium"] == SAMPLES
    assert seconds < SECONDS
    assert memory < BYTES
