"""PiSSA, MiLoRA, OLoRA and LoftQ against NumPy in float64, slice by slice.

The kernels of one model: a dense one, one with heads, one whose axes are (out, in), a
convolution, a scanned stack whose axes are not in order, experts, and a leaf that is
trained whole.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora

Key = Callable[[], jax.Array]
Tree = dict[str, Any]
Array = np.ndarray
RANK, ALPHA = 2, 5.0
SCALING = ALPHA / RANK
# Of each kernel: its shape, and its axes as (batch, in, out).
KERNELS: dict[str, tuple[tuple[int, ...], Any]] = {
    "dense": ((5, 7), ((), (0,), (1,))),
    "heads": ((5, 3, 4), ((), (0,), (1, 2))),
    "left": ((9, 5), ((), (1,), (0,))),
    "conv": ((3, 2, 6), ((), (0, 1), (2,))),
    "stack": ((8, 3, 5), ((1,), (0,), (2,))),
    "experts": ((4, 5, 6), ((0,), (1,), (2,))),
}


@pytest.fixture(autouse=True)
def _fast(fast_compile: None) -> None:
    """Much is compiled here and little run."""


def model(params: Tree, x: jax.Array) -> Tree:
    """Uses each kernel in its way; `x` is (batch, 5)."""
    signal = x[:, :4, None] * jnp.ones((1, 1, 2), x.dtype)
    numbers = ("NWC", "WIO", "NWC")
    layers = jnp.moveaxis(params["stack"], 1, 0)
    step = lambda h, w: (h + jnp.tanh(h @ w) @ w.T, None)
    wide = jnp.concatenate([x, x[:, :3]], axis=1)
    return {
        "dense": x @ params["dense"],
        "heads": jnp.einsum("bi,ihd->bhd", x, params["heads"]) + params["bias"][None],
        "left": params["left"] @ x.T,
        "conv": jax.lax.conv_general_dilated(
            signal, params["conv"], (1,), "SAME", dimension_numbers=numbers
        ),
        "stack": jax.lax.scan(step, wide, layers)[0],
        "experts": jnp.einsum("ebi,eio->ebo", jnp.stack([x] * 4), params["experts"]),
    }


@functools.cache
def make(dtype: Any = jnp.float32) -> tuple[jlora.Lora, Tree, Tree, jax.Array]:
    """The adapted model, params, a new adapter and an input; the same at each call."""
    keys = jax.random.split(jax.random.key(7), len(KERNELS) + 2)
    params = {
        name: jax.random.normal(key, shape, dtype)
        for key, (name, (shape, _)) in zip(keys, KERNELS.items(), strict=False)
    }
    params["bias"] = jnp.ones((3, 4), dtype)
    x = jax.random.normal(keys[-1], (4, 5), dtype)
    configs = [
        jlora.LoraConfig("bias", full=True),
        jlora.LoraConfig(rank=RANK, alpha=ALPHA),
    ]
    lora = jlora.lora(model, configs)
    return lora, params, lora.init(keys[-2], params, x), x


def matrices(kernel: Any, axes: Any) -> Array:
    """A kernel as (slices, in, out) in float64, by another way than the package's."""
    batch, in_, out = axes
    kernel = np.asarray(kernel, np.float64)
    moved = kernel.transpose(*batch, *in_, *out)
    slices = int(np.prod([kernel.shape[i] for i in batch], initial=1))
    n_in = int(np.prod([kernel.shape[i] for i in in_]))
    return moved.reshape(slices, n_in, -1)


def factors(entry: Any) -> tuple[Array, Array]:
    """Both factors as (slices, in, rank) and (slices, rank, out)."""
    n, rank = len(entry.axes.batch), entry.a.shape[-1]
    a, b = np.asarray(entry.a, np.float64), np.asarray(entry.b, np.float64)
    slices = int(np.prod(a.shape[:n], initial=1))
    return a.reshape(slices, -1, rank), b.reshape(slices, rank, -1)


Reference = Callable[[Array], Array]


