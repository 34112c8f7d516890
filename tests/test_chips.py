"""The table of hardware: known or "n/a", every figure with its source, rates that fit each other."""

import pytest

from bigmodel_jax.chips import CHIPS, chip, peak


def test_peaks_are_known_or_not_available():
    assert peak("NVIDIA H100 80GB HBM3", "bfloat16") == 989.4e12
    assert peak("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert peak("NVIDIA H200", "bfloat16") == 989.4e12
    assert peak("TPU v4", "bfloat16") == 275e12
    assert peak("TPU v5 lite", "bfloat16") == 197e12
    assert peak("TPU v5p", "bfloat16") == peak("TPU v5", "bfloat16") == 459e12
    assert peak("TPU v6 lite", "bfloat16") == 918e12
    assert peak("NVIDIA A100-SXM4-40GB", "float16") == 312e12
    for kind in ("cpu", "NVIDIA GeForce RTX 9090", "NVIDIA L40", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", ""):
        assert peak(kind, "bfloat16") is None and chip(kind).source("peaks") == "n/a"
    assert peak("TPU v4", "float32") is None


@pytest.mark.parametrize("row", CHIPS, ids=lambda row: row.name)
def test_every_figure_has_a_source(row):
    figures = {"peaks": row.peaks, "memory": row.memory_rate, "links": row.link_rate, "slow": row.slow_rate}
    for figure, value in figures.items():
        assert not value or row.source(figure) != "n/a"


def test_rows_are_told_apart_and_ordered():
    assert chip("NVIDIA A100-SXM4-80GB").memory_rate > chip("NVIDIA A100-SXM4-40GB").memory_rate
    v5e, v5p, v6e = (chip(f"TPU {kind}") for kind in ("v5 lite", "v5", "v6 lite"))
    assert (v5e.name, v5p.name, v6e.name) == ("v5e", "v5p", "v6e")
    for row in CHIPS:  # matrix products outrun memory, memory the links, links the network between machines
        rates = [max(row.peaks.values(), default=0), row.memory_rate, row.link_rate, row.slow_rate]
        known = [rate for rate in rates if rate]
        assert known == sorted(known, reverse=True)
