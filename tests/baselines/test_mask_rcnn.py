"""Mask R-CNN: its targets and nuclei against direct counts, its losses, and the weights it starts from."""

import re

import numpy as np
import pytest
import torch
from drawn_nuclei import check_nuclei, discs, planted, system_settings, train_steps
from torchvision.models import resnet18, resnet50
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.models.detection.roi_heads import project_masks_on_boxes

from celldetr.runtime.errors import ConfigError, InputError
from celldetr.segmentation.mask_rcnn import Detections, MaskRCNN, box_targets, nuclei_of_proposals, paint

NUCLEI = discs((14, 16, 9), (30, 16, 9), (30, 34, 10), (62, 60, 8), (2, 50, 7))


@pytest.fixture
def small():
    torch.manual_seed(0)
    return MaskRCNN(system_settings("mask_rcnn"))


@pytest.mark.parametrize("enlarged", [1, 2])
def test_targets_agree_with_a_direct_count(enlarged):
    instances = NUCLEI.copy()
    instances[instances == 2] = 0  # cut away by augmentation
    _, truth = planted(instances, discs())
    first, empty = box_targets(truth, enlarged)
    assert first["labels"].tolist() == [1, 3, 1, 2]
    for number, box, mask in zip((1, 3, 4, 5), first["boxes"], first["masks"], strict=True):
        y, x = np.nonzero(instances == number)
        assert box.tolist() == [enlarged * edge for edge in (x.min(), y.min(), 1 + x.max(), 1 + y.max())]
        np.testing.assert_array_equal(mask, np.kron(instances == number, np.ones((enlarged, enlarged))))
    assert [tuple(empty[name].shape) for name in ("boxes", "labels", "masks")] == [
        (0, 4),
        (0,),
        (0, 64 * enlarged, 64 * enlarged),
    ]


def test_proposals_of_one_nucleus_become_one_whatever_their_classes():
    box = torch.tensor([[10.0, 10, 30, 30], [11, 10, 31, 30], [30, 10, 50, 30], [5, 40, 20, 60], [5, 40, 5, 60]])
    boxes = torch.stack([torch.zeros(5, 4), box, box, box + 1], dim=1)
    probabilities = torch.tensor(
        [[0.1, 0.45, 0.4, 0.05], [0.05, 0.1, 0.25, 0.6], [0.5, 0.5, 0.0, 0.0], [0.51, 0.0, 0.49, 0.0], [0.0, 1, 0, 0]]
    )
    found = nuclei_of_proposals(boxes, probabilities, 0.5, 0.5)
    assert found.boxes.tolist() == [[12, 11, 32, 31], [30, 10, 50, 30]], "box of the likeliest class; neighbours stay"
    assert found.score.tolist() == pytest.approx([0.95, 0.5])
    assert found.classes[0].tolist() == pytest.approx([0.1 / 0.95, 0.25 / 0.95, 0.6 / 0.95])
    assert len(nuclei_of_proposals(boxes[:0], probabilities[:0], 0.5, 0.5).boxes) == 0
    certain = torch.tensor([[1.0, 0, 0, 0]])
    assert nuclei_of_proposals(boxes[:1], certain, 0.0, 0.5).classes.isfinite().all()


@pytest.mark.parametrize("enlarged", [1, 2])
def test_perfect_masks_give_the_nuclei_back(enlarged):
    instances = discs((14.3, 16, 9), (30, 16.6, 9), (30, 34, 10), (62, 60, 8), (2, 50, 7), (50, 8, 4), (48, 30, 3.5))
    _, truth = planted(instances)
    [target] = box_targets(truth, enlarged)
    boxes = target["boxes"] + torch.tensor([-0.7, -1.2, 0.4, 0.9])
    masks = project_masks_on_boxes(target["masks"], boxes, torch.arange(7), 28)
    found = paint(Detections(boxes, torch.ones(7), torch.eye(3)[target["labels"] - 1]), masks, 64, enlarged, 10)
    check_nuclei(found, 64, 3)
    for number, (left, top, right, bottom), mask in zip(range(1, 8), found.boxes.astype(int), found.masks, strict=True):
        painted = np.zeros(instances.shape, dtype=bool)
        painted[top:bottom, left:right] = mask
        own = instances == number
        assert (painted & own).sum() > 0.9 * (painted | own).sum()


