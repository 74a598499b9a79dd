"""The validated configuration, wildcards, and the small functions that several rules share."""

import os
import re
import subprocess
import sys
import uuid
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.logging import logger
from snakemake.settings.types import DeploymentMethod
from snakemake.sourcecache import LocalSourceFile


def checkout(source) -> Path:
    """Folder of the workflow; one that Snakemake reads from a git host is checked out below .snakemake."""
    if isinstance(source, LocalSourceFile):
        return Path(source).parents[1]
    git = ["git", "-C", str(source.hosted_repo.repo_clone)]
    revision = subprocess.check_output(
        [*git, "rev-parse", f"{source.ref}^{{commit}}"], text=True
    ).strip()
    folder = Path(".snakemake", "celldetr", revision).absolute()
    if not folder.exists():
        temporary = folder.with_name(f"{revision}.{os.getpid()}")
        temporary.mkdir(parents=True)
        archive = subprocess.check_output([*git, "archive", revision])
        subprocess.run(["tar", "-x", "-C", str(temporary)], input=archive, check=True)
        try:
            temporary.rename(folder)
        except OSError:  # another process made it first
            if not folder.exists():
                raise
    return folder


ROOT = checkout(workflow.current_basedir)

sys.path.insert(0, str(ROOT / "scripts"))
# The scripts of the rules import this library too, even if another one is installed in their environment.
os.environ.update(
    PYTHONPATH=os.pathsep.join(
        filter(None, [str(ROOT / "scripts"), os.environ.get("PYTHONPATH")])
    )
)

try:
    from celldetr.config.classes import ST_TO_PANNUKE
    from celldetr.config.load import load_config
    from celldetr.config.pannuke import FOLDS, fold_parts
    from celldetr.config.segmentation import missing_packages
    from celldetr.config.sheets import (
        CELLS_DEPEND_ON,
        cell_slides,
        locate,
        used_samples,
        used_slides,
    )
    from celldetr.config.sthelar import PATCH_KEYS, used_sthelar
    from celldetr.runtime.errors import ConfigError, masked
    from celldetr.runtime.provenance import source_hash
    from celldetr.runtime.rule import RUN_VARIABLE
except ImportError as error:
    raise WorkflowError(
        f"{error}: the environment that runs Snakemake needs pydantic to check the configuration; "
        "install it there: pip install 'pydantic>=2.10'"
    ) from error

if workflow.is_main_process:  # its jobs, also those on a cluster, have its environment
    os.environ.update({RUN_VARIABLE: uuid.uuid4().hex})

try:
    CONFIG = load_config(config, ROOT, workflow.configfiles)
    SAMPLES, REFERENCES = used_samples(CONFIG.xenium, ROOT)
    STHELAR = used_sthelar(CONFIG.xenium, SAMPLES, ROOT)
    SLIDES = used_slides(CONFIG.slides.sheet if CONFIG.slides else None, ROOT)
    CELLS = cell_slides(CONFIG.cells, SAMPLES, SLIDES, ROOT)
    CONFIG.check_groups({**SAMPLES, **STHELAR}, SLIDES)
except ConfigError as error:
    raise WorkflowError(
        f"The configuration is not valid:\n{masked(str(error))}"
    ) from None


OURS, OTHERS = (
    [
        name
        for name, block in CONFIG.experiments.items()
        if (block.stage == "segmentation") == segments
    ]
    for segments in (False, True)
)
"""Experiments with CellDETR; systems of others, which train and predict by rules of their own."""

IN_CONDA = DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method
MISSING = [] if IN_CONDA or not OTHERS else missing_packages()
"""Packages of these systems that the rules will not find."""

REMEDY = (
    f"systems of stage segmentation need {', '.join(MISSING)}, not installed in {sys.prefix}; `make baselines` makes "
    "an environment with these packages (start Snakemake in it), and with `--sdm conda` their rules bring them"
)

LEFT_OUT = [
    name
    for name in OTHERS
    if MISSING and any(name in table.others for table in CONFIG.tables.values())
]
if LEFT_OUT and workflow.is_main_process:
    logger.warning(f"Left out of the tables: {', '.join(LEFT_OUT)}; {REMEDY}.")


CELL_FILES = {
    "h5ad": "h5ad",
    "geojson": "geojson.gz",
    "cellvit": "cellvit.geojson",
    "spatialdata": "zarr",
}
"""Ending of each file of cells that `cells.outputs` may list."""


wildcard_constraints:
    fold="|".join(map(str, FOLDS)),
    split="|".join(map(str, sorted({1, *CONFIG.pannuke.splits}))),
    experiment="|".join(CONFIG.experiments),
    table="|".join(CONFIG.tables) or "none",
    sample="|".join(map(re.escape, SAMPLES)) or "none",
    slide="|".join(map(re.escape, SLIDES)) or "none",
    reference="|".join(map(re.escape, REFERENCES)) or "none",
    weights="|".join(CONFIG.weights) or "none",


