"""Small models whose weights are away from their initial values, so that every part has an effect."""

import torch

from celldetr.config.experiment import BackboneSettings, ModelSettings, RepresentationSettings
from celldetr.inference.predictor import Predictor
from celldetr.model.celldetr import CellDETR


def small_settings(mode, *, tokens=0, **changes):
    """Return the settings of a model of one mode; some of the changes are those of the representation decoder."""
    own = {name: changes.pop(name) for name in ("self_attention", "offset_init", "positions") if name in changes}
    sizes = {
        "classes": ("a", "b", "c"),
        "d_model": 32,
        "heads": 4,
        "points": 2,
        "ffn": 48,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "queries": 10,
        "backbone": BackboneSettings(block="basic", layers=(1, 1, 1, 1), width=8, stages=(2, 3), norm="group"),
        "representation": RepresentationSettings(layers=3, global_tokens=tokens, **own),
    }
    return ModelSettings(mode=mode, **{**sizes, **changes})


def small_model(mode, **options):
    """Build a model in evaluation mode."""
    torch.manual_seed(3)
    model = CellDETR(small_settings(mode, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))  # whatever its layout
    return model


def read_batch(model, images, given=None, **options):
    """Read one batch of images; returns the nuclei that were found, and those that were given."""
    options = {"embeds": "found" if given is None else "given", "batch_size": len(images), **options}
    [(_, found, embedded)] = Predictor(model, **options).read([(None, images, given)])
    return found, embedded
