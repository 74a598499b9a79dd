"""How many operators a training step launches when nothing is compiled: a bound, so that none comes unnoticed.

Measured, in bf16 with the layers of the paper: 1,451 (baseline), 1,729 (sequential), 1,766 (parallel), 1,790 (ssl). Of
those of sequential, 360 are the linear layers and 241 the backbone, 106 fold its frozen norms into weights, and 92 are
casts of what flows between the layers.
"""

import pytest
import torch
from counted_operators import Operators, as_on_a_gpu, sample
from step_on_pretended_device import one_step
from tiny_training import CLASSES, make_stage

from celldetr.config.experiment import Experiment
from celldetr.model.deformable_attention import DeformableAttention
from celldetr.training.data import TrainingBatches
from celldetr.training.optimizer import make_optimizer
from celldetr.training.prefetch import prepare

NARROW = {"d_model": 16, "heads": 2, "ffn": 16, "queries": 8, "backbone": {"width": 8}}


def paper_experiment(mode):
    """Make an experiment with the layers of the paper; its operators do not depend on how wide they are."""
    told = {"name": mode, "stage": "supervised", "training": {"batch_size": 2, "noise": {"share": 0.6}}}
    model = {"mode": mode, "classes": list(CLASSES)}
    if mode == "ssl":
        told["stage"] = "ssl"
        model = {"mode": "parallel", "classes": [], "projection": 8, "representation": {"positions": False}}
    return Experiment.from_dict({**told, "model": {**model, **NARROW}})


@pytest.mark.parametrize(
    ("mode", "most"), [("baseline", 1470), ("sequential", 1750), ("parallel", 1790), ("ssl", 1810)]
)
def test_a_step_launches_no_more_operators_than_before(store, slide, mode, most):
    stage = make_stage(slide if mode == "ssl" else store, paper_experiment(mode))
    for module in stage.model.modules():
        if isinstance(module, DeformableAttention):
            module.sample = sample
    stage.train()
    optimizer, batches = make_optimizer(stage.model, stage.settings), TrainingBatches(stage.train_data, 2, 0)
    stage.training_losses = torch.autocast("cpu", torch.bfloat16)(stage.training_losses)
    with as_on_a_gpu():
        one_step(stage, optimizer, prepare(batches[0], "cpu", stage.settings))  # makes the tables
        with Operators() as counted:
            one_step(stage, optimizer, prepare(batches[1], "cpu", stage.settings))
    assert counted.names["sample"] == counted.names["sample_backward"] > 0
    assert sum(counted.names.values()) <= most, counted.names.most_common(20)