def require_accounting() -> None:
    """Stop if jobs go to Slurm and `sacct` fails, which Snakemake asks for their state: it would wait for ever."""
    settings = workflow.executor_settings
    if getattr(settings, "status_command", None) != "sacct":
        return
    try:
        done = subprocess.run(
            ["sacct", "-X", "--noheader"], capture_output=True, text=True, timeout=120
        )
    except FileNotFoundError:  # Snakemake takes squeue then
        return
    except subprocess.TimeoutExpired:
        done = subprocess.CompletedProcess("sacct", 1, "", "no answer in 120 s")
    if done.returncode:
        raise WorkflowError(
            f"sacct fails ({done.stderr.strip()}): Snakemake would never see a job end. On a cluster without "
            "accounting set `slurm-status-command: squeue` in the profile, or give --slurm-status-command squeue."
        )


def code(script: str) -> str:
    """Hash of a rule's script and of the library code that it uses: editing either reruns the rule."""
    return source_hash(ROOT / "scripts" / f"{script}.py")


def as_it_is(value):
    """A text of the user in which Snakemake must not look for wildcards: braces stand for themselves."""
    return lambda wildcards: value


def own_file(path: str) -> str:
    """A file from the working folder or, if it is not there, of the workflow; a module's prefix does not apply."""
    return local(
        path if Path(path).is_absolute() else os.path.relpath(locate(path, ROOT))
    )


def local_files(urls) -> list[str]:
    """Sources that are local paths: they are inputs of the rule that reads them, so that another rule can make them."""
    return [url for url in urls if "://" not in url]


def fold_store(fold: int) -> str:
    """Patch store of a PanNuke fold."""
    return f"results/pannuke/fold{fold}.zarr"


def folds_of(split: str, *parts: str) -> list[int]:
    """Folds of a split that have patches in the named parts (train, val, test)."""
    found = fold_parts(int(split), CONFIG.pannuke.protocol)
    return sorted({fold for part in parts for fold in found[part]})


def sample_store(sample: str) -> str:
    """Patch store of a Xenium sample or a section of STHELAR."""
    return f"results/xenium/{sample}/{sample}.zarr"


def sample_stores() -> list[str]:
    """Patch stores of all Xenium samples and sections of STHELAR."""
    return [sample_store(sample) for sample in (*SAMPLES, *STHELAR)]


def sample_source(wildcards, what: str) -> dict:
    """Where to get a raw file of a Xenium sample (outs, he or alignment)."""
    row = SAMPLES[wildcards.sample].to_dict()
    return {
        "urls": row[what],
        "bytes": row.get(f"{what}_bytes"),
        "sha256": row[f"{what}_sha256"],
    }


def named(sheet: str, row: str, column: str, sources=()) -> dict:
    """What the user calls a raw file, for messages: its path, if it is one local file, and the place of that.

    Rules have it as a parameter that is a function of `input`: a change of such a parameter reruns nothing.
    """
    own = sources[0] if len(sources) == 1 and local_files(sources) else None
    return {"path": own, "place": f"row {row}, column {column} of {sheet}"}


def sample_names(sample: str, *columns: str) -> dict:
    """What the user calls raw files of a Xenium sample: column of the sheet and input of a rule -> name."""
    row = SAMPLES[sample]
    return {
        column: named(CONFIG.xenium.samples, sample, column, getattr(row, column))
        for column in columns
    }


def annotation_names(sample: str) -> dict:
    """What the user calls what the cell types of a Xenium sample come from."""
    samples, references = CONFIG.xenium.samples, CONFIG.xenium.references
    name = SAMPLES[sample].reference
    place = (
        f"row {sample}, column reference of {samples}, and row {name} of {references}"
    )
    return {
        **sample_names(sample, "outs"),
        "reference": {"path": None, "place": place},
    }


def reference_names(reference: str) -> dict:
    """What the user calls the files of an scRNA-seq reference."""
    row, sheet = REFERENCES[reference], CONFIG.xenium.references
    column = "file" if row.file else "cellxgene_dataset"
    return {
        "h5ad": named(sheet, reference, column, row.file),
        "mapping": named(sheet, reference, "mapping", [row.mapping]),
    }


def section_names(sample: str) -> dict:
    """Where the user named a section of STHELAR."""
    return {"section": named(CONFIG.xenium.sthelar.samples, sample, "sample")}


def slide_names(slide: str) -> dict:
    """What the user calls a slide and the outlines of its nuclei."""
    row, sheet = SLIDES[slide], CONFIG.slides.sheet
    found = {"file": named(sheet, slide, "hest" if row.hest else "file", row.file)}
    if not row.detect:
        own = () if row.nuclei == ("hest",) else row.nuclei
        found["nuclei"] = named(sheet, slide, "nuclei", own)
    return found


