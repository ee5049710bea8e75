"""Tables 1 and 2 against the paper's own numbers."""

import pytest

from effspinenet_lib.models import specs

# Table 2 as printed: 16 numbers, two entries lost in print (blocks 17 and 18).
PRINTED_REPEATS = (2, 2, 1, 1, 2, 2, 2, 1, 1, 2, 1, 2, 1, 1, 1, 1)


def test_compound_scaling_gives_the_printed_repeats():
    for scale in ("D1", "D2"):
        repeats = specs.SCALES[scale].repeats
        assert repeats[:16] == PRINTED_REPEATS
        assert len(repeats) == 18
    for scale in ("M0", "M1", "M2", "D0"):
        assert set(specs.SCALES[scale].repeats) == {1}


def test_every_level_has_the_blocks_of_table_1():
    levels = [block.level for block in specs.MODELS["eff_spinenet_d0"].backbone.blocks]
    assert levels == [1, 2, 2, 2, 4, 3, 4, 6, 4, 5, 7, 5, 5, 4, 3, 5, 7, 6]


@pytest.mark.parametrize("name", specs.BASES)
def test_wiring_goes_forward_and_reaches_five_outputs(name):
    base = specs.BASES[name]
    for block in base.blocks:
        assert all(source < block.index for source in block.inputs)
    assert {level: block.index for level, block in base.outputs.items()} == {
        3: 15,
        4: 14,
        5: 16,
        6: 18,
        7: 17,
    }


def test_the_one_block_without_a_consumer_is_added_to_its_level():
    for base in specs.BASES.values():
        assert base.extra_inputs == {16: (13,)}


def test_every_block_is_used():
    base = specs.MODELS["eff_spinenet_d0"].backbone
    used = {source for block in base.blocks for source in block.inputs}
    used |= {source for extra in base.extra_inputs.values() for source in extra}
    unused = {block.index for block in base.blocks if not block.is_output} - used
    assert not unused


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (1.0, 4),
        (5.9, 4 + 4),  # 4 would be under 90 % of 5.9
        (6.0, 8),
        (6.4, 8),
        (9.6, 12),  # 8 would be under 90 % of 9.6
        (13.0, 12),  # 12 is over 90 % of 13
        (112 * 1.1, 124),
        (40.0, 40),
    ],
)
def test_rounding(value, rounded):
    assert specs.round_dim(value) == rounded


@pytest.mark.parametrize("multiplier", [0.4, 0.5, 0.8, 1.0, 1.1])
def test_rounding_keeps_ninety_percent_of_every_dimension(multiplier):
    for base in specs.BASES.values():
        for block in base.blocks:
            scaled = block.feature_dim * multiplier
            rounded = specs.round_dim(scaled)
            assert rounded % 4 == 0
            assert rounded >= 0.9 * scaled
            assert abs(rounded - scaled) <= 4


def test_level_sides_are_ceilings():
    # Section 5.2: at 224 pixels P6 is 4x4 and P7 is 2x2.
    assert specs.level_side(224, 6) == 4
    assert specs.level_side(224, 7) == 2
    assert specs.level_side(512, 3) == 64


def test_equation_2_for_one_block_by_hand():
    base = specs.MODELS["eff_spinenet_d0"].backbone
    # Block 5: level 4, 104 channels, at 512 pixels 32x32; expansion 6, kernel 3.
    by_hand = 32 * 32 * (2 * 104**2 * 6 + 3**2 * 104 * 6)
    assert specs.block_multi_adds(base, 512)[4] == by_hand


def test_both_distributions_spend_nearly_the_same():
    """Section 3.3 fixes the total of the blocks; rounding and the grid of beta move it a little."""
    totals = [sum(specs.block_multi_adds(base, 512)) for base in specs.BASES.values()]
    assert totals[1] / totals[0] == pytest.approx(1, abs=0.1)
