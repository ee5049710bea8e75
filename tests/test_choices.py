"""The closed-form costs against the built modules, and the scan over what the paper leaves open."""

import itertools
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch import nn

from effspinenet_lib import create_model, measure_cost
from effspinenet_lib.choices import (
    CHOICES,
    CLOSEST,
    LIBRARY,
    RELEASED,
    SETS,
    cost,
    fit,
    read_scan,
    write_scan,
)
from effspinenet_lib.choices.scan import printed_cells
from effspinenet_lib.choices.settings import ROUNDINGS
from effspinenet_lib.models.learned import BETAS, SEARCH_SPACE, resource_unit, unrounded_dims
from effspinenet_lib.models.specs import BASES, MODELS, SCALES, block_multi_adds
from effspinenet_lib.models.zoo import default_image_size
from effspinenet_lib.report.fit import choice_fits
from effspinenet_lib.results.csvfile import read_rows
from effspinenet_lib.results.schemas import CHOICE

PLAIN = {"space_to_depth": False}
UNFUSED = {"space_to_depth": False, "weighted_fusion": False}
BUILT = [
    *((name, "detection", {}) for name in MODELS),
    ("eff_spinenet_d0", "detection", PLAIN),
    ("eff_spinenet_d0", "detection", UNFUSED),
    *((f"eff_spinenet_{scale}", "classification", {}) for scale in ("m0", "d0", "d1", "d2")),
    *((f"eff_spinenet_{scale}", "segmentation", {}) for scale in ("m0", "d0", "d2")),
    ("sp_efficientnet_b0", "classification", {}),
]


def count(name, task="detection", choices=LIBRARY, size=None, **variant):
    model = MODELS[name]
    size = size or default_image_size(name, task)
    return cost(BASES[model.base], SCALES[model.scale], task, choices, size, **variant)


def changed(**answers):
    return replace(LIBRARY, **answers)


@pytest.mark.parametrize(("name", "task", "options"), BUILT)
def test_the_librarys_own_answers_count_its_models_to_the_last_digit(name, task, options):
    with torch.device("meta"):
        model = create_model(name, task, **options)
    built = measure_cost(model, default_image_size(name, task))
    counted = count(name, task, **options)
    assert (counted.multi_adds, counted.parameters) == (built.multi_adds, built.parameters)


@pytest.mark.parametrize("name", ["eff_spinenet_m1", "eff_spinenet_d2"])
def test_mask_r_cnn_is_counted_to_the_last_digit(name):
    built = measure_cost(create_model(name, "instances"), 128)
    counted = count(name, "instances", size=128)
    assert (counted.multi_adds, counted.parameters) == (built.multi_adds, built.parameters)


@pytest.mark.parametrize("size", [200, 224])
def test_sides_that_halve_unevenly_are_counted_as_they_are_built(size):
    with torch.device("meta"):
        model = create_model("eff_spinenet_m0", num_classes=90)
    assert count("eff_spinenet_m0", size=size).multi_adds == measure_cost(model, size).multi_adds


def outputs_of(kinds, model, size):
    """Numbers that layers of these kinds give for one image, squeezed ones left out."""
    numbers = []

    def note(_, inputs, output):
        if output.shape[-1] > 1:
            numbers.append(output.numel())

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        model.eval().network(torch.zeros(1, 3, size, size, device="meta"))
    for hook in hooks:
        hook.remove()
    return sum(numbers)


def test_norms_and_activations_are_counted_once_a_number():
    with torch.device("meta"):
        model = create_model("eff_spinenet_m0")
    # P7 of 256 pixels is 2x2, so that only squeezed features are 1x1.
    norms = outputs_of(nn.BatchNorm2d, model, 256)
    activations = outputs_of(nn.SiLU, model, 256)
    plain, with_norms, with_both = (
        count("eff_spinenet_m0", choices=changed(counted=counted)).multi_adds
        for counted in ("convolutions", "and norms", "and activations")
    )
    assert with_norms - plain == norms
    assert with_both - with_norms == activations // 2


@pytest.mark.parametrize(
    ("answers", "parameters"),
    [
        # 1x1 convolutions and norms from block 3 to 4 (16 channels), 7 to 9 (120).
        ({"same_shape_conv": True}, 16 * 16 + 2 * 16 + 120 * 120 + 2 * 120),
        # 2 branches, 3 layers, 64 channels, 4 of 5 norms of 2 numbers.
        ({"head_norms": "shared"}, -2 * 3 * 64 * 4 * 2),
        ({"head_bias": True}, 2 * 3 * 64),
        # 9 anchors, 64 weights and a bias a class.
        ({"classes": 80}, -10 * 9 * 65),
        # 16 fused blocks have 2 inputs, and one of them block 13 as well.
        ({"fusion_weights": False}, -(16 * 2 + 1)),
        # Stem 3 to 8 channels; block 1 from 8 (48 inside, squeezed to 1) instead of 16 (96, 3).
        (
            {"stem_dim": 8},
            (27 * 8 + 16 + 8 * 48 + 96 + 9 * 48 + 96 + 48 + 1 + 48 + 48 + 48 * 16)
            - (27 * 16 + 32 + 16 * 96 + 192 + 9 * 96 + 192 + 96 * 3 + 3 + 3 * 96 + 96 + 96 * 16),
        ),
        # Depthwise convolutions (with norms) on four times the channels of blocks 2, 3, 4, 5, 7,
        # 10, 14 and 16, two levels down, and of block 7, three levels down.
        (
            {"downsampling": "one depthwise"},
            4 * ((24 + 16 + 16 + 104 + 120 + 168 + 104 + 136) * (9 + 2) + 120 * (25 + 2)),
        ),
    ],
)
def test_an_answer_changes_the_parameters_of_d0_by_what_the_hand_sum_gives(answers, parameters):
    difference = (
        count("eff_spinenet_d0", choices=changed(**answers)).parameters
        - count("eff_spinenet_d0").parameters
    )
    assert difference == parameters


