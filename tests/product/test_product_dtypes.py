"""Complex activations, eight-bit products, and cotangents beyond the operands' range.

The reference forms `W + s·a·b` in the test itself.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from oracle import relative_error
from releases import is_before

import jlora
from jlora._jax.dtypes import product_dtype

RANK, ALPHA = 2, 3.0
HALF, F16, F8, E5 = jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2
pytestmark = [pytest.mark.usefixtures("fast_compile")]
if is_before("jax", "0.10"):
    # JAX's own derivative of a real kernel among complex values warns there.
    pytestmark += [pytest.mark.filterwarnings("ignore:Casting complex values to real")]


@dataclasses.dataclass(frozen=True)
class Program:
    """A function of kernels and one input, and how `a·b` is laid out as each kernel."""

    fn: Callable[[Any, Any], Any]
    x: tuple[int, ...]
    kernels: dict[str, tuple[tuple[int, ...], str]]


def one(fn: Callable[..., Any], x: tuple[int, ...], w: tuple[int, ...], delta: str):
    """A program with the single kernel `w`."""
    return Program(lambda p, x: fn(p["w"], x), x, {"w": (w, delta)})


def _conv(w, x, **settings):
    return lax.conv_general_dilated(
        x,
        w.astype(x.dtype),
        (1,),
        "SAME",
        dimension_numbers=("NWC", "WIO", "NWC"),
        **settings,
    )


def _fourier(w, x):
    return jnp.fft.irfft(jnp.fft.rfft(x.real, axis=0) @ w, axis=0)


PHASE = jnp.exp(1j * jnp.arange(7.0)).astype(jnp.complex64)
OF_MATRIX = "ir,ro->io"
COMPLEX = {
    "matmul": one(lambda w, x: x @ w, (4, 5), (5, 7), OF_MATRIX),
    "left": one(lambda w, x: w @ x, (5, 4), (7, 5), "ir,ro->oi"),
    "transposed": one(lambda w, x: x @ w.T, (4, 5), (7, 5), "ir,ro->oi"),
    "fourier": one(_fourier, (6, 5), (5, 7), OF_MATRIX),
    "cast": one(lambda w, x: x @ w.astype(x.dtype), (4, 5), (5, 7), OF_MATRIX),
    "real_input": one(
        lambda w, x: x.real @ w.astype(x.dtype), (4, 5), (5, 7), OF_MATRIX
    ),
    "complex_scale": one(lambda w, x: x @ (w * (1 - 2j)), (4, 5), (5, 7), OF_MATRIX),
    "phase_out": one(lambda w, x: x @ (w * PHASE[None]), (4, 5), (5, 7), OF_MATRIX),
    "phase_in": one(
        lambda w, x: x.real @ (w * PHASE[:5, None]), (4, 5), (5, 7), OF_MATRIX
    ),
    "batched": one(
        lambda w, x: jnp.einsum("ebi,eio->ebo", x, w),
        (3, 4, 5),
        (3, 5, 7),
        "eir,ero->eio",
    ),
    "two_input_axes": one(
        lambda w, x: jnp.einsum("bhd,hdo->bo", x, w),
        (4, 3, 5),
        (3, 5, 7),
        "hdr,ro->hdo",
    ),
    "part_of_both": one(
        lambda w, x: (
            jnp.einsum("bhd,hdo->bo", x, w)
            + jnp.einsum("bd,hdo->bho", x[:, 0], w).prod(1)
        ),
        (4, 3, 5),
        (3, 5, 7),
        "hdr,ro->hdo",
    ),
    "siblings": Program(
        lambda p, x: (x @ p["q"]) * (x @ p["k"]),
        (4, 5),
        {"q": ((5, 7), OF_MATRIX), "k": ((5, 7), OF_MATRIX)},
    ),
    "joined": Program(
        lambda p, x: x @ jnp.concatenate([p["q"], 2 * p["k"]], axis=1),
        (4, 5),
        {"q": ((5, 7), OF_MATRIX), "k": ((5, 3), OF_MATRIX)},
    ),
    "conv": one(_conv, (2, 9, 5), (3, 5, 7), "kir,ro->kio"),
    "conv_depthwise": one(
        lambda w, x: _conv(w, x, feature_group_count=5),
        (2, 9, 5),
        (3, 1, 5),
        "kir,ro->kio",
    ),
    "ragged": one(
        lambda w, x: lax.ragged_dot(x, w.astype(x.dtype), jnp.array([1, 4])),
        (5, 3),
        (2, 3, 7),
        "eir,ero->eio",
    ),
    "lookup": one(
        lambda w, x: x * jnp.take(w, jnp.array([0, 5, 2]), axis=0) * PHASE[:3, None],
        (3, 7),
        (6, 7),
        OF_MATRIX,
    ),
    "lookup_of_cast": one(
        lambda w, x: x * (w * PHASE[None])[jnp.array([0, 5, 2])],
        (3, 7),
        (6, 7),
        OF_MATRIX,
    ),
}


def normal(rng: np.random.Generator, *shape: int, dtype: Any = jnp.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)


def prepared(program: Program, dtype: Any = jnp.float32, **settings: Any):
    """Returns the adapted function, params, a random adapter and a random input."""
    rng = np.random.default_rng(1)
    given = settings.pop("config", {})
    config = jlora.LoraConfig(list(program.kernels), rank=RANK, alpha=ALPHA, **given)
    params = {n: normal(rng, *w, dtype=dtype) for n, (w, _) in program.kernels.items()}
    x = normal(rng, *program.x) + 1j * normal(rng, *program.x)
    lora = jlora.lora(program.fn, config, **settings)
    adapter = lora.init(jax.random.key(0), params, x)
    random = lambda v: normal(rng, *v.shape, dtype=v.dtype)
    adapter = {
        path: dataclasses.replace(entry, a=random(entry.a), b=random(entry.b))
        for path, entry in adapter.items()
    }
    return lora, params, adapter, x


def merged(program: Program, params: Any, adapter: Any) -> Any:
    """Returns the kernels with their deltas."""
    new = {}
    for name, (_, laid_out) in program.kernels.items():
        e = adapter[name]
        change = jnp.einsum(laid_out, e.a, e.b, precision="highest")
        new[name] = params[name] + ALPHA / RANK * change
        if e.magnitude is not None:
            norm = jnp.sqrt(jnp.sum(new[name] ** 2, e.axes.in_))
            fixed = e.magnitude / lax.stop_gradient(norm)
            new[name] = new[name] * jnp.expand_dims(fixed, e.axes.in_)
    return new


def real_loss(y: Any) -> jax.Array:
    """A real loss that tells both parts of a complex value apart."""
    weights = 0.5 + jnp.arange(y.size, dtype=jnp.float32).reshape(y.shape) / y.size
    return jnp.sum(weights * (jnp.abs(y) ** 2 + jnp.real(y) - 3 * jnp.imag(y)))


def plain(fn: Callable[..., Any]) -> Callable[..., Any]:
    return fn


def scanned(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda p, x: lax.scan(
        lambda n, x: (n + 1, fn(p, x)), 0, jnp.stack([x, 2j * x])
    )[1]


def mapped(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda p, x: jax.vmap(fn, (None, 0))(p, jnp.stack([x, 2j * x]))


WRAPPERS = {
    "plain": plain,
    "remat": jax.checkpoint,
    "scan": scanned,
    "vmap": mapped,
    "scan_of_remat": lambda fn: scanned(jax.checkpoint(fn)),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "custom": {},
    "merged": {"contraction": "merged"},
    "autodiff": {"backward": "autodiff"},
    "dora": {"config": {"dora": True}},
}


def check(program: Program, like: Callable[..., Any] | None = None, **settings: Any):
    """Values and gradients of adapter, input and params are those of the sum.

    The sum is taken by the program itself, or by one that is like it.
    """
    lora, params, adapter, x = prepared(program, **settings)
    fn = like or program.fn
    mine = lambda p, a, x: real_loss(lora.apply(p, a, x))
    formed = lambda p, a, x: real_loss(fn(merged(program, p, a), x))
    whole = jax.jit(lora.apply)(params, adapter, x)
    wanted = jax.jit(lambda p, a, x: fn(merged(program, p, a), x))
    compare(whole, wanted(params, adapter, x), "output")
    grad = lambda f: jax.jit(jax.grad(f, (0, 1, 2)))(params, adapter, x)
    for name, got, want in zip(
        ("params", "adapter", "x"), grad(mine), grad(formed), strict=True
    ):
        jax.tree.map(lambda g, w, name=name: compare(g, w, name), got, want)


def compare(got: Any, want: Any, name: str, rtol: float = 2e-4) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype), name
    for part in (np.real, np.imag):
        assert relative_error(part(got), part(want)) < rtol, name


@pytest.mark.parametrize("name", COMPLEX)
@pytest.mark.parametrize("setting", SETTINGS)
def test_complex_activations(name: str, setting: str):
    if setting == "dora" and name == "conv_depthwise":
        pytest.skip("rank 2 of one value for each channel")
    check(COMPLEX[name], **SETTINGS[setting])


@pytest.mark.parametrize("wrapper", list(WRAPPERS)[1:])
@pytest.mark.parametrize("name", ["fourier", "siblings", "part_of_both", "conv"])
def test_complex_activations_inside(name: str, wrapper: str):
    program = COMPLEX[name]
    check(dataclasses.replace(program, fn=WRAPPERS[wrapper](program.fn)))


@pytest.mark.parametrize("equation", ["ni,io->no", "ni,io->on", "nb,ab->an"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_real_result_of_complex_activations(equation: str, setting: str):
    """The real part; JAX's own gradient of it lacks the imaginary part (findings/)."""
    *_, kernel = equation.partition("->")[0].split(",")
    sizes = (5, 7) if kernel == "io" else (7, 5)
    laid_out = OF_MATRIX if kernel == "io" else "ir,ro->oi"
    ask = lambda w, x: jnp.einsum(equation, x, w, preferred_element_type=jnp.float32)
    real = lambda p, x: jnp.real(jnp.einsum(equation, x, p["w"]))
    program = one(ask, (4, 5), sizes, laid_out)
    check(program, real, **SETTINGS[setting])


