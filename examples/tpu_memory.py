"""Whether a step fits into the memory of TPUs, and its bound in time, without a TPU.

The TPU's own compiler (libtpu, `pip install "jax[tpu]"` on Linux on x86-64) compiles a
step for chips that are not there, and refuses one that does not fit. All is an estimate
until such a step has run. Before JAX is imported:

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python ...
"""

import argparse
import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

GIB = 1 << 30
# What the compiler (libtpu 0.0.50.1) leaves to a program on one of JAX's devices, in
# GiB, and how many of these a chip is.
HBM = {"v4": 30.75, "v5e": 15.75, "v5p": 95.73, "v6e": 31.24, "tpu7x": 94.74}
HALVES = ("tpu7x",)
FLAT = ("v5e", "v6e")  # chips in a plane; those of other kinds are in space
# The peak in bfloat16 that Google publishes, of one of JAX's devices, in FLOP/s.
PEAK = {"v4": 275e12, "v5e": 197e12, "v5p": 459e12, "v6e": 918e12, "tpu7x": 1153.5e12}


@dataclasses.dataclass(frozen=True)
class Topology:
    """TPUs of one kind, side by side.

    Attributes:
        name: as libtpu has it, such as "v5p:4x4x4".
        kind: "v5p".
        devices: how many there are, as JAX counts.
    """

    name: str
    kind: str
    devices: int

    @property
    def hbm(self) -> float:
        """The bytes that a program may take of one device."""
        return HBM[self.kind] * GIB

    def most_tokens(self, flops: float) -> str:
        """Returns in words the bound of a step that takes so many FLOPs a token.

        >>> parse_topology("v5e:4x4").most_tokens(3.2e10)
        'at most 6,156 tokens a second a device, by its FLOPs at the published peak'
        """
        most = PEAK[self.kind] / flops
        return (
            f"at most {most:,.0f} tokens a second a device, by its FLOPs at the "
            "published peak"
        )


def parse_topology(text: str) -> Topology:
    """Returns the topology in `v5e:4x4`.

    Raises:
        argparse.ArgumentTypeError: If that isn't what `text` looks like.
    """
    kind, _, sizes = text.partition(":")
    numbers = sizes.split("x")
    known = kind in HBM and len(numbers) == (2 if kind in FLAT else 3)
    if not known or not all(n.isdecimal() and int(n) > 0 for n in numbers):
        raise argparse.ArgumentTypeError(
            f"{text!r} isn't a kind of TPU ({', '.join(HBM)}) with its sizes; write "
            f"`v5e:4x4`, or `v5p:4x4x4`: {' and '.join(FLAT)} have two, others three"
        )
    chips = math.prod(map(int, numbers))
    return Topology(text, kind, chips * (2 if kind in HALVES else 1))


def has_compiler() -> bool:
    """Returns whether the TPU's compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


def mesh_of(topology: Topology, sizes: dict[str, int]) -> Mesh:
    """Returns the mesh of a topology's devices, none of which is there."""
    # Else it looks for the machine that it runs on, and for others that do the same.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # The two cores of a v4 are one device where they are asked for as one.
    config = {"chip_config_name": "megacore"} if topology.kind == "v4" else {}
    found = topologies.get_topology_desc(
        platform="tpu", topology_name=topology.name, **config
    )
    devices = np.array(found.devices).reshape(*sizes.values())
    return Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def peak_of(step: Any, *args: Any) -> int:
    """Returns the bytes that a jitted step takes at most on one device.

    Args:
        step: a jitted function.
        args: its arguments as shapes, each with its place on the mesh.

    Raises:
        jax.errors.JaxRuntimeError: If it can't be compiled for another reason than
            that it doesn't fit.
    """
    try:
        compiled = step.lower(*args).compile()
    except jax.errors.JaxRuntimeError as error:
        taken = _taken(str(error))
        if taken is None:
            raise
        return taken
    held = compiled.memory_analysis()
    new = held.output_size_in_bytes - held.alias_size_in_bytes
    return held.argument_size_in_bytes + held.temp_size_in_bytes + new


def _taken(message: str) -> int | None:
    """Returns what a step would take, if an error says that it doesn't fit."""
    found = re.search(r"\b([\d.]+)([KMGT])\b.* (?:of|available HBM)\D", message)
    if "RESOURCE_EXHAUSTED" not in message or found is None:
        return None
    return round(float(found[1]) * 2 ** (10 * " KMGT".index(found[2])))


def verdict(topology: Topology, taken: float, what: str) -> str:
    """Returns in words whether so many bytes fit into a device of the topology.

    >>> verdict(parse_topology("v5e:4x4"), 12.65 * GIB, "the step takes")
    'on v5e:4x4 the step takes 12.7 of 15.8 GiB a device: it fits, with 3.1 to spare'
    """
    spare = (topology.hbm - taken) / GIB
    numbers = f"{taken / GIB:.1f} of {topology.hbm / GIB:.1f} GiB a device"
    fits = f"it fits, with {spare:.1f} to spare"
    if spare < 0:
        fits = f"it doesn't fit, {-spare:.1f} are missing"
    return f"on {topology.name} {what} {numbers}: {fits}"
