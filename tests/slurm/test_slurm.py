"""The workflow on a real Slurm: what jobs ask for, where logs are, that nothing is lost when jobs or drivers end."""

import json
import os
import re
import shutil
import signal

import cluster as slurm
import pytest
import yaml
from on_slurm import Workflow, ask, end, jobs, wait_for
from small_run import FEWEST, OTHERS, small_config

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1200)]

MODEL = "results/models/celldetr_p/split1/model.pt"
GOING_ON = re.compile(r"continuing from .*last\.ckpt at step (\d+)")
STOPPED = re.compile(r"stopped by SIGUSR1 after step (\d+)")
WITH_GPU = {
    *("rule_train", "rule_predict", "rule_attention", "rule_frozen_features", "rule_similarity", "rule_detect_slide"),
    "rule_find_cells",
    *(f"rule_{verb}_segmentation" for verb in ("train", "predict") if OTHERS),
}
GROUPS = {
    *("rule_pannuke_convert_pannuke_split_pannuke", "rule_slides_extract_slide", "rule_tables_score_table"),
    *("rule_xenium_annotate_xenium_extract_xenium", "rule_pictures_learning_curves_overlays"),
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Start a cluster, and stop it after the tests."""
    try:
        slurm.check()
    except slurm.ClusterError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("cluster")
    slurm.start(folder)
    yield
    slurm.stop(folder)


@pytest.fixture(scope="module")
def complete(cluster, finished, tmp_path_factory):
    """All but the raw files and the figures made anew on the cluster, the three stages of training included."""
    folder = tmp_path_factory.mktemp("complete") / "work"
    shutil.copytree(finished.work, folder, symlinks=True)
    for path in (folder / "results").iterdir():
        if path.name != "raw":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / "config.yaml").write_text(yaml.safe_dump(small_config(FEWEST)), encoding="utf-8")
    workflow = Workflow(folder, folder.parent / "tools")
    workflow("all", "--omit-from", "figure3", "figure4b", "figure4c", "figure5a", "figure5b")
    return workflow


@pytest.fixture
def unfinished(complete, tmp_path):
    """All that comes before training is there, a longer training run is asked for, and `sacct` does not work."""
    folder = tmp_path / "work"
    shutil.copytree(complete.folder, folder, symlinks=True)
    shutil.rmtree(folder / "results" / "models")
    shutil.rmtree(folder / ".snakemake" / "slurm_logs")
    workflow = Workflow(folder, tmp_path / "tools", accounting=False)
    yield workflow
    for number, job in jobs().items():
        if job["WorkDir"] == str(folder) and job["JobState"] in ("PENDING", "RUNNING"):
            ask("scancel", number)


def of(workflow):
    """Jobs of the last driver of a folder, by what they do."""
    mine = {number: job for number, job in jobs().items() if job["WorkDir"] == str(workflow.folder)}
    return {job["Comment"]: job | {"number": number} for number, job in mine.items()}


def log_of(workflow):
    lines = (workflow.folder / MODEL).with_name("log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def every_epoch_once(complete, workflow, epochs):
    """Tell whether each epoch was trained to its end once, with the steps that an epoch has."""
    steps = log_of(complete)[0]["step"]
    return [(line["epoch"], line["step"]) for line in log_of(workflow)] == [
        (n, steps * n) for n in range(1, epochs + 1)
    ]


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


def test_the_whole_workflow_runs_on_a_cluster_with_accounting(complete):
    for number in (1, 2, 3):
        assert (complete.folder / "results" / f"table{number}.tsv").is_file()
    assert set(ask("sacct", "-X", "-n", "-P", "-o", "State").split()) == {"COMPLETED"}
    assert len([job for job in of(complete) if "rule_train" in job]) == 3 + len(OTHERS)


def test_jobs_ask_for_what_they_need(complete):
    asked = of(complete)
    with_gpu = {
        name for name, job in asked.items() if "gres/gpu=1" in job["TRES"] or "gpu:1" in job.get("TresPerJob", "")
    }
    assert {name.split("_wildcards")[0] for name in with_gpu} == WITH_GPU
    assert {name for name in asked if name.split("_wildcards")[0] in WITH_GPU} == with_gpu
    train = asked["rule_train_wildcards_celldetr_p_1"]
    assert "mem=32000M" in train["TRES"]
    assert train["TimeLimit"] == "2-00:00:00"
    assert train["Requeue"] == "1"
    predict = asked["rule_predict_wildcards_celldetr_p_1"]
    assert "mem=16000M" in predict["TRES"]
    assert predict["TimeLimit"] == "02:00:00"
    assert {job["JobState"] for job in asked.values()} == {"COMPLETED"}


def test_rules_share_jobs(complete):
    names = {name.split("_wildcards")[0] for name in of(complete)}
    assert names >= GROUPS
    alone = ("convert_pannuke", "split_pannuke", "annotate_xenium", "extract_slide", "score", "table", "overlays")
    assert not names & {f"rule_{rule}" for rule in alone}


def test_logs_lie_where_they_should(complete):
    logs = complete.folder / "results" / "logs"
    for name in ("train/celldetr_p_split1.log", "convert_pannuke/fold1.log", "score/celldetr_p_split1.log"):
        assert (logs / name).is_file()
    assert "wrote results/models/celldetr_p" in (logs / "train" / "celldetr_p_split1.log").read_text(encoding="utf-8")
    for job in of(complete).values():
        assert job["StdOut"].startswith(str(complete.folder / ".snakemake" / "slurm_logs"))
        assert os.path.getsize(job["StdOut"]) > 0


def test_a_job_that_refused_its_input_is_submitted_again_but_does_not_work_again(complete, tmp_path):
    folder = tmp_path / "work"
    shutil.copytree(complete.folder, folder, symlinks=True)
    archive = folder / "results" / "raw" / "pannuke" / "fold_1.zip"
    content = archive.read_bytes()
    archive.unlink()
    archive.write_bytes(content[: len(content) // 2])
    workflow = Workflow(folder, tmp_path / "tools")
    driver = workflow.start("results/pannuke/fold1_summary.tsv")
    try:
        assert driver.wait(timeout=300)
    finally:
        end(driver)
    paths = sorted((folder / ".snakemake" / "slurm_logs").rglob("*.log"), key=lambda path: int(path.stem))
    refusals = [text for text in (path.read_text(encoding="utf-8") for path in paths) if "error: " in text]
    assert all("fold_1.zip: " in text for text in refusals)
    assert ["Refused by an earlier attempt" in text for text in refusals] == [False, True, True]


def test_a_training_run_survives_requeue_cancel_and_a_killed_driver(complete, unfinished):
    epochs = 120  # of about 0.2 s
    unfinished.configure(epochs=epochs)
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
    assert every_epoch_once(complete, unfinished, epochs)


def test_two_processes_stop_before_the_time_limit_and_go_on(complete, unfinished):
    """The second process changes neither the number of steps nor what a checkpoint is good for."""
    epochs = 480  # longer than Slurm takes to look at the time limit: every 30 s
    unfinished.configure(epochs=epochs, gpus=2)
    limit = "--signal=USR1@100"
    driver = unfinished.start(
        MODEL, "--set-resources", "train:runtime=30 if attempt == 1 else 60", f"train:slurm_extra='{limit}'"
    )
    checkpoint = unfinished.folder / MODEL.replace("model.pt", "checkpoints/last.ckpt")
    try:
        wait_for(checkpoint.is_file, "a checkpoint", driver)
        running = max(unfinished.train_logs())
        assert "gpu:2" in jobs()[running]["TresPerJob"]
        assert jobs()[running]["TimeLimit"] == "00:30:00"
        ask("scontrol", "update", f"jobid={running}", "TimeLimit=3")
        first, stopped = wait_for(job_with(unfinished, STOPPED), "the signal before the time limit", driver)
        _, continued = wait_for(job_with(unfinished, GOING_ON, after=first), "the next attempt", driver)
        assert first == running
        assert continued[1] == stopped[1]
        driver.wait(timeout=600)
    finally:
        end(driver)
    assert driver.returncode == 0, unfinished.driver_log()[-4000:]
    assert every_epoch_once(complete, unfinished, epochs)
    provenance = json.loads((unfinished.folder / MODEL).with_name("provenance.json").read_text(encoding="utf-8"))
    assert provenance["processes"] == 2
