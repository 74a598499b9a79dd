"""The workflow on a real Slurm: what jobs ask for, where logs are, that nothing is lost when jobs or drivers end."""

import json
import os
import re
import shutil
import signal

import pytest
from on_slurm import Workflow, ask, end, jobs, wait_for
from small_run import FEWEST, small_config

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]

MODEL = "results/models/celldetr_p/split1/model.pt"
GOING_ON = re.compile(r"continuing from .*last\.ckpt at step (\d+)")
STOPPED = re.compile(r"stopped by SIGUSR1 after step (\d+)")


@pytest.fixture(scope="module")
def finished(cluster, tmp_path_factory):
    """Make the raw files here, as a login node would get them, and all the rest on the cluster."""
    workflow = Workflow(tmp_path_factory.mktemp("finished"), accounting=cluster)
    workflow("--until", "download_pannuke", "download_slide", "download_slide_nuclei", local=True)
    workflow.output = workflow("all", "results/slides/split.tsv")
    return workflow


@pytest.fixture
def unfinished(finished, tmp_path):
    """All that comes before training is there, and a training run of more epochs is asked for."""
    shutil.copytree(finished.folder, tmp_path, dirs_exist_ok=True, symlinks=True)
    shutil.rmtree(tmp_path / "results" / "models")
    shutil.rmtree(tmp_path / ".snakemake" / "slurm_logs")
    workflow = Workflow(tmp_path)
    workflow.config["training"]["epochs"] = 60
    yield workflow
    for number, job in jobs().items():
        if job["WorkDir"] == str(tmp_path) and job["JobState"] in ("PENDING", "RUNNING"):
            ask("scancel", number)


def of(workflow):
    """Jobs of the last driver of a folder, by what they do."""
    mine = {number: job for number, job in jobs().items() if job["WorkDir"] == str(workflow.folder)}
    return {job["Comment"]: job | {"number": number} for number, job in mine.items()}


