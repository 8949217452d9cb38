"""Functions inside of a program: loops, branches, `vmap`, nested jit, checkpoints.

Each function takes the builder, the name of a value that is linear in kernels, and
`inner`, which writes further steps into the body and returns the name of its result.
It returns an expression.
"""

from collections.abc import Callable

import jax

from programs.build import Builder, Scope, Unfit
from programs.steps_carry import at

Inner = Callable[[str], str]
Wrap = Callable[[Builder, str, Inner], str]
WRAP: dict[str, tuple[float, Wrap]] = {}


def wrap(weight: float) -> Callable[[Wrap], Wrap]:
    """Registers a step under the name of its function."""

    def register(step: Wrap) -> Wrap:
        WRAP[step.__name__] = (weight, step)
        return step

    return register


def body(
    b: Builder,
    k: str,
    inner: Inner,
    *,
    passed: bool = True,
    axis: int | None = None,
    size: int | None = None,
    leading: bool = True,
) -> tuple[str, Scope]:
    """Writes a function of the kernel, or of its slice along an axis.

    Args:
        b: the builder.
        k: the value outside.
        inner: writes the body.
        passed: whether the kernel is its first parameter, or is closed over.
        axis: the axis of the kernel that is mapped or scanned, if any.
        size: the size of that axis, in the kernel or in the inputs.
        leading: whether it is the first axis of each input.
    """
    shape = list(b.shape(k))
    if axis is not None:
        del shape[axis]
    if not passed:
        return b.function({}, lambda: inner(k), size=size, leading=leading)
    name = b.fresh("k")
    struct = jax.ShapeDtypeStruct(tuple(shape), b.scope.values[k].dtype)
    return b.function({name: struct}, lambda: inner(name), size=size, leading=leading)


def sliceable(b: Builder, k: str) -> bool:
    """Whether slices along an axis are kernels: rows are looked up, all of them."""
    return len(b.shape(k)) > 2


def operands(k: str, scope: Scope, *, passed: bool) -> str:
    """The arguments of the function, as its caller names them."""
    return ", ".join([k] * passed + [outer for _, outer, _ in scope.params])


# loops


@wrap(3)
def scan_kernels(b: Builder, k: str, inner: Inner) -> str:
    """A scan over slices of the kernel: layers, without what goes from one to next."""
    if not sliceable(b, k) or b.shape(k)[0] > 10:
        raise Unfit("no axis to scan over")
    f, scope = body(b, k, inner, axis=0, size=b.shape(k)[0])
    return _scan(b, f, operands(k, scope, passed=True))


@wrap(2)
def scan_inputs(b: Builder, k: str, inner: Inner) -> str:
    """A scan over inputs; the kernel is a constant of it."""
    f, scope = body(b, k, inner, passed=False, size=3)
    if not scope.params:
        raise Unfit("no input is scanned")
    return _scan(b, f, operands(k, scope, passed=False))


def _scan(b: Builder, f: str, xs: str) -> str:
    reverse, unroll = b.flip(0.4), b.rng.choice([1, 1, 2, True])
    step = f"lambda s, x: (s + 0.1 * jnp.nansum(jnp.real({f}(*x)).astype(jnp.float32))"
    step = f"lambda s, x: (0.5 * s + 1.0, {f}(*x) * s)" if b.flip(0.5) else step
    step = step if step.endswith("* s)") else f"{step}, {f}(*x))"
    start = "jnp.float32(1.0)"
    return f"lax.scan({step}, {start}, ({xs},), reverse={reverse}, unroll={unroll})[1]"


@wrap(1.5)
def recurrence(b: Builder, k: str, inner: Inner) -> str:
    """A recurrence whose state goes through the kernel and back."""
    if len(b.shape(k)) != 2 or b.dtype(k) != "float32":
        raise Unfit("no matrix")
    h = b.input((b.tokens[0], b.shape(k)[0]))
    step = f"h + jnp.tanh(h @ {k}) @ {k}.T"
    if b.flip(0.5):
        return f"lax.scan(lambda h, _: ({step}, h), {h}, None, length=3)[0]"
    loop = f"lax.fori_loop(0, 3, lambda i, h: {step}, {h})"
    return loop if b.flip(0.5) else f"jax.checkpoint(lambda h: {loop})({h})"


@wrap(1.5)
def layers(b: Builder, k: str, inner: Inner) -> str:
    """A loop that takes a slice of the kernel by its counter."""
    if not sliceable(b, k) or not 0 < b.shape(k)[0] < 11:
        raise Unfit("no layers")
    f, scope = body(b, k, inner, axis=0)
    rest = "".join(f", {outer}" for _, outer, _ in scope.params)
    taken = f"lax.dynamic_index_in_dim({k}, i, 0, keepdims=False)"
    taken = b.rng.choice([taken, f"{k}[i]"])
    zeros = f"jnp.zeros_like({f}({k}[0]{rest}))"
    step = f"y + {f}({taken}{rest})"
    n = b.shape(k)[0]
    if b.flip(0.3):
        b.reverse = False
        loop = f"lambda s: s[0] < {n}, lambda s: (s[0] + 1, _y(*s)), (0, {zeros})"
        return f"lax.while_loop({loop})[1]".replace(
            "_y(*s)", f"(lambda i, y: {step})(*s)"
        )
    return f"lax.fori_loop(0, {n}, lambda i, y: {step}, {zeros})"


