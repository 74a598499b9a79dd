import os
import subprocess
import sys

import pytest
import torch
from small_model import small_model, small_settings
from torch._dynamo.testing import CompileCounterWithBackend

from celldetr.model.celldetr import CellDETR
from celldetr.model.device import use_activation_checkpointing

MODES = ("baseline", "sequential", "parallel")


def build(mode, *, tokens=2, **options):
    """Build a small model in float64."""
    return small_model(mode, tokens=tokens, **options).double()


def images(count=3, size=64):
    return torch.rand(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def boxes(batch, count, seed=0):
    drawn = torch.rand(batch, count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.cat((0.2 + 0.6 * drawn[..., :2], 0.05 + 0.3 * drawn[..., 2:]), dim=-1)


def middle(model, batch):
    """Find a threshold that about half of the detections of a batch reach, between two scores."""
    logits = model.detect(model.encode(batch)).logits[-1]
    scores = logits.detach().sigmoid().amax(dim=-1).flatten().sort().values
    return float(scores[len(scores) // 2 : len(scores) // 2 + 2].mean())


def same(first, second):
    for name in ("query", "boxes", "nucleus_score", "class_scores", "embeddings"):
        if getattr(first, name) is not None:
            torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_result_of_an_image_is_the_same_whatever_shares_its_batch(mode):
    model, batch = build(mode), images()
    threshold = middle(model, batch)
    together = model.predict(batch, threshold)
    assert len({len(found.query) for found in together}) > 1, "images must need different padding"
    for index, found in enumerate(together):
        same(found, model.predict(batch[index : index + 1], threshold)[0])


@pytest.mark.parametrize(("mode", "self_attention"), [("sequential", "none"), ("parallel", "after_first")])
def test_padding_never_leaks(mode, self_attention):
    model = build(mode, self_attention=self_attention)
    features, given = model.encode(images(2)), boxes(2, 5)
    valid = torch.tensor([[True] * 5, [True, False, True, False, False]])
    expected = model.represent(features, given, valid)
    for rubbish in (torch.nan, 1e9, 0.0):
        padded = torch.where(valid[..., None], given, rubbish)
        torch.testing.assert_close(model.represent(features, padded, valid), expected, rtol=0, atol=1e-12)
    training_loss(model, images(2), torch.where(valid[..., None], given, torch.nan), valid).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert not expected[~valid].any()
    alone = model.represent(model.encode(images(2)[1:]), given[1:, [0, 2]])
    torch.testing.assert_close(expected[1, [0, 2]], alone[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_images_without_nuclei_give_empty_results(mode):
    model = build(mode)
    for found, points in model.attention(images(2), 1.0):
        assert found.boxes.shape == (0, 4)
        assert found.class_scores.shape == (0, 3)
        assert len(points.weights) == len(found.query) == 0
        assert found.embeddings is None if mode == "baseline" else found.embeddings.shape == (0, 32)


def test_permuted_boxes_give_permuted_embeddings():
    model = build("parallel")
    features, given, order = model.encode(images(2)), boxes(2, 6), torch.tensor([4, 1, 5, 0, 2, 3])
    expected = model.represent(features, given)[:, order]
    torch.testing.assert_close(model.represent(features, given[:, order]), expected, rtol=0, atol=1e-12)


def test_without_self_attention_an_embedding_depends_on_its_own_box_alone():
    given = boxes(1, 4)
    others = torch.cat((given[:, :1], boxes(1, 6, seed=1)), dim=1)
    for kind, alike in (("none", True), ("after_first", False)):
        model = build("parallel", self_attention=kind)
        features = model.encode(images(1))
        first, second = (model.represent(features, some)[:, 0] for some in (given, others))
        assert torch.allclose(first, second, rtol=0, atol=1e-12) == alike


@pytest.mark.parametrize("mode", MODES)
def test_predictions_are_the_detections_that_reach_the_threshold(mode):
    model, batch = build(mode), images()
    found = model.detect(model.encode(batch))
    scores = found.logits[-1].sigmoid().amax(dim=-1)
    threshold = scores.detach().flatten().median().item()  # one score is equal to it
    for image, predicted in enumerate(model.predict(batch, threshold)):
        assert predicted.query.tolist() == (scores[image] >= threshold).nonzero().flatten().tolist()
        centre = predicted.boxes.view(-1, 2, 2).mean(dim=1) / 64
        torch.testing.assert_close(centre, found.boxes[-1, image, predicted.query, :2].detach())
        torch.testing.assert_close(predicted.nucleus_score, scores[image, predicted.query].detach())


def training_loss(model, batch, given, valid):
    """Losses that reach what the losses of training reach."""
    features = model.encode(batch)
    found = model.detect(features)
    matched = found.boxes[:, :, : given.shape[1]][:, valid]
    loss = found.logits.square().mean() + matched.square().sum()
    if model.settings.mode == "sequential":
        classes = model.classify(model.represent(features, found.boxes[-1]))[:, : given.shape[1]][valid]
        loss = loss + classes.square().sum()
    if model.settings.mode == "parallel":
        loss = loss + model.classify(model.represent(features, given, valid))[valid].square().sum()
    return loss


@pytest.mark.parametrize("nuclei", [0, 1, 3])
@pytest.mark.parametrize(
    ("mode", "tokens", "self_attention"),
    [
        ("baseline", 0, "after_first"),
        ("sequential", 0, "after_first"),
        *(("parallel", tokens, kind) for tokens in (0, 2) for kind in ("after_first", "none")),
    ],
)
def test_every_parameter_gets_a_gradient(mode, nuclei, tokens, self_attention):
    """Devices that share a batch wait for each other's gradients: none may depend on what a device's images hold."""
    model = build(mode, tokens=tokens, self_attention=self_attention).train()
    training_loss(model, images(2), boxes(2, nuclei), torch.ones(2, nuclei, dtype=torch.bool)).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    if nuclei > 1:
        silent = [name for name, p in model.named_parameters() if not p.grad.any()]
        assert silent == []


def test_each_detection_layer_refines_the_detached_box_of_the_layer_before():
    model = build("baseline")
    found = model.detect(model.encode(images(1)))
    assert found.logits.shape == (2, 1, 10, 3)
    found.boxes[1].sum().backward()
    assert model.decoder.bbox_embed[1].layers[-1].bias.grad.any()
    assert not model.decoder.bbox_embed[0].layers[-1].bias.grad.any()


def test_a_new_model_starts_at_the_prior_with_boxes_of_nuclear_size():
    torch.manual_seed(0)
    model = CellDETR(small_settings("sequential")).eval()
    with torch.no_grad():
        features = model.encode(images(1).float())
        found = model.detect(features)
        classes = model.classify(model.represent(features, found.boxes[-1])).sigmoid()
    torch.testing.assert_close(found.boxes[0], found.boxes[1])
    for scores in (found.logits.sigmoid(), classes):
        assert 0.005 < scores.mean() < 0.05
    assert 0.05 < found.boxes[-1, ..., 2:].min() <= found.boxes[-1, ..., 2:].max() < 0.3


def test_mask_hides_boxes_from_each_other():
    """Anchors after originals (contrastive pretraining): an anchor sees the originals and itself alone."""
    model = build("parallel", positions=False)
    features = model.encode(images(1))
    mask = torch.zeros(1, 5, 5, dtype=torch.bool)
    mask[..., :3] = True  # three originals, two anchors
    given, other = boxes(1, 5), boxes(1, 5)
    other[:, 4] = boxes(1, 5, seed=2)[:, 4]
    first, second = (model.represent(features, some, mask=mask) for some in (given, other))
    torch.testing.assert_close(first[:, :4], second[:, :4], rtol=0, atol=1e-12)
    assert not torch.allclose(first[:, 4], second[:, 4])
    originals = model.represent(features, given[:, :3])
    torch.testing.assert_close(first[:, :3], originals, rtol=0, atol=1e-12)


def test_positions_are_of_self_attention_only():
    given = boxes(1, 3)
    for kind, alike in (("none", True), ("after_first", False)):
        models = [build("parallel", tokens=0, self_attention=kind, positions=value) for value in (True, False)]
        first, second = (model.represent(model.encode(images(1)), given) for model in models)
        assert torch.allclose(first, second, rtol=0, atol=1e-12) == alike


def test_global_tokens_are_context_of_the_parallel_mode_with_positions():
    for mode, positions, alike in (("sequential", True, True), ("parallel", True, False), ("parallel", False, True)):
        first, second = (build(mode, tokens=tokens, positions=positions) for tokens in (0, 3))
        second.load_state_dict(first.state_dict())
        found = [model.represent(model.encode(images(1)), boxes(1, 3)) for model in (first, second)]
        assert torch.equal(*found) == alike


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_autocast_keeps_boxes_and_logits_in_full_precision(mode):
    model, batch = build(mode).float(), images(2).float()
    given = boxes(2, 3).float()
    with torch.no_grad():
        exact = model.detect(model.encode(batch))
        with torch.autocast("cpu", torch.bfloat16):
            features = model.encode(batch)
            found = model.detect(features)
            assert found.logits.dtype == found.boxes.dtype == torch.float32
            assert (found.boxes - exact.boxes).abs().mean() < 0.02
            if mode != "baseline":
                logits = model.classify(model.represent(features, given))
                assert logits.dtype == torch.float32
            assert all(item.boxes.isfinite().all() for item in model.predict(batch, 0.0))
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = training_loss(model, batch, given, torch.ones(2, 3, dtype=torch.bool))
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


def test_prediction_in_inference_mode_leaves_the_model_trainable():
    model = build("parallel").train()
    with torch.inference_mode():
        model.predict(images(1, size=96), 0.0)
    assert model.training
    training_loss(model, images(1, size=96), boxes(1, 2), torch.ones(1, 2, dtype=torch.bool)).backward()


def test_extra_levels_halve_the_last_map():
    backbone = small_settings("sequential").backbone.model_copy(update={"extra_levels": 2})
    model = build("sequential", backbone=backbone)
    features = model.encode(images(1, size=96))
    assert features.shapes == ((12, 12), (6, 6), (3, 3), (2, 2))
    assert features.memory.shape == (1, sum(h * w for h, w in features.shapes), 32)


def test_both_kernels_give_the_same_model():
    first, second = build("parallel"), build("parallel", kernel="reference")
    for found, expected in zip(first.predict(images(), 0.0), second.predict(images(), 0.0), strict=True):
        same(found, expected)


@pytest.mark.parametrize("half", [False, True])
def test_activation_checkpointing_keeps_less_and_gives_the_same_gradients(half):
    kept, gradients = {}, {}
    for again in (True, False):
        model = build("parallel", encoder_layers=4).float().train()
        use_activation_checkpointing(model, again)
        sizes = {}

        def keep(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        precision = torch.autocast("cpu", torch.bfloat16, enabled=half)
        with precision, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            torch.manual_seed(1)
            features = model.encode(images().float())
            logits, boxes = model.detect(features)
            embeddings = model.represent(features, boxes[-1])
        kept[again] = sum(sizes.values())
        (logits.sum() + boxes.sum() + embeddings.square().sum()).backward()
        gradients[again] = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert kept[True] < 0.4 * kept[False]
    for first, second in zip(gradients[True], gradients[False], strict=True):
        assert torch.equal(first, second)


NARROW = """
import torch
from small_model import small_model
torch.set_num_threads(2)
model = small_model("baseline").train()
for _ in range(10):
    model.encode(torch.rand(3, 3, 64, 64)).memory.sum().backward()
"""


def test_a_narrow_backbone_trains_on_several_threads_of_a_cpu():
    """In a process of its own: the memory was damaged where channels were last."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", NARROW], env=environment, check=True)


@pytest.mark.slow
def test_a_compiled_step_in_half_precision_is_one_graph_with_the_same_gradients():
    backbone = small_settings("sequential").backbone.model_copy(update={"norm": "frozen_batch"})
    model = build("sequential", backbone=backbone).float()
    batch, given = images(2).float(), boxes(2, 3).float()

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            return training_loss(model, batch, given, torch.ones(2, 3, dtype=torch.bool))

    counted = CompileCounterWithBackend("aot_eager")
    compiled, losses, gradients = torch.compile(step, fullgraph=True, backend=counted), [], []
    for run in (step, compiled, compiled):  # the first makes the tables
        model.zero_grad()
        losses.append(run())
        losses[-1].backward()
        gradients.append([weight.grad for weight in model.parameters()])
    torch._dynamo.reset()
    assert counted.frame_count == 1
    assert losses[0] == losses[1] == losses[2]
    for expected, *found in zip(*gradients, strict=True):
        for gradient in found:
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)