def test_masks_do_not_overlap_and_small_ones_are_dropped():
    boxes = torch.tensor([[20.0, 20, 40, 40], [4, 4, 12, 20], [30, 20, 50, 40], [60, 60, 63, 63], [50, 2, 80, 12]])
    masks = torch.ones(5, 28, 28)
    masks[1, 14:] = 0  # the lower half of its box is empty
    nuclei = Detections(boxes, torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]), torch.eye(3)[[0, 1, 2, 0, 1]])
    found = paint(nuclei, masks, 64, 1, 10)
    check_nuclei(found, 64, 3)
    assert found.boxes.tolist() == [[20, 20, 40, 40], [4, 4, 12, 12], [40, 20, 50, 40], [50, 2, 64, 12]]
    assert found.nucleus_score.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.5])
    assert found.class_scores.argmax(axis=1).tolist() == [0, 1, 2, 1]
    assert paint(nuclei, torch.zeros_like(masks), 64, 1, 0).boxes.shape == (0, 4), "empty masks are dropped"
    outside = Detections(torch.tensor([[63.6, 3, 64.0, 9]]), torch.ones(1), torch.ones(1, 3))
    assert len(paint(outside, masks[:1], 64, 1, 0).boxes) == 0


def test_losses_fall_and_planted_nuclei_are_found(small):
    images, truth = planted(NUCLEI)
    losses = train_steps(small, images, truth, 60)
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    with torch.no_grad():
        [found] = small.eval().segment(images)
    check_nuclei(found, 64, 3)
    expected = box_targets(truth, 1)[0]["boxes"].numpy()
    distance = np.abs(found.boxes[:, None] - expected).max(axis=2)
    assert (distance.min(axis=0) < 5).sum() >= 4
    assert len(found.boxes) <= 2 * len(expected)


def test_boxes_are_computed_in_float32_beside_bfloat16(small):
    """Proposals that were rounded to bfloat16 would be apart by whole px from 128 px on."""
    images, truth = planted(NUCLEI)
    kinds = set()
    for part in (small.rpn.head.conv, small.roi_heads.box_head, small.roi_heads.mask_predictor):
        part.register_forward_hook(lambda _, given, out: kinds.add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        losses = small.train().losses(images, truth)
        with torch.no_grad():
            small.eval().segment(images)
    assert kinds == {loss.dtype for loss in losses.values()} == {torch.float32}


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_images_without_nuclei_are_legal(small, precision):
    for maps in ((discs(), discs()), (NUCLEI, discs())):
        images, truth = planted(*maps)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            losses = small.train().losses(images, truth)
            sum(losses.values()).backward()
            assert set(losses) == {"objectness", "rpn_box_reg", "classifier", "box_reg", "mask"}
            assert all(loss.isfinite() for loss in losses.values())
            assert small._look(images)[1]["0"].dtype == torch.float32, "bfloat16 has no digits for boxes"
            with torch.no_grad():
                for nuclei in small.eval().segment(images):
                    check_nuclei(nuclei, 64, 3)
    assert all(parameter.grad.isfinite().all() for parameter in small.parameters())


def test_a_threshold_that_nothing_reaches_finds_nothing(small):
    small.settings = system_settings("mask_rcnn", score_threshold=1.0)
    images, _ = planted(NUCLEI, discs())
    with torch.no_grad():
        assert [len(nuclei.boxes) for nuclei in small.eval().segment(images)] == [0, 0]


def test_no_image_has_more_nuclei_than_allowed(small):
    small.settings = system_settings("mask_rcnn", score_threshold=0.0, max_detections=3, min_area=0)
    with torch.no_grad():
        assert all(0 < len(nuclei.boxes) <= 3 for nuclei in small.eval().segment(torch.rand(2, 3, 64, 64)))


def test_a_step_repeats_with_its_seed(small):
    images, truth = planted(NUCLEI, discs((40, 40, 12)))
    seen = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        seen.append(torch.stack(list(small.train().losses(images, truth).values())).tolist())
    assert seen[0] == seen[1] != seen[2]


@pytest.fixture(scope="module")
def paper():
    torch.manual_seed(0)
    return MaskRCNN(system_settings("mask_rcnn", "paper"))


@pytest.fixture(scope="module")
def before(paper):
    return {name: tensor.clone() for name, tensor in paper.state_dict().items()}


def published(module):
    """State of a module of torchvision with random statistics, as published: without counts of batches."""
    for norm in module.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            for values, low, high in ((norm.running_mean, -1, 1), (norm.running_var, 0.5, 2), (norm.weight, 0.1, 0.3)):
                values.data.uniform_(low, high)
    return {name: tensor for name, tensor in module.state_dict().items() if not name.endswith("num_batches_tracked")}


def test_coco_weights_are_taken_over_without_their_classes(paper, before, tmp_path):
    torch.manual_seed(1)
    original = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).eval()
    for norm in original.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.eps = 0.0  # as torchvision does for this file
    state = published(original)
    for now, then in (
        (r"(_blocks\.\d)\.0\.", r"\1."),
        (r"(head\.conv)\.0\.0\.", r"\1."),
        (r"mask_head\.(\d)\.0\.", lambda found: f"mask_head.mask_fcn{int(found[1]) + 1}."),
    ):
        state = {re.sub(now, then, name): tensor for name, tensor in state.items()}
    assert {"rpn.head.conv.weight", "roi_heads.mask_head.mask_fcn4.bias", "backbone.fpn.inner_blocks.0.weight"} < {
        *state
    }
    path = tmp_path / "coco.pth"
    torch.save(state, path)
    kept = paper.load_pretrained(path)
    assert {name.rpartition(".")[0].removeprefix("roi_heads.") for name in kept} == {
        "box_predictor.cls_score",
        "box_predictor.bbox_pred",
        "mask_predictor.mask_fcn_logits",
    }
    own = paper.state_dict()
    assert all(torch.equal(own[name], before[name]) for name in kept)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        paper.train()
        _, features = paper._look(images)
        large = torch.nn.functional.interpolate(images, scale_factor=2, mode="bilinear")
        expected = original.backbone((large - paper.image_mean) / paper.image_std)
        for name, maps in expected.items():
            torch.testing.assert_close(features[name], maps, rtol=1e-3, atol=1e-3)
        pooled, same = (
            model.roi_heads.mask_predictor.conv5_mask(model.roi_heads.mask_head(torch.ones(1, 256, 14, 14)))
            for model in (paper, original)
        )
    torch.testing.assert_close(pooled, same)
    for name, tensor in own.items():
        assert torch.equal(paper.state_dict()[name], tensor), f"{name} changed in training mode"


