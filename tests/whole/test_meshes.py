"""Sharded kernels: Auto and Explicit meshes, and shard_map inside of the function.

Each function is written once; `out` holds the sharding of a product, which Explicit
meshes ask for where a contracted axis is sharded. The reference runs on one device.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from case import GRADIENTS, VALUES, randomized
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import assert_close, delta, random_like, weighted_sum
from use import ALPHA, RANK, Kernel

import jlora

pytestmark = pytest.mark.usefixtures("fast_compile")
STACK = "lir,lro->lio"


@dataclasses.dataclass(frozen=True)
class Sharded:
    """A use of kernels with the specs of kernels and input."""

    name: str
    fn: Callable[..., Any]
    kernels: dict[str, tuple[Kernel, P]]
    x: tuple[tuple[int, ...], P]

    def arguments(self, key: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        """Unsharded params and input."""
        keys = jax.random.split(key, len(self.kernels) + 1)
        params = {
            name: 0.3 * jax.random.normal(k, kernel.shape)
            for k, (name, (kernel, _)) in zip(keys, self.kernels.items(), strict=False)
        }
        shape, _ = self.x
        if self.name.startswith("lookup"):
            return params, jax.random.randint(keys[-1], shape, 0, 12)
        return params, jax.random.normal(keys[-1], shape)


def _scan(params: Any, x: jax.Array, out: P | None) -> jax.Array:
    """A stack of Megatron blocks: columns, then rows with a sum over devices."""

    def body(h: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        up = jnp.tanh(h @ layer["w"])
        return jnp.einsum("bi,io->bo", up, layer["v"], out_sharding=out), None

    return lax.scan(body, x, params)[0]


def _lookup(params: Any, ids: jax.Array, out: P | None) -> jax.Array:
    return params["w"].at[ids].get(out_sharding=out)


def _siblings(params: Any, x: jax.Array, out: P | None) -> jax.Array:
    """Products of one input in one pass, each laid out as is said."""
    up, gate = (_einsum("bi,io->bo")({"w": params[n]}, x, out) for n in ("w", "v"))
    return up * jnp.tanh(gate)


def _einsum(spec: str) -> Callable[..., jax.Array]:
    return lambda params, x, out: jnp.einsum(spec, x, params["w"], out_sharding=out)


COLUMNS = {"w": (Kernel((6, 10)), P(None, "model"))}
ROWS = {"w": (Kernel((10, 6)), P("model", None))}
DATA = P("data", None)

SHARDED = [
    (Sharded("columns", _einsum("bi,io->bo"), COLUMNS, ((8, 6), DATA)), None),
    (
        Sharded("rows", _einsum("bi,io->bo"), ROWS, ((8, 10), P("data", "model"))),
        DATA,
    ),
    (
        Sharded(
            "siblings",
            _siblings,
            {name: (Kernel((10, 6)), P("model", None)) for name in ("w", "v")},
            ((8, 10), P("data", "model")),
        ),
        DATA,
    ),
    (
        Sharded(
            "heads",
            _einsum("bti,ihd->bthd"),
            {"w": (Kernel((6, 4, 10), "ir,rhd->ihd"), P(None, "model", None))},
            ((8, 3, 6), P("data", None, None)),
        ),
        None,
    ),
    (
        Sharded(
            "experts",
            _einsum("ebi,eio->ebo"),
            {"w": (Kernel((4, 6, 10), "eir,ero->eio"), P("model", None, None))},
            ((4, 8, 6), P("model", "data", None)),
        ),
        None,
    ),
    (
        Sharded(
            "layers",
            _scan,
            {
                "w": (Kernel((3, 6, 10), STACK), P(None, None, "model")),
                "v": (Kernel((3, 10, 6), STACK), P(None, "model", None)),
            },
            ((8, 6), DATA),
        ),
        DATA,
    ),
    (
        Sharded(
            "lookup_rows",
            _lookup,
            {"w": (Kernel((12, 6)), P(None, "model"))},
            ((8, 3), DATA),
        ),
        P("data", None, "model"),
    ),
]


def mesh_of(kind: AxisType) -> jax.sharding.Mesh:
    devices = jax.devices()[:4]
    return jax.make_mesh((2, 2), ("data", "model"), (kind, kind), devices=devices)


def formed(use: Sharded, params: Any, adapter: Any) -> Any:
    """W + ΔW of every kernel."""
    return {
        name: params[name]
        + delta(kernel, adapter[name].a, adapter[name].b, ALPHA / RANK)
        for name, (kernel, _) in use.kernels.items()
    }


def grads_of(f: Callable[..., Any], adapter: Any, x: jax.Array, weights: Any) -> Any:
    """The output, and the gradients of the adapter and of a float input."""
    argnums = (0, 1) if jnp.issubdtype(x.dtype, jnp.floating) else (0,)

    def loss(adapter: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        out = f(adapter, x)
        return weighted_sum(out, weights), out

    grads, out = jax.jit(jax.grad(loss, argnums, has_aux=True))(adapter, x)
    return out, grads


def check(use: Sharded, mesh: Any, getkey: Any, out: P | None) -> None:
    """Values and gradients on the mesh equal those of one device."""
    params, x = use.arguments(getkey())
    config = jlora.LoraConfig(list(use.kernels), rank=RANK, alpha=ALPHA)
    plain = lambda params, x: use.fn(params, x, None)
    adapter = jlora.lora(plain, config).init(getkey(), params, x)
    adapter = randomized(adapter, getkey())
    weights = random_like(jax.eval_shape(plain, params, x), 0)
    reference = lambda adapter, x: plain(formed(use, params, adapter), x)
    expected, wanted = grads_of(reference, adapter, x, weights)

    specs = {name: spec for name, (_, spec) in use.kernels.items()}
    put = lambda value, spec: jax.device_put(value, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        params = {name: put(w, specs[name]) for name, w in params.items()}
        x = put(x, use.x[1])
        model = lambda params, x: use.fn(params, x, out)
        lora = jlora.lora(model, config)
        fresh = lora.init(getkey(), params, x)
        shapes = jax.tree.map(jnp.shape, fresh)
        assert shapes == jax.tree.map(jnp.shape, adapter)
        adapter = jax.tree.map(
            lambda value, like: jax.device_put(value, like.sharding), adapter, fresh
        )
        weights = put(weights, P())
        applied = lambda adapter, x: lora.apply(params, adapter, x)
        actual, grads = grads_of(applied, adapter, x, weights)
        alone, plain_out = (
            jax.jit(lora.apply)(params, adapter, x),
            jax.jit(model)(params, x),
        )
    assert alone.sharding.is_equivalent_to(plain_out.sharding, alone.ndim)
    assert_close(alone, expected, VALUES["float32"])
    assert_close(actual, expected, VALUES["float32"])
    assert_close(grads, wanted, GRADIENTS["float32"])


each_sharded = pytest.mark.parametrize(
    "use, out", [pytest.param(*pair, id=pair[0].name) for pair in SHARDED]
)


@each_sharded
def test_auto_mesh(use: Sharded, out: P | None, getkey):
    check(use, mesh_of(AxisType.Auto), getkey, None)


@each_sharded
def test_explicit_mesh(use: Sharded, out: P | None, getkey):
    check(use, mesh_of(AxisType.Explicit), getkey, out)


# --- shard_map inside of the function ---


def in_shard_map(use: Sharded, body: Callable[..., Any], out: P) -> Sharded:
    """The use with `body(kernels, x)` run under shard_map."""
    specs = {name: spec for name, (_, spec) in use.kernels.items()}

    def fn(params: Any, x: jax.Array, _: Any) -> jax.Array:
        mapped = jax.shard_map(
            body,
            mesh=mesh_of(AxisType.Auto),
            in_specs=(specs, use.x[1]),
            out_specs=out,
        )
        return mapped(params, x)

    return dataclasses.replace(use, fn=fn)


def _psum_rows(params: Any, x: jax.Array) -> jax.Array:
    return lax.psum(x @ params["w"], "model")


BY_NAME = {use.name: use for use, _ in SHARDED}
MAPPED = [
    in_shard_map(BY_NAME["columns"], lambda p, x: x @ p["w"], P("data", "model")),
    in_shard_map(BY_NAME["rows"], _psum_rows, DATA),
    in_shard_map(
        BY_NAME["experts"],
        lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["w"]),
        P("model", "data", None),
    ),
    in_shard_map(
        BY_NAME["lookup_rows"], lambda p, i: p["w"][i], P("data", None, "model")
    ),
]


@pytest.mark.parametrize("use", MAPPED, ids=lambda use: use.name)
def test_shard_map_of_sharded_kernels(use: Sharded, getkey):
    """Every device has a piece of the kernel and the matching piece of the factors."""
    check(use, mesh_of(AxisType.Auto), getkey, None)
