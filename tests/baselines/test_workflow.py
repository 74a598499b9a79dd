"""The rules of the other systems on the smallest example: from patches to a row of Table 1 and a picture."""

import json

import pandas as pd
import pytest
import yaml
from programs import ROOT, run
from small_run import counted_jobs, small_config

from celldetr.evaluation.predictions import read_predictions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_system_is_trained_scored_and_drawn(tmp_path):
    config = small_config(["celldetr_p", "hover_net"])
    config |= dict.fromkeys(("figure3", "cells", "slides", "xenium"))
    config["tables"] = {"table1": config["tables"]["table1"]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command = ("snakemake", "--snakefile", ROOT / "workflow" / "Snakefile", "--configfile", tmp_path / "config.yaml")
    wanted = ("results/table1.tsv", "results/figures/overlays_hover_net_split1.png")
    curves = "results/models/hover_net/split1/curves.png"
    done = run(*command, "--directory", tmp_path, "--cores", 2, *wanted, curves)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "Left out" not in done.stdout
    jobs = counted_jobs(done.stdout)
    assert {name: jobs[name] for name in jobs if name.startswith(("train", "predict"))} == dict.fromkeys(
        ("train", "train_segmentation", "predict", "predict_segmentation"), 1
    )
    results = tmp_path / "results"
    assert all((tmp_path / name).stat().st_size for name in (*wanted, curves))
    rows = pd.read_csv(results / "table1.tsv", sep="\t", keep_default_na=False)
    row = rows[(rows["source"] == "measured") & (rows["experiment"] == "hover_net")].squeeze()
    assert (row["system"], row["group"]) == ("HoverNet", "Others")
    assert "panoptic quality of its masks: bPQ" in row["note"]
    provenance = json.loads((results / "models" / "hover_net" / "split1" / "provenance.json").read_text())
    assert provenance["settings"]["segmentation"]["system"] == "hover_net"
    found = read_predictions(results / "predictions" / "hover_net" / "split1.parquet", patch_size=64)
    assert (found.metadata["mode"], found.metadata["trained_on"]) == ("segmentation", ["fold1", "fold3"])
    assert found.masks is not None
