"""When a function is compiled, and when it runs as it is."""

import shutil

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend

from celldetr.model.compiled import compiled, compiles, memory_use, no_more_compiling, uncompiled
from celldetr.runtime.errors import ConfigError


def test_a_function_is_compiled_for_each_shape_until_no_more_compiling(monkeypatch):
    graphs, real, run = [], torch.compile, lookup_backend("eager")

    def backend(graph, inputs):
        graphs.append(graph)
        return run(graph, inputs)

    monkeypatch.setattr(torch, "compile", lambda function, mode, **options: real(function, **options, backend=backend))
    double = compiled(lambda x: x * 2, "cpu")

    def calls(*sizes):
        assert all(torch.equal(double(torch.ones(size)), torch.full((size,), 2.0)) for size in sizes)
        return len(graphs)

    with uncompiled():
        assert calls(3, 4) == 0
    assert calls(3, 4, 5, 3, 4) == 3
    with no_more_compiling():
        assert calls(3, 6, 7, 5) == 3
    assert calls(*range(8, 40)) == 35  # beyond the compiler's own limit


def test_what_a_setting_means_depends_on_the_device_and_its_compilers(monkeypatch):
    assert not compiles(False, "cuda", "key")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    assert compiles("auto", "cuda", "key")
    assert not compiles("auto", "cpu", "key")
    with pytest.raises(ConfigError, match="^training.compile: got true, but there is no C"):
        compiles(True, "cpu", "training.compile")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/c++")
    assert compiles(True, "cpu", "key")
    assert memory_use("cpu") == ""
