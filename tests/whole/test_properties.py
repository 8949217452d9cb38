"""Laws that hold for all shapes, axes and layouts; the oracles are NumPy einsums."""

import dataclasses
import re
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factored import factored_kernels, factors_of, normal, subset
from hypothesis import Phase, given, settings
from jax import lax
from jax.tree_util import keystr
from oracle import assert_close

import jlora
from jlora import LoraConfig

pytestmark = pytest.mark.usefixtures("fast_compile")
# Examples are small as they are, and each one compiles: nothing is shrunk.
profile = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
)
fewer = settings(profile, max_examples=20)

ALPHA = 3.0
sizes = st.integers(2, 5)
flags = st.booleans()
seeds = st.integers(0, 2**31)


def adapted(
    fn: Any, w: np.ndarray, x: np.ndarray, rank: int
) -> tuple[jlora.Lora, jlora.LoraFactors]:
    """The transform of `fn(params, x)`, and factors that are nowhere zero."""
    lora = jlora.lora(fn, LoraConfig("w", rank=rank, alpha=ALPHA))
    factors = lora.init(jax.random.key(0), {"w": w}, x)["w"]
    (b,) = normal(1, factors.b.shape)
    return lora, dataclasses.replace(factors, b=jnp.asarray(b))


def run(
    lora: jlora.Lora, w: np.ndarray, factors: jlora.LoraFactors, x: np.ndarray, c: Any
) -> tuple[Any, Any]:
    """The output, and the gradients of `a`, `b` and `x` for the cotangent `c`."""

    def loss(factors: jlora.LoraFactors, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = lora.apply({"w": w}, {"w": factors}, x)
        return (out * c).sum(), out

    grads, out = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(factors, x)
    return out, {"a": grads[0].a, "b": grads[0].b, "x": grads[1]}


def exact(spec: str, *operands: Any) -> np.ndarray:
    """An einsum in float64, returned in float32."""
    wide = [np.asarray(v, np.float64) for v in operands]
    return np.einsum(spec, *wide, optimize=True).astype(np.float32)


# --- products ---


@dataclasses.dataclass(frozen=True)
class Product:
    """A `dot_general` in letters: batch a, b; contracting c, d; free of x e, f."""

    x: str
    w: str
    batch: str
    contract: str
    size: dict[str, int]
    left: bool
    rank: int

    def shape(self, letters: str) -> tuple[int, ...]:
        return tuple(self.size[letter] for letter in letters)

    @property
    def out(self) -> str:
        first, second = (self.w, self.x) if self.left else (self.x, self.w)
        shared = self.batch + self.contract
        free = [letter for letter in first + second if letter not in shared]
        return self.batch + "".join(free)

    @property
    def factors(self) -> tuple[str, str]:
        """The letters of `a` and `b`; r is the rank."""
        batch, in_ = subset(self.w, self.batch), subset(self.w, self.contract)
        out = "".join(letter for letter in self.w if letter not in batch + in_)
        return batch + in_ + "r", batch + "r" + out

    def __call__(self, params: Any, x: jax.Array) -> jax.Array:
        places = lambda letters, of: tuple(map(of.index, letters))
        pair = (params["w"], x) if self.left else (x, params["w"])
        names = (self.w, self.x) if self.left else (self.x, self.w)
        contract = tuple(places(self.contract, name) for name in names)
        batch = tuple(places(self.batch, name) for name in names)
        return lax.dot_general(*pair, (contract, batch))


@st.composite
def products(draw: st.DrawFn) -> Product:
    some = lambda letters, least: letters[: draw(st.integers(least, len(letters)))]
    batch, contract = some("ab", 0), some("cd", 1)
    x_free, w_free = some("ef", 0), some("gh", 1)
    mixed = lambda letters: "".join(draw(st.permutations(letters)))
    return Product(
        x=mixed(batch + contract + x_free),
        w=mixed(batch + contract + w_free),
        batch=mixed(batch),
        contract=mixed(contract),
        size={letter: draw(sizes) for letter in batch + contract + x_free + w_free},
        left=draw(flags),
        rank=draw(st.integers(1, 2)),
    )


@profile
@given(products(), seeds)
def test_any_dot_general(product: Product, seed: int):
    shapes = map(product.shape, (product.w, product.x, product.out))
    w, x, c = normal(seed, *shapes)
    lora, factors = adapted(product, w, x, product.rank)
    a, b = product.factors
    assert factors.a.shape == (*product.shape(a[:-1]), product.rank)
    scale, names = ALPHA / product.rank, (product.x, product.w, product.out)
    formed = w + scale * exact(f"{a},{b}->{product.w}", factors.a, factors.b)
    xs, ws, outs = names
    dw = scale * exact(f"{xs},{outs}->{ws}", x, c)
    wanted = {
        "a": exact(f"{ws},{b}->{a}", dw, factors.b),
        "b": exact(f"{ws},{a}->{b}", dw, factors.a),
        "x": exact(f"{ws},{outs}->{xs}", formed, c),
    }
    out, grads = run(lora, w, factors, x, c)
    assert_close(out, exact(f"{xs},{ws}->{outs}", x, formed), 1e-5)
    assert_close(grads, wanted, 1e-4)


# --- convolutions ---


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A convolution; axes of the kernel in letters o, i and the spatial u, v."""

    layout: tuple[str, str, str]
    size: dict[str, int]
    settings: dict[str, Any]
    rank: int

    @property
    def kernel(self) -> str:
        return self.layout[1].lower().replace("0", "u").replace("1", "v")

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of the kernel and of the input."""
        image = {"N": "n", "C": "c", "0": "y", "1": "z"}
        return (
            tuple(self.size[letter] for letter in self.kernel),
            tuple(self.size[image[letter]] for letter in self.layout[0]),
        )

    def __call__(self, params: Any, x: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x, params["w"], dimension_numbers=self.layout, **self.settings
        )


@st.composite
def convolutions(draw: st.DrawFn) -> Convolution:
    space = "01"[: draw(st.integers(1, 2))]
    mixed = lambda letters: "".join(draw(st.permutations(letters)))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in space)
    groups = draw(st.integers(1, 3))
    size = {letter: draw(st.integers(1, 3)) for letter in "uvin"}
    size |= {letter: draw(st.integers(5, 7)) for letter in "yz"}
    size |= {"c": size["i"] * groups, "o": draw(st.integers(1, 3)) * groups}
    fan_in = size["i"] * int(np.prod([size["uv"[i]] for i in range(len(space))]))
    return Convolution(
        (mixed("NC" + space), mixed("OI" + space), mixed("NC" + space)),
        size,
        {
            "window_strides": each(1, 2),
            "padding": tuple(zip(each(0, 2), each(-1, 2), strict=True)),
            "lhs_dilation": each(1, 2),
            "rhs_dilation": each(1, 2),
            "feature_group_count": groups,
        },
        rank=draw(st.integers(1, min(2, fan_in, size["o"]))),
    )


