"""From the files of a user to the whole configuration."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from celldetr.config.base import merge
from celldetr.config.workflow import Config
from celldetr.runtime.errors import ConfigError


def load_config(given: Mapping[str, Any], root: Path, files: Iterable[str | os.PathLike[str]] = ()) -> Config:
    """Lay a user's settings over the paper's and check them.

    Mappings are merged key by key; lists and values replace those of the paper; null removes a block. With
    ``base: none`` the settings stand alone.

    Parameters
    ----------
    given
        Settings of the user's files and command line; empty for the paper itself.
    root
        Folder of the workflow; its config/config.yaml is the paper.
    files
        The user's files; a key that one of them gives twice is refused, because its last value would win in silence.

    Raises
    ------
    ConfigError
        As `Settings.from_dict`, or with a file and its lines.
    """
    for file in map(Path, files):
        if file.resolve().is_relative_to(Path("results").resolve()):
            raise ConfigError(
                f"--configfile: got {file}, a result; expected configurations alone: write targets before this option, "
                "or after --"
            )
        _refuse_repeated_keys(file)
    paper = yaml.safe_load((root / "config" / "config.yaml").read_text(encoding="utf-8"))
    config = dict(given) if given.get("base") == "none" else merge(paper, given)
    for key in ("experiments", "tables"):
        if isinstance(named := config.get(key), Mapping):
            config[key] = {name: block for name, block in named.items() if block is not None}
    return Config.from_dict(config)


def _refuse_repeated_keys(path: Path) -> None:
    try:
        waiting = [yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)]
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return  # Snakemake reads it too, and says what is wrong
    seen = set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        if isinstance(node, yaml.MappingNode):
            lines = dict[str, int]()
            for key, value in node.value:
                name, line = str(key.value), key.start_mark.line + 1
                if name in lines:
                    raise ConfigError(f"{path}: line {line}: got {name!r} again (also in line {lines[name]}); keep one")
                lines[name] = line
                waiting.append(value)
