"""A JAX function beside the torch model that it stands for, and maps between them.

Written out by hand and without jlora: how each leaf is made of torch's tensors, and to
which tensors of PEFT's file the gradients of its factors belong.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

State = Mapping[str, np.ndarray]
Tree = dict[str, Any]
Names = list[tuple[Any, ...]] | None


# --- how a leaf is made of torch's tensors ---


@dataclasses.dataclass(frozen=True)
class Pair:
    """The two factors of a kernel, or their gradients."""

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None = None

    def matrices(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns `a (in, rank)` and `b (rank, out)`."""
        rank = self.a.shape[-1]
        return self.a.reshape(-1, rank), self.b.reshape(rank, -1)


def magnitude_of(module: str, entry: Pair, shape: tuple[int, ...] = (-1,)) -> State:
    """Returns DoRA's magnitude, or its gradient, under the name of the file."""
    if entry.magnitude is None:
        return {}
    return {f"{module}.lora_magnitude_vector": entry.magnitude.reshape(shape)}


@dataclasses.dataclass(frozen=True)
class Plain:
    """A leaf that torch keeps as it is: a bias, a scale, a table that is only read."""

    name: str

    def value(self, state: State) -> np.ndarray:
        """Returns the leaf."""
        return state[self.name]

    def to_torch(self, entry: Any) -> State:
        """Returns the value, or gradient, of the whole leaf under torch's name."""
        return {self.name: entry}


@dataclasses.dataclass(frozen=True)
class Dense:
    """A linear map.

    Attributes:
        module: the torch module.
        shape: the shape of the kernel, if it is none of `(in, out)`.
        turned: whether torch, too, keeps `(in, out)`.
        part: which part of torch's outputs it is, and of how many.
        weight: the name of the weight in the module.
    """

    module: str
    shape: tuple[int, ...] | None = None
    turned: bool = False
    part: tuple[int, int] = (0, 1)
    weight: str = ".weight"

    def value(self, state: State) -> np.ndarray:
        """Returns the kernel."""
        found = state[self.module + self.weight]
        matrix = found if self.turned else found.T
        number, count = self.part
        matrix = np.split(matrix, count, axis=1)[number]
        return matrix.reshape(self.shape or matrix.shape)

    def to_torch(self, entry: Any) -> State:
        """Returns factors, or gradients of them, under the names of the file."""
        if not isinstance(entry, Pair):
            return {self.module + self.weight: entry if self.turned else entry.T}
        a, b = entry.matrices()
        number, count = self.part
        zeros = np.zeros_like(b.T)
        rows = [b.T if i == number else zeros for i in range(count)]
        return {
            f"{self.module}.lora_A.weight": a.T,
            f"{self.module}.lora_B.weight": np.concatenate(rows),
            **magnitude_of(self.module, entry),
        }


@dataclasses.dataclass(frozen=True)
class Bias:
    """The bias of a part of a torch module, with the axes of the outputs."""

    name: str
    shape: tuple[int, ...]
    part: tuple[int, int] = (0, 1)

    def value(self, state: State) -> np.ndarray:
        """Returns the bias."""
        number, count = self.part
        return np.split(state[self.name], count)[number].reshape(self.shape)

    def to_torch(self, entry: Any) -> State:
        """No case trains one."""
        raise NotImplementedError(self.name)


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution: `(*window, in, out)` is torch's `(out, in, *window)`."""

    module: str

    def value(self, state: State) -> np.ndarray:
        """Returns the kernel."""
        return np.moveaxis(state[f"{self.module}.weight"], (0, 1), (-1, -2))

    def to_torch(self, entry: Any) -> State:
        """Returns factors, or gradients of them, under the names of the file."""
        b = entry.b.reshape(entry.b.shape[-2:]).T
        window = (1,) * (entry.a.ndim - 2)
        return {
            f"{self.module}.lora_A.weight": np.moveaxis(entry.a, (-1, -2), (0, 1)),
            f"{self.module}.lora_B.weight": b.reshape(b.shape + window),
            **magnitude_of(self.module, entry, (1, -1, *window)),
        }