def log_of(workflow):
    lines = (workflow.folder / MODEL).with_name("log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def every_epoch_once(workflow):
    """Tell whether each epoch was trained to its end once, with the 5 steps that an epoch has."""
    epochs = workflow.config["training"]["epochs"]
    return [(line["epoch"], line["step"]) for line in log_of(workflow)] == [(n, 5 * n) for n in range(1, epochs + 1)]


def job_with(workflow, pattern, after=0):
    """Wait until the log of a training job says something; return the number of the job and what was found."""

    def look():
        found = {number: pattern.search(text) for number, text in workflow.train_logs().items() if number > after}
        return next(((number, match) for number, match in found.items() if match), None)

    return look


def newer(path):
    """Return a function that tells whether a file was written anew since now."""
    before = path.stat().st_mtime_ns
    return lambda: path.stat().st_mtime_ns > before


def test_jobs_ask_for_what_they_need(finished):
    asked = of(finished)
    with_gpu = {
        name for name, job in asked.items() if "gres/gpu=1" in job["TRES"] or "gpu:1" in job.get("TresPerJob", "")
    }
    assert with_gpu == {
        "rule_train_wildcards_celldetr_p_1",
        "rule_predict_wildcards_celldetr_p_1",
        "rule_detect_slide_wildcards_drawn_slide_2",
    }
    train = asked["rule_train_wildcards_celldetr_p_1"]
    assert "mem=32000M" in train["TRES"]
    assert train["TimeLimit"] == "2-00:00:00"
    assert train["Requeue"] == "1"
    predict = asked["rule_predict_wildcards_celldetr_p_1"]
    assert "mem=16000M" in predict["TRES"]
    assert predict["TimeLimit"] == "02:00:00"
    assert {job["JobState"] for job in asked.values()} == {"COMPLETED"}


def test_rules_share_jobs(finished):
    """Of 14 rules that run here, conversion and split, scores and tables, and the slides are one job each."""
    asked = of(finished)
    groups = {re.sub(r"_wildcards.*", "", name) for name in asked}
    assert len(asked) == 8, sorted(asked)
    assert any("pannuke" in name for name in groups)
    for table in ("table1.tsv", "slides/split.tsv"):
        assert (finished.folder / "results" / table).is_file()


def test_logs_lie_where_they_should(finished):
    logs = finished.folder / "results" / "logs"
    for name in ("train/celldetr_p_split1.log", "convert_pannuke/fold1.log", "score/celldetr_p_split1.log"):
        assert (logs / name).is_file()
    assert "wrote results/models/celldetr_p" in (logs / "train" / "celldetr_p_split1.log").read_text(encoding="utf-8")
    for job in of(finished).values():
        assert job["StdOut"].startswith(str(finished.folder / ".snakemake" / "slurm_logs"))
        assert os.path.getsize(job["StdOut"]) > 0


def test_a_training_run_survives_requeue_cancel_and_a_killed_driver(unfinished):
    driver = unfinished.start(MODEL)
    checkpoint = unfinished.folder / MODEL.replace("model.pt", "checkpoints/last.ckpt")
    try:
        wait_for(checkpoint.is_file, "a checkpoint", driver)
        first = max(unfinished.train_logs())
        ask("scontrol", "requeue", first)
        wait_for(lambda: jobs()[first]["JobState"] == "PENDING", "the job to be pending", driver)
        ask("scontrol", "update", f"jobid={first}", "StartTime=now")
        number, requeued = wait_for(job_with(unfinished, GOING_ON), "the requeued job to go on", driver)
        wait_for(newer(checkpoint), "progress of the requeued job", driver)
        assert number == first
        assert jobs()[first]["Restarts"] == "1"

        ask("scancel", first)
        second, cancelled = wait_for(job_with(unfinished, GOING_ON, after=first), "the next attempt", driver)
        assert int(cancelled[1]) > int(requeued[1]) > 0
        assert "mem=62.50G" in jobs()[second]["TRES"], "twice the 32000 MB of the first attempt"
        wait_for(newer(checkpoint), "progress of the next attempt", driver)

        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    finally:
        end(driver)
    run = re.search(r"SLURM run ID: (\S+)", unfinished.driver_log())[1]
    ask("scancel", f"--name={run}")
    wait_for(lambda: not ask("squeue", "-h", f"--name={run}").strip(), "the cancelled jobs to end")
    assert not (unfinished.folder / MODEL).exists()
    unfinished("--unlock")
    output = unfinished(MODEL)
    assert set(re.findall(r"^(\w+) +\d+$", output, re.M)) == {"train", "total"}
    _, again = job_with(unfinished, GOING_ON, after=second)()
    assert int(again[1]) > int(cancelled[1])
    assert every_epoch_once(unfinished)


def test_two_processes_stop_before_the_time_limit_and_go_on(finished, unfinished):
    """The second process changes neither the number of steps nor what a checkpoint is good for."""
    epochs = round(80 / log_of(finished)[-1]["seconds"])  # longer than the first attempt, however fast it is here
    unfinished.config["training"] |= {"epochs": max(epochs, 60), "gpus": 2}
    limit = "--signal=USR1@45"  # Slurm looks every 30 s: between 45 and 75 s after the start
    driver = unfinished.start(
        MODEL, "--set-resources", "train:runtime=2 if attempt == 1 else 60", f"train:slurm_extra='{limit}'"
    )
    try:
        first, stopped = wait_for(job_with(unfinished, STOPPED), "the signal before the time limit", driver)
        assert jobs()[first]["TimeLimit"] == "00:02:00"
        assert "gpu:2" in jobs()[first]["TresPerJob"]
        _, continued = wait_for(job_with(unfinished, GOING_ON, after=first), "the next attempt", driver)
        assert continued[1] == stopped[1]
        driver.wait(timeout=600)
    finally:
        end(driver)
    assert driver.returncode == 0, unfinished.driver_log()[-4000:]
    assert every_epoch_once(unfinished)
    provenance = json.loads((unfinished.folder / MODEL).with_name("provenance.json").read_text(encoding="utf-8"))
    assert provenance["processes"] == 2


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("cluster", [True], indirect=True, ids=["accounting"])
def test_the_whole_workflow_runs_on_a_cluster_with_accounting(cluster, tmp_path):
    """From the raw files to all tables, the three stages of training included."""
    workflow = Workflow(tmp_path, accounting=cluster)
    workflow.config = small_config(FEWEST)
    workflow("all", seconds=1500)
    for number in (1, 2, 3):
        assert (tmp_path / "results" / f"table{number}.tsv").is_file()
    states = ask("sacct", "-X", "-n", "-P", "-o", "State").split()
    assert set(states) == {"COMPLETED"}
    trained = [job for job in of(workflow) if "rule_train" in job]
    assert len(trained) == 3
    assert any("xenium" in job for job in of(workflow)), "registration, cell types and patches of a sample share a job"
