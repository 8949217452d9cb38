"""The public surface as a table: a name, and a call of it that returns arrays.

`FEATURES[name](place)` is the call with its operands where `place` says: on no mesh, or
on one with params, inputs and factors replicated or sharded. What it returns may not
depend on the place, nor on JAX's rules of promotion. A feature that is added here is
tried on all meshes and under all rules.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from use import ALPHA, RANK

import jlora

# Paths of the kernels, with the roles of their axes: b(atch), i(n), o(ut).
ROLES = {
    "table": "io",
    "dense/kernel": "io",
    "dense/bias": "o",
    "layers/up": "bio",
    "layers/down": "bio",
    "heads": "ioo",
    "experts": "bio",
}
SHAPES = {
    "table": (12, 16),
    "dense/kernel": (16, 24),
    "dense/bias": (24,),
    "layers/up": (3, 24, 20),
    "layers/down": (3, 20, 24),
    "heads": (24, 4, 6),
    "experts": (4, 6, 10),
}
ROWS, EXAMPLES = 12, 8
KERNELS = [path for path in ROLES if path not in ("table", "dense/bias")]
# What the axes of a role are sharded over.
LAYOUTS = {
    "whole": {},
    "in": {"i": "model"},
    "out": {"o": "model"},
    "both": {"i": "data", "o": "model"},
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where operands are.

    Attributes:
        kind: the type of the axes of the mesh; None for no mesh.
        kernels: the name of one of `LAYOUTS`.
        batch: whether the examples are sharded over the axis "data".
        follow: whether factors are laid out like their kernels, and not replicated.
        spread: whether factors are cut along all mesh axes of their kernels.
        dtype: the dtype of params and inputs.
    """

    kind: AxisType | None = None
    kernels: str = "whole"
    batch: bool = False
    follow: bool = True
    spread: bool = False
    dtype: Any = jnp.float32

    def __str__(self) -> str:
        """Returns a name for tests."""
        if self.kind is None:
            return "no mesh"
        rows, factors = "-rows" * self.batch, "" if self.follow else "-whole_factors"
        factors += "-spread" * self.spread
        return f"{self.kind.name}-{self.kernels}{rows}{factors}"

    @property
    def mesh(self) -> Any:
        """The mesh, of four devices."""
        if self.kind is None:
            return None
        devices = jax.devices()[:4]
        return jax.make_mesh(
            (2, 2), ("data", "model"), (self.kind,) * 2, devices=devices
        )

    @property
    def rows(self) -> str | None:
        """What the axis of the examples is sharded over."""
        return "data" if self.batch else None

    @property
    def outs(self) -> str | None:
        """What outputs are sharded over."""
        return LAYOUTS[self.kernels].get("o")

    def put(self, value: Any, *spec: Any) -> Any:
        """Returns a value on the mesh."""
        value = (
            value
            if jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended)
            else jnp.asarray(value)
        )
        mesh = self.mesh
        if mesh is None:
            return value
        return jax.device_put(value, NamedSharding(mesh, P(*spec)))

    def out(self, *spec: Any) -> Any:
        """Returns what an Explicit mesh wants to know of a result."""
        return P(*spec) if self.kind is AxisType.Explicit else None

    def spec(self, path: str) -> P:
        """Returns how a leaf of the params is laid out."""
        layout = [LAYOUTS[self.kernels].get(role) for role in ROLES[path]]
        second = [i for i, name in enumerate(layout) if name in layout[:i]]
        return P(*(None if i in second else name for i, name in enumerate(layout)))

    def params(self) -> dict[str, Any]:
        """Returns the params of `model`."""
        rng, tree = np.random.default_rng(0), {}
        for path, shape in SHAPES.items():
            value = 0.3 * rng.normal(size=shape)
            *above, name = path.split("/")
            node = tree.setdefault(above[0], {}) if above else tree
            node[name] = self.put(jnp.asarray(value, self.dtype), *self.spec(path))
        return tree

    def ids(self) -> jax.Array:
        """Returns the inputs of `model`, of shape (examples, 3)."""
        ids = np.random.default_rng(1).integers(0, ROWS, (EXAMPLES, 3))
        return self.put(jnp.asarray(ids, jnp.int32), self.rows, None)

    def model(self, params: Any, ids: jax.Array) -> jax.Array:
        """A lookup, a dense layer with a bias, a stack, heads and experts."""
        rows, out = self.rows, self.out
        x = params["table"].at[ids].get(out_sharding=out(rows, None, self.outs))
        x = self.gathered(x.mean(1))
        x = self.einsum("bi,io->bo", x, params["dense"]["kernel"])
        x = self.gathered(jnp.tanh(x + params["dense"]["bias"][None]))

        def layer(x: jax.Array, own: Any) -> tuple[jax.Array, None]:
            up = self.gathered(jnp.tanh(self.einsum("bi,io->bo", x, own["up"])))
            return x + self.gathered(self.einsum("bi,io->bo", up, own["down"])), None

        x, _ = lax.scan(layer, x, params["layers"])
        x = self.gathered(jnp.tanh(self.einsum("bi,ihd->bhd", x, params["heads"])))
        return self.einsum("bhd,hdo->bho", x, params["experts"])

    def einsum(self, expression: str, x: jax.Array, w: jax.Array) -> jax.Array:
        """A product with a kernel; an Explicit mesh is told where its result is."""
        out = expression.split("->")[1]
        last = [self.outs if c in "ho" else None for c in out[1:]]
        if "h" in expression.split(",")[0]:
            last = [None, self.outs]
        elif "h" in out:
            last = [self.outs, None]
        return jnp.einsum(expression, x, w, out_sharding=self.out(self.rows, *last))

    def gathered(self, x: jax.Array) -> jax.Array:
        """Returns activations whole along all but the axis of the examples."""
        if self.kind is not AxisType.Explicit:
            return x
        return jax.sharding.reshard(x, P(self.rows, *[None] * (x.ndim - 1)))

    def lora(self, target: Any = None, **settings: Any) -> jlora.Lora:
        """Returns the model with its kernels, or those that are named, adapted."""
        how = ("materialize", "backward", "contraction")
        kwargs = {k: settings.pop(k) for k in how if k in settings}
        return jlora.lora(self.model, config(target, **settings), **kwargs)

    def adapter(self, lora: jlora.Lora, seed: int = 0, params: Any = None) -> Any:
        """Returns a new adapter with all of its arrays moved."""
        params = self.params() if params is None else params
        return self.moved(lora.init(jax.random.key(3), params, self.ids()), seed)

    def moved(self, adapter: Any, seed: int = 0) -> Any:
        """Returns an adapter with random changes of its arrays, where they belong."""
        rng = np.random.default_rng(seed)
        places = jax.tree.map(lambda value: value.sharding, adapter)
        if self.spread:
            places = jlora.shardings(self.params(), adapter, spread=True)

        def change(value: jax.Array, place: Any) -> jax.Array:
            new = np.asarray(value, np.float64) + 0.3 * rng.normal(size=value.shape)
            new = jnp.asarray(new, value.dtype)
            if self.mesh is None:
                return new
            return jax.device_put(
                new, place if self.follow else NamedSharding(self.mesh, P())
            )

        return jax.tree.map(change, adapter, places)

    def weights(self, shape: tuple[int, ...] = (EXAMPLES, 4, 10)) -> jax.Array:
        """Returns weights that make a scalar of the outputs."""
        values = np.random.default_rng(2).normal(size=shape)
        return self.put(jnp.asarray(values, self.dtype), *[None] * len(shape))

    def loss(self, out: jax.Array, weights: jax.Array) -> jax.Array:
        """Returns the weighted sum of outputs of the model."""
        return (jnp.sin(out) * weights).sum()