def principal(w: Array) -> Array:
    """The best approximation of the rank."""
    u, s, vt = np.linalg.svd(w)
    return (u[:, :RANK] * s[:RANK]) @ vt[:RANK]


def minor(w: Array) -> Array:
    """The part of the smallest singular values."""
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return (u[:, -RANK:] * s[-RANK:]) @ vt[-RANK:]


def orthonormal(w: Array) -> Array:
    """The first columns and rows of the QR decomposition of torch's weight, scaled."""
    q, r = np.linalg.qr(w.T)
    return SCALING * (q[:, :RANK] @ r[:RANK]).T


def fast(params: Tree, adapter: Tree) -> tuple[Tree, Tree]:
    """PiSSA by a randomized decomposition."""
    return jlora.pissa(params, adapter, method="fast", n_iter=8, key=jax.random.key(3))


MOVES: dict[str, tuple[Any, Reference]] = {
    "pissa": (jlora.pissa, principal),
    "pissa_fast": (fast, principal),
    "milora": (jlora.milora, minor),
    "olora": (jlora.olora, orthonormal),
}
each_move = pytest.mark.parametrize("name", MOVES)
slow = lambda name: pytest.param(name, marks=pytest.mark.slow)
# What is the same code for all of them is run for all of them once.
most_moves = pytest.mark.parametrize(
    "name", ["pissa", slow("pissa_fast"), slow("milora"), slow("olora")]
)


@functools.cache
def done(name: str) -> tuple[Tree, Tree]:
    """What an initialiser makes of the params and the adapter of `make`."""
    _, params, adapter, _ = make()
    return MOVES[name][0](params, adapter)


# what the factors are


@each_move
def test_delta_is_the_reference_in_each_slice(name: str) -> None:
    _, reference = MOVES[name]
    _, params, _adapter, _ = make()
    _, moved = done(name)
    for path, (_, axes) in KERNELS.items():
        expected = np.stack([reference(w) for w in matrices(params[path], axes)])
        a, b = factors(moved[path])
        atol = 2e-3 if name == "pissa_fast" else 1e-5
        np.testing.assert_allclose(SCALING * a @ b, expected, atol=atol, err_msg=path)


@pytest.mark.parametrize("name", ["pissa", "milora"])
def test_singular_values_are_shared_between_both_factors(name: str) -> None:
    _move, _ = MOVES[name]
    _, params, _adapter, _ = make()
    _, moved = done(name)
    part = slice(None, RANK) if name == "pissa" else slice(-RANK, None)
    for path, (_, axes) in KERNELS.items():
        a, b = factors(moved[path])
        w = matrices(params[path], axes)
        s = np.linalg.svd(w, compute_uv=False)[:, part] / SCALING
        gram = s[:, :, None] * np.eye(RANK)
        np.testing.assert_allclose(a.transpose(0, 2, 1) @ a, gram, atol=1e-5)
        np.testing.assert_allclose(b @ b.transpose(0, 2, 1), gram, atol=1e-5)


def test_the_b_of_olora_is_orthonormal() -> None:
    _, moved = done("olora")
    for path in KERNELS:
        _, b = factors(moved[path])
        eye = np.broadcast_to(np.eye(RANK), (len(b), RANK, RANK))
        np.testing.assert_allclose(b @ b.transpose(0, 2, 1), eye, atol=1e-6)


# what stays


@each_move
def test_the_output_is_that_of_before(name: str) -> None:
    _move, _ = MOVES[name]
    lora, params, adapter, x = make()
    rest, moved = done(name)
    assert all((rest[path] != params[path]).any() for path in KERNELS)
    assert rest["bias"] is params["bias"] and moved["bias"] is adapter["bias"]
    close = lambda x, y: np.testing.assert_allclose(x, y, atol=5e-5)
    jax.tree.map(close, lora.apply(rest, moved, x), model(params, x))
    jax.tree.map(close, jlora.merge(rest, moved), params)


