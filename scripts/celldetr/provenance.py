"""Where a result came from: versions, settings, inputs, and the hash of the code that a rule depends on."""

import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import celldetr
from celldetr.files import atomic

PACKAGES = ("numpy", "pandas", "scipy", "zarr", "torch", "lightning", "kornia", "snakemake")
_STARTED = time.time()


def sha256(path: str | os.PathLike[str], block: int = 1 << 22) -> str:
    """SHA-256 of a file as hex digits; of a folder, over its files' names and contents in sorted order."""
    digest = hashlib.sha256()
    root = Path(path)
    files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
    for file in files:
        if root.is_dir():
            digest.update(file.relative_to(root).as_posix().encode())
        with file.open("rb") as handle:
            while chunk := handle.read(block):
                digest.update(chunk)
    return digest.hexdigest()


def source_hash(*modules: str) -> str:
    """Hash of the sources of modules and packages of this library, without importing them.

    Rules carry it as a parameter, so that editing the library reruns the rules that use it (and only those).

    Parameters
    ----------
    modules
        Names such as ``"celldetr.model"`` (a package: all its files) or ``"celldetr.boxes"``.

    Returns
    -------
    str
        Sixteen hex digits.

    Raises
    ------
    ModuleNotFoundError
        A name has no source file in this library.
    """
    root = Path(celldetr.__file__).parent.parent
    digest = hashlib.sha256()
    for module in sorted(set(modules)):
        base = root.joinpath(*module.split("."))
        files = sorted(base.rglob("*.py")) if base.is_dir() else [base.with_suffix(".py")]
        if not all(file.is_file() for file in files):
            raise ModuleNotFoundError(f"no source for {module} below {root}")
        for file in files:
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def git_revision() -> str:
    """Revision of the checkout this library was imported from, with '+' when it was edited; 'unknown' outside of one."""
    here = Path(celldetr.__file__).parent
    try:
        run = [
            subprocess.run(["git", "-C", str(here), *args], capture_output=True, text=True, check=True, timeout=10).stdout
            for args in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return run[0].strip() + ("+" if run[1].strip() else "")


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the packages that results depend on, as far as they are installed."""
    found = {"python": platform.python_version(), "celldetr": celldetr.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_provenance(
    path: str | os.PathLike[str],
    *,
    settings: Mapping[str, Any],
    inputs: Iterable[str | os.PathLike[str]] = (),
    **extra: Any,
) -> None:
    """Write the provenance JSON that stands beside a model or a table.

    Parameters
    ----------
    path
        File to write.
    settings
        What the step was told (JSON values).
    inputs
        Files or folders read; each is recorded with its SHA-256.
    extra
        More JSON values, e.g. ``device`` or ``seed``.
    """
    record = {
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "wall_seconds": round(time.time() - _STARTED, 1),
        "git_revision": git_revision(),
        "versions": versions(),
        "machine": {"host": socket.gethostname(), "system": platform.platform(), "cpus": os.cpu_count()},
        "settings": dict(settings),
        "inputs": {str(item): sha256(item) for item in inputs},
        **extra,
    }
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2, sort_keys=False) + "\n", encoding="utf-8")
