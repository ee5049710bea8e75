"""Table 7's comparators: SSDLite against torchvision, the wiring of the pyramids."""

import math

import pytest
import timm
import torch
from torch import nn
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou

from effspinenet_lib import create_model, measure_cost
from effspinenet_lib.errors import TrainingError, UserError
from effspinenet_lib.models.fpn import TimmFeatures
from effspinenet_lib.models.layers import set_norms
from effspinenet_lib.models.mobile_fpn import (
    NAS_FPN_CELLS,
    MnasFPN,
    MnasFPNCell,
    MobileNetV2Features,
    NASFPNCells,
    mnasnet_a1_features,
    mobilenetv3_features,
)
from effspinenet_lib.models.retinanet import RetinaNet
from effspinenet_lib.models.ssd import PriorBoxes, SharedTower, SSDSettings

SIDES = (8, 4, 2, 1, 1, 1)  # of SSDLite's features at 128 pixels
CLASSES = 5


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return create_model("mobilenetv3_small_ssdlite", num_classes=CLASSES)


@pytest.fixture(scope="module")
def priors(detector):
    return detector.anchors(torch.zeros(1, 3, 128, 128), [(side, side) for side in SIDES])


@pytest.fixture
def reference(detector):
    """torchvision's SSD around the same prior boxes; its network is never run."""
    settings = detector.settings
    return SSD(
        nn.Identity(),
        detector.priors,
        (128, 128),
        CLASSES + 1,
        head=nn.Identity(),
        score_thresh=settings.score_threshold,
        nms_thresh=settings.nms_iou,
        detections_per_img=settings.detections,
        topk_candidates=settings.candidates,
    )


def random_outputs(count, images=2):
    torch.manual_seed(3)
    return torch.randn(images, count, CLASSES + 1) * 2, torch.randn(images, count, 4)


def random_target(count):
    corners = torch.rand(count, 2) * 80
    boxes = torch.cat([corners, corners + 12 + torch.rand(count, 2) * 36], 1)
    return {"boxes": boxes, "labels": torch.randint(CLASSES, (count,))}


def test_mnasfpn_at_full_width_costs_what_its_released_config_states():
    with torch.device("meta"):  # 64 channels in the predictor; 0.92 B and 2.5 M
        tower = SharedTower(MnasFPN(1.0), 64, 4)
        cost = measure_cost(RetinaNet(tower, 90, 64, 0, "relu", project=False), 320)
    assert cost.multi_adds / 1e9 == pytest.approx(0.92, rel=0.02)
    assert cost.parameters / 1e6 == pytest.approx(2.5, rel=0.02)


def test_prior_boxes_against_torchvisions(priors):
    """All but the finest level, where the released configs have three."""
    generator = DefaultBoxGenerator([[2, 3] for _ in SIDES], min_ratio=0.2, max_ratio=0.95)
    grids = [torch.empty(1, 1, side, side) for side in SIDES]
    expected = generator(ImageList(torch.zeros(1, 3, 128, 128), [(128, 128)]), grids)[0]
    finest = SIDES[0] ** 2
    torch.testing.assert_close(priors[3 * finest :], expected[6 * finest :])


def test_the_finest_prior_boxes(priors):
    corner = priors[:3]
    torch.testing.assert_close(corner.unflatten(1, (2, 2)).mean(1), torch.full((3, 2), 8.0))
    wide, narrow = 0.2 * 128 * 2**0.5, 0.2 * 128 / 2**0.5
    sides = torch.tensor([[12.8, 12.8], [wide, narrow], [narrow, wide]])
    torch.testing.assert_close(corner[:, 2:] - corner[:, :2], sides)
    assert PriorBoxes(SSDSettings(), 6).num_anchors_per_location() == [3, 6, 6, 6, 6, 6]


@pytest.mark.parametrize("counts", [(4, 7), (0, 3), (0, 0)])
def test_losses_against_torchvision(detector, reference, priors, counts):
    logits, codes = random_outputs(len(priors))
    targets = [random_target(count) for count in counts]
    losses = detector.losses(logits, codes, priors, targets)

    nothing = torch.full((len(priors),), -1)
    matches = [
        reference.proposal_matcher(box_iou(t["boxes"], priors)) if len(t["boxes"]) else nothing
        for t in targets
    ]
    shifted = [{**t, "labels": t["labels"] + 1} for t in targets]
    outputs = {"cls_logits": logits, "bbox_regression": codes}
    expected = reference.compute_loss(shifted, outputs, [priors] * 2, matches)
    torch.testing.assert_close(losses["classification"], expected["classification"])
    torch.testing.assert_close(losses["box"], expected["bbox_regression"])
    assert (losses["box"] > 0) == (sum(counts) > 0)


