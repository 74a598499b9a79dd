"""The validated configuration, wildcards, and the small functions that several rules share."""

import re
import sys

from snakemake.exceptions import WorkflowError

sys.path.insert(0, str(ROOT / "scripts"))

from celldetr.classes import ST_TO_PANNUKE
from celldetr.config import Config
from celldetr.data.splits import FOLDS, fold_parts
from celldetr.errors import ConfigError
from celldetr.provenance import source_hash
from celldetr.sheets import used_samples

try:
    CONFIG = Config.from_dict(config)
    SAMPLES, REFERENCES = used_samples(CONFIG.xenium, ROOT)
except ConfigError as error:
    raise WorkflowError(f"The configuration is not right:\n{error}") from error


wildcard_constraints:
    fold="|".join(map(str, FOLDS)),
    split="|".join(map(str, sorted({1, *CONFIG.pannuke.splits}))),
    experiment="|".join(CONFIG.experiments),
    table="|".join(CONFIG.tables) or "table[0-9]+",
    sample="|".join(map(re.escape, SAMPLES)) or "none",
    reference="|".join(map(re.escape, REFERENCES)) or "none",


def code(script: str) -> str:
    """Hash of a rule's script and of the library below it: editing either reruns the rule."""
    return source_hash(ROOT / "scripts" / f"{script}.py")


def local_files(urls) -> list[str]:
    """Sources that are paths of this machine: inputs of the rule that reads them, so that a rule can make them."""
    return [url for url in urls if "://" not in url]


def fold_store(fold: int) -> str:
    """Patch store of a PanNuke fold."""
    return f"results/pannuke/fold{fold}.zarr"


def folds_of(split: str, *parts: str) -> list[int]:
    """Folds of a split that have patches in the named parts (train, val, test)."""
    found = fold_parts(int(split), CONFIG.pannuke.protocol)
    return sorted({fold for part in parts for fold in found[part]})


def sample_store(sample: str) -> str:
    """Patch store of a Xenium sample."""
    return f"results/xenium/{sample}/{sample}.zarr"


def sample_source(wildcards, what: str) -> dict:
    """Where a raw file of a Xenium sample can be had (outs, he or alignment)."""
    row = SAMPLES[wildcards.sample].to_dict()
    return {
        "urls": row[what],
        "bytes": row.get(f"{what}_bytes"),
        "sha256": row[f"{what}_sha256"],
    }


def alignment_file(wildcards) -> list[str]:
    """Alignment of a Xenium sample, where there is one."""
    path = f"results/raw/xenium/{wildcards.sample}/alignment.csv"
    return [path] if SAMPLES[wildcards.sample].alignment else []


def on_xenium(experiment: str) -> bool:
    """Whether an experiment trains and tests on Xenium patches; else PanNuke."""
    return CONFIG.experiments[experiment].stage == "st"


def train_stores(wildcards) -> list[str]:
    """Stores of the patches that an experiment trains and validates on."""
    if on_xenium(wildcards.experiment):
        return [sample_store(sample) for sample in SAMPLES]
    return [fold_store(fold) for fold in folds_of(wildcards.split, "train", "val")]


def split_file(wildcards) -> str:
    """Table of the patches of each part."""
    return (
        "results/xenium/split.tsv"
        if on_xenium(wildcards.experiment)
        else f"results/pannuke/split{wildcards.split}.tsv"
    )


def test_store(wildcards) -> str:
    """Store of the patches that an experiment is tested on."""
    if on_xenium(wildcards.experiment):
        return "results/xenium/test.zarr"
    return fold_store(folds_of(wildcards.split, "test")[0])


def model_file(experiment: str, split: str) -> str:
    """Weights that an experiment predicts with."""
    block = CONFIG.experiments[experiment]
    if block.stage == "zero_shot":
        return initial_model(block.initial, split)
    return f"results/models/{experiment}/split{split}/model.pt"


def initial_model(initial: str, split: str) -> str:
    """Model file of an experiment, or a given file; an experiment on PanNuke has a model of the same split."""
    if initial not in CONFIG.experiments:
        return initial
    return model_file(initial, "1" if on_xenium(initial) else split)


def initial_weights(wildcards, kind: str) -> list[str]:
    """Weights that an experiment starts from: of the backbone alone, or of a whole model."""
    initial = CONFIG.experiments[wildcards.experiment].initial
    if kind == "backbone":
        return ["results/raw/weights/resnet50.pth"] if initial == "imagenet" else []
    return (
        []
        if initial in ("none", "imagenet")
        else [initial_model(initial, wildcards.split)]
    )


def class_map(experiment: str) -> dict | None:
    """Map of classes for models that predict others than they were trained on."""
    return (
        dict(ST_TO_PANNUKE)
        if CONFIG.experiments[experiment].stage == "zero_shot"
        else None
    )


def st_experiment() -> str | None:
    """Return the experiment whose confusion of cell types is figure 5b: the first one on Xenium."""
    return next((name for name in CONFIG.experiments if on_xenium(name)), None)


def all_results() -> list[str]:
    """Everything that the configuration asks for."""
    wanted = [
        f"results/{table}.{kind}"
        for table in CONFIG.tables
        for kind in ("tsv", "md", "html")
    ]
    if CONFIG.figure3 is not None:
        wanted += [f"results/figures/figure3.{kind}" for kind in ("png", "svg")]
    for experiment in CONFIG.experiments:
        for split in CONFIG.splits(experiment):
            wanted.append(f"results/figures/overlays_{experiment}_split{split}.png")
    wanted += expand("results/pannuke/fold{fold}_summary.html", fold=FOLDS)
    if SAMPLES:
        wanted += expand(
            "results/xenium/{sample}/{file}",
            sample=SAMPLES,
            file=["registration.png", "patches.html"],
        )
        wanted += [f"results/figures/figure5a.{kind}" for kind in ("png", "svg")]
    if st_experiment() is not None:
        wanted += [f"results/figures/figure5b.{kind}" for kind in ("png", "svg")]
        wanted.append(f"results/scores/{st_experiment()}/split1.tsv")
    return wanted
