"""Systems that segment nuclei: settings that do not fit them, and whether their packages are there."""

import subprocess
import sys

import pytest
from shipped_config import read

from celldetr.config.base import merge
from celldetr.config.classes import PANNUKE_CLASSES
from celldetr.config.segmentation import PACKAGES
from celldetr.config.workflow import Config
from celldetr.runtime.errors import ConfigError

ASK = """
import sys
from celldetr.config.segmentation import missing_packages
sys.path[:] = sys.argv[1:]
print(*missing_packages(), "torch" in sys.modules)
"""


def test_missing_packages_are_found_without_importing_any(tmp_path):
    for name in PACKAGES[::2]:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('this package was imported')", encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", ASK, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [*PACKAGES[1::2], "False"]


SEGMENTS = {"title": "T", "stage": "segmentation", "initial": "none", "segmentation": {"system": "hover_net"}}


@pytest.mark.parametrize(
    ("block", "others", "message"),
    [
        ({"mode": "parallel"}, {}, "experiments.other.mode: got a value, but stage segmentation with hover_net does"),
        ({"model": {"d_model": 64}}, {}, "experiments.other.model: got a value"),
        ({"training": {"losses": {"l1": 1.0}}}, {}, "experiments.other.training.losses: got a value"),
        ({"training": {"compile": True}}, {}, "experiments.other.training.compile: got a value"),
        ({"segmentation": None}, {}, "segmentation: got no block with stage segmentation"),
        ({"stage": "supervised", "mode": "parallel"}, {}, "segmentation: got a block with stage supervised"),
        ({"segmentation": {"schedule": "steps"}}, {}, "steps: got {} with schedule steps"),
        ({"segmentation": {"system": "hovernet"}}, {}, "segmentation.system: got 'hovernet', expected 'mask_rcnn'"),
        ({"initial": "celldetr_s"}, {}, "initial: got 'celldetr_s', expected one of"),
        ({"initial": "imagenet", "segmentation": {"size": "small"}}, {}, r"\['none'\] for hover_net of size small"),
        ({"initial": "imagenet", "segmentation": {"system": "micro_net"}}, {}, r"\['none'\] for micro_net"),
        ({"initial": "imagenet", "segmentation": {"system": "cellvit_256"}}, {}, "for cellvit_256 of size paper"),
        ({"segmentation": {"score_threshold": 0.3}}, {}, "score_threshold: got a value, but"),
        ({"segmentation": {"decay": 0.9}}, {}, "segmentation.decay: got a value"),
        ({"segmentation": {"optimizer": "sgd", "betas": [0.9, 0.9]}}, {}, "segmentation.betas: got a value"),
        ({"segmentation": {"frozen_epochs": 101}}, {}, "frozen_epochs: got 101, expected at most 100"),
        ({"segmentation": {"schedule": "steps", "steps": {100: 0.1}}}, {}, r"epochs \[100\], expected 0 to 99"),
        ({}, {"experiments.mine": {"title": "M", "mode": "baseline", "initial": "other"}}, "trains another system"),
        ({}, {"tables.table1.experiments": ["other"]}, "that are tested on PanNuke"),
        ({}, {"tables.table1.others": ["celldetr_s"]}, "expected experiments of stage segmentation"),
        ({}, {"figure3.experiments": ["other"]}, "figure3.experiments: got .*other"),
        ({}, {"slides.detection.model": "other"}, "slides.detection.model: got .*other"),
        ({}, {"cells": {"model": "other", "split": 1}}, "cells.model: got .*other"),
        ({}, {"weights.other": {"urls": ["https://x.org/y"]}}, "weights: got .*other.*names of experiments"),
        ({}, {"weights.resnet50": {"urls": ["https://x.org/y"]}}, "weights: got .*resnet50.*of `imagenet`"),
    ],
)
def test_segmentation_is_refused_where_it_does_not_fit(block, others, message):
    values = merge(read(), {"experiments": {"other": merge(SEGMENTS, block)}})
    for path, value in others.items():
        for key in reversed(path.split(".")):
            value = {key: value}
        values = merge(values, value)
    with pytest.raises(ConfigError, match=message):
        Config.from_dict(values)


def test_segmentation_shares_the_recipe():
    block = merge(SEGMENTS, {"training": {"epochs": 7}})
    config = Config.from_dict(
        merge(read(), {"experiments": {"other": block}, "tables": {"table1": {"others": ["other"]}}})
    )
    made = config.experiment("other")
    assert (made.training.epochs, made.training.batch_size, made.classes) == (
        7,
        config.training.batch_size,
        PANNUKE_CLASSES,
    )
    unread = {"training": {"losses": {"l1": 1.0}, "matching": {"l1": 1.0}, "compile": True}}
    assert Config.from_dict(merge(read(), unread | {"experiments": {"other": block}})).experiment("other") == made
    assert config.splits("other") == config.pannuke.splits
    assert config.tables["table1"].systems[0] == "other"
