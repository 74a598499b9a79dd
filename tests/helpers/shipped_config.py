"""The configuration files that are shipped, and changes of the paper's."""

import yaml
from programs import ROOT

from celldetr.config.base import merge

FILES = sorted([ROOT / "config" / "config.yaml", *ROOT.glob("config/*/config.yaml")])


def read(path=FILES[0]):
    """Read a configuration file; the paper's."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def with_value(path, value):
    """Lay a value over the shipped configuration at a dotted path."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return merge(read(), value)
