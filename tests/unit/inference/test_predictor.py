"""Batches through a model: compiled as it is, with few compilations and transfers, whatever is in a batch."""

import numpy as np
import pytest
import torch
from pretended_device import Copies, moved, pretended_device
from small_model import small_model

from celldetr.inference.predictor import COMPILING_PAYS, Arriving, Predictor
from celldetr.model import compiled as compiling_of
from celldetr.runtime.errors import InputError

SIZE, BATCH = 64, 3
FOUND = {"nucleus_threshold": 0.0027}  # half of the queries
KINDS = {
    "baseline": ("baseline", {"nucleus_threshold": 0.024}),
    "sequential": ("sequential", FOUND),
    "parallel": ("parallel", FOUND),
    "boxes": ("sequential", {**FOUND, "embeds": "none"}),
    "given": ("parallel", {"embeds": "given"}),
    "given and found": ("sequential", {**FOUND, "embeds": "given"}),
}


def batches(kind, counts, seed=0):
    """Batches of as many images; images with 0 to 40 given nuclei."""
    rng = np.random.default_rng(seed)
    for number, count in enumerate(counts):
        images = rng.integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)
        low = [rng.uniform(0, 40, (nuclei, 2)) for nuclei in rng.choice([0, 1, 5, 40], count)]
        boxes = [np.concatenate([corner, corner + rng.uniform(4, 12, corner.shape)], axis=1) for corner in low]
        yield number, images, boxes if KINDS[kind][1].get("embeds") == "given" else None


def results(model, kind, counts, **options):
    predictor = Predictor(model, batch_size=BATCH, **KINDS[kind][1], **options)
    return list(predictor.read(batches(kind, counts)))


@pytest.fixture
def graphs(monkeypatch):
    """Let graphs be compiled by a backend that needs no compiler; returns those that were compiled."""
    seen, original = [], torch.compile
    backend = torch._dynamo.lookup_backend("aot_eager")

    def counted(graph, inputs):
        seen.append(graph)
        return backend(graph, inputs)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda function, **given: original(
        function, backend=counted, fullgraph=given["fullgraph"], dynamic=given["dynamic"]
    ))  # fmt: skip
    monkeypatch.setattr(compiling_of.shutil, "which", lambda _: "/a/compiler")
    yield seen
    torch._dynamo.reset()


def same(found, expected):
    for (key, *parts), (other, *others) in zip(found, expected, strict=True):
        assert key == other
        for part, like in zip(parts, others, strict=True):
            for name, values in part._asdict().items():
                np.testing.assert_allclose(values, getattr(like, name), rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_full_partial_and_empty_batches_have_the_results_of_plain_ones(kind, graphs):
    few = {"encoder_layers": 1, "decoder_layers": 1, "tokens": 2 if kind == "given" else 0}
    model, counts = small_model(KINDS[kind][0], **few), (3, 0, 3, 1, 2)
    expected = results(model, kind, counts)
    assert sum(len(found.query) + len(given.embeddings) for _, found, given in expected)
    assert not graphs
    same(results(model, kind, counts, compiling=True), expected)
    # one of the images, and one for each number of nuclei (32 or 64) where representing is a step of its own
    assert len(graphs) == {"parallel": 2, "given": 3, "given and found": 3}.get(kind, 1)


@pytest.mark.parametrize("kind", ["sequential", "parallel", "given and found"])
def test_batches_taken_ahead_have_the_same_results(kind):
    """As on a GPU: a batch is looked at before nuclei of the one before it are represented."""
    model, counts = small_model(KINDS[kind][0]), (3, 3, 0, 1)
    predictor = Predictor(model, batch_size=BATCH, **KINDS[kind][1])
    predictor._ahead, taken = 2, []

    def watched():
        for batch in batches(kind, counts):
            taken.append(batch[0])
            yield batch

    found, reached = [], []
    for result in predictor.read(watched()):
        found.append(result)
        reached.append(len(taken))
    same(found, results(model, kind, counts))
    assert reached == [3, 4, 4, 4]


def test_a_compiler_that_fails_is_told_of_once_or_is_an_error(graphs, monkeypatch, caplog):
    def broken(function, device):
        def fail(*_):
            raise RuntimeError("no such instruction\nand much more")

        return fail

    monkeypatch.setattr("celldetr.inference.predictor.compiled", broken)
    monkeypatch.setattr("celldetr.inference.predictor.compiles", lambda setting, *_, pays: setting is True or pays)
    model, counts = small_model("parallel"), (3, 3, 1)
    found = results(model, "parallel", counts, compiling="auto", expected=COMPILING_PAYS)
    same(found, results(model, "parallel", counts))
    [message] = [record.message for record in caplog.records]
    assert message == "the model runs uncompiled, as compiling it failed: no such instruction"
    with pytest.raises(RuntimeError, match="no such instruction"):
        results(model, "parallel", counts, compiling=True)


def test_a_few_images_or_a_cpu_are_not_worth_compiling(graphs):
    model = small_model("sequential")
    for expected in (COMPILING_PAYS - 1, COMPILING_PAYS):
        results(model, "sequential", (1,), compiling="auto", expected=expected)
    assert not graphs


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_is_read_once_a_batch(kind, monkeypatch):
    """Once more in mode parallel, which represents the nuclei that were found; any other wait is an error there."""
    device, fakes = pretended_device()
    monkeypatch.setattr(Arriving, "arrays", lambda arriving: [np.ones(shape, np.float32) for shape in arriving._shapes])
    model = small_model(KINDS[kind][0])
    with fakes, Copies() as copies:
        moved(model, device)
        predictor = Predictor(model, batch_size=BATCH, device=str(device), **KINDS[kind][1])
        read = [list(predictor.read(batches(kind, (3,), seed))) for seed in range(2)]
    assert len(read) == 2
    assert len(copies.to_host) == (4 if kind == "parallel" else 2)


@pytest.mark.parametrize("kind", ["sequential", "given", "given and found"])
def test_a_cpu_looks_at_a_few_images_at_a_time(kind, monkeypatch):
    model = small_model(KINDS[kind][0])
    expected = results(model, kind, (3, 3))
    monkeypatch.setattr("celldetr.inference.predictor._CACHED", 2)
    same(results(model, kind, (3, 3)), expected)


def test_values_that_are_not_finite_are_an_error_after_the_batches_before():
    model = small_model("sequential")
    predictor, done = Predictor(model, batch_size=BATCH, **FOUND), []

    def diverging():
        for batch in batches("sequential", (3, 3)):
            if batch[0] == 1:
                model.level_embed.data.fill_(float("nan"))
            yield batch

    with pytest.raises(InputError, match="not finite"):
        done.extend(key for key, *_ in predictor.read(diverging()))
    assert done == [0]
