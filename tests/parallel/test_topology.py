# SPDX-License-Identifier: Apache-2.0
"""Names of pods: what they stand for, and what is said of those that do not exist."""

import math

import pytest

from r1jax.parallel.topology import CHIPS, parse, sizes


@pytest.mark.parametrize(
    ("name", "shape", "devices", "chips"),
    [
        # As in Google's tables of configurations.
        ("v5p-8", (2, 2, 1), 4, 4),
        ("v5p-32", (2, 2, 4), 16, 16),
        ("v5p-128", (4, 4, 4), 64, 64),
        ("v5p-256", (4, 4, 8), 128, 128),
        ("v5p-1024", (8, 8, 8), 512, 512),
        ("v5p-2048", (8, 8, 16), 1024, 1024),
        ("v5p-12288", (16, 16, 24), 6144, 6144),
        ("v4-128", (4, 4, 4), 64, 64),
        ("v5e-8", (2, 4), 8, 8),
        ("v5e-32", (4, 8), 32, 32),
        ("v5e-256", (16, 16), 256, 256),
        ("v6e-128", (8, 16), 128, 128),
        ("tpu7x-256", (4, 4, 8), 256, 128),
        ("tpu7x-4608", (12, 12, 16), 4608, 2304),
        ("2xv6e-256", (16, 16), 512, 512),
        ("2x v6e-256", (16, 16), 512, 512),
        ("V5P-1024", (8, 8, 8), 512, 512),
        ("v5p:4x8x8", (4, 8, 8), 256, 256),
        ("tpu7x:4x4x4", (4, 4, 4), 128, 64),
    ],
)
def test_names(name, shape, devices, chips):
    found = parse(name)
    assert (found.shape, found.devices, found.chips) == (shape, devices, chips)


@pytest.mark.parametrize("kind", CHIPS)
def test_every_size_of_a_chip_is_a_torus_of_that_many(kind):
    chip = CHIPS[kind]
    for n in sizes(kind):
        found = parse(f"{kind}-{n}")
        assert math.prod(found.shape) == n // (2 if chip.counts == "cores" else 1)
        assert len(found.shape) == chip.dimensions
        assert list(found.shape) == sorted(found.shape) or math.prod(found.shape) < 64
        assert chip.dimensions == 2 or math.prod(found.shape) < 64 or found.shape[0] % 4 == 0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5p-1000", "near: v5p-896, v5p-1024, v5p-1152"),
        ("v5p-512x", "write v5p-1024"),
        ("v5q-1024", "did you mean v5p"),
        ("h100-8", "known chips: v4, v5e, v5p"),
        ("v6e-512", "counts chips"),
        ("v5e:8x8x8", "2 dimensions"),
        ("v5p:3x3x3", "2x2 chips"),
        ("v5e:32x32", "1 to 256"),
        ("0xv6e-4", "no slice"),
        ("", "no topology ''"),
    ],
)
def test_what_does_not_exist(name, said):
    with pytest.raises(ValueError, match="no topology") as error:
        parse(name)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
