"""The stages of CellDETR by name, apart from the loop: an edit of their losses trains no other system again."""

from collections.abc import Mapping

from celldetr.training.ssl import SslStage
from celldetr.training.stage import Stage
from celldetr.training.supervised import SupervisedStage

STAGES: Mapping[str, type[Stage]] = {"supervised": SupervisedStage, "st": SupervisedStage, "ssl": SslStage}
"""Values of ``experiments.*.stage``."""
