"""Names of hardware: what they mean, and what is said of those that mean nothing."""

from __future__ import annotations

import pytest

from bigmodel_jax import chips
from bigmodel_jax.errors import InputError
from bigmodel_jax.planner.targets import CHIPS, parse


@pytest.mark.parametrize(
    "text, devices, hosts, slices, topology",
    [
        ("v5p:8x8x8", 512, 128, 1, "8x8x8"),
        ("v5e:2x2", 4, 1, 1, "2x2"),
        ("v6e:1x1", 1, 1, 1, "1x1"),
        ("2xv5e:16x16", 512, 128, 2, "16x16"),
        ("h100:8x8", 64, 8, 1, "8x8"),
        ("a100:1x4", 4, 1, 1, "1x4"),
        ("cpu:8", 8, 1, 1, "8"),
    ],
)
def test_a_target_counts_its_devices(text, devices, hosts, slices, topology):
    target = parse(text)
    assert (target.devices, target.hosts, target.slices, target.topology) == (devices, hosts, slices, topology)


@pytest.mark.parametrize("name", [name for name in CHIPS if name != "cpu"])
def test_every_chip_has_a_row_in_the_table(name):
    shape = {"v4": "2x2x2", "v5p": "2x2x2", "v5e": "4x4", "v6e": "4x4"}.get(name, "1x8")
    row = chips.chip(parse(f"{name}:{shape}").kind)
    assert row.name.lower().startswith(name) and row.memory_bytes > 10e9 and row.memory_rate


@pytest.mark.parametrize(
    "text, says",
    [
        ("v5q:8x8x8", "did you mean 'v5p'"),
        ("v5p:8x8", "v5p:4x4x4"),
        ("v5e:8x8x8", "v5e:16x32"),
        ("h100:64", "h100:8x8"),
        ("h100:4", "h100:1x4"),
        ("cpu:2x4", "cpu:8"),
        ("v5e", "CHIP:SHAPE"),
        ("her", "did you mean 'here'"),
        ("v5e:16x16x", "CHIP:SHAPE"),
        ("0xv5e:4x4", "at least 1"),
        ("v5e:0x4", "at least 1"),
    ],
)
def test_what_is_no_target_is_answered_in_one_line(text, says):
    with pytest.raises(InputError) as error:
        parse(text)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, wrap",
    [
        ("v5p:8x8x8", (True, True, True)),
        ("v5p:2x4x4", (False, False, False)),
        ("v5e:16x16", (True, True, False)),
        ("v6e:8x16", (False, True, False)),
        ("v5e:8x8", (False, False, False)),
    ],
)
def test_the_ends_of_a_dimension_are_joined_as_in_the_machine(text, wrap):
    assert parse(text).wrap == wrap


def test_here_has_no_size_of_its_own():
    assert parse("here").devices == 0 and parse("here").platform == ""
