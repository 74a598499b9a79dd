"""The workflow as users deploy it: partial configurations, as a module, from git, with Snakemake alone installed."""

import re
import subprocess
import tomllib

import pytest
import yaml
from programs import ROOT, run
from small_run import copy_sources, counted_jobs, small_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MODULE = """
configfile: "config.yaml"

module celldetr:
    snakefile:
        {snakefile}
    config:
        config
    {prefix}

use rule * from celldetr{name}
"""
BLOCK = """
import builtins

original = builtins.__import__


def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    # Snakemake and its plugins may import what they like; the environment may lie in the checkout.
    if name.partition(".")[0] in {names!r} and str((globals or {{}}).get("__file__")).startswith({own!r}):
        raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
    return original(name, globals, locals, fromlist, level)


builtins.__import__ = guarded
"""


@pytest.fixture
def deployed(tmp_path):
    """Write a folder that uses the workflow as a module; return a function that calls Snakemake there."""

    def call(*arguments, snakefile=f"'{ROOT}/workflow/Snakefile'", prefix="", name="", **variables):
        text = MODULE.format(snakefile=snakefile, prefix=f'prefix: "{prefix}"' if prefix else "", name=name)
        (tmp_path / "Snakefile").write_text(text, encoding="utf-8")
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(small_config()), encoding="utf-8")
        environment = {"PYTHONPATH": "", "XDG_CACHE_HOME": str(tmp_path / "cache"), **variables}
        done = run("snakemake", "--cores", 2, *arguments, cwd=tmp_path, environment=environment)
        assert done.returncode == 0, done.stdout[-4000:]
        return done.stdout

    return call


def test_a_partial_configuration_lies_over_the_paper(tmp_path):
    experiment = {"title": "Mine", "mode": "sequential", "model": {"representation": {"self_attention": "none"}}}
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump({"experiments": {"mine": experiment}}), encoding="utf-8")
    given = ("--configfile", path, "--directory", tmp_path, "--cores", 1, "--dry-run")
    done = run("snakemake", *given, "results/scores/mine/split1.tsv")
    assert done.returncode == 0, done.stdout[-4000:]
    jobs = counted_jobs(done.stdout)
    assert (jobs["train"], jobs["predict"], jobs["score"], jobs["convert_pannuke"]) == (1, 1, 1, 3)


def test_rules_of_a_module_run_in_another_folder(deployed, tmp_path):
    planned = counted_jobs(deployed("--dry-run"))
    assert planned["train"] == 6
    deployed("results/references/drawn.h5ad")
    assert (tmp_path / "results" / "references" / "drawn.h5ad").is_file()


def test_a_module_with_a_prefix_and_renamed_rules(deployed):
    output = deployed("--dry-run", prefix="he", name=" as he_*")
    assert {"he_train", "he_table", "he_make_example"} <= set(counted_jobs(output))
    summary = deployed("--summary", prefix="he", name=" as he_*")
    outputs = [
        line.split("\t")[0] for line in summary[summary.index("output_file\t") :].splitlines()[1:] if "\t" in line
    ]
    assert "he/results/table1.tsv" in outputs
    assert all(path.startswith("he/") for path in outputs)


def test_a_module_from_github(deployed, tmp_path):
    """As snakedeploy writes it; git finds the repository in a folder instead of at GitHub."""
    source = tmp_path / "lab" / "celldetr"
    source.mkdir(parents=True)
    copy_sources(source)
    git = ["git", "-C", str(source), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "-q"], ["add", "--all"], ["commit", "-qm", "all"], ["tag", "v1"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "gitconfig").write_text(f'[url "file://{tmp_path}/"]\n\tinsteadOf = https://github.com/\n')
    deployed(
        "results/references/drawn.h5ad",
        snakefile="github('lab/celldetr', path='workflow/Snakefile', tag='v1')",
        GIT_CONFIG_GLOBAL=str(tmp_path / "gitconfig"),
        GITHUB_TOKEN="",
    )
    assert (tmp_path / "results" / "references" / "drawn.h5ad").is_file()


def without(folder, names):
    """Environment in which some packages cannot be imported."""
    folder.mkdir()
    own = (f"{ROOT}/scripts/", f"{ROOT}/workflow/")
    (folder / "sitecustomize.py").write_text(BLOCK.format(names=sorted(names), own=own), encoding="utf-8")
    return {"PYTHONPATH": str(folder)}


def test_planning_needs_snakemake_and_pydantic_alone(tmp_path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in project["dependencies"]}
    names = names - {"pydantic", "pyyaml", "requests", "jinja2"} | {"sklearn", "PIL", "openslide"}  # Snakemake's own
    assert {"numpy", "pandas", "torch", "zarr"} <= names
    environment = without(tmp_path / "site", names)
    for arguments in (("--dry-run", "--cores", 1), ("--lint",)):
        done = run("snakemake", *arguments, "--directory", tmp_path, environment=environment)
        assert done.returncode == 0, done.stdout[-4000:]


def test_missing_pydantic_is_named_with_its_remedy(tmp_path):
    done = run("snakemake", "-n", "--directory", tmp_path, environment=without(tmp_path / "site", {"pydantic"}))
    assert done.returncode != 0
    assert "needs pydantic to check the configuration; install it there: pip install 'pydantic>=2.10'" in done.stdout
    assert "Traceback" not in done.stdout
