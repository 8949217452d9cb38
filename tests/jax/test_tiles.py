"""Tiles of devices, read as axes of a mesh and parts of them."""

import math
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jlora._jax.tiles import read_tiles

# A mesh of the program, and one of the same devices that says how an array lies.
CASES: dict[str, tuple[dict[str, int], dict[str, int], Any]] = {
    "whole": ({"i": 2, "j": 4}, {"i": 2, "j": 4}, P(None, None)),
    "an axis": ({"i": 2, "j": 4}, {"i": 2, "j": 4}, P(None, "j")),
    "two axes": (
        {"i": 2, "j": 4},
        {"i": 2, "j": 4},
        P(
            ("i", "j"),
        ),
    ),
    "two axes, turned": ({"i": 2, "j": 4}, {"i": 2, "j": 4}, P(None, ("j", "i"))),
    "each": ({"i": 2, "j": 4}, {"i": 2, "j": 4}, P("j", "i")),
    "parts of an axis": ({"i": 8}, {"a": 2, "b": 4}, P("a", "b")),
    "the end of an axis": ({"i": 8}, {"a": 4, "b": 2}, P("b")),
    "a half and a third": ({"i": 6}, {"a": 2, "b": 3}, P("a", "b")),
    "a third and a half": ({"i": 6}, {"a": 3, "b": 2}, P("a", "b")),
    "no mesh": ({}, {"a": 2, "b": 4}, P("b", "a")),
}


def mesh_of(sizes: dict[str, int]) -> Mesh:
    """A mesh of the first devices."""
    devices = np.array(jax.devices()[: math.prod(sizes.values())])
    return Mesh(devices.reshape(tuple(sizes.values())), tuple(sizes))


@pytest.mark.parametrize("case", CASES)
def test_a_mesh_that_says_it(case: str) -> None:
    own, other, spec = CASES[case]
    program = mesh_of(own) if own else Mesh(np.empty((), dtype=object), ())
    told = NamedSharding(mesh_of(other), spec)
    mesh, found = read_tiles(program, [told], [2])
    assert found is not None
    again = NamedSharding(mesh, P(*found[0]))
    assert again.is_equivalent_to(told, 2)
    assert list(mesh.devices.flat) == list(mesh_of(other).devices.flat)


def test_tiles_that_follow_no_axis() -> None:
    order = np.array(jax.devices()[:4])[[0, 3, 2, 1]]
    told = NamedSharding(Mesh(order, "i"), P("i"))
    assert read_tiles(mesh_of({"i": 4}), [told], [1])[1] is None
