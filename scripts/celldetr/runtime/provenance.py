"""Where a result comes from: versions, settings, inputs, and the hash of the code that a rule depends on."""

import ast
import contextlib
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
from celldetr.runtime.errors import masked
from celldetr.runtime.files import write_json

PACKAGES = ("numpy", "pandas", "scipy", "zarr", "torch", "snakemake")
_MAKERS = {"fetch", "slides", "pannuke", "xenium", "model", "training", "example"}
"""Rooms that make data and models."""
_FRAME = {"runtime/rule.py", "runtime/errors.py", "runtime/provenance.py", "config/base.py"}
"""Modules around the work of a rule: its log and errors, provenance, checks of settings (they are parameters)."""
_STARTED = time.time()


def sha256(path: str | os.PathLike[str], block: int = 1 << 22) -> str:
    """SHA-256 of a file as hex digits; of a folder, over the names and contents of its files in sorted order."""
    digest = hashlib.sha256()
    root = Path(path)
    for file in sorted(item for item in root.rglob("*") if item.is_file()) if root.is_dir() else [root]:
        if root.is_dir():
            digest.update(file.relative_to(root).as_posix().encode())
        with file.open("rb") as handle:
            while chunk := handle.read(block):
                digest.update(chunk)
    return digest.hexdigest()


def source_hash(script: str | os.PathLike[str]) -> str:
    """Hash of a script and of the library modules that it imports, directly or through others.

    Rules carry it as a parameter, so that editing the library reruns the rules whose results it can change, and no
    others. What cannot change a result does not count: layout, comments, docstrings, texts of errors, log messages and
    descriptions of settings, and the modules `_FRAME`. Nor do modules of the room `report` for a script that also
    imports a room of `_MAKERS`: there they draw pictures and pages beside data or a model, which should not be made
    again for these.

    Parameters
    ----------
    script
        Python file; it is read, not run.

    Returns
    -------
    str
        Sixteen hex digits.
    """
    library = Path(celldetr.__file__).parent
    makes_data = bool(_MAKERS & {file.parent.name for file in imported_files(Path(script), library.parent)})
    waiting, seen = [Path(script)], dict[Path, str]()
    while waiting:
        file = waiting.pop()
        if file in seen or (makes_data and file.parent == library / "report"):
            continue
        frame = f"{file.parent.name}/{file.name}" in _FRAME
        seen[file] = "" if frame else _parsed(file.read_bytes())[1]
        waiting += imported_files(file, library.parent)
    digest = hashlib.sha256()
    for file in sorted(seen):
        digest.update(file.name.encode() + b"\0" + seen[file].encode() + b"\0")
    return digest.hexdigest()[:16]


@functools.cache  # the rules share most modules, and every job of the workflow asks for the hashes of all rules
def _parsed(source: bytes) -> tuple[frozenset[str], str]:
    """Names that a module imports, and its syntax tree as text, without what cannot change a result."""
    tree = ast.parse(source)
    names = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names), _dump(_WithoutWords().visit(tree))


def _dump(node: Any) -> str:
    """Syntax tree as text, the same in every version of Python: `ast.dump` differs in which empty fields it shows."""
    if isinstance(node, list):
        return f"[{', '.join(map(_dump, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {name: value for name, value in ast.iter_fields(node) if value is not None and value != []}
    return f"{type(node).__name__}({', '.join(f'{name}={_dump(value)}' for name, value in fields.items())})"


class _WithoutText(ast.NodeTransformer):
    """Replace every text, with the values in it, by an empty one."""

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.Constant("") if isinstance(node.value, str) else node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.Constant:
        return ast.Constant("")


class _WithoutWords(ast.NodeTransformer):
    """Remove docstrings and log messages, and the texts of errors and of descriptions of settings."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        value = node.value
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            return None
        called = value.func.value if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) else None
        is_log = isinstance(called, ast.Name) and called.id in ("log", "logging")
        return None if is_log else self.generic_visit(node)

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        return _WithoutText().visit(node) if node.arg == "description" else self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return _WithoutText().visit(node)


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
    """Git revision of this library, with '+' if it was edited since; 'unknown' outside a checkout."""
    command = ["git", "-C", str(Path(celldetr.__file__).parent), "describe", "--always", "--exclude=*", "--abbrev=40"]
    try:
        return subprocess.run(
            [*command, "--dirty=+"], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Versions of Python, of this library and of those of `PACKAGES` that are installed."""
    found = {"python": platform.python_version(), "celldetr": celldetr.__version__}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _text(moment: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))


def origin() -> dict[str, Any]:
    """Say what computes, where, and since when."""
    machine = {"host": socket.gethostname(), "system": platform.platform(), "cpus": os.cpu_count()}
    return {"started": _text(_STARTED), "git_revision": git_revision(), "versions": versions(), "machine": machine}


def write_provenance(
    path: str | os.PathLike[str],
    *,
    settings: Mapping[str, Any],
    inputs: Iterable[str | os.PathLike[str]] | Mapping[str, str] = (),
    **extra: Any,
) -> None:
    """Write the JSON file that says where a model or a table came from, without the credentials of URLs.

    Parameters
    ----------
    settings
        Settings of the step (JSON values).
    inputs
        Files or folders read; each is recorded with its SHA-256, as it is now or as it is given.
    extra
        More JSON values, e.g. ``device`` or ``seed``; they replace the others, e.g. by what `origin` said at the start.
    """
    record = {
        "written": _text(time.time()),
        "wall_seconds": round(time.time() - _STARTED, 1),
        **origin(),
        "settings": dict(settings),
        "inputs": dict(inputs) if isinstance(inputs, Mapping) else {str(item): sha256(item) for item in inputs},
        **extra,
    }
    write_json(path, json.loads(masked(json.dumps(record))))
