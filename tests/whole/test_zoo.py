"""Whole models: plan, outputs, gradients, the traced program, and merging.

Every model of the zoo states which kernels are chosen and what role each of their
axes plays, as a person reads it. From that, and from nothing that jlora computes,
the expected kernels are formed here.
"""

import dataclasses
import re
import string
from collections.abc import Callable, Iterator
from functools import cached_property
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxpr_checks import assert_not_materialized, slice_shapes
from releases import is_before
from zoo import CASES, Axes, Built, Case

import jlora

pytestmark = pytest.mark.usefixtures("fast_compile")
ALPHA = 3.0
# Both sides of a comparison round at every layer of a model that computes in bfloat16.
BF16 = 2e-2


class Subject:
    """A model, its adapter with b moved off zero, and what they give when run."""

    def __init__(self, case: Case) -> None:
        self.built = built = relaxed(case.build)()
        self.run = relaxed(built.fn)
        settings = {"exclude": built.exclude, "rank": built.rank, "alpha": ALPHA}
        config = jlora.LoraConfig(built.target, **settings)
        self.lora = jlora.lora(self.run, config)
        # Arrays are traced; flags, names and functions stay as they are.
        self.leaves, self.treedef = jax.tree.flatten((built.args, dict(built.kwargs)))
        self.places = [i for i, x in enumerate(self.leaves) if isinstance(x, jax.Array)]
        self.arrays = [self.leaves[i] for i in self.places]

    def arguments(self, arrays: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        leaves = list(self.leaves)
        for place, array in zip(self.places, arrays, strict=True):
            leaves[place] = array
        return self.treedef.unflatten(leaves)

    def base(self, params: Any, arrays: list[Any]) -> Any:
        args, kwargs = self.arguments(arrays)
        return self.run(params, *args, **kwargs)

    def factored(self, params: Any, adapter: Any, arrays: list[Any]) -> Any:
        args, kwargs = self.arguments(arrays)
        return self.lora.apply(params, adapter, *args, **kwargs)

    def reference(self, params: Any, adapter: Any, arrays: list[Any]) -> Any:
        return self.base(with_kernels(self.built, params, adapter, jnp), arrays)

    @cached_property
    def fresh(self) -> dict[str, Any]:
        args, kwargs = self.arguments(self.arrays)
        return self.lora.init(jax.random.key(7), self.built.params, *args, **kwargs)

    @cached_property
    def adapter(self) -> dict[str, Any]:
        generator = np.random.default_rng(8)
        number = lambda x: jnp.asarray(generator.normal(size=x.shape) / 2, x.dtype)
        items = self.fresh.items()
        return {k: dataclasses.replace(f, b=number(f.b)) for k, f in items}

    @cached_property
    def jitted_base(self) -> Callable[..., Any]:
        return jax.jit(self.base)

    @cached_property
    def factored_results(self) -> tuple[Any, Any]:
        return self.results(self.factored)

    @cached_property
    def reference_results(self) -> tuple[Any, Any]:
        return self.results(self.reference)

    @cached_property
    def true_gradients(self) -> Any:
        """The gradient of the formed kernels, all in float32."""
        assert self.built.exact is not None
        run = relaxed(self.built.exact)

        def exact(params: Any, adapter: Any, arrays: list[Any]) -> Any:
            args, kwargs = self.arguments(arrays)
            formed = with_kernels(self.built, params, adapter, jnp)
            return run(formed, *args, **kwargs)

        return self.results(exact)[1]

    def results(self, run: Callable[..., Any]) -> tuple[Any, Any]:
        """Outputs, and the gradient of a loss with respect to the adapter."""
        step = jax.jit(jax.grad(loss_of(run), argnums=1, has_aux=True))
        grads, outputs = step(self.built.params, self.adapter, self.arrays)
        return outputs, grads


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    yield Subject(request.param)


def test_plan_finds_the_kernels_and_the_roles_of_their_axes(subject: Subject):
    """From shapes alone, as for a model too large for this machine."""
    built = subject.built
    params, arrays = jax.eval_shape(lambda *x: x, built.params, subject.arrays)
    args, kwargs = subject.arguments(arrays)
    plan = subject.lora.plan(params, *args, **kwargs)
    found = {t.path: Axes(t.axes.batch, t.axes.in_, t.axes.out) for t in plan.targets}
    assert found == built.expected
    shapes = {path: leaf.shape for path, leaf in named_leaves(params).items()}
    assert {t.path: tuple(t.shape) for t in plan.targets} == {
        path: shapes[path] for path in built.expected
    }


def test_fresh_adapter_changes_nothing(subject: Subject):
    built = subject.built
    base = subject.base(built.params, subject.arrays)
    adapted = subject.factored(built.params, subject.fresh, subject.arrays)
    assert_same_kind(adapted, base)
    # XLA of before rounds a convolution otherwise where something is added to it.
    assert_close(adapted, base, 1e-6 if is_before("jax", "0.10") else 0.0)


def test_factors_have_the_shapes_of_their_axes(subject: Subject):
    built, kernels = subject.built, named_leaves(subject.built.params)
    assert set(subject.fresh) == set(built.expected)
    for path, axes in built.expected.items():
        size = lambda group, shape=kernels[path].shape: tuple(shape[i] for i in group)
        factors = subject.fresh[path]
        batch = size(axes.batch)
        assert built.rank not in kernels[path].shape  # or shapes say little
        assert factors.a.shape == (*batch, *size(axes.in_), built.rank)
        assert factors.b.shape == (*batch, built.rank, *size(axes.out))
        assert factors.a.dtype == factors.b.dtype == jnp.float32
        assert jnp.any(factors.a != 0) and not jnp.any(factors.b)


def test_outputs_equal_those_of_the_formed_kernels(subject: Subject):
    built = subject.built
    params = with_kernels(built, built.params, subject.adapter, np)
    expected = subject.jitted_base(params, subject.arrays)
    base = subject.jitted_base(built.params, subject.arrays)
    outputs, _ = subject.factored_results
    assert_same_kind(outputs, base)
    assert_close(outputs, expected, BF16 if built.coarse else 1e-5)
    assert distance(outputs, base) > 0.05  # else the comparison says nothing


def test_gradients_equal_those_of_the_formed_kernels(subject: Subject):
    _, grads = subject.factored_results
    _, expected = subject.reference_results
    assert_same_kind(grads, expected)
    if subject.built.coarse:
        # Both are roundings of the true gradient, layers apart; how far they are off
        # depends on the machine, which of them is nearer on chance.
        assert_as_near(grads, expected, subject.true_gradients)
    else:
        assert_close(grads, expected, 1e-4)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_no_kernel_is_formed(subject: Subject, direction: str):
    built, kernels = subject.built, named_leaves(subject.built.params)
    run = loss_of(subject.factored)
    if direction == "backward":
        run = jax.grad(run, argnums=1, has_aux=True)
    traced = jax.make_jaxpr(run)(built.params, subject.adapter, subject.arrays)
    shapes = list(built.watched)
    for path, axes in built.expected.items():
        if path not in built.formed:
            shapes += slice_shapes(kernels[path].shape, axes.batch)
    assert_not_materialized(traced, range(len(kernels)), shapes)


def test_merged_params_are_plain_and_equal(subject: Subject):
    built = subject.built
    merged = jlora.merge(built.params, subject.adapter)
    assert_same_kind(merged, built.params)
    expected = with_kernels(built, built.params, subject.adapter, np)
    assert_close(merged, expected, 1e-6)
    outputs, _ = subject.factored_results
    plain = subject.jitted_base(merged, subject.arrays)
    assert_close(outputs, plain, BF16 if built.coarse else 1e-5)


def relaxed(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Models may broadcast as they please; what jlora writes may not."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_rank_promotion("allow"):
            return fn(*args, **kwargs)

    return run


def named_leaves(params: Any) -> dict[str, Any]:
    """Leaves by path; the field of a box is no part of the path."""
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    return {re.sub("/value$", "", name(path)): leaf for path, leaf in flat}


def with_kernels(built: Built, params: Any, adapter: Any, xp: ModuleType) -> Any:
    """Params with W + alpha/rank · a·b for every expected kernel, formed here.

    With NumPy the sum is taken in double precision.
    """
    leaves = named_leaves(params)
    for path, axes in built.expected.items():
        a, b = adapter[path].a, adapter[path].b
        kernel = leaves[path]
        if xp is np:
            a, b, kernel = (np.asarray(x, np.float64) for x in (a, b, kernel))
        total = kernel + ALPHA / built.rank * product(a, b, axes, xp)
        leaves[path] = jnp.asarray(total, leaves[path].dtype)
    return jax.tree.unflatten(jax.tree.structure(params), leaves.values())


def product(a: Any, b: Any, axes: Axes, xp: ModuleType) -> Any:
    """a·b in the layout of the kernel, one letter per axis of the kernel."""
    batch, in_, out = (
        "".join(string.ascii_lowercase[i] for i in group) for group in axes
    )
    kernel = "".join(sorted(batch + in_ + out))
    return xp.einsum(f"{batch}{in_}Z,{batch}Z{out}->{kernel}", a, b)


def loss_of(run: Callable[..., Any]) -> Callable[..., Any]:
    """A scalar in which every number of the outputs has a weight of its own."""

    def loss(params: Any, adapter: Any, arrays: list[Any]) -> tuple[jax.Array, Any]:
        outputs = run(params, adapter, arrays)
        generator, total = np.random.default_rng(9), jnp.float32(0)
        for leaf in filter(is_float, jax.tree.leaves(outputs)):
            weights = generator.normal(size=leaf.shape) / max(leaf.size, 1) ** 0.5
            total += jnp.sum(leaf.astype(jnp.float32) * weights.astype(np.float32))
        return total, outputs

    return loss


def is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def assert_same_kind(found: Any, expected: Any) -> None:
    """The same tree, of the same shapes and dtypes."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    kind = lambda x: (x.shape, x.dtype)
    assert jax.tree.map(kind, found) == jax.tree.map(kind, expected)


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    """Every leaf within a relative distance; all that is no float is equal.

    A leaf that should be zero may differ by rounding errors of the whole tree.
    """
    whole = max(map(norm, filter(is_float, jax.tree.leaves(expected))), default=0.0)
    pairs = zip(
        named_leaves(found).items(), jax.tree.leaves(expected), strict=True
    )  # named, for the message
    for (path, x), y in pairs:
        if not is_float(x):
            assert np.array_equal(plain(x), plain(y)), path
            continue
        x, y = plain(x), plain(y)
        bound = tolerance * (np.linalg.norm(y) + 1e-3 * whole)
        assert np.linalg.norm(x - y) <= bound, (
            f"{path}: {np.linalg.norm(x - y)} from {np.linalg.norm(y)}, "
            f"at most {bound} allowed"
        )


def assert_as_near(found: Any, reference: Any, truth: Any) -> None:
    """About as far from the truth as the reference for most leaves; far off for none.

    `x·a` and the delta are rounded apart, which the formed kernel is spared.
    """

    def errors(tree: Any) -> Any:
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(truth), strict=True)
        # A leaf without a gradient, in a branch not taken, has none in either.
        apart = lambda x, y: np.linalg.norm(plain(x) - plain(y))
        return [apart(x, y) / (norm(y) or 1.0) for x, y in pairs]

    own, other = errors(found), errors(reference)
    worst = dict(zip(named_leaves(found), own, strict=True))
    assert max(own) <= 0.2, worst
    assert np.median(own) <= 2 * np.median(other) + 2.0**-8, (own, other)


def distance(found: Any, base: Any) -> float:
    """The largest relative distance of a leaf."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(base), strict=True)
    return max(
        np.linalg.norm(plain(x) - plain(y)) / (norm(y) + 1e-9)
        for x, y in pairs
        if is_float(x)
    )


def norm(x: jax.Array) -> float:
    return float(np.linalg.norm(plain(x)))


def plain(x: jax.Array) -> np.ndarray:
    """A flat array of NumPy, in double precision; a random key as its data."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x).astype(np.float64 if is_float(x) else np.int64).ravel()