@pytest.mark.parametrize("name", ["matmul", "batched", "part_of_both", "conv"])
def test_complex_activations_with_dropout(name: str):
    """Against autodiff of the same forward pass."""
    grads = []
    for backward in ("custom", "autodiff"):
        settings = {"backward": backward, "config": {"dropout": 0.4}}
        lora, params, adapter, x = prepared(COMPLEX[name], **settings)
        loss = lambda a, x, lora=lora, params=params: real_loss(
            lora.apply(params, a, x, lora_dropout_key=jax.random.key(3))
        )
        grads.append(jax.jit(jax.grad(loss, (0, 1)))(adapter, x))
    jax.tree.map(lambda g, w: compare(g, w, name), *grads)


def test_complex_inputs_are_measured():
    """The second moment of a complex input is the real part of xᴴ·x."""
    lora, params, _, x = prepared(COMPLEX["matmul"])
    want = np.real(np.conj(x).T @ x)
    assert relative_error(lora.inputs(params, x)["w"].moment, want) < 1e-5


# --- eight bits, and half precision beside a float32 result ---


def product(x_dtype: Any, result: Any) -> Callable[..., Any]:
    dims = (((1,), (0,)), ((), ()))
    return lambda p, x: lax.dot_general(
        x.astype(x_dtype), p["w"], dims, preferred_element_type=result
    )