@profile
@given(convolutions(), seeds)
def test_any_convolution(conv: Convolution, seed: int):
    w, x = normal(seed, *conv.shapes)
    lora, factors = adapted(conv, w, x, conv.rank)
    kernel = conv.kernel
    a, b = kernel.replace("o", "") + "r", "ro"
    assert factors.b.shape == (conv.rank, conv.size["o"])
    scale = ALPHA / conv.rank
    formed = w + scale * exact(f"{a},{b}->{kernel}", factors.a, factors.b)
    expected, pull = jax.vjp(lambda w, x: conv({"w": w}, x), formed, x)
    (c,) = normal(seed + 1, expected.shape)
    dw, dx = pull(jnp.asarray(c))
    wanted = {
        "a": scale * exact(f"{kernel},{b}->{a}", dw, factors.b),
        "b": scale * exact(f"{kernel},{a}->{b}", dw, factors.a),
        "x": dx,
    }
    out, grads = run(lora, w, factors, x, c)
    assert_close(out, expected, 1e-5)
    assert_close(grads, jax.tree.map(jnp.asarray, wanted), 1e-4)


# --- factors, delta, merge ---


@fewer
@given(factored_kernels(), st.floats(0.01, 10.0), seeds)
def test_delta_is_an_einsum(kernel, scaling: float, seed: int):
    factors = factors_of(kernel, scaling, seed)
    letters, a, b, size = kernel
    wanted = scaling * exact(f"{a},{b}->{letters}", factors.a, factors.b)
    actual = jlora.delta(factors)
    assert factors.kernel_shape == tuple(size[letter] for letter in letters)
    assert_close(actual, wanted.astype(np.float32), 1e-5)


