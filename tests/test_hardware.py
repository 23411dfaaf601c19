"""The table of chips: found by the names that devices bear, and consistent with itself."""

import pytest

from meap_jax.hardware import CHIPS, detect


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
    ],
)
def test_a_device_is_known_by_its_kind(device_kind, name):
    assert detect(device_kind) is CHIPS[name]


@pytest.mark.parametrize(
    "device_kind",
    ["cpu", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "TPU v4 lite", "TPU7x", ""],
)
def test_a_device_that_is_not_in_the_table_is_unknown_rather_than_taken_for_its_sibling(device_kind):
    assert detect(device_kind) is None


@pytest.mark.parametrize("name", CHIPS)
def test_figures_are_of_one_unit_each_and_have_a_source(name):
    chip = CHIPS[name]
    assert chip.name == name and chip.source
    assert 1e14 < chip.peak_flops < 1e16 and 1e10 < chip.hbm_bytes < 1e12
    # A chip computes a few hundred operations for each byte of HBM, and its links are slower than its memory.
    assert 100 < chip.peak_flops / chip.hbm_bandwidth < 600
    assert 3 < chip.hbm_bandwidth / chip.ici_bandwidth < 12