# Kinds of input, kernel and result, and the dtype of the skinny products.
KINDS = {
    "both eight bits": (F8, F8, jnp.float32, jnp.float32),
    "both eight bits, half result": (F8, F8, HALF, HALF),
    "two kinds of eight bits": (E5, F8, jnp.float32, jnp.float32),
    "eight-bit result": (F8, F8, F8, HALF),
    "eight-bit kernel": (HALF, F8, HALF, HALF),
    "eight-bit input": (F8, HALF, HALF, HALF),
    "eight-bit input, wide kernel": (F8, jnp.float32, jnp.float32, jnp.float32),
    "integer input": (jnp.int8, jnp.float32, jnp.float32, jnp.float32),
    "integer input, half kernel": (jnp.int8, HALF, HALF, HALF),
    "float16, wide result": (F16, F16, jnp.float32, jnp.float32),
    "bfloat16, wide result": (HALF, HALF, jnp.float32, HALF),
    "bfloat16": (HALF, HALF, HALF, HALF),
    "mixed halves": (F16, HALF, jnp.float32, jnp.float32),
}
ROUNDED = {jnp.float32: 1e-5, HALF: 2e-2, F8: 1e-1}


@pytest.mark.parametrize("kind", KINDS)
def test_the_dtype_of_skinny_products(kind: str):
    x, w, result, wanted = KINDS[kind]
    assert product_dtype(x, w, result) == wanted


