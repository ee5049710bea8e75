"""Tables 1 and 2, and the rule from betas to dimensions, against the paper and the code."""

from __future__ import annotations

import pytest

from effspinenet_lib.errors import UserError
from effspinenet_lib.models import specs
from effspinenet_lib.results.paper import paper_values

# Table 2 as printed: 16 numbers, two entries lost in print (blocks 17 and 18).
PRINTED_REPEATS = (2, 2, 1, 1, 2, 2, 2, 1, 1, 2, 1, 2, 1, 1, 1, 1)
# Of the authors' code (spinenetv2.py at 1021ed8); the paper has no D3 and D4.
REPEATS = {
    "D3": (2, 2, 1, 1, 2, 2, 2, 1, 2, 2, 1, 2, 2, 2, 1, 1, 1, 1),
    "D4": (2, 2, 2, 1, 3, 2, 3, 1, 2, 3, 1, 2, 2, 2, 2, 2, 1, 1),
}
LEVELS = (1, 2, 2, 2, 4, 3, 4, 6, 4, 5, 7, 5, 5, 4, 3, 5, 7, 6)
SP = specs.MODELS["sp_efficientnet_b0"].backbone
D0 = specs.MODELS["eff_spinenet_d0"].backbone


def dims_of(spec: specs.BackboneSpec) -> list[int]:
    return [block.feature_dim for block in spec.blocks]


def test_compound_scaling_gives_the_printed_repeats_and_those_of_the_code() -> None:
    for scale in ("D1", "D2"):
        assert specs.SCALES[scale].repeats == (*PRINTED_REPEATS, 1, 1)
    for scale in ("M0", "M1", "M2", "D0"):
        assert set(specs.SCALES[scale].repeats) == {1}
    for scale, repeats in REPEATS.items():
        assert specs.SCALES[scale].repeats == repeats


@pytest.mark.parametrize(("row", "spec"), [("SP-EfficientNet-B0", SP), ("Eff-SpineNet-D0", D0)])
def test_betas_give_table_1_to_the_digit(row: str, spec: specs.BackboneSpec) -> None:
    table = paper_values("table-01")
    printed = table[table["row"].str.startswith(row) & (table["metric"] == "feature_dim")]
    assert len(printed) == 18
    assert dims_of(spec) == printed["value"].astype(int).tolist()


@pytest.mark.parametrize("unit", [0.07814, 0.0782, 0.07823])
def test_the_scaled_dimensions_do_not_depend_on_where_in_its_range_the_unit_lies(
    monkeypatch: pytest.MonkeyPatch, unit: float
) -> None:
    expected = {
        scale: dims_of(specs.MODELS[f"eff_spinenet_{scale}"].backbone)
        for scale in ("m0", "m1", "m2", "d0", "d2")
    }
    factor = unit / specs.resource_unit(specs.LEARNED_BETAS)
    monkeypatch.setattr(specs, "UNIT_FACTOR", factor)
    for scale, dims in expected.items():
        assert dims_of(specs.MODELS[f"eff_spinenet_{scale}"].backbone) == dims
    # recovered from the printed costs of M0, by hand: 0.4 sqrt(0.0782 * 10) * 16 = 5.66, at least 8
    assert expected["m0"] == [8, 8, 8, 8, 40, 24, 48, 16, 48, 64, 40, 80, 56, 40, 16, 56, 56, 16]


def test_equation_4_keeps_the_total_of_the_approximated_equation_2() -> None:
    """sum(alpha F) is sum(F), before rounding and the factor that the print asks for."""
    betas = (20, 1, 5, 10, 15, 20, 1, 5, 10, 15, 20, 1, 5, 10, 15, 20, 1, 5)
    unit = specs.resource_unit(betas)
    costs = [dim**2 / 4**level for dim, level in zip(specs.SP_DIMS, LEVELS, strict=True)]
    kept = sum(unit * beta * cost for beta, cost in zip(betas, costs, strict=True))
    assert kept == pytest.approx(sum(costs))
    assert pytest.approx(1.0, abs=0.003) == specs.UNIT_FACTOR


@pytest.mark.parametrize(
    ("value", "rounded"), [(0.3, 8), (8.8, 8), (11.9, 8), (12.0, 16), (44.0, 48), (107.9, 104)]
)
def test_rounding_is_to_the_nearest_multiple_of_8_ties_up(value: float, rounded: int) -> None:
    assert specs.round_dim(value) == rounded


@pytest.mark.parametrize("spec", [SP, D0])
def test_the_wiring_is_that_of_table_1(spec: specs.BackboneSpec) -> None:
    assert tuple(block.level for block in spec.blocks) == LEVELS
    assert all(source < block.index for block in spec.blocks for source in block.inputs)
    outputs = {level: block.index for level, block in spec.outputs.items()}
    assert outputs == {3: 15, 4: 14, 5: 16, 6: 18, 7: 17}
    assert spec.stem_blocks == 3
    assert [block.inputs for block in spec.blocks[:4]] == [(0,), (1,), (2,), (2, 3)]
    used = {source for block in spec.blocks for source in block.inputs}
    assert {b.index for b in spec.blocks if not b.is_output} - used == {13}
    assert spec.extra_inputs == {16: (13,)}


def test_an_idle_block_of_other_channels_is_not_taken_in() -> None:
    betas = list(specs.LEARNED_BETAS)
    betas[12] = 1
    spec = specs.backbone_spec(betas)
    assert spec.blocks[12].feature_dim != spec.blocks[15].feature_dim
    assert spec.extra_inputs == {}


def test_every_model_has_a_stem_of_8_channels() -> None:
    assert {model.backbone.stem_dim for model in specs.MODELS.values()} == {8}


def test_level_sides_are_ceilings() -> None:
    # Section 5.2: at 224 pixels P6 is 4x4 and P7 is 2x2.
    assert specs.level_side(224, 6) == 4
    assert specs.level_side(224, 7) == 2
    assert specs.level_side(512, 3) == 64


def test_equation_2_for_one_block_by_hand() -> None:
    # Block 5: level 4, 104 channels, at 512 pixels 32x32; expansion 6, kernel 3.
    by_hand = 32 * 32 * (2 * 104**2 * 6 + 3**2 * 104 * 6)
    assert specs.block_multi_adds(D0, 512)[4] == by_hand


@pytest.mark.parametrize(
    "betas",
    ["", "10-10", "-".join(["10"] * 17), "-".join(["0"] * 18), "-".join(["10001"] * 18), "a"],
)
def test_invalid_betas_are_refused(betas: str) -> None:
    with pytest.raises(UserError, match="18 whole numbers from 1 to 10000"):
        specs.parse_betas(betas)


def test_betas_as_a_word() -> None:
    assert specs.parse_betas(specs.betas_text(specs.LEARNED_BETAS)) == specs.LEARNED_BETAS
    for invalid in ([10.0] * 18, [10_001, *[1] * 17], [True] * 18):
        with pytest.raises(UserError, match="18 whole numbers"):
            specs.check_betas(invalid)
