"""Programs compiled by the TPU's own compiler, for chips that are not there."""

import importlib.util
import math
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
from jax.experimental import topologies

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
MARKS = [
    pytest.mark.tpu,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="LIBTPU IS MISSING: NOTHING IS COMPILED FOR TPUS. Run .ci/tpu",
    ),
]
_PRODUCT = re.compile(r"= \w+\[([\d,]*)\]\S* (?:convolution|dot)\(")


def chips(topology: str) -> list[Any]:
    """The devices of a topology; none of them is there."""
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def cycles(program: Any) -> int:
    """The sum of the compiler's estimates for its fusions."""
    return sum(map(int, re.findall(r'estimated_cycles":"(\d+)"', program.as_text())))


def argument_bytes(program: Any) -> int:
    """The bytes of the arguments of a program on one chip."""
    return program.memory_analysis().argument_size_in_bytes


def products_of(program: Any) -> Iterator[tuple[int, ...]]:
    """The shapes of the results of all products, sorted and without axes of one."""
    for dims in _PRODUCT.findall(program.as_text()):
        yield sizes(map(int, filter(None, dims.split(","))))


def sizes(shape: Any) -> tuple[int, ...]:
    """The axes of a shape in order of size, without those of one."""
    return tuple(sorted(size for size in shape if size != 1))


def kernel_shapes(kernel: Any, stacked: bool = False) -> set[tuple[int, ...]]:
    """The shapes that a kernel has on the way to a product: whole, a part, a layer.

    Along each axis it may be whole or the part of a chip.
    """
    whole = kernel.shape
    part = kernel.sharding.shard_shape(whole)
    found = {()}
    for axis in zip(whole, part, strict=True):
        found = {(*shape, size) for shape in found for size in axis}
    found |= {shape[1:] for shape in found} if stacked else set()
    least = math.prod(part) // (whole[0] if stacked else 1)
    return {sizes(shape) for shape in found if math.prod(shape) >= least}