def cell_names(slide: str) -> dict:
    """What the user calls a slide whose cells are found, its region and its given cells."""
    row, sheet = CELLS[slide], CONFIG.cells.sheet
    if sheet is not None:
        image = named(sheet, slide, "file", row.file)
    elif slide in SAMPLES:
        image = sample_names(slide, "he")["he"]
    else:
        image = slide_names(slide)["file"]
    return {
        **dict.fromkeys(("slide", "image", "file"), image),  # inputs of several rules
        "region": named(sheet, slide, "region", [row.region]),
        "nuclei": named(sheet, slide, "nuclei", row.nuclei),
    }


def alignment_file(wildcards) -> list[str]:
    """Alignment file of a Xenium sample, if it has one."""
    path = f"results/raw/xenium/{wildcards.sample}/alignment.csv"
    return [path] if SAMPLES[wildcards.sample].alignment else []


def slide_store(slide: str) -> str:
    """Patch store of a slide."""
    return f"results/slides/{slide}/{slide}.zarr"


def slide_source(wildcards) -> dict:
    """Where to get a slide."""
    row = SLIDES[wildcards.slide]
    return {
        "urls": list(row.file),
        "hest": row.hest,
        "bytes": row.bytes,
        "sha256": row.sha256,
    }


def outline_sources(wildcards) -> list[str]:
    """URLs or paths of the outlines of a slide's nuclei; none if they come from HEST-1k."""
    nuclei = SLIDES[wildcards.slide].nuclei
    return [] if nuclei == ("hest",) else list(nuclei)


def slide_nuclei(wildcards) -> str:
    """Outlines of a slide's nuclei: given, or found by a model."""
    if SLIDES[wildcards.slide].detect:
        return f"results/slides/{wildcards.slide}/detected.parquet"
    return f"results/raw/slides/{wildcards.slide}_nuclei"


def cell_slide(wildcards) -> str:
    """File of a slide whose cells are found."""
    if CONFIG.cells.sheet is None:
        return CELLS[wildcards.slide].file[0]
    return f"results/raw/cells/{wildcards.slide}.tif"


def cell_inputs(wildcards) -> dict[str, str]:
    """Files of a slide whose cells are found: its image, and the region and the given cells that its row names."""
    row, files = CELLS[wildcards.slide], {"slide": cell_slide(wildcards)}
    if row.region:
        files["region"] = own_file(row.region)
    if row.nuclei:
        files["nuclei"] = f"results/raw/cells/{wildcards.slide}_nuclei"
    return files


def cell_settings(slide: str) -> dict:
    """What the cells of a slide depend on beside its files."""
    return {key: getattr(CELLS[slide], key) for key in CELLS_DEPEND_ON}


def stage_of(experiment: str) -> str:
    """Stage of an experiment, which decides the patches that it trains and tests on."""
    return CONFIG.experiments[experiment].stage


def one_of(experiments) -> str:
    """Wildcard constraint of these experiments."""
    return "|".join(experiments) or "none"


def systems(table: str) -> list[str]:
    """Experiments with measured rows in a table, in order."""
    return [name for name in CONFIG.tables[table].systems if name not in LEFT_OUT]


def experiment_of(stage: str) -> str | None:
    """First experiment of a stage, which is the one in the figures; None if there is none."""
    return next((name for name in CONFIG.experiments if stage_of(name) == stage), None)


def train_stores(wildcards) -> list[str]:
    """Stores of the patches that an experiment trains and validates on."""
    if MISSING and wildcards.experiment in OTHERS:
        raise WorkflowError(f"{wildcards.experiment} cannot be trained: {REMEDY}")
    if int(wildcards.split) not in CONFIG.splits(wildcards.experiment):
        raise WorkflowError(
            f"{wildcards.experiment} has no split {wildcards.split}, only {CONFIG.splits(wildcards.experiment)}"
        )
    if stage_of(wildcards.experiment) == "st":
        return sample_stores()
    if stage_of(wildcards.experiment) == "ssl":
        return [slide_store(slide) for slide in SLIDES]
    return [fold_store(fold) for fold in folds_of(wildcards.split, "train", "val")]


def split_file(wildcards) -> str:
    """Table of the patches of each part."""
    folder = {"st": "xenium", "ssl": "slides"}.get(stage_of(wildcards.experiment))
    return (
        f"results/{folder}/split.tsv"
        if folder
        else f"results/pannuke/split{wildcards.split}.tsv"
    )


