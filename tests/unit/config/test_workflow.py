"""The configuration: what is refused, and how experiments are put together."""

import json
import re

import jsonschema
import pytest
from programs import ROOT
from shipped_config import FILES, read, with_value

from celldetr.config.base import REMOVED, merge
from celldetr.config.classes import PANNUKE_CLASSES, ST_TYPES
from celldetr.config.experiment import Experiment
from celldetr.config.load import load_config
from celldetr.config.workflow import Config, schemas
from celldetr.runtime.errors import ConfigError


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_shipped_files_are_valid_for_the_classes_and_for_the_schema(path):
    Config.from_dict(read(path))
    jsonschema.validate(read(path), json.loads(schemas()["config.schema.json"]))


def test_shipped_configuration_is_complete_and_states_the_defaults():
    shipped = read()
    folds = {name: source for name, source in shipped["pannuke"].items() if name.startswith("fold")}
    given = {name: shipped[name] for name in ("imagenet", "weights", "experiments")}
    blocks = {"pannuke": folds, "xenium": {}, "slides": {}}
    defaults = Config.from_dict({**blocks, **given}).to_dict()
    for name in set(shipped) - {*given, "tables", "figure3"}:
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
    config = Config.from_dict(with_value("experiments.celldetr_p.training.noise.share", 0.6))
    noise = config.experiment("celldetr_p").training.noise
    assert (noise.share, noise.high) == (0.6, 0.4)
    assert config.experiment("celldetr_s") == Config.from_dict(read()).experiment("celldetr_s")


def test_no_key_that_counts_as_removed_is_there():
    present = set(re.findall(r'"(\w+)": \{', schemas()["config.schema.json"]))
    assert {"min_contrast", "radius_um"} < present
    assert not {old.rpartition(".")[2] for old in REMOVED} & present


def test_settings_survive_json():
    experiment = Config.from_dict(read()).experiment("celldetr_p")
    assert Experiment.from_dict(json.loads(json.dumps(experiment.to_dict()))) == experiment


