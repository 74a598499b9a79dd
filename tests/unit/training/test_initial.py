"""Initial weights: what is taken over from a model of other classes, another mode or another stage."""

import pytest
import torch
from tiny_training import make_experiment, make_ssl_experiment

from celldetr.model.celldetr import CellDETR
from celldetr.model.weights import save_model
from celldetr.training.initial import build_model

LAYERS = {"representation": {"layers": 2}}
MODELS = {
    "two classes": make_experiment("parallel", LAYERS),
    "cell types": make_experiment("parallel", {**LAYERS, "classes": ["T", "B", "Mast"]}),
    "contrastive": make_ssl_experiment(),
    "baseline": make_experiment("baseline"),
    "baseline of cell types": make_experiment("baseline", {"classes": ["T", "B", "Mast"]}),
}


@pytest.mark.parametrize(
    ("start", "then", "fresh", "unused"),
    [
        ("two classes", "two classes", set(), set()),
        ("cell types", "two classes", {"class_head"}, set()),
        ("contrastive", "two classes", {"class_head"}, {"projection"}),
        ("two classes", "contrastive", {"projection"}, {"class_head"}),
        ("baseline", "two classes", {"class_head", "representation", "decoder.class_embed"}, set()),
        ("baseline of cell types", "baseline", {"decoder.class_embed"}, set()),
    ],
)
def test_only_what_a_model_lacks_or_has_otherwise_starts_from_random_weights(
    tmp_path, caplog, start, then, fresh, unused
):
    caplog.set_level("INFO")
    torch.manual_seed(5)
    theirs, settings = CellDETR(MODELS[start].model), MODELS[start].model
    save_model(tmp_path / "first.pt", theirs, settings)
    experiment = MODELS[then]
    with_it, without = (build_model(experiment, None, path, "cpu") for path in (tmp_path / "first.pt", None))
    before, random = theirs.state_dict(), without.state_dict()
    for name, weights in with_it.state_dict().items():
        expected = random if name.startswith(tuple(fresh)) else before
        assert torch.equal(weights, expected[name]), name
    lost = [name for name in before if name not in random]
    assert {name.split(".")[0] for name in lost} == unused
    assert (f"{len(lost)} tensors of" in caplog.text) == bool(lost)
    assert ("tensors start from random weights" in caplog.text) == bool(fresh)