@pytest.mark.parametrize(
    ("rounding", "value", "rounded"),
    [
        ("8, 90 %", 9.6, 16),
        ("nearest 8", 9.6, 8),
        ("down to 8", 15.9, 8),
        ("up to 8", 8.1, 16),
        ("nearest 4", 9.6, 8),
        ("4, 90 %", 9.6, 12),
        ("down to 1", 9.6, 9),
        ("down to 1", 0.4, 1),
    ],
)
def test_roundings(rounding, value, rounded):
    assert ROUNDINGS[rounding](value) == rounded


def test_equation_4_gives_table_1_from_the_search_space():
    printed = [block.feature_dim for block in BASES["eff_spinenet"].blocks]
    assert set(BETAS) == set(SEARCH_SPACE)
    for approximate in (False, True):
        dims = unrounded_dims(resource_unit(approximate=approximate))
        assert [8 * round(dim / 8) for dim in dims] == printed


def test_only_two_blocks_leave_a_doubt_about_the_betas():
    """Every set of betas that gives Table 1 with a unit of its own; found without BETAS."""
    base = BASES["sp_efficientnet"]
    printed = [block.feature_dim for block in BASES["eff_spinenet"].blocks]
    dims = [block.feature_dim for block in base.blocks]
    costs = block_multi_adds(base, 512)
    found = set()
    for step in range(500, 1500):
        unit = step / 10_000
        answers = [
            [b for b in SEARCH_SPACE if int(dim * math.sqrt(unit * b) + 4) // 8 * 8 == target]
            for dim, target in zip(dims, printed, strict=True)
        ]
        for betas in itertools.product(*answers):
            own = sum(costs) / sum(b * c for b, c in zip(betas, costs, strict=True))
            if all(
                int(dim * math.sqrt(own * b) + 4) // 8 * 8 == target
                for dim, b, target in zip(dims, betas, printed, strict=True)
            ):
                found.add(betas)
    assert len(found) == 3
    assert BETAS in found
    certain = [len({betas[block] for betas in found}) == 1 for block in range(18)]
    assert [block + 1 for block, sure in enumerate(certain) if not sure] == [6, 15]


def test_every_cell_that_the_paper_prints_is_compared():
    cells = printed_cells()
    assert len(cells) == 36
    d1 = next(c for c in cells if c.printed == 0.7)
    assert d1.decimals == 2  # printed 0.70
    assert {cell.item for cell in cells if cell.metric == "multi_adds"} >= {"table-11"}


def test_the_librarys_misses_are_the_known_ones():
    found = fit(LIBRARY)
    missed = {cell.name: round(d, 1) for cell, d in found.deviations.items() if abs(d) > 3}
    assert missed == {
        "table-07 Eff-SpineNet-M0 multi_adds": -5.4,
        "table-07 Eff-SpineNet-M0 parameters": -3.6,
        "table-07 Eff-SpineNet-M1 multi_adds": -10.2,
    }


def test_each_step_from_the_released_code_meets_more_cells():
    steps = [fit(choices).within for name, choices in SETS.items() if name != "library"]
    assert SETS["released code"] == RELEASED
    assert steps == sorted(set(steps))
    assert fit(CLOSEST).within == 36


def test_every_answer_tried_changes_some_cell():
    """A choice that no printed cost can feel does not belong into the scan."""
    known = fit(LIBRARY).deviations
    for choice in CHOICES:
        for value in choice.values:
            if value != getattr(LIBRARY, choice.name):
                assert fit(changed(**{choice.name: value})).deviations != known, (choice, value)


def test_the_scan_marks_what_is_chosen_once_a_choice():
    rows = read_scan()
    for around in ("library", "closest"):
        one = rows[(rows["scan"] == "one") & (rows["around"] == around)]
        assert (one["choice"].value_counts() > 1).all()
        chosen = one[one["chosen"] == "yes"]
        assert sorted(chosen["choice"]) == sorted(choice.name for choice in CHOICES)
        assert chosen["cells_within_3_percent"].nunique() == 1


def test_the_file_is_what_the_program_writes(tmp_path):
    path = write_scan(tmp_path / "new" / "choices.csv")
    assert len(read_rows(path, CHOICE)) > 400
    pd.testing.assert_frame_equal(read_scan(path), read_scan())


def test_the_plot_says_every_answer():
    gallery = choice_fits(read_scan())
    said = " ".join(picture.alt for picture in gallery.pictures)
    assert "Stem channels: 8 20, 3.7 %; 16 (chosen) 33, 1.4 %;" in said
    assert said.count("(chosen)") == len(CHOICES)