def test_priors_in_a_crowd_are_no_negatives(detector, priors):
    logits, codes = random_outputs(len(priors), images=1)
    objects = torch.tensor([[70.0, 20, 120, 80], [0, 0, 64, 128]])
    target = {"boxes": objects, "labels": torch.tensor([1, 2])}
    crowded = [{**target, "iscrowd": torch.tensor([False, True])}]
    inside = (priors[:, 2] < 60).nonzero().squeeze(1)  # far from the object
    harder = logits.clone()
    harder[0, inside, 3] += 20

    def loss(values, targets):
        return detector.losses(values, codes, priors, targets)["classification"]

    assert loss(harder, crowded) == loss(logits, crowded)
    alone = [{key: value[:1] for key, value in target.items()}]
    assert loss(harder, alone) > loss(logits, alone)


def test_detections_against_torchvision(detector, reference, priors):
    logits, codes = random_outputs(len(priors), images=1)
    outputs = {"cls_logits": logits, "bbox_regression": codes}
    expected = reference.postprocess_detections(outputs, [priors], [(128, 128)])[0]
    scores = logits.softmax(-1)[0, :, 1:]
    found = detector.detections(scores, codes[0], priors, (128, 128))
    assert len(found["boxes"]) == 100
    torch.testing.assert_close(found["scores"], expected["scores"])
    torch.testing.assert_close(found["boxes"], expected["boxes"])
    assert torch.equal(found["labels"], expected["labels"] - 1)


def test_evaluation_finds_an_object_that_the_network_gives(detector, priors, monkeypatch):
    logits = torch.full((1, len(priors), CLASSES + 1), -10.0)
    logits[..., 0] = 10
    logits[0, 40, 3] = 20  # the column of class 2
    codes = torch.zeros(1, len(priors), 4)
    monkeypatch.setattr(detector, "network", lambda images: (logits, codes, priors))
    monkeypatch.setattr(detector, "training", False)
    (found,) = detector(torch.zeros(1, 3, 128, 128))
    assert found["labels"].tolist() == [2]
    torch.testing.assert_close(found["boxes"], priors[40:41].clamp(0, 128))
    logits[0, 7, 1] = math.nan
    with pytest.raises(TrainingError, match="not finite"):
        detector(torch.zeros(1, 3, 128, 128))


def test_ssdlite_refuses_what_it_cannot_train_on(detector):
    detector.train()
    with pytest.raises(ValueError, match="targets"):
        detector(torch.zeros(2, 3, 64, 64))
    with pytest.raises(UserError, match="2 images"):
        detector(torch.zeros(1, 3, 320, 320), [random_target(1)])


def test_mobilenetv3_levels_against_torchvisions_ssdlite():
    theirs = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).backbone.eval()
    ours = mobilenetv3_features("large").eval()
    ours.network.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        expected, found = theirs(images), ours(images)
    assert list(found) == [4, 5, 6, 7, 8, 9]
    for level, feature in zip(found, expected.values(), strict=True):
        assert ours.feature_dims[level] == feature.shape[1]
        torch.testing.assert_close(found[level], feature)


def test_mnasnet_levels_against_timm():
    torch.manual_seed(5)
    ours = mnasnet_a1_features(0.0).eval()
    torch.manual_seed(5)
    theirs = timm.create_model("semnasnet_100").eval()
    set_norms(theirs)
    images = torch.randn(1, 3, 96, 96)
    finer, coarser = ours.network.features
    with torch.no_grad():
        expected = theirs.blocks(theirs.bn1(theirs.conv_stem(images)))
        torch.testing.assert_close(coarser[:-1](finer(images)), expected)
    assert list(ours.feature_dims.values()) == [672, 1280, 512, 256, 256, 128]


def test_mobilenetv2_of_full_width_costs_what_timms_does():
    ours, theirs = MobileNetV2Features(1.0), TimmFeatures("mobilenetv2_100")
    assert ours.feature_dims == theirs.feature_dims == {3: 32, 4: 96, 5: 320}
    costs = [measure_cost(features, 96) for features in (ours, theirs)]
    assert len({(cost.multi_adds, cost.parameters) for cost in costs}) == 1
    shapes = {level: tuple(f.shape[2:]) for level, f in ours(torch.zeros(1, 3, 96, 80)).items()}
    assert shapes == {3: (12, 10), 4: (6, 5), 5: (3, 3)}