@fewer
@given(factored_kernels(), st.floats(0.01, 10.0), seeds)
def test_delta_is_linear_in_scaling_and_in_each_factor(kernel, scaling, seed: int):
    one = factors_of(kernel, 1.0, seed)
    other = factors_of(kernel, 1.0, seed + 1)
    scaled = dataclasses.replace(one, scaling=scaling)
    assert_close(jlora.delta(scaled), scaling * jlora.delta(one), 1e-5)
    for name in ("a", "b"):
        value = {name: getattr(other, name)}
        total = {name: getattr(one, name) + getattr(other, name)}
        parts = jlora.delta(one) + jlora.delta(dataclasses.replace(one, **value))
        assert_close(jlora.delta(dataclasses.replace(one, **total)), parts, 1e-4)


@fewer
@given(factored_kernels(), seeds)
def test_merge_adds_delta_and_nothing_else(kernel, seed: int):
    factors = factors_of(kernel, 0.5, seed)
    w, other = map(jnp.asarray, normal(seed + 1, factors.kernel_shape, (3,)))
    params = {"w": w, "other": [other]}
    merged = jlora.merge(params, {"w": factors})
    assert_close(merged["w"], w + jlora.delta(factors), 1e-6)
    assert merged["other"][0] is other
    np.testing.assert_array_equal(params["w"], w)
    zero = dataclasses.replace(factors, b=jnp.zeros_like(factors.b))
    np.testing.assert_array_equal(jlora.merge(params, {"w": zero})["w"], w)


# --- targets ---

NAMES = ("query", "key", "value", "output", "gate", "up", "down")
subsets = st.lists(st.sampled_from(NAMES), min_size=1, unique=True)


def _projections(params: Any, x: jax.Array) -> Any:
    return {name: x @ layer["kernel"] for name, layer in params.items()}


@profile
@given(subsets, subsets)
def test_init_of_a_target_does_not_depend_on_the_others(some, others):
    params = {name: {"kernel": jnp.ones((5, 7))} for name in NAMES}

    def init(names: list[str]) -> Any:
        lora = jlora.lora(_projections, LoraConfig(names, rank=2))
        return lora.init(jax.random.key(3), params, jnp.ones((2, 5)))

    first, second = init(some), init(others)
    assert set(first) == {f"{name}/kernel" for name in some}
    for path in set(first) & set(second):
        np.testing.assert_array_equal(first[path].a, second[path].a)
    values = [np.asarray(factors.a).tobytes() for factors in first.values()]
    assert len(set(values)) == len(values)


keys = st.text("abc_.0[]'\"é -", min_size=1, max_size=4)
trees = st.recursive(
    st.just("leaf"),
    lambda inner: (
        st.dictionaries(keys, inner, min_size=1, max_size=3)
        | st.lists(inner, min_size=1, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=6,
)


@profile
@given(trees, seeds)
def test_paths_name_leaves_and_come_back(tree: Any, seed: int):
    count = iter(range(100))
    params = jax.tree.map(lambda _: jnp.float32(next(count)), {"root": tree})
    leaves = jax.tree.leaves_with_path(params)
    paths = [keystr(path, simple=True, separator="/") for path, _ in leaves]
    total = lambda params: sum(jax.tree.leaves(params))
    lora = jlora.lora(total, LoraConfig(".*", full=True))
    adapter = lora.init(jax.random.key(0), params)
    assert list(adapter) == paths
    assert [float(value) for value in adapter.values()] == [float(v) for _, v in leaves]
    chosen = paths[seed % len(paths)]
    one = jlora.lora(total, LoraConfig(f"^{re.escape(chosen)}$", full=True))
    assert list(one.init(jax.random.key(0), params)) == [chosen]
    shifted = jax.tree.map(lambda v: v + 1, adapter)
    merged = jlora.merge(params, shifted)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert_close(merged, jax.tree.map(lambda v: v + 1, params), 0.0)