FAIL_LATE = [  # accepted, these would fail after hours of work, or give something else than was asked for
    ("slides.detection.model", "celldetr_q"),
    ("slides.detection.model", "ssl_finetune"),  # it is trained on patches of the slides
    ("slides.detection.margin_um", 32.0),
    *(("cells.model", name) for name in ("celldetr_q", "deformable_detr", "ssl_pretrain", "st_zero_shot")),
    ("cells.margin_um", 32.0),
    ("cells.outputs", ["h5ad", "h5ad"]),
    ("figure3.experiments", ["st_zero_shot"]),
    ("figure3.experiments", ["celldetr_p", "celldetr_p"]),
    ("tables.table1.experiments", ["celldetr_s", "celldetr_s"]),
    ("tables.table1.ours", ["celldetr_plus", "celldetr_plus"]),
    ("tables.table2.frozen_features", ["ssl_pretrain", "ssl_pretrain"]),
    ("tables.table2.frozen_features", ["st_zero_shot"]),
    ("tables.table2.frozen_features", ["deformable_detr"]),
    ("tables.table1.published", ""),
    ("pannuke.splits", [1, 1]),
    ("experiments.st_zero_shot.initial", "ssl_pretrain"),  # it has no classes
    ("experiments.none", {"title": "None", "mode": "sequential"}),
    ("experiments.celldetr_s.title", "two\nlines"),
    ("experiments.celldetr_s.training.noise", {"share": 0.6}),  # only mode parallel reads it
    ("experiments.celldetr_s.model.representation.global_tokens", 50),
    ("experiments.celldetr_p.training.contrastive", {"weight": 2.0}),
    ("experiments.st_finetune.initial", ".pt"),
    ("training.noise.high", 1.0),
    ("training.augmentation.blur_kernel", 301),
    ("training.contrastive.temperature", 1e-300),
    ("training.matching", {"nucleus": 0.0, "l1": 0.0, "giou": 0.0}),
    ("seed", 2**31),
    ("patch.size", 32 * 10**9),
    ("patch.mpp", 250.0),
    ("model.encoder_layers", 10**9),
    ("training.epochs", 10**40),
    ("slides.patches.stride", 1e-9),
    ("xenium.registration.angle_step", 1e-9),
    ("frozen_features.max_nuclei", 4),
    ("evaluation.resamples", 10**12),
    ("overlays.patches", 10**6),
]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("training.epocs", 3, "training.epocs: unknown key; did you mean 'epochs'?"),
        ("sead", 3, "sead: unknown key; did you mean 'seed'?"),
        ("xenium.registration.min_gain", 0.2, "xenium.registration.min_gain: this key was removed: a refinement"),
        ("experiments.celldetr_s.training.recompute", True, "training.recompute: this key was removed: give training."),
        ("readout", {"k": 20}, "readout: this key was removed: give frozen_features instead"),
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
        ("training.augmentation.blur_sigma", [0.0, 1.0], "augmentation.blur_sigma.0: got 0.0, expected greater than 0"),
        ("training.augmentation.blur_sigma", [1.0, 0.2], "blur_sigma: got [1.0, 0.2], expected the smaller one first"),
        ("frozen_features.k", 30_000, "k: got 30000, expected at most max_nuclei (20000)"),
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
        ("experiments.ssl_pretrain.model.projection", 0, "ssl_pretrain.model.projection: got 0, expected at least 1"),
        (
            "experiments.celldetr_s.model.projection",
            8,
            "celldetr_s.model.projection: got",
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
        ("training.lr", "1.0e9", "YAML reads 1.0e9 as text: write 1.0e+9"),
        ("training.epochs", "1e4", "training.epochs: got '1e4', expected a valid integer; write 10000"),
        ("training.epochs", "ten", "training.epochs: got 'ten', expected a valid integer"),
        *((key, value, f"{key}: got") for key, value in FAIL_LATE),
    ],
)
def test_mistakes_are_named_with_their_key(path, value, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Config.from_dict(with_value(path, value))


def test_cells_need_a_split_of_their_model_and_slides():
    for model, split in (("celldetr_p", 3), ("ssl_finetune", 2), ("st_pretrain", 1), ("mine.pt", 1)):
        Config.from_dict(with_value("cells", {"model": model, "split": split}))
    with pytest.raises(ConfigError, match=r"cells\.split: got 2, expected one of \[1\], the splits of .* st_pretrain"):
        Config.from_dict(with_value("cells", {"model": "st_pretrain", "split": 2}))
    alone = {"pannuke": read()["pannuke"], "imagenet": read()["imagenet"], "cells": {"model": "mine.pt"}}
    alone["experiments"] = {"celldetr_s": {"title": "S", "mode": "sequential"}}
    with pytest.raises(ConfigError, match=r"cells\.sheet: got null, but there are no slides and no Xenium samples"):
        Config.from_dict(alone)
    Config.from_dict(merge(alone, {"cells": {"sheet": "mine.tsv"}}))


def test_the_example_writes_its_archives():
    example = read(ROOT / "config" / "example" / "config.yaml")
    example["pannuke"]["fold2"] = {"urls": ["https://example.org/fold_2.zip"]}
    with pytest.raises(ConfigError, match=r"pannuke\.fold2\.urls: got URLs, expected a path"):
        Config.from_dict(example)


def test_validation_needs_patches():
    split = {"train": 0.8, "val": 0.0, "test": 0.2}
    with pytest.raises(ConfigError, match="xenium.split.val: got 0, expected more: experiment st_pretrain has"):
        Config.from_dict(with_value("xenium.split", split))
    last = merge(with_value("xenium.split", split), {"experiments": {"st_pretrain": {"training": {"select": "last"}}}})
    Config.from_dict(last)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\npatch: {size: 64}\nseed: 2\n", "line 3: got 'seed' again (also in line 1); keep one"),
        ("a:\n  - b: 1\n    c: 2\n    b: 3\n", "line 4: got 'b' again (also in line 2)"),
        ('{"a": 1,\n"a": 2}', "line 2: got 'a' again (also in line 1)"),
    ],
)
def test_a_key_that_a_file_gives_twice_is_named_with_its_lines(tmp_path, text, message):
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(f"my.yaml: {message}")):
        load_config({}, ROOT, [tmp_path / "my.yaml"])


def test_a_result_that_snakemake_took_for_a_configuration_is_named(tmp_path, monkeypatch):
    """Of the targets behind --configfile, Snakemake itself refuses all that are not JSON of names and values."""
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "results" / "xenium" / "lung" / "registration.json"
    with pytest.raises(ConfigError, match=r"registration\.json, a result; .* write targets before this option, or aft"):
        load_config({"sample": "lung"}, ROOT, [tmp_path / "my.yaml", target])


def test_keys_that_differ_or_are_merged_are_no_repetition(tmp_path):
    (tmp_path / "my.yaml").write_text("a: &a {x: 1}\nb: {<<: *a, x: 2}\nc: [*a, *a, {x: 3}]\n")
    assert load_config({}, ROOT, [*FILES, tmp_path / "my.yaml"]) == load_config({}, ROOT)


def test_anchors_that_multiply_are_refused_before_they_fill_the_memory():
    bomb = [1] * 10
    for _ in range(20):
        bomb = [bomb] * 10
    with pytest.raises(ConfigError, match="config: got 100000 values or more; does it repeat an anchor"):
        Config.from_dict(with_value("seed", bomb))


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
