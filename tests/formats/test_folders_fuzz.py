"""Thousands of altered folders: each is read, or refused by a typed error.

Of MLX; of Orbax with the factors of Qwix, of a step of Tunix's, of `nnx.LoRA`; and of
PEFT with LoRA's relatives.
Three hundred of each kind, and five thousand with `--whole`; the same in every run.
"""

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from alterations import ALTER, altered, profile
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import DATA
from peft_files import pack, unpack

import jlora
import jlora.peft
import jlora.tunix
from jlora._formats import mlx

pytestmark = pytest.mark.slow
FEW, MANY = 300, 5000


def factors(*names: str, experts: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    """Arrays `(5, 2)` and `(2, 3)` in turn, no two values alike."""
    rng = np.random.default_rng(0)
    shapes = itertools.cycle([(*experts, 5, 2), (*experts, 2, 3)])
    return {n: rng.normal(size=next(shapes)).astype(np.float32) for n in names}


def mlx_folder(folder: Path) -> Any:
    plain = jlora.KernelAxes((), (0,), (1,))
    made = [*factors("a", "b", "c", "d").values()]
    pairs = {"q": made[:2], "embed": made[2:]}
    entries = {
        f"params/{name}/kernel": jlora.LoraFactors(a, b, plain, 3.0)
        for name, (a, b) in pairs.items()
    }
    a, b = factors("a", "b", experts=(2,)).values()
    packed = jlora.KernelAxes((0,), (1,), (2,))
    entries["params/experts/up/kernel"] = jlora.LoraFactors(a, b, packed, 3.0)
    mlx.write(folder, entries, jlora.LoraConfig("q", rank=2, alpha=6.0))
    return lambda: mlx.read(folder)


def mlx_magnitudes(folder: Path) -> Any:
    axes = jlora.KernelAxes((), (0,), (1,))
    a, b = factors("a", "b").values()
    norms = np.array([0.5, 1.0, 2.0], np.float32)
    entries = {
        f"params/{name}/kernel": jlora.LoraFactors(a, b, axes, 3.0, norms)
        for name in ("q", "k", "v")
    }
    config = jlora.LoraConfig("q", rank=2, alpha=6.0, dora=True)
    mlx.write(folder, entries, config)
    return lambda: mlx.read(folder)


def leaves() -> dict[str, jax.Array]:
    """A kernel with the factors that Qwix has beside it."""
    own = {"w": np.ones((5, 3), np.float32), **factors("w_lora_a", "w_lora_b")}
    return jax.tree.map(jax.numpy.asarray, own)


def qwix_state(folder: Path) -> Any:
    with ocp.StandardCheckpointer() as saver:
        saver.save(folder, {"q": leaves()})
    return lambda: jlora.tunix.restore(folder, alpha=6.0)


def tunix_step(folder: Path) -> Any:
    handlers = {"model_params": ocp.PyTreeCheckpointHandler()}
    with ocp.CheckpointManager(folder, item_handlers=handlers) as manager:
        items = {name: ocp.args.PyTreeSave({"q": leaves()}) for name in handlers}
        manager.save(10, args=ocp.args.Composite(**items), force=True)
    return lambda: jlora.tunix.restore(folder, alpha=6.0)


def nnx_state(folder: Path) -> Any:
    layer = nnx.LoRALinear(5, 3, lora_rank=2, rngs=nnx.Rngs(0))
    with ocp.StandardCheckpointer() as saver:
        saver.save(folder, nnx.state(layer, nnx.Param))
    return lambda: jlora.tunix.restore(folder)


def relative(name: str) -> Callable[[Path], Any]:
    """What copies a folder that PEFT wrote, and reads the copy."""

    def copied(folder: Path) -> Any:
        source = DATA / "peft_relatives" / name
        weights = np.load(source / "arrays.npz")
        kernel = lambda n: np.moveaxis(weights[f"{n}.weight"], (1, 0), (-2, -1))
        params = {n: {"kernel": kernel(n)} for n in ("up", "conv", "down")}
        folder.mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(source / file, folder)
        return lambda: jlora.peft.load(folder, params, RULES)

    return copied


RULES = [(r"(?P<name>up|down)", "{name}"), ("conv", "conv", "conv")]
KINDS: dict[str, Callable[[Path], Any]] = {
    "mlx": mlx_folder,
    "mlx dora": mlx_magnitudes,
    "qwix": qwix_state,
    "tunix": tunix_step,
    "nnx": nnx_state,
    "loha": relative("loha"),
    "lokr": relative("lokr"),
    "vera": relative("vera"),
    "ia3": relative("ia3"),
}
OF_ORBAX = ["qwix", "tunix", "nnx"]
OF_SAFETENSORS = [kind for kind in KINDS if kind not in OF_ORBAX]


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

    def count(self) -> int:
        """How many cases there are."""
        return sum(1 for how in ALTER for _ in self.cases(how))

    def cases(self, how: str) -> Iterator[tuple[Path, bytes]]:
        for file, data in self.good.items():
            yield from ((file, other) for other in ALTER[how](data))


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Folder:
    return Folder(tmp_path / "adapter", request.param)


@pytest.mark.timeout(6000)  # with --whole on a machine that has others to serve
@pytest.mark.parametrize("how", ALTER)
@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_altered_bytes(folder: Folder, how: str, request: Any) -> None:
    wanted = MANY if request.config.getoption("--whole") else FEW
    # Of all ways together so many, in even steps.
    step = max(1, folder.count() // wanted)
    taken = [
        folder.take(*case)
        for case in itertools.islice(folder.cases(how), 0, None, step)
    ]
    assert not all(taken) or wanted < MANY  # some may all be numbers
    assert folder.take(*next(iter(folder.good.items())))


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_there_are_enough_cases(folder: Folder) -> None:
    assert folder.count() >= MANY


@profile
@given(data=st.data())
@pytest.mark.parametrize("folder", OF_SAFETENSORS, indirect=True)
def test_an_altered_config(folder: Folder, data: st.DataObject) -> None:
    (file,) = (file for file in folder.good if file.suffix == ".json")
    good = json.loads(folder.good[file])
    folder.take(file, json.dumps(data.draw(altered(good))).encode())


@profile
@given(data=st.data())
@pytest.mark.parametrize("folder", OF_SAFETENSORS, indirect=True)
def test_an_altered_header(folder: Folder, data: st.DataObject) -> None:
    (file,) = (file for file in folder.good if file.suffix == ".safetensors")
    header, stored = unpack(folder.good[file])
    folder.take(file, pack(data.draw(altered(header)), stored))


@pytest.mark.parametrize("name", ["_METADATA", "process_0"])
@pytest.mark.parametrize("folder", OF_ORBAX, indirect=True)
@settings(profile, max_examples=100)
@given(data=st.data())
def test_altered_metadata_of_orbax(
    folder: Folder, name: str, data: st.DataObject
) -> None:
    (file,) = (file for file in folder.good if file.name == name)
    good = json.loads(folder.good[file])
    folder.take(file, json.dumps(data.draw(altered(good))).encode())
