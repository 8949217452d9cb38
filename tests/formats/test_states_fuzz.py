"""Thousands of altered adapters of MLX and Qwix: each is read, or refused by its type.

Three hundred of each kind, and five thousand with `--whole`; the same in every run.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from alterations import ALTER, altered
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import jlora
import jlora.tunix
from jlora._formats import mlx

pytestmark = pytest.mark.slow
profile = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def factors(*names: str) -> dict[str, np.ndarray]:
    """Arrays `(5, 2)` and `(2, 3)` in turn, no two values alike."""
    rng = np.random.default_rng(0)
    shapes = itertools.cycle([(5, 2), (2, 3)])
    return {n: rng.normal(size=next(shapes)).astype(np.float32) for n in names}


def mlx_folder(folder: Path) -> Any:
    axes = jlora.KernelAxes((), (0,), (1,))
    made = [*factors("a", "b", "c", "d").values()]
    entries = {
        f"params/{name}/kernel": jlora.LoraFactors(a, b, axes, 3.0)
        for name, (a, b) in (("q", made[:2]), ("embed", made[2:]))
    }
    mlx.write(folder, entries, jlora.LoraConfig("q", rank=2, alpha=6.0))
    return lambda: mlx.read(folder)


def qwix_state(folder: Path) -> Any:
    leaves = {"w": np.ones((5, 3), np.float32), **factors("w_lora_a", "w_lora_b")}
    with ocp.StandardCheckpointer() as saver:
        saver.save(folder, {"q": jax.tree.map(jax.numpy.asarray, leaves)})
    return lambda: jlora.tunix.restore(folder, alpha=6.0)


KINDS: dict[str, Callable[[Path], Any]] = {"mlx": mlx_folder, "qwix": qwix_state}


class Folder:
    """A good folder, whose files are replaced one at a time."""

    def __init__(self, path: Path, kind: str) -> None:
        self.read = KINDS[kind](path)
        files = sorted(p for p in path.rglob("*") if p.is_file())
        # The names of Orbax's data are drawn anew at each run.
        self.good = {file: file.read_bytes() for file in files}
        self.read()

    def take(self, file: Path, data: bytes) -> bool:
        """Reads with an altered file; returns whether it was taken."""
        file.write_bytes(data)
        try:
            _, adapter = self.read()
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(adapter))
            return True
        except (jlora.AdapterError, FileNotFoundError) as error:
            assert len(str(error)) < 10_000
            return False
        except Exception as error:
            raise AssertionError(f"{file} as {data!r} raises {error!r}") from error
        finally:
            file.write_bytes(self.good[file])

    def cases(self, how: str) -> Iterator[tuple[Path, bytes]]:
        for file, data in self.good.items():
            yield from ((file, other) for other in ALTER[how](data))


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Folder:
    return Folder(tmp_path / "adapter", request.param)


@pytest.mark.timeout(3000)  # with --whole on a machine that has others to serve
@pytest.mark.parametrize("how", ALTER)
@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_altered_bytes(folder: Folder, how: str, request: Any) -> None:
    wanted = 1000 if request.config.getoption("--whole") else 60
    cases = list(folder.cases(how))
    some = cases[:: max(1, len(cases) // wanted)]
    assert len(some) >= min(wanted, len(cases))
    taken = [folder.take(*case) for case in some]
    assert not all(taken)
    assert folder.take(*next(iter(folder.good.items())))


@profile
@given(data=st.data())
@pytest.mark.parametrize("folder", ["mlx"], indirect=True)
def test_an_altered_config_of_mlx(folder: Folder, data: st.DataObject) -> None:
    (file,) = (file for file in folder.good if file.suffix == ".json")
    good = json.loads(folder.good[file])
    folder.take(file, json.dumps(data.draw(altered(good))).encode())


@pytest.mark.parametrize("name", ["_METADATA", "process_0"])
@pytest.mark.parametrize("folder", ["qwix"], indirect=True)
@settings(profile, max_examples=100)
@given(data=st.data())
def test_altered_metadata_of_orbax(
    folder: Folder, name: str, data: st.DataObject
) -> None:
    (file,) = (file for file in folder.good if file.name == name)
    good = json.loads(folder.good[file])
    folder.take(file, json.dumps(data.draw(altered(good))).encode())