def config(target: Any = None, **settings: Any) -> jlora.LoraConfig:
    """Returns a config in which alpha is not the rank."""
    settings = {"rank": RANK, "alpha": ALPHA, **settings}
    return jlora.LoraConfig(target, **settings)


EVERY = ".*(table|kernel|up|down|heads|experts)"
SLICES = [(0, 8), (16, 24)]


Feature = Callable[[Place], Any]
FEATURES: dict[str, Feature] = {}


def feature(run: Feature) -> Feature:
    """Adds a feature under the name of its function."""
    FEATURES[run.__name__.lstrip("_")] = run
    return run


def trained(place: Place, lora: jlora.Lora, params: Any = None, **kwargs: Any) -> Any:
    """Returns the outputs, and the gradients of the adapter."""
    params = place.params() if params is None else params
    adapter, ids, weights = (
        place.adapter(lora, params=params),
        place.ids(),
        place.weights(),
    )

    def loss(adapter: Any, params: Any, ids: Any, weights: Any) -> Any:
        out = lora.apply(params, adapter, ids, **kwargs)
        return place.loss(out, weights), out

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return step(adapter, params, ids, weights)


def several(place: Place, lora: jlora.Lora, count: int = 3) -> list[Any]:
    return [place.adapter(lora, seed) for seed in range(count)]
