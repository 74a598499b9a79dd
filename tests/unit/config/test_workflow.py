"""The configuration: what is refused, and how experiments are put together."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from celldetr.config.base import merge
from celldetr.config.classes import PANNUKE_CLASSES, ST_TYPES
from celldetr.config.experiment import Experiment
from celldetr.config.workflow import Config, load_config, schemas
from celldetr.runtime.errors import ConfigError

ROOT = Path(__file__).parents[3]
FILES = sorted([ROOT / "config" / "config.yaml", *ROOT.glob("config/*/config.yaml")])


def read(path=FILES[0]):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def with_value(path, value):
    """Lay a value over the shipped configuration at a dotted path."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return merge(read(), value)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_shipped_files_are_valid_for_the_classes_and_for_the_schema(path):
    Config.from_dict(read(path))
    jsonschema.validate(read(path), json.loads(schemas()["config.schema.json"]))


def test_shipped_configuration_is_complete_and_states_the_defaults():
    shipped = read()
    folds = {name: source for name, source in shipped["pannuke"].items() if name.startswith("fold")}
    blocks = {"pannuke": folds, "imagenet": shipped["imagenet"], "xenium": {}, "slides": {}}
    defaults = Config.from_dict({**blocks, "experiments": shipped["experiments"]}).to_dict()
    for name in set(shipped) - {"experiments", "tables", "figure3", "imagenet"}:
        left_out = dict.fromkeys(folds) if name == "pannuke" else {}
        assert merge({"": shipped[name]}, {"": left_out}) == merge({"": defaults[name]}, {"": left_out}), name


def test_a_partial_configuration_lies_over_the_paper():
    experiment = {"title": "Mine", "mode": "sequential", "initial": "celldetr_s"}
    figures = {"figure3": None}
    config = load_config({"seed": 7, "pannuke": {"splits": [2]}, "experiments": {"mine": experiment}, **figures}, ROOT)
    paper = load_config({}, ROOT)
    assert paper == Config.from_dict(read())
    assert set(config.experiments) == {*paper.experiments, "mine"}
    assert (config.seed, config.pannuke.splits, config.pannuke.fold1) == (7, (2,), paper.pannuke.fold1)
    assert (config.figure3, config.model) == (None, paper.model)


NO_XENIUM = {"xenium": None, "tables": {"table3": None}}


def test_null_removes_a_block_of_the_paper():
    gone = ("st_pretrain", "st_zero_shot", "st_finetune")
    config = load_config({**NO_XENIUM, "experiments": dict.fromkeys(gone)}, ROOT)
    assert config.xenium is None
    assert not set(gone) & set(config.experiments)
    assert set(config.tables) == {"table1", "table2"}
    with pytest.raises(ConfigError, match="experiments.st_pretrain.stage: got 'st', but the block xenium is missing"):
        load_config(NO_XENIUM, ROOT)


def test_base_none_stands_alone():
    example = read(ROOT / "config" / "example" / "config.yaml")
    assert load_config(example, ROOT) == Config.from_dict(example)
    with pytest.raises(ConfigError, match="pannuke: missing"):
        load_config({"base": "none", "experiments": read()["experiments"]}, ROOT)
    with pytest.raises(ConfigError, match="base: got 'all', expected 'paper' or 'none'"):
        load_config({"base": "all"}, ROOT)


