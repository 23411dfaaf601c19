"""The table of chips: found by the kinds of devices, and consistent with itself."""

import pytest

from meap_jax.hardware import CHIPS, detect


@pytest.mark.parametrize(
    ("name", "device_kinds"),
    [
        ("v5e", ["TPU v5 lite", "TPU v5e"]),
        ("v5p", ["TPU v5", "TPU v5p"]),
        ("v6e", ["TPU v6 lite"]),
        ("a100-40gb", ["NVIDIA A100-SXM4-40GB"]),
        ("h100", ["NVIDIA H100 80GB HBM3"]),
        # A device that is not in the table is not taken for its sibling.
        (None, ["cpu", "NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "TPU v4 lite", "TPU7x", ""]),
    ],
)
def test_a_device_is_known_by_its_kind_to_the_letter(name, device_kinds):
    for device_kind in device_kinds:
        assert detect(device_kind) is (name and CHIPS[name])


@pytest.mark.parametrize("name", CHIPS)
def test_figures_are_of_one_unit_each(name):
    chip = CHIPS[name]
    assert 1e14 < chip.peak_flops < 1e16 and 1e10 < chip.hbm_bytes < 1e12
    # A chip computes a few hundred operations for each byte of HBM, and its links are slower than its memory.
    assert 100 < chip.peak_flops / chip.hbm_bandwidth < 600
    assert 3 < chip.hbm_bandwidth / chip.ici_bandwidth < 12
