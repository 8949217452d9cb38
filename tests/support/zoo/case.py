"""What a model of the zoo is made of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Axes(NamedTuple):
    """The roles of a kernel's axes, read from the model by a person."""

    batch: tuple[int, ...]
    in_: tuple[int, ...]
    out: tuple[int, ...]


@dataclass(frozen=True)
class Built:
    """A model ready to run: `fn(params, *args, **kwargs)`.

    Attributes:
        expected: the kernels that `target` chooses, by path.
        formed: those whose delta is formed by design (depthwise kernels).
        exact: the same function in float32, if this one computes in half precision.
        watched: shapes, besides those of the kernels, that no value may have.
    """

    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    expected: Mapping[str, Axes]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    target: str | None = None
    exclude: str | None = None
    rank: int = 2
    formed: frozenset[str] = frozenset()
    exact: Callable[..., Any] | None = None
    watched: tuple[tuple[int, ...], ...] = ()

    @property
    def coarse(self) -> bool:
        """Whether it computes in half precision."""
        return self.exact is not None


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], Built]


# The layouts that come up again and again.
DENSE = Axes((), (0,), (1,))
TABLE = Axes((), (0,), (1,))
SPLIT = Axes((), (0,), (1, 2))  # features to heads
JOIN = Axes((), (0, 1), (2,))  # heads to features
CONV1D = Axes((), (0, 1), (2,))
CONV2D = Axes((), (0, 1, 2), (3,))
CONV3D = Axes((), (0, 1, 2, 3), (4,))


def stacked(axes: Axes) -> Axes:
    """The same kernel with an axis of layers, experts or members before it."""
    shift = lambda group: tuple(i + 1 for i in group)
    return Axes((0, *shift(axes.batch)), shift(axes.in_), shift(axes.out))


def under(prefix: str, axes: Mapping[str, Axes]) -> dict[str, Axes]:
    return {f"{prefix}/{path}": roles for path, roles in axes.items()}


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def tokens(seed: int, shape: tuple[int, ...], vocab: int) -> jax.Array:
    ids = np.random.default_rng(seed).integers(0, vocab, shape)
    return jnp.asarray(ids, jnp.int32)


def randomize(tree: Any, seed: int = 0) -> Any:
    """Fills the shapes of a tree with numbers; no bias or norm scale stays trivial."""
    # NumPy's, for JAX's would compile once per shape.
    generator = np.random.default_rng(seed)

    def numbers(like: Any) -> jax.Array:
        x = generator.normal(size=like.shape)
        if x.ndim < 2:  # a scale or a bias
            return jnp.asarray(0.5 + 0.2 * x, like.dtype)
        fan_in = min(x.shape[-2] * 3, x.size // x.shape[-1])
        return jnp.asarray(x / fan_in**0.5, like.dtype)

    return jax.tree.map(numbers, tree)


def variables(model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The variables of a Linen model, without running its initialisers."""
    key = jax.random.key(0)
    init = lambda *args: model.init({"params": key, "dropout": key}, *args, **kwargs)
    tree = jax.eval_shape(init, *args)
    return jax.tree.map(begin, tree) | {"params": randomize(tree["params"])}


def begin(like: Any) -> jax.Array:
    """A value for state: zero for counters, one for means and variances, a key."""
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.key(3)
    ones = jnp.issubdtype(like.dtype, jnp.floating)
    return jnp.asarray(np.full(like.shape, ones), like.dtype)