@each_move
def test_both_factors_have_a_gradient(name: str) -> None:
    _move, _ = MOVES[name]
    lora, _params, _adapter, x = make()
    rest, moved = done(name)
    loss = lambda adapter: sum(
        (y**2).sum() for y in jax.tree.leaves(lora.apply(rest, adapter, x))
    )
    grads = jax.grad(loss)(moved)
    assert all(grads[path].a.any() and grads[path].b.any() for path in KERNELS)


@most_moves
def test_structure_dtypes_and_statics_stay(name: str) -> None:
    move, _ = MOVES[name]
    _, params, adapter, _ = make()
    half = jax.tree.map(lambda v: v.astype(jnp.bfloat16), params)
    for base in (params, half):
        rest, moved = done(name) if base is params else move(base, adapter)
        like = lambda tree: jax.tree.map(lambda v: (v.shape, v.dtype), tree)
        assert like(rest) == like(base)
        assert like(moved) == like(adapter)  # axes and scaling are in the structure


@most_moves
def test_under_jit_and_on_shapes(name: str) -> None:
    move, _ = MOVES[name]
    _, params, adapter, _ = make()
    plain = done(name)
    jitted = jax.jit(move)(params, adapter)
    # Signs of singular vectors may differ between programs; ΔW and W − ΔW do not.
    change = lambda adapter: {p: jlora.delta(adapter[p]) for p in KERNELS}
    close = lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5)
    jax.tree.map(close, jitted[0], plain[0])
    jax.tree.map(close, change(jitted[1]), change(plain[1]))
    shapes = jax.eval_shape(move, params, adapter)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, plain)


def test_the_residual_is_rounded_once(getkey: Key) -> None:
    """In bfloat16: the new kernel is the nearest to `W − ΔW` of the kept factors."""
    for dtype in (jnp.float32, jnp.bfloat16):
        config = jlora.LoraConfig("w", rank=RANK, alpha=ALPHA, dtype=dtype)
        lora = jlora.lora(lambda p, x: x @ p["w"], config)
        params = {"w": jax.random.normal(getkey(), (60, 70), jnp.bfloat16)}
        adapter = lora.init(getkey(), params, jnp.ones((2, 60), jnp.bfloat16))
        rest, moved = jlora.pissa(params, adapter)
        assert moved["w"].a.dtype == dtype
        a, b = (v[0] for v in factors(moved["w"]))
        exact = np.asarray(params["w"], np.float64) - SCALING * a @ b
        error = np.abs(np.asarray(rest["w"], np.float64) - exact)
        assert (error <= 2.0**-8 * np.abs(exact) * 1.01 + 1e-6).all()
        nearest = jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16)
        assert (np.asarray(rest["w"]) == np.asarray(nearest)).mean() > 0.99


def test_a_kernel_of_low_rank_leaves_factors_that_learn(getkey: Key) -> None:
    """Where singular values are zero `a` is as in a new adapter and `b` is zero."""
    u, v = jax.random.normal(getkey(), (6, 1)), jax.random.normal(getkey(), (1, 9))
    lora = jlora.lora(
        lambda p, x: x @ p["thin"] @ p["zero"],
        jlora.LoraConfig(rank=RANK, alpha=ALPHA),
    )
    params = {"thin": u @ v, "zero": jnp.zeros((9, 5))}
    adapter = lora.init(getkey(), params, jnp.ones((2, 6)))
    for move in (jlora.pissa, jlora.milora):
        _, moved = move(params, adapter)
        assert (moved["zero"].a == adapter["zero"].a).all()
        assert not moved["zero"].b.any()
    _, moved = jlora.pissa(params, adapter)
    assert (moved["thin"].a[:, 1] == adapter["thin"].a[:, 1]).all()
    assert moved["thin"].b[0].any() and not moved["thin"].b[1].any()
    _, moved = jlora.milora(params, adapter)
    assert (moved["thin"].a == adapter["thin"].a).all()


