"""The validated configuration, wildcards, and the small functions that several rules share."""

import sys

from snakemake.exceptions import WorkflowError

sys.path.insert(0, str(ROOT / "scripts"))

from celldetr.config import Config, Source
from celldetr.data.splits import FOLDS, fold_parts
from celldetr.errors import ConfigError
from celldetr.provenance import source_hash

try:
    CONFIG = Config.from_dict(config)
except ConfigError as error:
    raise WorkflowError(f"The configuration is not right:\n{error}") from error


wildcard_constraints:
    fold="|".join(map(str, FOLDS)),
    split="|".join(map(str, CONFIG.pannuke.splits)),
    experiment="|".join(CONFIG.experiments),
    table="|".join(CONFIG.tables) or "table[0-9]+",


def code(script: str) -> str:
    """Hash of a rule's script and of the library below it: editing either reruns the rule."""
    return source_hash(ROOT / "scripts" / f"{script}.py")


def local_files(source: Source) -> list[str]:
    """Sources that are paths of this machine: inputs of the rule that reads them, so that a rule can make them."""
    return [url for url in source.urls if "://" not in url]


def fold_store(fold: int) -> str:
    """Patch store of a PanNuke fold."""
    return f"results/pannuke/fold{fold}.zarr"


def folds_of(split: str, *parts: str) -> list[int]:
    """Folds of a split that have patches in the named parts (train, val, test)."""
    found = fold_parts(int(split), CONFIG.pannuke.protocol)
    return sorted({fold for part in parts for fold in found[part]})


def test_store(wildcards) -> str:
    """Store of the fold that a split tests on."""
    return fold_store(folds_of(wildcards.split, "test")[0])


def initial_weights(wildcards, kind: str) -> list[str]:
    """Weights that an experiment starts from: of the backbone alone, or of a whole model."""
    initial = CONFIG.experiments[wildcards.experiment].initial
    if kind == "backbone":
        return ["results/raw/weights/resnet50.pth"] if initial == "imagenet" else []
    return [] if initial in ("none", "imagenet") else [initial]


def all_results() -> list[str]:
    """Everything that the configuration asks for."""
    wanted = [
        f"results/{table}.{kind}"
        for table in CONFIG.tables
        for kind in ("tsv", "md", "html")
    ]
    if CONFIG.figure3 is not None:
        wanted += [f"results/figures/figure3.{kind}" for kind in ("png", "svg")]
    wanted += expand(
        "results/figures/overlays_{experiment}_split{split}.png",
        experiment=CONFIG.experiments,
        split=CONFIG.pannuke.splits,
    )
    wanted += expand("results/pannuke/fold{fold}_summary.html", fold=FOLDS)
    return wanted
