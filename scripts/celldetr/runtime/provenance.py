"""Where a result came from: versions, settings, inputs, and the hash of the code that a rule depends on."""

import ast
import functools
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
from celldetr.runtime.files import atomic

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


def source_hash(script: str | os.PathLike[str]) -> str:
    """Hash of a script and of all modules of this library that it imports, directly or through others.

    Rules carry it as a parameter, so that editing the library reruns the rules that use what was edited, and only
    those. Comments, docstrings and layout do not count: they cannot change a result.

    Parameters
    ----------
    script
        Python file; it is read, not run.

    Returns
    -------
    str
        Sixteen hex digits.
    """
    root = Path(celldetr.__file__).parent.parent
    digest = hashlib.sha256()
    waiting, seen = [Path(script)], dict[Path, str]()
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen[file] = _parsed(file.read_bytes())[1]
        waiting += imported_files(file, root)
    for file in sorted(seen):
        digest.update(file.name.encode() + b"\0" + seen[file].encode() + b"\0")
    return digest.hexdigest()[:16]


@functools.cache  # the rules share most of their modules, and every job of the workflow asks for all of them
def _parsed(source: bytes) -> tuple[frozenset[str], str]:
    """Names that a module imports, and the text of its syntax tree without docstrings."""
    tree = ast.parse(source)
    names = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                del body[0]
    return frozenset(names), ast.dump(tree)


def imported_files(file: Path, root: Path) -> list[Path]:
    """Files of the library below `root` that a module imports; importing a module imports the packages around it."""
    files = set[Path]()
    for name in _parsed(file.read_bytes())[0]:
        parts = name.split(".")
        if parts[0] != celldetr.__name__:
            continue
        for depth in range(1, len(parts) + 1):
            base = root.joinpath(*parts[:depth])
            files |= {file for file in (base / "__init__.py", base.with_suffix(".py")) if file.is_file()}
    return sorted(files)


def git_revision() -> str:
    """Revision of the checkout that this library is in, with '+' when it was edited; 'unknown' outside of one."""
    here = Path(celldetr.__file__).parent
    try:
        run = [
            subprocess.run(
                ["git", "-C", str(here), *args], capture_output=True, text=True, check=True, timeout=10
            ).stdout
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
