"""What lets any device train: the same shapes at every step, and no device by name."""

import ast
import re
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from effspinenet_lib import create_model
from effspinenet_lib.data import DataConfig, classes_of, open_dataset
from effspinenet_lib.data.augment import MAX_OBJECTS, PADDING_LABEL, Augmentation, pad_target
from effspinenet_lib.data.loader import training_loader

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


def test_no_maker_of_devices_is_named():
    """Devices come from accelerate and torch.accelerator.

    But for the variable that gives a process a GPU of its own, which AMD's runtime reads too.
    """
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
    return word != "CUDA_VISIBLE_DEVICES" and bool(
        {"cuda", "cudnn", "nccl"} & set(re.split(r"[^a-z]+", word.lower()))
    )