def test_fast_pissa_finds_the_largest_of_a_large_kernel(getkey: Key) -> None:
    w = jax.random.normal(getkey(), (150, 130))
    lora = jlora.lora(lambda p, x: x @ p["w"], jlora.LoraConfig("w", rank=8))
    adapter = lora.init(getkey(), {"w": w}, jnp.ones((2, 150)))
    best = np.linalg.svd(np.asarray(w, np.float64), compute_uv=False)
    for n_iter, worst in ((0, 0.06), (4, 0.01), (16, 1e-3)):
        rest, _ = jlora.pissa(
            {"w": w}, adapter, method="fast", n_iter=n_iter, key=getkey()
        )
        left = np.linalg.norm(rest["w"]) / np.sqrt((best[8:] ** 2).sum())
        assert 1 - 1e-5 <= left <= 1 + worst


def test_fast_pissa_draws_by_path(getkey: Key) -> None:
    _lora, params, adapter, _ = make()
    key = getkey()
    run = lambda adapter: jlora.pissa(
        params, adapter, method="fast", n_iter=1, key=key
    )[1]
    alone = run({"dense": adapter["dense"]})["dense"]
    assert (alone.a == run(adapter)["dense"].a).all()


# LoftQ


def rounded(step: float) -> Callable[[Any], Any]:
    """Values rounded to multiples of a step."""
    return lambda w: (w / step).round() * step


def test_loftq_is_its_alternation_in_numpy() -> None:
    _, params, adapter, _ = make()
    quantize = rounded(0.5)
    for steps in (1, 3):
        base, moved = jlora.loftq(params, adapter, quantize=quantize, steps=steps)
        for path, (_, axes) in KERNELS.items():
            a, b = factors(moved[path])
            q = matrices(base[path], axes)
            for i, w in enumerate(matrices(params[path], axes)):
                low = np.zeros_like(w)
                for _ in range(steps):
                    wanted = quantize(w - low)
                    low = principal(w - wanted)
                np.testing.assert_allclose(q[i], wanted, atol=1e-6, err_msg=path)
                got = SCALING * a[i] @ b[i]
                np.testing.assert_allclose(got, low, atol=1e-5, err_msg=path)


def test_loftq_is_nearer_to_the_kernel_than_rounding() -> None:
    _, params, adapter, _ = make()
    base, moved = jlora.loftq(params, adapter, quantize=rounded(0.5))
    merged = jlora.merge(base, moved)
    for path in KERNELS:
        plain = np.linalg.norm(params[path] - rounded(0.5)(params[path]))
        assert np.linalg.norm(params[path] - merged[path]) < 0.9 * plain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """Whole numbers and a step."""

    values: jax.Array
    step: jax.Array


def test_loftq_with_quantised_arrays() -> None:
    _, params, adapter, _ = make(jnp.bfloat16)
    quantize = lambda w: Quantised((w / 0.5).round().astype(jnp.int8), jnp.float32(0.5))
    dequantize = lambda q: q.values * q.step
    base, moved = jlora.loftq(
        params, adapter, quantize=quantize, dequantize=dequantize, steps=2
    )
    plain, same = jlora.loftq(params, adapter, quantize=rounded(0.5), steps=2)
    for path in KERNELS:
        assert isinstance(base[path], Quantised)
        np.testing.assert_array_equal(dequantize(base[path]), plain[path])
        assert plain[path].dtype == jnp.bfloat16
        np.testing.assert_array_equal(moved[path].b, same[path].b)
    assert base["bias"] is params["bias"]


def test_loftq_says_what_it_cannot_read() -> None:
    _, params, adapter, _ = make()
    adapter = {"dense": adapter["dense"]}
    with pytest.raises(TypeError, match=r"'dense' is a tuple.*dequantize"):
        jlora.loftq(params, adapter, quantize=lambda w: (w, 1.0))
    with pytest.raises(ValueError, match=r"'dense'.*\(35,\).*\(5, 7\)"):
        jlora.loftq(params, adapter, quantize=lambda w: w.ravel())
    with pytest.raises(ValueError, match=r"`steps`.*0"):
        jlora.loftq(params, adapter, quantize=lambda w: w, steps=0)