def test_a_resnet_is_taken_over_alone_and_without_weights_statistics_are_learned(paper, before, tmp_path):
    paper.load_state_dict(before)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        paper.train()._look(images)
        assert not torch.equal(paper.backbone.body.bn1.running_mean, before["backbone.body.bn1.running_mean"])
        torch.manual_seed(2)
        original = resnet50().eval()
        path = tmp_path / "resnet50.pth"
        torch.save(published(original), path)
        kept = paper.load_pretrained(path)
        assert {name.split(".")[1] for name in kept if name.startswith("backbone.")} == {"fpn"}
        assert not any(name.startswith("backbone.body.") for name in kept)
        assert {name for name in before if name.startswith(("rpn.", "roi_heads."))} < {*kept}
        paper.train()
        x = torch.rand(1, 3, 64, 64)
        maps = original.maxpool(original.relu(original.bn1(original.conv1(x))))
        maps = original.layer4(original.layer3(original.layer2(original.layer1(maps))))
        torch.testing.assert_close(paper.backbone.body(x)["3"], maps, rtol=1e-4, atol=1e-4)
    trained = {name for name, parameter in paper.named_parameters() if parameter.requires_grad}
    assert "backbone.body.conv1.weight" in trained
    assert not any(".bn" in name for name in trained)


def test_a_step_of_the_full_size(paper):
    images, truth = planted(NUCLEI)
    losses = paper.train().losses(images, truth)
    sum(losses.values()).backward()
    assert paper.backbone.body.conv1.weight.grad.abs().sum() > 0
    with torch.no_grad():
        [found] = paper.eval().segment(images)
    check_nuclei(found, 64, 3)
    paper.zero_grad()


def test_other_files_are_refused(paper, small, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(resnet18().state_dict(), path)
    with pytest.raises(InputError, match=r"weights\.pth: does not fit the model(.|\n)*layer1\.0\.conv"):
        paper.load_pretrained(path)
    torch.save({"format": 1, "state": {}}, path)
    with pytest.raises(InputError, match=r"got keys .*format.*expected weights of torchvision.*resnet50-0676ba61"):
        paper.load_pretrained(path)
    path.write_bytes(b"no weights")
    with pytest.raises(InputError, match="cannot be read as a PyTorch file"):
        paper.load_pretrained(path)
    with pytest.raises(ConfigError, match="size small, which has no weights; set `initial: none`"):
        small.load_pretrained(path)
