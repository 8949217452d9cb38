"""Two processes save and restore an adapter that neither of them holds as a whole.

This file is also the script that they run.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from paths import PYTHONPATH
from processes import finish, free_port

import jlora
from jlora import KernelAxes, LoraConfig, LoraFactors
from jlora.checkpoint import describe, restore, save

CONFIG = (LoraConfig("w", rank=3, alpha=5.0), LoraConfig("scale", full=True))
SPECS = {"w": P("x", "y"), "scale": P(("x", "y"))}


def values(sign: int = 1) -> tuple[Any, Any]:
    """A base and an adapter, the same in every process."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: sign * rng.normal(size=shape).astype(np.float32)
    base = {"w": normal(16, 24), "scale": normal(8)}
    axes = KernelAxes((), (0,), (1,))
    factors = LoraFactors(normal(16, 3), normal(3, 24), axes, 5 / 3)  # type: ignore[arg-type]
    return base, {"w": factors, "scale": normal(8)}


def places_on(sizes: tuple[int, int], adapter: Any) -> tuple[Any, Any]:
    """Shardings of the base and of the adapter on a mesh of all devices."""
    mesh = jax.make_mesh(sizes, ("x", "y"), (AxisType.Auto,) * 2)
    places = {path: NamedSharding(mesh, spec) for path, spec in SPECS.items()}
    return places, jlora.shardings(places, adapter)


def put(tree: Any, places: Any) -> Any:
    """The arrays of a tree as global ones, of which each process makes its parts."""
    make = lambda x, place: jax.make_array_from_callback(x.shape, place, x.__getitem__)
    return jax.tree.map(make, tree, places)


def assert_parts_same(found: Any, wanted: Any) -> None:
    """Whether what this process holds of the arrays is what it should be."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    for array, value in pairs:
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, value[shard.index])


def work(folder: Path) -> None:
    """What each of the processes does."""
    base, adapter = values()
    other = values(sign=-1)[0]
    base_places, places = places_on((4, 2), adapter)
    sharded = put(adapter, places)
    assert not sharded["w"].b.is_fully_addressable
    save(folder, values(sign=-1)[1], config=CONFIG)  # of NumPy, one process writes
    try:
        save(folder, sharded, config=CONFIG)
        raise AssertionError("an adapter was replaced unasked")
    except FileExistsError:
        pass
    save(folder, sharded, config=CONFIG, base=put(base, base_places), overwrite=True)

    base_places, places = places_on((2, 4), adapter)
    found = restore(folder, shardings=places, base=put(base, base_places))
    assert_parts_same(found, adapter)
    assert found["w"].a.sharding == places["w"].a
    assert_parts_same(restore(folder, base=base), adapter)
    try:
        restore(folder, shardings=places, base=put(other, base_places))
        raise AssertionError("another base was not noticed")
    except jlora.BaseMismatchError as error:
        assert "'w'" in str(error) and "'scale'" in str(error)


def start(folder: Path, log: Path, *who: str) -> tuple[subprocess.Popen[bytes], Path]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    with log.open("wb") as file:
        child = subprocess.Popen(
            [sys.executable, __file__, str(folder), *who],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**kept, "PYTHONPATH": PYTHONPATH, "JAX_PLATFORMS": "cpu"},
        )
    return child, log


@pytest.mark.slow
def test_two_processes_save_and_restore_and_so_does_one(tmp_path: Path) -> None:
    folder, address = tmp_path / "saved", f"127.0.0.1:{free_port()}"
    logs = [tmp_path / f"log{i}" for i in range(2)]
    finish([start(folder, log, address, str(i)) for i, log in enumerate(logs)])

    base, adapter = values()
    assert describe(folder).config == CONFIG
    for sizes in [(1, 8), (4, 2)]:
        base_places, places = places_on(sizes, adapter)
        found = restore(folder, shardings=places, base=put(base, base_places))
        assert_parts_same(found, adapter)
    assert_parts_same(restore(folder, base=base), adapter)


if __name__ == "__main__":
    where, coordinator, number = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, 2, int(number))
    work(Path(where))
