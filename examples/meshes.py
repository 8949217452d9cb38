"""The devices of a run, on one process or many, and the mesh that they form."""

import argparse
import math

import jax
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor")


def start(args: argparse.Namespace) -> None:
    """Chooses the devices and joins the other processes; before any array is made.

    Raises:
        RuntimeError: If JAX has started already, or the others can't be reached.
        ValueError: If JAX doesn't find out by itself who the others are.
    """
    if args.devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.devices)
    if args.coordinator is not None or args.distributed:
        # How processes sum over CPUs; accelerators bring their own way.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        _join(args.coordinator, args.num_processes, args.process_id)


def _join(coordinator: str | None, processes: int | None, number: int | None) -> None:
    try:
        jax.distributed.initialize(coordinator, processes, number)
    except ValueError as error:
        raise ValueError(
            f"`--distributed` finds no cluster here ({error}); say who takes part with "
            "--coordinator, --num-processes and --process-id"
        ) from error


def parse_sizes(text: str) -> dict[str, int]:
    """Returns the sizes in `data=2,fsdp=4`, 1 for an axis that isn't named.

    Raises:
        argparse.ArgumentTypeError: If that isn't what `text` looks like.
    """
    sizes = dict.fromkeys(AXES, 1)
    for entry in text.split(","):
        name, _, size = entry.strip().partition("=")
        if name not in AXES or not size.isdecimal() or int(size) < 1:
            raise argparse.ArgumentTypeError(
                f"{entry!r} isn't one of the axes {', '.join(AXES)} with its size, "
                "such as `fsdp=4`; write `data=2,fsdp=2,tensor=2`"
            )
        sizes[name] = int(size)
    return sizes


def default_sizes(count: int) -> dict[str, int]:
    """Returns the sizes for a number of devices: 2 × 2 × 2 for 8, 1 × 2 × 2 for 4.

    `tensor` is 2 from 4 devices on and `data` is 2 from 8 on, where they divide:
    `tensor` waits for other devices in every layer, and `data` saves no memory. The
    rest is `fsdp`.
    """
    tensor = 2 if count % 2 == 0 and count >= 4 else 1
    data = 2 if count % 4 == 0 and count >= 8 else 1
    return {"data": data, "fsdp": count // (data * tensor), "tensor": tensor}


def make_mesh(sizes: dict[str, int] | None) -> Mesh:
    """Returns the mesh of all devices of all processes, with Auto axes.

    Raises:
        ValueError: If the product of the sizes isn't the number of devices.
    """
    count = jax.device_count()
    sizes = default_sizes(count) if sizes is None else sizes
    if math.prod(sizes.values()) != count:
        raise ValueError(
            f"`--mesh` {describe(sizes)} needs {math.prod(sizes.values())} devices, "
            f"and {count} are here; {describe(default_sizes(count))} would fit"
        )
    shape = tuple(sizes[name] for name in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_rows(rows: int, mesh: Mesh) -> None:
    """Checks that a batch can be spread over `data` and `fsdp`.

    Raises:
        ValueError: If some devices would get more rows than others.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise ValueError(
            f"`--batch` {rows} can't be divided among data × fsdp = {parts}; "
            f"{rows + -rows % parts} would fit"
        )


def describe(sizes: dict[str, int]) -> str:
    """Returns the sizes as `--mesh` takes them.

    >>> describe({"data": 2, "fsdp": 4, "tensor": 1})
    'data=2,fsdp=4,tensor=1'
    """
    return ",".join(f"{name}={size}" for name, size in sizes.items())