def test_store(wildcards) -> str:
    """Store of the patches that an experiment is tested on."""
    if stage_of(wildcards.experiment) == "st":
        return "results/xenium/test.zarr"
    return fold_store(folds_of(wildcards.split, "test")[0])


def model_file(experiment: str, split: str) -> str:
    """Weights that an experiment predicts with."""
    block = CONFIG.experiments[experiment]
    if block.stage == "zero_shot":
        return initial_model(block.initial, split)
    return f"results/models/{experiment}/split{split}/model.pt"


def initial_model(initial: str, split: str) -> str:
    """Model file of an experiment on the same split or, if it has none, its first one; or a given file."""
    if initial not in CONFIG.experiments:
        return initial
    splits = [str(number) for number in CONFIG.splits(initial)]
    return model_file(initial, split if split in splits else splits[0])


def run_settings(experiment: str) -> dict:
    """Settings of a training run; the number of its loader processes is a resource, and changes nothing."""
    settings = CONFIG.experiment(experiment).to_dict()
    del settings["training"]["workers"]
    return settings


def gpu_batch(experiment: str) -> int:
    """Patches of a training step on one GPU."""
    training = CONFIG.experiment(experiment).training
    return training.batch_size // training.gpus


def initial_weights(wildcards, kind: str) -> list[str]:
    """Initial weights of an experiment: of a part of its network, as published, or of a whole model."""
    initial = CONFIG.experiments[wildcards.experiment].initial
    if initial in CONFIG.weights:
        return [f"results/raw/weights/{initial}.pth"] if kind == "backbone" else []
    if kind == "backbone":
        return ["results/raw/weights/resnet50.pth"] if initial == "imagenet" else []
    return (
        []
        if initial in ("none", "imagenet")
        else [initial_model(initial, wildcards.split)]
    )


def class_map(experiment: str) -> dict | None:
    """Map from the classes of a model to those of PanNuke, for models that were trained on other classes."""
    return (
        dict(ST_TO_PANNUKE)
        if CONFIG.experiments[experiment].stage == "zero_shot"
        else None
    )


def trained_models() -> list[str]:
    """Model files that tables, figures and slides need, and those of the experiments that they start from."""
    waiting = [
        (name, split)
        for table, block in CONFIG.tables.items()
        for name in (*systems(table), *block.frozen_features)
        for split in CONFIG.pannuke.splits
    ]
    if CONFIG.figure3 is not None:
        waiting += [(name, CONFIG.figure3.split) for name in CONFIG.figure3.experiments]
    waiting += [(name, 1) for name in CONFIG.experiments if stage_of(name) == "st"]
    waiting.append((experiment_of("ssl"), 1))
    if any(row.detect for row in SLIDES.values()):
        waiting.append((CONFIG.slides.detection.model, CONFIG.pannuke.splits[0]))
    if CONFIG.cells is not None:
        waiting.append((CONFIG.cells.model, CONFIG.cells.split))
    found = set()
    while waiting:
        name, split = waiting.pop()
        if name in CONFIG.experiments:
            if stage_of(name) != "zero_shot":
                found.add(initial_model(name, str(split)))
            waiting.append((CONFIG.experiments[name].initial, split))
    return sorted(found)


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
        in_table = any(experiment in systems(table) for table in CONFIG.tables)
        if in_table or stage_of(experiment) == "st":
            wanted += [
                f"results/figures/overlays_{experiment}_split{split}.png"
                for split in CONFIG.splits(experiment)
            ]
    wanted += [path.replace("model.pt", "curves.png") for path in trained_models()]
    wanted += expand("results/pannuke/fold{fold}_summary.html", fold=FOLDS)
    wanted += expand("results/xenium/{sample}/registration.png", sample=SAMPLES)
    if SAMPLES or STHELAR:
        wanted += expand(
            "results/xenium/{sample}/patches.html", sample=[*SAMPLES, *STHELAR]
        )
        wanted += [f"results/figures/figure5a.{kind}" for kind in ("png", "svg")]
    if experiment_of("st") is not None:
        wanted += [f"results/figures/figure5b.{kind}" for kind in ("png", "svg")]
        wanted.append(f"results/scores/{experiment_of('st')}/split1.tsv")
    wanted += [f"results/slides/{slide}/patches.png" for slide in SLIDES]
    if experiment_of("ssl") is not None:
        wanted += [
            f"results/figures/figure4{part}.{kind}"
            for part in "bc"
            for kind in ("png", "svg")
        ]
        wanted.append("results/slides/summary.tsv")
    return wanted + all_cells()


def all_cells() -> list[str]:
    """The files of cells that the configuration asks for."""
    if CONFIG.cells is None:
        return []
    endings = [CELL_FILES[kind] for kind in CONFIG.cells.outputs] + ["html"]
    return expand("results/cells/{slide}.{kind}", slide=CELLS, kind=endings)
