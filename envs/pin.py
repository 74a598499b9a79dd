"""Write the conda files of this folder: their direct packages with all that these need, at the versions of the locks.

Usage: python envs/pin.py, in the environment of `make baselines`, which holds all of them (`make lock` does it).
"""

import importlib.metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
PYTHON = "3.11"
# What the file is for, and what the scripts of its rules import.
SHARED = [
    "google-crc32c",
    "matplotlib",
    "numcodecs",
    "numpy",
    "pandas",
    "pillow",
    "pyarrow",
    "pydantic",
    "scipy",
    "zarr",
]
ENVIRONMENTS = {
    "data": ("Downloads, archives, patch stores, splits.", [*SHARED, "huggingface-hub", "jinja2", "requests", "tqdm"]),
    "spatial": (
        "Xenium samples: registration, cell types, patches.",
        [
            *SHARED,
            *("anndata", "dask", "fsspec", "geopandas", "h5py", "ijson", "imagecodecs", "jinja2", "openslide-bin"),
            *("openslide-python", "orjson", "requests", "scanpy", "shapely", "spatialdata", "spatialdata-io"),
            *("tacco", "tifffile", "tqdm"),
        ],
    ),
    "cells": (
        "Finding nuclei on slides with a trained model; on Linux, pip's own torch is the CUDA build.",
        [
            *SHARED,
            *("geopandas", "ijson", "imagecodecs", "jinja2", "openslide-bin", "openslide-python", "orjson"),
            *("shapely", "tifffile", "torch", "tqdm"),
        ],
    ),
    "report": ("Scores, tables, figures.", [*SHARED, "jinja2"]),
    "training": (
        "Training and predicting; on Linux, pip's own torch is the CUDA build.",
        [*SHARED, "scikit-learn", "tensorboard", "torch", "tqdm"],
    ),
    "baselines": (
        "Training and predicting with the systems that CellDETR is compared with.",
        [
            *(*SHARED, "scikit-learn", "tensorboard", "torch", "tqdm"),
            *("cellseg-models-pytorch", "monai", "timm", "torchvision"),
        ],
    ),
}
LOCKS = {"baselines": ("lock.txt", "lock-baselines.txt")}
"""Files that an environment takes its versions from, if not from lock.txt alone; the last one decides."""


def locked(environment: str) -> dict[str, str]:
    """Return lines of the locks by canonical name, without Triton, which torch for CUDA brings."""
    files = [HERE / name for name in LOCKS.get(environment, ("lock.txt",))]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    pins = {canonicalize_name(line.split("==")[0]): line for line in lines if "==" in line and line[0] != "#"}
    return {name: line for name, line in pins.items() if name != "triton"}


def closure(roots: list[str], pins: dict[str, str]) -> list[str]:
    """Return the pins of packages and of all they need on Linux; CUDA libraries are torch's own business."""
    waiting, found = [(root, frozenset[str]()) for root in roots], dict[str, set[str]]()
    while waiting:
        name, extras = waiting.pop()
        name = canonicalize_name(name)
        if name not in pins or (name in found and extras <= found[name]):
            continue
        found.setdefault(name, set()).update(extras)
        for text in importlib.metadata.requires(name) or []:
            need = Requirement(text)
            markers = [{"extra": extra, "python_version": PYTHON, "sys_platform": "linux"} for extra in (*extras, "")]
            if need.marker is None or any(need.marker.evaluate(marker) for marker in markers):
                waiting.append((need.name, frozenset(need.extras)))
    return sorted(pins[name] for name in found)


def text(name: str) -> str:
    """Return the content of one conda file."""
    purpose, roots = ENVIRONMENTS[name]
    lines = [
        f"# {purpose} Written by envs/pin.py from {' and '.join(LOCKS.get(name, ('lock.txt',)))}; do not edit.",
        "channels: [conda-forge, nodefaults]",
        "dependencies:",
        f"  - python={PYTHON}",
        "  - pip",
        "  - pip:",
    ]
    return "\n".join([*lines, *(f"      - {pin}" for pin in closure(roots, locked(name)))]) + "\n"


if __name__ == "__main__":
    for environment in ENVIRONMENTS:
        try:
            content = text(environment)
        except importlib.metadata.PackageNotFoundError as error:
            raise SystemExit(
                f"error: {environment}.yaml: what it must hold is asked of its packages, and {error.name} is not "
                "installed; use .venv-baselines/bin/python (make baselines)"
            ) from error
        (HERE / f"{environment}.yaml").write_text(content, encoding="utf-8")
