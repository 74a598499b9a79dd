"""Small models whose weights are away from their initial values, so that every part has an effect."""

import torch

from celldetr.config.experiment import BackboneSettings, ModelSettings, RepresentationSettings
from celldetr.model.celldetr import CellDETR


def small_settings(mode, *, tokens=0, self_attention="after_first", offset_init="authors", **changes):
    """Return the settings of a model of one mode."""
    representation = {"self_attention": self_attention, "global_tokens": tokens, "offset_init": offset_init}
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
        "representation": RepresentationSettings(layers=3, **representation),
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