def narrow_case(kind: str, **settings: Any):
    x_dtype, w_dtype, result, _ = KINDS[kind]
    rng = np.random.default_rng(0)
    fn = product(x_dtype, result)
    params = {"w": (0.1 * normal(rng, 64, 32)).astype(w_dtype)}
    x = normal(rng, 5, 64) * (20 if x_dtype == jnp.int8 else 1)
    given = settings.pop("config", {})
    lora = jlora.lora(fn, jlora.LoraConfig("w", rank=4, alpha=8.0, **given), **settings)
    adapter = lora.init(jax.random.key(0), params, x)
    adapter = jax.tree.map(lambda v: 0.1 * normal(rng, *v.shape), adapter)

    def apart(adapter: Any) -> jax.Array:
        e, seen = adapter["w"], x.astype(x_dtype).astype(jnp.float32)
        y = fn(params, x).astype(jnp.float32)
        total = y + 2.0 * jnp.dot(seen @ e.a, e.b, precision="highest")
        return total.astype(result)

    return lora, params, adapter, x, apart


@pytest.mark.parametrize("backward", ["custom", "autodiff"])
@pytest.mark.parametrize("kind", KINDS)
def test_narrow_products(kind: str, backward: Any):
    lora, params, adapter, x, apart = narrow_case(kind, backward=backward)
    *_, result, computed = KINDS[kind]
    rtol = max(ROUNDED[result], ROUNDED[computed])
    y = lora.apply(params, adapter, x)
    assert y.dtype == result
    assert relative_error(y, apart(adapter)) < rtol
    # What an optimizer sees at a loss that was averaged over many tokens.
    small = 1.0 if result == F8 else 1e-5
    weights = small * jax.random.normal(jax.random.key(1), y.shape)
    grad = lambda f: jax.grad(lambda a: jnp.sum(f(a).astype(jnp.float32) * weights))
    got = grad(lambda a: lora.apply(params, a, x))(adapter)["w"]
    want = grad(apart)(adapter)["w"]
    assert relative_error(got.a / small, want.a / small) < 2 * rtol
    assert relative_error(got.b / small, want.b / small) < 2 * rtol


@pytest.mark.parametrize("kind", ["both eight bits", "integer input"])
def test_narrow_inputs_with_dropout(kind: str):
    """The kept inputs are divided by their share in no dtype of eight bits."""
    lora, params, adapter, x, apart = narrow_case(kind, config={"dropout": 0.25})
    keys = jax.random.split(jax.random.key(2), 2000)
    dropped = lambda a: jax.vmap(
        lambda k: lora.apply(params, a, x, lora_dropout_key=k)
    )(keys).mean(0)
    change = apart(adapter) - apart(jax.tree.map(jnp.zeros_like, adapter))
    base = apart(jax.tree.map(jnp.zeros_like, adapter))
    assert relative_error(jax.jit(dropped)(adapter) - base, change) < 0.06
    grads = jax.jit(jax.grad(lambda a: dropped(a).sum()))(adapter)
    want = jax.grad(lambda a: apart(a).sum())(adapter)
    jax.tree.map(lambda g, w: compare(g, w, kind, 0.06), grads, want)


@pytest.mark.parametrize("kind", ["both eight bits", "eight-bit result"])
def test_the_gradient_of_a_narrow_input(kind: str):
    """It is rounded once, though it is a sum."""
    x_dtype, *_ = KINDS[kind]
    lora, params, adapter, x, _ = narrow_case(kind)
    narrow = x.astype(x_dtype)
    weights = jax.random.normal(jax.random.key(1), (5, 32))
    loss = lambda x: jnp.sum(lora.apply(params, adapter, x).astype("float32") * weights)
    got = jax.grad(loss)(narrow)
    e = adapter["w"]
    w = params["w"].astype(jnp.float32) + 2.0 * e.a @ e.b
    assert got.dtype == x_dtype
    assert relative_error(got, weights @ w.T) < 0.07


def test_default_products_are_not_cast():
    """In bfloat16 and in float32 no operand of a product is widened on its way."""
    for dtype in (HALF, jnp.float32):
        fn = lambda p, x: x @ p["w"]
        lora = jlora.lora(fn, jlora.LoraConfig("w", rank=4))
        params = {"w": jax.ShapeDtypeStruct((64, 32), dtype)}
        x = jax.ShapeDtypeStruct((5, 64), dtype)
        adapter = jax.eval_shape(lora.init, jax.random.key(0), params, x)
        program = jax.make_jaxpr(lora.apply)(params, adapter, x)
        assert str(program).count("dot_general") == 3
        assert f"preferred_element_type={jnp.dtype(dtype).name}" in str(program)
        assert str(program).count("convert_element_type") == 2 * (dtype == HALF)