RECIPES = {  # paper, table 1 and 4.3 to 4.4: mode, class loss, epochs, learning rates, warm-up, queries
    "deformable_detr": ("baseline", 1.6, 100, 8e-5, 8e-6, 600, 900),
    "celldetr_s": ("sequential", 1.6, 100, 8e-5, 8e-6, 600, 900),
    "celldetr_p": ("parallel", 3.2, 100, 8e-5, 8e-6, 600, 900),
    "ssl_pretrain": ("parallel", 1.6, 30, 1e-4, 1e-5, 5000, 900),
    "ssl_finetune": ("parallel", 3.2, 80, 3e-5, 3e-6, 600, 900),
    "st_pretrain": ("parallel", 3.2, 20, 1e-4, 1e-5, 600, 400),
    "st_finetune": ("parallel", 3.2, 80, 3e-5, 3e-6, 600, 400),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_those_of_the_paper(name):
    found = Config.from_dict(read()).experiment(name)
    recipe = found.training
    rates = (recipe.lr, recipe.backbone_lr, recipe.warmup_steps)
    assert (found.model.mode, recipe.losses.classes, recipe.epochs, *rates, found.model.queries) == RECIPES[name]
    assert recipe.matching.to_dict() == {"nucleus": 2.0, "l1": 5.0, "giou": 2.0}
    assert recipe.losses.nucleus == (1.0 if name == "ssl_pretrain" else 2.0)
    assert found.model.classes == {"st": ST_TYPES, "ssl": ()}.get(found.stage, PANNUKE_CLASSES)
    noise = (0.6, 0.1, 0.3) if name == "st_pretrain" else (0.0, 0.1, 0.4)
    assert (recipe.noise.share, recipe.noise.low, recipe.noise.high) == noise
    assert (recipe.augmentation.flip, recipe.augmentation.hed) == ((0, 1) if found.stage in ("st", "ssl") else (0.5, 0))


def test_overrides_reach_their_experiment_alone():
    config = Config.from_dict(with_value("experiments.celldetr_s.training.noise.share", 0.6))
    noise = config.experiment("celldetr_s").training.noise
    assert (noise.share, noise.high) == (0.6, 0.4)
    assert config.experiment("celldetr_p") == Config.from_dict(read()).experiment("celldetr_p")


def test_settings_survive_json():
    experiment = Config.from_dict(read()).experiment("celldetr_p")
    assert Experiment.from_dict(json.loads(json.dumps(experiment.to_dict()))) == experiment


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("training.epocs", 3, "training.epocs: unknown key; did you mean 'epochs'?"),
        ("sead", 3, "sead: unknown key; did you mean 'seed'?"),
        (
            "training.lr",
            "1e-4",
            "training.lr: got '1e-4', expected a valid number; YAML reads 1e-4 as text: write 1.0e-4",
        ),
        ("training.lr", -1, "training.lr: got -1, expected greater than 0"),
        ("training.epochs", 1.5, "training.epochs: got 1.5, expected"),
        ("training.epochs", True, "training.epochs: got True, expected a valid integer"),
        ("training.gpus", 3, "batch_size: got 16, expected a multiple of gpus"),
        ("training.augmentation.blur_kernel", 8, "blur_kernel: got 8, expected an odd number"),
        ("training.noise.low", 0.9, "low: got 0.9, expected at most high"),
        ("model.heads", 7, "d_model: got 256, expected a multiple of heads"),
        ("model.backbone.stages", [2, 1], "stages: got [2, 1], expected increasing stages"),
        ("experiments.celldetr_s.mode", "serial", "experiments.celldetr_s.mode: got 'serial', expected 'baseline'"),
        ("experiments.celldetr_s.model.d_modell", 9, "experiments.celldetr_s.model.d_modell: unknown key"),
        ("experiments.celldetr_s.model.backbone.norm", "group", "experiments.celldetr_s.initial: got 'imagenet'"),
        ("experiments.celldetr_s.training.gpus", 5, "experiments.celldetr_s.training: batch_size: got 16"),
        ("tables.table1.experiments", ["celldetr_x"], "expected names of experiments"),
        ("tables.table1.ours", ["celldetr_x"], "tables.table1.ours: got ['celldetr_x'], expected names of experiments"),
        ("tables.table1.ours", ["celldetr_s"], "tables.table1.ours: got ['celldetr_s'], which are in experiments too"),
        ("figure3.split", 4, "figure3.split: got 4, expected less than or equal to 3"),
        ("pannuke.splits", [1, 5], "pannuke.splits.1: got 5"),
        ("experiments.st_finetune.initial", "st_pretran", "experiments.st_finetune.initial: got 'st_pretran'"),
        ("experiments.st_finetune.initial", "st_zero_shot", "initial: got 'st_zero_shot', which trains no model"),
        ("experiments.st_pretrain.initial", "st_finetune", "expected no circle"),
        (
            "experiments.st_finetune.model.queries",
            300,
            "st_finetune.model: got other queries than experiment st_pretrain",
        ),
        (
            "experiments.ssl_probe.model.representation.positions",
            True,
            "ssl_probe.model: got other representation than experiment ssl_pretrain",
        ),
        (
            "experiments.ssl_pretrain.model.representation.positions",
            True,
            "experiments.ssl_pretrain.model.representation.positions: got True, expected false",
        ),
        ("experiments.st_zero_shot.mode", "parallel", "stage: got zero_shot with ['mode'], expected none"),
        ("experiments.st_zero_shot.initial", "imagenet", "initial: got 'imagenet', expected an experiment or a model"),
        ("experiments.celldetr_s.mode", None, "experiments.celldetr_s: mode: missing"),
        ("tables.table3.experiments", ["st_pretrain"], "expected experiments that are tested on PanNuke"),
        ("xenium", None, "experiments.st_pretrain.stage: got 'st', but the block xenium is missing"),
        ("xenium.split.train", 0.5, "xenium.split: train, val, test: got 0.5, 0.1, 0.1"),
        ("pannuke.fold1.sha256", "abc", "pannuke.fold1.sha256: got 'abc'"),
        ("pannuke.fold1.urls", [], "pannuke.fold1.urls: got []"),
        ("evaluation.score", "sum", "evaluation.score: got 'sum', expected 'both_thresholds', 'class' or 'product'"),
    ],
)
def test_mistakes_are_named_with_their_key(path, value, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Config.from_dict(with_value(path, value))


def test_missing_blocks_are_all_named():
    with pytest.raises(ConfigError) as error:
        Config.from_dict({"experiments": read()["experiments"]})
    assert {line.split(":")[0] for line in str(error.value).splitlines()} == {"pannuke", "imagenet"}


def test_every_setting_is_read_somewhere():
    """Each key occurs as an attribute or a string outside the classes that define the settings."""
    files = [*ROOT.glob("scripts/**/*.py"), *ROOT.glob("workflow/**/*.smk")]
    text = "\n".join(
        path.read_text(encoding="utf-8")
        for path in files
        if path.parent.name != "config" or path.name == "workflow.py"  # it combines the blocks
    )
    schema = json.loads(schemas()["config.schema.json"])
    blocks = [schema, *schema["$defs"].values()]
    keys = {key for block in blocks for key in block.get("properties", {})} - {"fold1", "fold2", "fold3"}
    assert len(keys) > 60
    unread = {key for key in keys if not re.search(rf"\.{key}\b|[\"']{key}[\"']", text)}
    assert not unread
