"""Convolutions with every option, in both ways of deriving, and on meshes of two axes.

The reference convolves with `W + s·a·b` on one device. (JAX's own gradient of a grouped
kernel is wrong on such a mesh; see `test_why`.)
"""

import dataclasses
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import assert_close
from releases import since

import jlora

pytestmark = pytest.mark.usefixtures("fast_compile")
LAYOUTS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC")}


def normal(seed: int, *shape: int) -> Array:
    return jax.random.normal(jax.random.key(seed), shape)


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution: its kernel, its input and its options."""

    kernel: tuple[int, ...]
    x: tuple[int, ...]
    groups: int = 1
    padding: Any = "SAME"
    strides: tuple[int, ...] | None = None
    lhs_dilation: tuple[int, ...] | None = None
    rhs_dilation: tuple[int, ...] | None = None
    layout: tuple[str, str, str] | None = None

    def __call__(self, w: Array, x: Array, out: Any = None) -> Array:
        n = len(self.kernel) - 2
        return lax.conv_general_dilated(
            x,
            w,
            self.strides or (1,) * n,
            self.padding,
            lhs_dilation=self.lhs_dilation,
            rhs_dilation=self.rhs_dilation,
            dimension_numbers=self.layout or LAYOUTS[n],
            feature_group_count=self.groups,
            out_sharding=out,
        )


def adapted(conv: Conv, **settings: Any) -> tuple[Any, Any, Any, Array]:
    """The adapted convolution, params, an adapter with random factors, and an input."""
    model = lambda params, x: conv(params["w"], x)
    lora = jlora.lora(model, jlora.LoraConfig("w", rank=2, alpha=3), **settings)
    params, x = {"w": normal(0, *conv.kernel)}, normal(1, *conv.x)
    adapter = lora.init(jax.random.key(2), params, x)
    adapter = jax.tree.map(lambda v: normal(v.size, *v.shape), adapter)
    return lora, params, adapter, x


def derived(apply: Any, *args: Any) -> Any:
    """Output and gradients of the adapter and the input."""
    loss = lambda adapter, x: (jnp.sin(y := 0.1 * apply(adapter, x)).sum(), y)
    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(*args)


def expected(conv: Conv, params: Any, adapter: Any, x: Array) -> Any:
    merged = lambda adapter, x: conv(jlora.merge(params, adapter)["w"], x)
    return derived(merged, adapter, x)


def drawn(seed: int) -> Conv:
    """A convolution with options drawn at random."""
    rng = random.Random(seed)
    n = rng.choice([1, 2])
    draw = lambda *values: tuple(rng.choice(values) for _ in range(n))
    groups, width = rng.choice([1, 2, 3]), rng.choice([1, 3, 4])
    taps, sizes = draw(1, 2, 3), draw(5, 6, 8)
    multiple = rng.choice([2, 3])
    channels = "NC" + "HW"[-n:]
    kernel = "IO" + "HW"[-n:]
    shuffled = lambda letters: "".join(rng.sample(letters, len(letters)))
    layout = shuffled(channels), shuffled(kernel), shuffled(channels)
    of = dict(zip("HW"[-n:], zip(taps, sizes, strict=True), strict=True))
    kernel_sizes = {"I": width, "O": groups * multiple}
    x_sizes = {"N": 3, "C": groups * width}
    return Conv(
        tuple(kernel_sizes.get(c) or of[c][0] for c in layout[1]),
        tuple(x_sizes.get(c) or of[c][1] for c in layout[0]),
        groups,
        tuple((rng.choice([-1, 0, 2]), rng.choice([0, 1, 3])) for _ in range(n)),
        draw(1, 2, 3),
        draw(1, 1, 2),
        draw(1, 1, 2),
        layout,
    )


@pytest.mark.parametrize("backward", ["custom", "autodiff"])
@pytest.mark.parametrize("seed", range(24))
def test_every_option(seed: int, backward: Any) -> None:
    conv = drawn(seed)
    lora, params, adapter, x = adapted(conv, backward=backward)
    actual = derived(lambda adapter, x: lora.apply(params, adapter, x), adapter, x)
    assert_close(actual, expected(conv, params, adapter, x), 1e-4)


def test_batch_groups_are_refused_by_name() -> None:
    model = lambda params, x: lax.conv_general_dilated(
        x,
        params["w"],
        (1,),
        "SAME",
        dimension_numbers=LAYOUTS[1],
        batch_group_count=2,
    )
    lora = jlora.lora(model, jlora.LoraConfig("w", rank=2))
    params, x = {"w": normal(0, 3, 5, 4)}, normal(1, 6, 7, 5)
    with pytest.raises(jlora.TargetError, match="conv_general_dilated"):
        lora.plan(params, x)


@pytest.mark.parametrize("dtype", ["complex64", "bfloat16", "float16", "float8_e4m3fn"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_dtypes(dtype: str, groups: int) -> None:
    """Gradients keep imaginary parts, and are summed in float32 whatever flows."""
    eight = "float8" in dtype
    conv = Conv((3, 3, 4 // groups, 8), (4, 6, 6, 4), groups)

    def model(w: Array, x: Array) -> Array:
        y = lax.conv_general_dilated(
            x,
            w.astype(dtype),
            (1, 1),
            "SAME",
            dimension_numbers=LAYOUTS[2],
            feature_group_count=groups,
            preferred_element_type="float32" if eight else None,
        )
        return y.astype("complex64" if dtype == "complex64" else "float32")

    params = {"w": normal(0, *conv.kernel)}
    x = normal(1, *conv.x).astype(dtype)
    x = x + 1j * normal(5, *conv.x) if dtype == "complex64" else x
    config = jlora.LoraConfig("w", rank=2, alpha=3)
    lora = jlora.lora(lambda params, x: model(params["w"], x), config)
    adapter = lora.init(jax.random.key(2), params, x)
    adapter = jax.tree.map(lambda v: 0.3 * normal(v.size, *v.shape), adapter)
    loss = lambda y: jnp.sin(y.real).sum() + jnp.cos(y.imag).sum()
    grads = jax.jit(jax.grad(lambda a: loss(lora.apply(params, a, x))))(adapter)

    def wide(adapter: Any) -> Array:
        """The same in float32: the base of eight bits, the delta added to it."""
        stored = params["w"].astype("float32" if dtype == "complex64" else dtype)
        w = jlora.merge({"w": stored.astype("float32")}, adapter)["w"]
        flowing = "complex64" if dtype == "complex64" else "float32"
        return loss(conv(w.astype(flowing), x.astype(flowing)))

    wanted = jax.grad(wide)(adapter)
    assert_close(grads, wanted, {"complex64": 1e-4, "float16": 5e-3}.get(dtype, 3e-2))
    if dtype in ("bfloat16", "float16"):
        for grad in jax.tree.leaves(grads):
            more = grad != grad.astype(dtype).astype(grad.dtype)
            assert more.mean() > 0.5


# --- meshes of two axes ---

MESHED = {
    "groups": (Conv((3, 3, 2, 8), (8, 6, 6, 4), 2), P("data")),
    "depthwise": (Conv((3, 3, 1, 4), (8, 6, 6, 4), 4), P("data")),
    "depthwise_multiplier": (Conv((3, 3, 1, 8), (8, 6, 6, 4), 4), P("data")),
    "causal": (Conv((4, 1, 4), (8, 6, 4), 4, [(3, 0)]), P("data")),
    "plain_height": (Conv((3, 3, 4, 8), (8, 8, 6, 4)), P(None, "data")),
    "strided_height": (
        Conv((3, 3, 4, 8), (8, 8, 6, 4), strides=(2, 2)),
        P(None, "data"),
    ),
    "patches_height": (
        Conv((4, 4, 3, 8), (8, 16, 8, 3), padding="VALID", strides=(4, 4)),
        P(None, "data"),
    ),
    "plain_batch": (Conv((3, 3, 4, 8), (8, 6, 6, 4)), P("data")),
    "depthwise_height": (Conv((3, 3, 1, 4), (8, 8, 6, 4), 4), P(None, "data")),
}


def meshes(kind: AxisType) -> list[Any]:
    make = lambda *shape: jax.make_mesh(
        shape, ("data", "model"), (kind,) * 2, devices=jax.devices()[: np.prod(shape)]
    )
    return [make(2, 2), make(2, 4)]


def on_mesh(mesh: Any, conv: Conv, lora: Any, specs: Any, *args: Any) -> Any:
    params, adapter, x = args
    put = lambda value, spec: jax.device_put(value, NamedSharding(mesh, spec))
    params = {"w": put(params["w"], specs["w"])}
    adapter = jax.tree.map(lambda v: put(v, P()), adapter)
    apply = lambda adapter, x: lora.apply(params, adapter, x)
    return derived(apply, adapter, put(x, specs["x"]))


@pytest.mark.parametrize("backward", ["custom", "autodiff"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("name", MESHED)
def test_gradients_on_a_mesh_of_two_axes(name: str, kind: Any, backward: Any) -> None:
    conv, spec = MESHED[name]
    lora, *args = adapted(conv, backward=backward)
    wanted = expected(conv, *args)
    for mesh in meshes(kind):
        with jax.set_mesh(mesh):
            actual = on_mesh(mesh, conv, lora, {"w": P(), "x": spec}, *args)
        assert_close(jax.device_get(actual), jax.device_get(wanted), 1e-4)


OUT = {
    "plain": (
        Conv((3, 3, 4, 8), (4, 6, 6, 4)),
        P("data"),
        P("data", None, None, "model"),
    ),
    "to_whole": (Conv((3, 3, 4, 8), (4, 6, 6, 4)), P("data"), P()),
    "groups": (
        Conv((3, 3, 2, 8), (4, 6, 6, 4), 2),
        P(),
        P("data", None, None, "model"),
    ),
    "depthwise": (
        Conv((3, 3, 1, 4), (4, 6, 6, 4), 4),
        P("data", None, None, "model"),
        P("data", None, None, "model"),
    ),
    "channels": (
        Conv((3, 3, 4, 8), (4, 6, 6, 4)),
        P("data", None, None, "model"),
        P("data"),
    ),
}


@pytest.mark.parametrize("name", OUT)
def test_out_sharding(name: str) -> None:
    """The layout of the output is not copied onto the rank axis.

    JAX has no gradient of the input of a grouped kernel that is sharded.
    """
    conv, x_spec, out = OUT[name]
    _, params, adapter, x = adapted(conv)
    model = lambda params, x: conv(params["w"], x, out)
    lora = jlora.lora(model, jlora.LoraConfig("w", rank=2, alpha=3))
    wanted = expected(conv, params, adapter, x)
    sharded = "model" in str(out) and conv.groups == 1
    column = P(None, None, None, "model") if sharded else P()
    for mesh in meshes(AxisType.Explicit):
        with jax.set_mesh(mesh):
            specs = {"w": column, "x": x_spec}
            actual = on_mesh(mesh, conv, lora, specs, params, adapter, x)
        assert_close(jax.device_get(actual), jax.device_get(wanted), 1e-4)


RAGGED = {
    "columns": (P(), P(None, None, "model"), P(None, "model")),
    "experts": (P(), P("model"), P()),
    "rows": (P("data"), P(), P("data")),
    "rows_and_columns": (P("data"), P(None, None, "model"), P("data", "model")),
    "inputs": (P(), P(None, "model"), P()),
}


@since("jax", "0.10.1", "no ragged product on Explicit meshes at all")
@pytest.mark.parametrize("name", RAGGED)
def test_ragged_products_on_explicit_meshes(name: str) -> None:
    x_spec, w_spec, out = RAGGED[name]
    sizes = jnp.asarray([2, 0, 5, 1])
    ragged = lambda w, x, out=None: lax.ragged_dot(x, w, sizes, out_sharding=out)
    params, x = {"w": normal(0, 4, 12, 16)}, normal(1, 8, 12)
    config = jlora.LoraConfig("w", rank=3, alpha=2)
    plain = jlora.lora(lambda params, x: ragged(params["w"], x), config)
    adapter = plain.init(jax.random.key(2), params, x)
    adapter = jax.tree.map(lambda v: normal(v.size, *v.shape), adapter)
    merged = lambda adapter, x: ragged(jlora.merge(params, adapter)["w"], x)
    wanted = derived(merged, adapter, x)
    for mesh in meshes(AxisType.Explicit):
        with jax.set_mesh(mesh):
            lora = jlora.lora(lambda params, x: ragged(params["w"], x, out), config)
            specs = {"w": w_spec, "x": x_spec}
            actual = on_mesh(mesh, None, lora, specs, params, adapter, x)
        assert_close(jax.device_get(actual), jax.device_get(wanted), 1e-4)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("name", ["groups", "causal", "plain_height"])
def test_moments_of_inputs_on_a_mesh_of_two_axes(name: str, kind: Any) -> None:
    """They are the gradients of probes."""
    conv, spec = MESHED[name]
    lora, params, _, x = adapted(conv)
    wanted = jax.jit(lora.inputs)(params, x)["w"]
    for mesh in meshes(kind):
        put = lambda v, spec, mesh=mesh: jax.device_put(v, NamedSharding(mesh, spec))
        with jax.set_mesh(mesh):
            args = {"w": put(params["w"], P())}, put(x, spec)
            found = jax.jit(lora.inputs)(*args)["w"]
        assert_close(jax.device_get(found.moment), jax.device_get(wanted.moment), 1e-4)
        assert_close(jax.device_get(found.rows), jax.device_get(wanted.rows), 0.0)


def test_why() -> None:
    """JAX's gradient of a grouped kernel is multiplied by the size of the other axis.

    Where this fails, XLA is mended: say so in the documentation.
    """
    conv, spec = MESHED["groups"]
    w, x = normal(0, *conv.kernel), normal(1, *conv.x)
    grad = jax.jit(jax.grad(lambda w, x: jnp.sin(conv(w, x)).sum()))
    for mesh in meshes(AxisType.Auto):
        put = lambda v, spec, mesh=mesh: jax.device_put(v, NamedSharding(mesh, spec))
        meshed = jax.device_get(grad(put(w, P()), put(x, spec)))
        times = mesh.shape["model"]
        assert_close(meshed, jax.device_get(times * grad(w, x)), 1e-4)
