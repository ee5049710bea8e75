"""What lets any device train: the same shapes at every step, and no device by name."""

import ast
import re
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import box_iou, sigmoid_focal_loss

from effspinenet_lib import create_model
from effspinenet_lib.data import Augmentation, DataConfig, classes_of, open_dataset, training_loader
from effspinenet_lib.data.augment import MAX_OBJECTS, PADDING_LABEL, pad_target
from effspinenet_lib.errors import UserError
from effspinenet_lib.models.anchors import (
    IGNORED,
    NEGATIVE,
    AnchorSettings,
    assign_anchors,
    make_anchors,
    match_anchors,
)
from effspinenet_lib.models.retinanet import CACHED, focal_loss_sum

SIDE = 64
# Operations whose result's shape, or whose program, depends on values.
DATA_DEPENDENT = {"nonzero", "masked_select", "_local_scalar_dense", "unique2", "_unique2", "item"}


class Recorder(TorchDispatchMode):
    """Writes down every operation with the shapes of its tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.data_dependent = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
        self.calls.append((str(function), tuple((tuple(t.shape), t.dtype) for t in tensors)))
        name = function.overloadpacket.__name__
        indexed = "index" in name and any(t.dtype == torch.bool for t in tensors[1:])
        if name in DATA_DEPENDENT or (indexed and name != "index_fill"):
            self.data_dependent.add(name)
        return function(*args, **(kwargs or {}))


def make_targets(counts=(3, 0, 1), side=SIDE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for index, count in enumerate(counts):
        corner = torch.rand(count, 2, generator=generator) * side * 0.6
        size = 6 + torch.rand(count, 2, generator=generator) * side * 0.4
        targets.append(
            {
                "boxes": torch.cat([corner, corner + size], 1),
                "labels": torch.randint(0, 5, (count,), generator=generator),
                "iscrowd": torch.arange(count) == index + 1,
            }
        )
    return targets


def losses_and_gradients(model, targets):
    images = torch.randn(len(targets), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    torch.manual_seed(1)  # the same stochastic depth
    losses = model.train()(images, targets)
    sum(losses.values()).backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    return {name: loss.item() for name, loss in losses.items()}, gradients


def epoch(task, pad_targets, steps=4):
    """The batches of an epoch of pictures with many objects, few, crowds and none."""
    config = DataConfig("shapescenes", train_images=2 * steps, eval_images=2, image_size=SIDE)
    dataset = open_dataset(config, "train")
    augmentation = Augmentation((0.05, 3.0), 0.5)
    loader = training_loader(
        dataset, SIDE, 2, augmentation, 0, 0, steps, task=task, pad_targets=pad_targets
    )
    batches = list(loader)
    if task == "detection":  # ShapeScenes has few crowds
        batches[1].targets[0]["iscrowd"][0] = True
    return batches, classes_of(dataset, task)


def programs_of(name, task, batches, classes):
    """The operations and shapes of each step, and those that depend on data."""
    torch.manual_seed(0)
    model = create_model(name, task, classes).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, foreach=True)
    programs, data_dependent = [], set()
    for batch in batches:
        with Recorder() as recorder:
            sum(model(batch.images, batch.targets).values()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        programs.append(recorder.calls)
        data_dependent |= recorder.data_dependent
    return programs[1:], data_dependent  # the first step makes anchors and momentum


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("eff_spinenet_m0", "detection"),
        ("mobilenetv3_small_ssdlite", "detection"),
        ("eff_spinenet_m0", "classification"),
        ("eff_spinenet_m0", "segmentation"),
    ],
)
def test_shapes_do_not_change_over_an_epoch(name, task):
    batches, classes = epoch(task, MAX_OBJECTS)
    programs, data_dependent = programs_of(name, task, batches, classes)
    assert len(programs[0]) > 1000
    assert all(program == programs[0] for program in programs)
    assert data_dependent == set()


def test_the_epoch_has_pictures_with_many_objects_crowds_and_none():
    """And without padding its shapes change: the test above can fail."""
    batches, classes = epoch("detection", None)
    targets = [target for batch in batches for target in batch.targets]
    counts = {len(target["labels"]) for target in targets}
    assert 0 in counts
    assert len(counts) >= 4
    assert any(target["iscrowd"].any() for target in targets)
    programs, _ = programs_of("eff_spinenet_m0", "detection", batches, classes)
    assert any(program != programs[0] for program in programs)


def test_the_recorder_sees_what_depends_on_data():
    values = torch.tensor([1.0, 0.0])
    with Recorder() as recorder:
        values[values > 0].sum().item()
        values[values > 0] = 2.0
        torch.nonzero(values)
    assert {"_local_scalar_dense", "nonzero", "index", "index_put_"} <= recorder.data_dependent


def test_instances_cannot_be_padded():
    with pytest.raises(UserError, match="proposals"):
        epoch("instances", MAX_OBJECTS)


def test_padding_to_no_rows_is_refused():
    with pytest.raises(UserError, match="0 rows"):
        epoch("detection", 0)


@pytest.mark.parametrize("name", ["eff_spinenet_m0", "mobilenetv3_small_ssdlite"])
def test_a_compiler_builds_one_program_for_the_losses_of_all_batches(name):
    model = create_model(name, num_classes=5)
    with torch.no_grad():
        logits, codes, anchors = model.eval().network(torch.randn(3, 3, SIDE, SIDE))
    logits.requires_grad_()
    counter = CompileCounter()
    compiled = torch.compile(model.losses, backend=counter, dynamic=False, fullgraph=True)
    for counts in ((3, 0, 1), (0, 0, 0), (7, 2, 5)):
        targets = [pad_target(target, 9) for target in make_targets(counts)]
        expected = model.losses(logits, codes, anchors, targets)
        found = compiled(logits, codes, anchors, targets)
        torch.testing.assert_close(found, expected)
        slopes = [
            torch.autograd.grad(losses["classification"], logits)[0] for losses in (found, expected)
        ]
        torch.testing.assert_close(*slopes)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["eff_spinenet_m0", "mobilenetv3_small_ssdlite"])
def test_padding_changes_neither_losses_nor_gradients(name):
    torch.manual_seed(0)
    model = create_model(name, num_classes=5)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    targets = make_targets()
    plain, gradients = losses_and_gradients(model, targets)
    model.load_state_dict(state)
    padded = [pad_target(target, 9) for target in targets]
    assert {len(target["labels"]) for target in padded} == {9}
    again, same = losses_and_gradients(model, padded)
    assert again == pytest.approx(plain, rel=1e-6)
    assert torch.allclose(same, gradients, rtol=1e-5, atol=1e-7)
    assert gradients.abs().max() > 1e-3


def test_padded_rows_are_marked_and_last():
    target = make_targets((3,))[0]
    padded = pad_target(target, 5)
    assert padded["labels"].tolist() == [*target["labels"].tolist(), PADDING_LABEL, PADDING_LABEL]
    assert torch.equal(padded["boxes"][:3], target["boxes"])
    assert not padded["boxes"][3:].any()
    assert padded["iscrowd"].dtype == torch.bool
    assert not padded["iscrowd"][3:].any()


def test_of_too_many_objects_the_largest_are_kept_in_order():
    sides = torch.tensor([4.0, 9.0, 2.0, 7.0])
    boxes = torch.cat([torch.zeros(4, 2), sides[:, None].expand(4, 2)], 1)
    kept = pad_target({"boxes": boxes, "labels": torch.arange(4)}, 2)
    assert kept["labels"].tolist() == [1, 3]
    assert torch.equal(kept["boxes"], boxes[[1, 3]])


def matched_one_by_one(anchors, boxes, iscrowd, settings):
    """The rule of matching, an object at a time."""
    matches = [NEGATIVE] * len(anchors)
    iou = box_iou(anchors, boxes)
    for a, anchor in enumerate(anchors.tolist()):
        for box, crowd in zip(boxes.tolist(), iscrowd.tolist(), strict=True):
            width = min(anchor[2], box[2]) - max(anchor[0], box[0])
            height = min(anchor[3], box[3]) - max(anchor[1], box[1])
            area = (anchor[2] - anchor[0]) * (anchor[3] - anchor[1])
            if crowd and max(width, 0) * max(height, 0) / area >= settings.crowd_overlap:
                matches[a] = IGNORED
        best = max(
            (m for m in range(len(boxes)) if not iscrowd[m]),
            key=lambda m: iou[a, m],
            default=None,
        )
        if best is not None and iou[a, best] >= settings.match_iou:
            matches[a] = best
    for m in range(len(boxes)):
        if not iscrowd[m] and iou[:, m].max() > 0:
            matches[int(iou[:, m].argmax())] = m
    return matches


@pytest.mark.parametrize("count", [1, 2, 9])
def test_matching_against_a_loop(count):
    settings = AnchorSettings()
    anchors = make_anchors(((8, 8), (4, 4), (2, 2), (1, 1), (1, 1)), settings, torch.device("cpu"))
    for seed in range(4):
        target = make_targets((count,), seed=seed)[0]
        boxes, iscrowd = target["boxes"], torch.arange(count) % 4 == 1
        boxes[-1] = boxes[0] + 0.01  # two objects with one best anchor
        matches = match_anchors(anchors, boxes, iscrowd, settings)
        assert matches.tolist() == matched_one_by_one(anchors, boxes, iscrowd, settings)


def test_an_object_outside_of_every_anchor_is_not_matched():
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [10.0, 0.0, 20.0, 10.0]])
    boxes = torch.tensor([[50.0, 50.0, 60.0, 60.0]])
    matches = match_anchors(anchors, boxes, torch.tensor([False]), AnchorSettings())
    assert matches.tolist() == [NEGATIVE, NEGATIVE]


def test_assignments_say_what_each_anchor_is_to_find():
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0], [0.0, 20, 10, 30]])
    target = {
        "boxes": torch.tensor([[0.0, 20.0, 10.0, 31.0], [19.0, 0.0, 31.0, 12.0]]),
        "labels": torch.tensor([3, 4]),
        "iscrowd": torch.tensor([False, True]),
    }
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    assigned = assign_anchors(anchors, [target, empty], AnchorSettings())
    assert assigned.positive.tolist() == [[False, False, True], [False] * 3]
    assert assigned.ignored.tolist() == [[False, True, False], [False] * 3]
    assert assigned.labels.tolist() == [[NEGATIVE, NEGATIVE, 3], [NEGATIVE] * 3]
    assert torch.equal(assigned.boxes[0, 2], target["boxes"][0])
    assert torch.equal(assigned.boxes[0, :2], anchors[:2])
    assert torch.equal(assigned.boxes[1], anchors)


@pytest.mark.parametrize("gamma", [1.5, 2.0])
def test_the_focal_loss_and_its_gradient_are_torchvisions(gamma):
    torch.manual_seed(0)
    anchors = 2 * CACHED // 5 // 3  # more than one piece
    logits = (torch.randn(3, anchors, 5) * 4).requires_grad_()
    classes = torch.randint(-3, 5, (3, anchors))
    kept = (torch.rand(3, anchors) < 0.9) | (classes >= 0)
    expected = (classes[..., None] == torch.arange(5)).double()
    slow = logits.detach().double().requires_grad_()
    focal = sigmoid_focal_loss(slow[kept], expected[kept], 0.25, gamma).sum()
    (focal / 7).backward()
    found = focal_loss_sum(logits, classes, kept, 0.25, gamma)
    (found / 7).backward()
    assert found.item() == pytest.approx(focal.item(), rel=1e-6)
    assert torch.allclose(logits.grad.double(), slow.grad, rtol=3e-6, atol=1e-9)
    assert not logits.grad[~kept].any()


def test_the_focal_loss_of_extreme_logits_is_finite():
    logits = torch.tensor([[[-200.0, 200.0], [200.0, -200.0]]], requires_grad=True)
    loss = focal_loss_sum(
        logits, torch.tensor([[1, 1]]), torch.ones(1, 2, dtype=torch.bool), 0.25, 1.5
    )
    loss.backward()
    assert loss.item() == pytest.approx(0.75 * 200 + 0.25 * 200)
    assert torch.allclose(logits.grad, torch.tensor([[[0.0, 0.0], [0.75, -0.25]]]))


def test_the_focal_losss_gradient_has_the_logits_type():
    logits = torch.randn(1, 4, 3).bfloat16().requires_grad_()
    kept = torch.ones(1, 4, dtype=torch.bool)
    loss = focal_loss_sum(logits, torch.tensor([[0, -1, 2, 1]]), kept, 0.25, 1.5)
    assert loss.dtype == torch.float32
    loss.backward()
    assert logits.grad.dtype == torch.bfloat16


def test_a_broken_number_of_an_anchor_without_object_leaves_the_box_loss_alone():
    """Codes of negatives take no part, not even by zero times infinity."""
    torch.manual_seed(0)
    model = create_model("eff_spinenet_m0", num_classes=5)
    anchors = make_anchors(((8, 8), (4, 4), (2, 2), (1, 1), (1, 1)), AnchorSettings(), "cpu")
    targets = make_targets((2,))
    codes = torch.zeros(1, len(anchors), 4)
    negative = ~assign_anchors(anchors, targets, AnchorSettings()).positive
    codes[negative] = torch.inf
    codes.requires_grad_()
    loss = model.losses(torch.zeros(1, len(anchors), 5), codes, anchors, targets)["box"]
    loss.backward()
    assert loss.isfinite()
    assert codes.grad.isfinite().all()
    assert not codes.grad[negative].any()


def test_no_maker_of_devices_is_named():
    """Devices come from accelerate and torch.accelerator."""
    library = Path(__file__).resolve().parent.parent / "effspinenet_lib"
    named = []
    for path in sorted(library.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            words = [getattr(node, field, None) for field in ("attr", "id", "value", "module")]
            words += [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
            if any(isinstance(word, str) and names_cuda(word) for word in words):
                named.append(path.relative_to(library).as_posix())
    assert named == []


def names_cuda(word):
    return bool({"cuda", "cudnn", "nccl"} & set(re.split(r"[^a-z]+", word.lower())))