@wrap(0.7)
def while_each(b: Builder, k: str, inner: Inner) -> str:
    """A while loop under `vmap`, whose condition depends on the example."""
    if len(b.shape(k)) != 2 or b.dtype(k) != "float32":
        raise Unfit("no matrix")
    b.reverse = False
    h, n = b.input((b.tokens[0], b.shape(k)[0])), b.input((b.tokens[0],), 0, 4)
    step = f"(s[0] + 1, 0.5 * jnp.tanh(s[1] @ {k}) @ {k}.T)"
    loop = f"lax.while_loop(lambda s: s[0] < n, lambda s: {step}, (0, h))[1]"
    return f"jax.vmap(lambda h, n: {loop})({h}, {n})"


# vmap


@wrap(4)
def vmap(b: Builder, k: str, inner: Inner) -> str:
    """Over an axis of the kernel, of the inputs, or of both."""
    axis = None
    if sliceable(b, k) and b.flip(0.6):
        axis = b.axis(k)
    passed = axis is not None or b.flip(0.5)
    size = b.shape(k)[axis] if axis is not None else b.tokens[1]
    f, scope = body(b, k, inner, passed=passed, axis=axis, size=size, leading=False)
    in_axes = ([axis] if passed else []) + [where for *_, where in scope.params]
    if all(where is None for where in in_axes):
        raise Unfit("nothing is mapped")
    out = b.rng.choice([0, 0, -1, 1])
    call = operands(k, scope, passed=passed)
    return f"jax.vmap({f}, in_axes={tuple(in_axes)}, out_axes={out})({call})"


@wrap(1.5)
def branch_each(b: Builder, k: str, inner: Inner) -> str:
    """A branch under `vmap`, chosen by each example."""
    f, scope = body(b, k, inner)
    i = b.input((b.tokens[1],), 0, 2)
    rest = operands(k, scope, passed=True).removeprefix(k)
    halves = [f"lambda: {f}({k}{rest})", f"lambda: 0.5 * {f}({k}{rest})"]
    scaled = f"{f}(lax.cond(i > 0, lambda: {k}, lambda: -{k}){rest})"
    return b.rng.choice(
        [
            f"jax.vmap(lambda i: lax.switch(i, [{', '.join(halves)}]))({i})",
            f"jax.vmap(lambda i: lax.cond(i > 0, {', '.join(halves)}))({i})",
            f"jax.vmap(lambda i: {scaled})({i})",
        ]
    )


# branches


@wrap(2)
def branch(b: Builder, k: str, inner: Inner) -> str:
    """A branch by an input; the other one scales the kernel, or does without it."""
    f, scope = body(b, k, inner)
    call = operands(k, scope, passed=True)
    i = b.input((), 0, 2)
    others = [
        f"lambda k, *x: -{f}(k, *x)",
        f"lambda k, *x: {f}(2.0 * k, *x)",
        f"lambda k, *x: jnp.zeros_like({f}(k, *x))",
    ]
    pair = b.shuffled([f, b.rng.choice(others)])
    if b.flip(0.5):
        return f"lax.switch({i}, [{', '.join(pair)}], {call})"
    return f"lax.cond({i} > 0, {', '.join(pair)}, {call})"


# functions


@wrap(2)
def nested_jit(b: Builder, k: str, inner: Inner) -> str:
    """A jitted function, called once, twice, or with two kernels."""
    passed = b.flip(0.6)
    f, scope = body(b, k, inner, passed=passed)
    call = operands(k, scope, passed=passed)
    once = f"jax.jit({f})({call})"
    if not passed:
        return once
    rest = call.removeprefix(k)
    return b.rng.choice([once, f"{once} - jax.jit({f})(0.5 * {k}{rest})"])


@wrap(2)
def checkpoint(b: Builder, k: str, inner: Inner) -> str:
    passed = b.flip(0.6)
    f, scope = body(b, k, inner, passed=passed)
    policies = [
        "",
        ", policy=jax.checkpoint_policies.dots_saveable",
        ", policy=jax.checkpoint_policies.everything_saveable",
        ", policy=jax.checkpoint_policies.nothing_saveable",
        ", policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable",
        ", prevent_cse=False",
    ]
    call = operands(k, scope, passed=passed)
    return f"jax.checkpoint({f}{b.rng.choice(policies)})({call})"


@wrap(0.7)
def each_in_python(b: Builder, k: str, inner: Inner) -> str:
    """A Python loop over slices, all of them used."""
    if not sliceable(b, k) or max(b.shape(k)) > 10:
        raise Unfit("no axis to loop over")
    axis = b.axis(k, 2)
    f, scope = body(b, k, inner, axis=axis)
    rest = operands(k, scope, passed=True).removeprefix(k)
    index = at(len(b.shape(k)), axis, "i")
    n = b.shape(k)[axis]
    return f"sum({f}({k}[{index}]{rest}) for i in range({n}))"