@dataclasses.dataclass(frozen=True)
class Table:
    """An embedding."""

    module: str

    def value(self, state: State) -> np.ndarray:
        """Returns the table."""
        return state[f"{self.module}.weight"]

    def to_torch(self, entry: Any) -> State:
        """Returns factors, or gradients of them, under the names of the file."""
        return {
            f"{self.module}.lora_embedding_A": entry.a.T,
            f"{self.module}.lora_embedding_B": entry.b.T,
            **magnitude_of(self.module, entry),
        }


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A raw parameter `(in, out)`, whose rows PEFT takes for outputs."""

    name: str
    module: str

    def value(self, state: State) -> np.ndarray:
        """Returns the kernel."""
        return state[self.name]

    def to_torch(self, entry: Any) -> State:
        """Returns factors, or gradients of them, under the names of the file."""
        return {
            f"{self.module}.lora_B.weight": entry.a,
            f"{self.module}.lora_A.weight": entry.b,
        }


@dataclasses.dataclass(frozen=True)
class Experts:
    """A parameter with an axis of experts; `module` is the wrapper of its factors."""

    name: str
    module: str
    is_transposed: bool = False

    def value(self, state: State) -> np.ndarray:
        """Returns the kernel `(experts, in, out)`."""
        found = state[self.name]
        return found if self.is_transposed else found.transpose(0, 2, 1)

    def to_torch(self, entry: Any) -> State:
        """Returns factors, or gradients of them, under the names of the file."""
        a, b = entry.a, entry.b
        return {
            f"{self.module}.lora_A.weight": a.transpose(0, 2, 1).reshape(
                -1, a.shape[1]
            ),
            f"{self.module}.lora_B.weight": b.transpose(2, 1, 0).reshape(
                b.shape[2], -1
            ),
        }


@dataclasses.dataclass(frozen=True)
class Stacked:
    """The layers of a scan; a layer may have a smaller rank than the stack."""

    layers: tuple[Any, ...]

    def value(self, state: State) -> np.ndarray:
        """Returns the stack."""
        return np.stack([layer.value(state) for layer in self.layers])

    def to_torch(self, entry: Any) -> State:
        """Returns what is trained of all layers under the names of the file."""
        found: dict[str, np.ndarray] = {}
        for i, layer in enumerate(self.layers):
            if isinstance(entry, Pair):
                norm = None if entry.magnitude is None else entry.magnitude[i]
                found |= layer.to_torch(Pair(entry.a[i], entry.b[i], norm))
            else:
                found |= layer.to_torch(entry[i])
        return found


@dataclasses.dataclass(frozen=True)
class Fused:
    """Linear maps side by side in one kernel, each with a block of the ranks."""

    parts: tuple[Dense, ...]
    widths: tuple[int, ...]

    def value(self, state: State) -> np.ndarray:
        """Returns the kernel."""
        return np.concatenate([part.value(state) for part in self.parts], axis=-1)

    def to_torch(self, entry: Any) -> State:
        """Returns the diagonal blocks under the names of the file."""
        count, ends = len(self.parts), np.cumsum(self.widths)[:-1]
        columns = np.split(entry.a, count, axis=-1)
        rows = np.split(entry.b, count, axis=-2)
        found: dict[str, np.ndarray] = {}
        for i, part in enumerate(self.parts):
            block = np.split(rows[i], ends, axis=-1)[i]
            found |= part.to_torch(Pair(columns[i], block))
        return found


def combined(parts: list[State]) -> dict[str, np.ndarray]:
    """Joins tensors by name and adds those that have the same name.

    What several leaves share is one tensor in torch, whose gradient is the sum.
    """
    found: dict[str, np.ndarray] = {}
    for name, tensor in (item for part in parts for item in part.items()):
        found[name] = found[name] + tensor if name in found else tensor
    return found


# --- twins, and what several of them are made of ---


@dataclasses.dataclass(frozen=True)
class Twin:
    """A JAX function that computes what the torch model of a case computes.

    Attributes:
        case: the folder of the fixture.
        fn: takes the variables `{"params": ...}` and the inputs.
        leaves: how each leaf is made of torch's tensors, by path.
        names: the rules that jlora gets.
        tied: names in the file that are copies, and of which tensor they are a
            transpose.
        ignore: fields of the config that jlora is told to do without.
        exact: whether the factors themselves are those of the file; in a stack whose
            layers have several scalings their deltas are, but for rounding.
        in_doubt: whether a plan is needed, because neither the name nor the shape of a
            kernel tells the roles of its axes.
    """

    case: str
    fn: Callable[..., jax.Array]
    leaves: Mapping[str, Any]
    names: Names = None
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    exact: bool = True
    in_doubt: bool = False

    def variables(self, state: State) -> Tree:
        """Returns the params made of torch's tensors by hand."""
        tree: Tree = {}
        for path, leaf in self.leaves.items():
            *folders, last = path.split("/")
            node = functools.reduce(lambda d, k: d.setdefault(k, {}), folders, tree)
            node[last] = np.ascontiguousarray(leaf.value(state))
        return tree


def affine(params: Tree, x: jax.Array, n: int = 1) -> jax.Array:
    """Returns a linear map over the last `n` axes of `x`, plus the bias if any."""
    y = jnp.tensordot(x, params["kernel"], n)
    bias = params.get("bias")
    return y if bias is None else y + jnp.broadcast_to(bias, y.shape)


def norm(params: Tree, x: jax.Array, epsilon: float) -> jax.Array:
    """Returns layer normalisation."""
    x = x - x.mean(-1, keepdims=True)
    x = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + epsilon)
    scale, bias = (jnp.broadcast_to(params[k], x.shape) for k in ("scale", "bias"))
    return x * scale + bias


def attend(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool = False) -> jax.Array:
    """Returns softmax attention of (batch, time, heads, features) arrays."""
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    if causal:
        mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(jnp.broadcast_to(mask, scores.shape), scores, -1e30)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)


def biased(path: str, module: str, kernel: Any | None = None) -> dict[str, Any]:
    """Returns the leaves of a linear map with a bias."""
    kernel = kernel or Dense(module)
    return {f"{path}/kernel": kernel, f"{path}/bias": Plain(f"{module}.bias")}


def normed(path: str, module: str) -> dict[str, Any]:
    """Returns the leaves of a layer normalisation."""
    return {
        f"{path}/scale": Plain(f"{module}.weight"),
        f"{path}/bias": Plain(f"{module}.bias"),
    }
