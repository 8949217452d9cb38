"""The golden fixtures of PEFT, each beside its twin in JAX."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from paths import DATA
from peft_twins import TWINS
from safetensors import safe_open

import jlora
import jlora.peft

FOLDER = DATA / "peft"


class Golden:
    """A fixture beside its twin, and what jlora reads of it."""

    def __init__(self, name: str) -> None:
        """Reads the arrays of the fixture, not the adapter."""
        self.twin = TWINS[name]
        self.folder = FOLDER / self.twin.case
        with np.load(self.folder / "arrays.npz") as file:
            self.arrays = dict(file)
        base = self.group("base")
        self.variables = jax.tree.map(jnp.asarray, self.twin.variables(base))
        self.x = self.arrays["input/0"]

    def group(self, name: str) -> dict[str, np.ndarray]:
        """Returns the arrays below a name."""
        start = f"{name}/"
        found = {k: v for k, v in self.arrays.items() if k.startswith(start)}
        return {k.removeprefix(start): v for k, v in found.items()}

    @functools.cached_property
    def plan(self) -> Any:
        """A plan that knows the axes of every kernel."""
        lora = jlora.lora(self.twin.fn, jlora.LoraConfig(".*", rank=1))
        return lora.plan(self.variables, self.x)

    @property
    def base(self) -> Any:
        """The params; their plan, where names don't tell the roles of the axes."""
        return self.plan if self.twin.in_doubt else self.variables

    @functools.cached_property
    def loaded(self) -> tuple[Any, dict[str, Any]]:
        """The config and the adapter that jlora reads."""
        twin = self.twin
        return jlora.peft.load(self.folder, self.base, twin.names, ignore=twin.ignore)

    @property
    def adapter(self) -> dict[str, Any]:
        """The adapter."""
        return self.loaded[1]

    def in_float32(self) -> dict[str, Any]:
        """Returns the adapter as PEFT computes with it."""
        return jax.tree.map(lambda x: x.astype(jnp.float32), self.adapter)

    def lora(self) -> jlora.Lora:
        """Returns the adapted twin."""
        return jlora.lora(self.twin.fn, self.loaded[0])

    @functools.cached_property
    def computed(self) -> tuple[jax.Array, Any]:
        """The output with the adapter, and the gradients of the adapter in float32."""
        lora, weights = self.lora(), self.arrays["loss/weights"]

        def loss(adapter: Any) -> tuple[jax.Array, jax.Array]:
            output = lora.apply(self.variables, adapter, self.x)
            return (output * weights).sum(), output

        step = jax.jit(jax.grad(loss, has_aux=True))
        gradients, output = step(self.in_float32())
        return output, gradients


@functools.cache
def golden(name: str) -> Golden:
    """Returns a fixture, read once."""
    return Golden(name)


def read(folder: Path) -> dict[str, Any]:
    """Returns the tensors of an adapter's file with their dtypes, as bits."""
    with safe_open(folder / "adapter_model.safetensors", framework="flax") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


def json_of(folder: Path) -> dict[str, Any]:
    """Returns the config of an adapter."""
    return json.loads((folder / "adapter_config.json").read_text())


def save(case: Golden, folder: Path, adapter: Any = None) -> Path:
    """Saves the adapter that was read, or another one, as the fixture was saved."""
    jlora.peft.save(
        folder,
        case.base,
        case.adapter if adapter is None else adapter,
        case.loaded[0],
        case.twin.names,
        task_type=json_of(case.folder)["task_type"],
    )
    return folder


def scaled(factors: jlora.LoraFactors, by: float) -> jlora.LoraFactors:
    """Returns the factors with another scaling."""
    scaling = by * factors.scaling
    return jlora.LoraFactors(factors.a, factors.b, factors.axes, scaling)