# errors


def test_bad_arguments_are_named(getkey: Key) -> None:
    _, params, adapter, _ = make()
    with pytest.raises(ValueError, match=r"`method`.*'slow'"):
        jlora.pissa(params, adapter, method="slow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give a `key`"):
        jlora.pissa(params, adapter, method="fast")
    with pytest.raises(ValueError, match=r"`n_iter`.*-1"):
        jlora.pissa(params, adapter, method="fast", n_iter=-1, key=getkey())


@each_move
def test_entries_that_do_not_fit_are_named(name: str) -> None:
    move, _ = MOVES[name]
    _, params, adapter, _ = make()
    with pytest.raises(jlora.AdapterError, match="'nowhere' is no path"):
        move(params, {"nowhere": adapter["dense"]})
    wide = {
        path: dataclasses.replace(
            adapter[path],
            a=jnp.ones((*adapter[path].a.shape[:-1], 6)),
            b=jnp.ones((6, *adapter[path].b.shape[1:])),
        )
        for path in ("dense", "left", "conv")
    }
    with pytest.raises(jlora.AdapterError) as error:
        move(params, wide)
    text = str(error.value)
    assert "'dense' maps 5 to 7 and has a rank of 6" in text and "'left'" in text
    assert "conv" not in text
    shapes = {path: jax.typeof(v) for path, v in params.items()}
    shapes = {p: jax.ShapeDtypeStruct(v.shape, v.dtype) for p, v in shapes.items()}
    with pytest.raises(jlora.AdapterError, match=r"'dense' is a shape.*eval_shape"):
        move(shapes, adapter)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _More(jlora.LoraFactors):
    """Factors with something else beside them."""


@each_move
def test_entries_that_are_more_than_two_factors_are_refused(name: str) -> None:
    move, _ = MOVES[name]
    _, params, adapter, _ = make()
    old = adapter["dense"]
    more = {**adapter, "dense": _More(old.a, old.b, old.axes, old.scaling)}
    with pytest.raises(jlora.UnsupportedFeatureError, match=r"\['dense'\]"):
        move(params, more)


# where things live


@most_moves
def test_numpy_params_stay_numpy(name: str) -> None:
    move, _ = MOVES[name]
    _, params, adapter, _ = make()
    rest, _ = move(jax.tree.map(np.asarray, params), adapter)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(rest))
    close = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5)
    jax.tree.map(close, rest, done(name)[0])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@most_moves
def test_shardings_stay(name: str, kind: Any, getkey: Key) -> None:
    move, _ = MOVES[name]
    mesh = jax.make_mesh((2, 2), ("x", "y"), (kind, kind))
    lora = jlora.lora(
        lambda p, x: jnp.einsum("lbi,lio->lbo", x, p["w"]),
        jlora.LoraConfig("w", rank=RANK, alpha=ALPHA),
    )
    params = {"w": jax.random.normal(getkey(), (2, 4, 6))}
    adapter = lora.init(getkey(), params, jnp.ones((2, 3, 4)))
    rest, moved = move(params, adapter)
    place = NamedSharding(mesh, P("x", None, "y"))
    sharded = {"w": jax.device_put(params["w"], place)}
    for given in (adapter, jax.device_put(adapter, jlora.shardings(sharded, adapter))):
        there, entries = move(sharded, given)
        assert there["w"].sharding.is_equivalent_to(place, 3)
        assert entries["w"].b.sharding.is_equivalent_to(place, 3)
        assert len(entries["w"].a.sharding.device_set) == 4
        np.testing.assert_allclose(there["w"], rest["w"], atol=1e-5)
        change = jlora.delta(jax.device_get(entries["w"]))
        np.testing.assert_allclose(change, jlora.delta(moved["w"]), atol=1e-5)
    jitted, _ = jax.jit(move)(sharded, given)
    np.testing.assert_allclose(jitted["w"], rest["w"], atol=1e-5)
