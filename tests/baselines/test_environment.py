"""The environment of `make baselines`: complete, consistent, and with the compiled operators of torchvision."""

import importlib
import pkgutil
import sys

import pytest
import torch
from programs import run
from torchvision.ops import nms, roi_align

import celldetr.segmentation

MODULES = sorted(module.name for module in pkgutil.iter_modules(celldetr.segmentation.__path__))


def test_the_compiled_operators_of_torchvision_work():
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [1.0, 0.0, 4.0, 4.0], [8.0, 8.0, 9.0, 9.0]])
    assert nms(boxes, torch.tensor([0.8, 0.9, 0.1]), 0.5).tolist() == [1, 2]
    image = torch.arange(16.0).view(1, 1, 4, 4)
    assert roi_align(image, [boxes[:1]], output_size=4, aligned=True).allclose(image)


@pytest.mark.parametrize("name", MODULES)
def test_it_holds_what_the_systems_import(name):
    importlib.import_module(f"celldetr.segmentation.{name}")


def test_no_package_lacks_what_it_requires():
    done = run(sys.executable, "-m", "pip", "--disable-pip-version-check", "check")
    assert done.returncode == 0, done.stdout
