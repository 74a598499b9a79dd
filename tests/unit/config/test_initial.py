"""Models that experiments start from: what they need of them, and that none was trained on what is tested."""

import re
from types import SimpleNamespace

import pytest
from shipped_config import read, with_value

from celldetr.config.base import merge
from celldetr.config.workflow import Config
from celldetr.runtime.errors import ConfigError


def test_initial_models_need_what_an_experiment_takes_from_them():
    probe = {"title": "Probe", "mode": "parallel", "training": {"probe": "representation"}}
    mine = {"initial": "mine.pt", "trained_on": []}
    for start in ({"initial": "ssl_pretrain"}, {"initial": "celldetr_s"}, mine):
        Config.from_dict(with_value("experiments.probe", {**probe, **start}))
    for initial in ("imagenet", "none", "deformable_detr"):
        with pytest.raises(
            ConfigError, match=r"experiments\.probe\.training\.probe: got 'representation' with initial"
        ):
            Config.from_dict(with_value("experiments.probe", {**probe, "initial": initial}))
    for start in ({"initial": "celldetr_p"}, mine):
        Config.from_dict(with_value("experiments.st_zero_shot", start))


@pytest.mark.parametrize(
    ("name", "block", "message"),
    [
        (
            "ssl_pretrain",
            {"initial": "celldetr_p"},
            "split 2 tests on fold1, on which celldetr_p was",
        ),
        ("ssl_probe", {"initial": "mine.pt", "trained_on": ["fold3"]}, "split 3 tests on fold3, on which mine.pt"),
        (
            "ssl_pretrain",
            {"initial": "mine.pt", "trained_on": ["fold2"]},
            "split 1 tests on fold2, on which mine.pt",
        ),
        (
            "st_zero_shot",
            {"initial": "mine.pt", "trained_on": ["fold1"]},
            "split 2 tests on fold1, on which mine.pt",
        ),
        (
            "ssl_finetune",
            {"initial": "mine.pt"},
            "experiments.ssl_finetune: trained_on: missing; list what mine.pt",
        ),
        ("ssl_finetune", {"initial": "mine.pt", "trained_on": ["fold_1"]}, "trained_on: got ['fold_1'], expected"),
        ("ssl_finetune", {"initial": "mine.pt", "trained_on": ["PanNuke"]}, "trained_on: got ['PanNuke'], expected"),
        ("ssl_finetune", {"trained_on": []}, "trained_on: got initial 'ssl_pretrain', expected a model file"),
    ],
)
def test_no_model_is_tested_on_what_it_or_its_ancestors_have_seen(name, block, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Config.from_dict(with_value(f"experiments.{name}", block))


def test_models_of_the_same_split_and_of_other_data_may_be_started_from():
    Config.from_dict(with_value("experiments.celldetr_s", {"initial": "celldetr_p", "mode": "parallel"}))
    Config.from_dict(
        with_value("experiments.ssl_pretrain", {"initial": "mine.pt", "trained_on": ["slide 3", "scaffold 1"]})
    )
    for split in (1, 2):
        one_split = {"pannuke": {"splits": [split]}, "figure3": {"split": split}}
        Config.from_dict(merge(with_value("experiments.ssl_pretrain.initial", "celldetr_p"), one_split))


def test_donors_of_pretraining_slides_are_not_tested():
    samples, slides = ({"a": SimpleNamespace(group=group)} for group in ("donor1", "donor1"))
    Config.from_dict(read()).check_groups(samples, slides)  # its st_pretrain does not start from ssl_pretrain
    model = {"queries": read()["model"]["queries"]}
    start = {"st_pretrain": {"initial": "ssl_pretrain", "model": model}, "st_finetune": {"model": model}}
    config = Config.from_dict(with_value("experiments", start))
    with pytest.raises(ConfigError, match=r"st_pretrain\.initial: .* trains on slides of groups \['donor1'\]"):
        config.check_groups(samples, slides)
    config.check_groups(samples, {"a": SimpleNamespace(group="donor2")})