def pyramid_of(values):
    """Constant features [1, 1, S, S] of 80-pixel images, whose sides are odd at three levels."""
    return {
        level: torch.full((1, 1, -(-80 // 2**level), -(-80 // 2**level)), value)
        for level, value in values.items()
    }


def test_nas_fpn_merges_as_published():
    """Constant features stay constant, so the seven cells can be written out by hand."""
    cells = NASFPNCells(1)
    cells.cells = nn.ModuleList(nn.Identity() for _ in NAS_FPN_CELLS)
    p3, p4, p5, p6, p7 = 0.3, -0.5, 0.7, 0.2, -0.4
    outputs = cells(pyramid_of({3: p3, 4: p4, 5: p5, 6: p6, 7: p7}))

    def gated(coarse, fine):
        return coarse + fine / (1 + math.exp(-coarse))

    first = gated(p6, p4)
    second = p4 + first
    n3 = p3 + second
    n4 = second + n3
    n5 = gated(n4, n3) + p5
    n7 = gated(n5, second) + p7
    n6 = gated(n7, n5)
    for level, value in {3: n3, 4: n4, 5: n5, 6: n6, 7: n7}.items():
        torch.testing.assert_close(outputs[level], pyramid_of({level: value})[level])
    assert list(outputs) == [3, 4, 5, 6, 7]


def test_nas_fpn_repeats_its_cells_as_asked():
    def parameters(**options):
        with torch.device("meta"):
            model = create_model("mobilenetv2_nas_fpn", **options)
        return sum(parameter.numel() for parameter in model.parameters())

    one_more = 7 * (64 * 9 + 64 * 64 + 2 * 64)  # depthwise, pointwise, norm
    assert parameters(repeats=4) - parameters(repeats=3) == one_more


def test_nas_fpn_adds_what_no_cell_consumes():
    """The released code's rule: at an output, each feature of its level not consumed so far."""
    levels, consumed = [3, 4, 5, 6, 7], set()
    for number, cell in enumerate(NAS_FPN_CELLS):
        consumed.update(cell.inputs)
        idle = [i for i, level in enumerate(levels) if level == cell.level and i not in consumed]
        assert list(cell.unused) == (idle if number >= 2 else [])
        consumed.update(cell.unused)
        levels.append(cell.level)
    assert sorted(levels[-5:]) == [3, 4, 5, 6, 7]


@pytest.fixture
def cell():
    torch.manual_seed(0)
    return MnasFPNCell((32,) * 4, 32, 0.7).eval()


def test_mnasfpn_outputs_depend_on_the_inputs_of_its_figure(cell):
    inputs = {level: torch.randn(1, 32, 16 >> level - 3, 16 >> level - 3) for level in range(3, 7)}
    for feature in inputs.values():
        feature.requires_grad_()
    for level, expected in {3: {3, 4, 5}, 4: {3, 4, 5}, 5: {4, 5, 6}, 6: {4, 5, 6}}.items():
        output = cell(inputs)[level]
        gradients = torch.autograd.grad(output.sum(), list(inputs.values()), allow_unused=True)
        used = {at for at, g in zip(inputs, gradients, strict=True) if g is not None and g.any()}
        assert used == expected


def test_mnasfpn_adds_a_cells_input_to_its_output(cell):
    for layers in cell.project:
        nn.init.zeros_(layers[-1][-1].weight)  # the norm after the last convolution
    sides = {level: -(-72 // 2**level) for level in range(3, 7)}
    inputs = {level: torch.randn(1, 32, side, side) for level, side in sides.items()}
    for level, output in cell(inputs).items():
        torch.testing.assert_close(output, inputs[level])


def test_a_short_pyramid_has_anchors_on_its_levels_only():
    model = create_model("mobilenetv2_mnasfpn", num_classes=CLASSES).eval()
    with torch.no_grad():
        logits, codes, anchors = model.network(torch.zeros(1, 3, 128, 128))
    count = 9 * (16**2 + 8**2 + 4**2 + 2**2)
    assert logits.shape == (1, count, CLASSES)
    assert codes.shape == (1, count, 4)
    assert anchors.shape == (count, 4)


def test_the_tower_shares_convolutions_but_not_norms():
    features = torch.randn(1, 8, 6, 6)

    class Twice(nn.Module):
        feature_dims = {3: 8, 4: 8}  # noqa: RUF012

        def forward(self, images):
            return {3: images, 4: images}

    tower = SharedTower(Twice(), 16, 2).eval()
    finer, coarser = tower(features).values()
    assert torch.equal(finer, coarser)
    nn.init.constant_(tower.norms[-1].bias, 1.0)
    changed, other = tower(features).values()
    assert torch.equal(changed, finer)
    assert not torch.equal(other, coarser)
