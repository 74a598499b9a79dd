"""Which parts of a model a run trains."""

from torch import nn

from celldetr.model.celldetr import CellDETR

TRAINED = {"head": ("class_head",), "representation": ("representation", "class_head")}
"""Parts of the model that train, by the setting ``training.probe``; the rest is frozen."""


def freeze(model: CellDETR, probe: str) -> list[nn.Module]:
    """Take the gradient from the parameters that do not train.

    Where nothing before it trains, autograd computes nothing backwards, and no graph is kept for it.

    Returns
    -------
    list
        The frozen modules, which must stay in evaluation mode.
    """
    if probe == "none":
        return []
    model.requires_grad_(False)
    frozen = []
    for name, part in model.named_children():
        if name in TRAINED[probe]:
            part.requires_grad_(True)
        else:
            frozen.append(part)
    return frozen
