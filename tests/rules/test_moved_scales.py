"""Scales that the adapter moves: gains trained whole, spectral norms, and the like.

Values and gradients are those of the kernel `W + s·a·b` with its scale, and no value of
the backward pass has the shape of a kernel: a scale has its gradient from the outputs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jaxpr_checks import assert_not_materialized, materialized
from oracle import relative_error

import jlora

RANK, ALPHA = 3, 4.5
OF_MATRIX = "ir,ro->io"
pytestmark = pytest.mark.usefixtures("fast_compile")


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A function of kernels and gains, the input, and the shapes of both.

    Attributes:
        fn: takes params and an input.
        kernels: shape and layout of the delta of each kernel.
        gains: the shapes of the leaves that are trained whole.
        x: the shape of the input.
    """

    fn: Callable[[Any, Any], Any]
    kernels: dict[str, tuple[tuple[int, ...], str]]
    gains: dict[str, tuple[int, ...]]
    x: tuple[int, ...] = (4, 7)


def of_matrix(fn: Callable[[Any, Any], Any], **gains: tuple[int, ...]) -> Scaled:
    return Scaled(fn, {"w": ((7, 11), OF_MATRIX)}, gains)


U, V = jnp.linspace(0.5, 1.5, 7), jnp.linspace(1.0, 2.0, 11)


def spectral(p: Any, x: Any) -> Any:
    """The norm by one step of a power iteration, differentiated as Miyato et al. do."""
    w = p["w"]
    v = lax.stop_gradient(U @ w)
    u = lax.stop_gradient(w @ (v / jnp.linalg.norm(v)))
    u = u / jnp.linalg.norm(u)
    return x @ (w / (u @ w @ (v / jnp.linalg.norm(v))))


def conv(w: Any, x: Any, **settings: Any) -> Any:
    names = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(x, w, (1,), "SAME", None, None, names, **settings)


def scanned(p: Any, x: Any) -> Any:
    def layer(x: Any, rows: Any) -> Any:
        w, g = rows
        return jnp.tanh(x @ (w * g[None])), None

    return lax.scan(layer, x, (p["w"], p["g"]))[0]


def outside_of_scan(p: Any, x: Any) -> Any:
    stack = p["w"] * p["g"][:, None]
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]


def inside_of_jit(p: Any, x: Any) -> Any:
    inner = jax.jit(lambda w, g, x: x @ (w / (1 + g**2)))
    return inner(p["w"], p["g"][None], x)


def inside_of_cond(p: Any, x: Any) -> Any:
    use = lambda w, g: x @ (w * g)
    return lax.cond(x[0, 0] < 9, use, lambda w, g: 2 * use(w, g), p["w"], p["g"])


def from_an_adapted_layer(p: Any, x: Any) -> Any:
    """The scale is computed from what another adapted kernel gives."""
    gate = jax.nn.sigmoid((x @ p["v"]).mean(0))
    return x @ (p["w"] * gate[None])


CASES = {
    "out": of_matrix(lambda p, x: x @ (p["w"] * p["g"][None]), g=(11,)),
    "in": of_matrix(lambda p, x: x @ (p["w"] * p["g"][:, None]), g=(7,)),
    "scalar": of_matrix(lambda p, x: x @ (p["g"] * p["w"]), g=()),
    "divided": of_matrix(lambda p, x: x @ (p["w"] / (1 + p["g"] ** 2)[None]), g=(11,)),
    "zero": of_matrix(lambda p, x: x @ (p["w"] * (0 * p["g"])[None]), g=(11,)),
    "twice": of_matrix(
        lambda p, x: x @ (p["w"] * p["g"][None] / (2 + jnp.tanh(p["h"]))), g=(11,), h=()
    ),
    "and_frozen": of_matrix(
        lambda p, x: x @ (p["w"] * U[:, None] * p["g"][None] * 3), g=(11,)
    ),
    "transposed": of_matrix(
        lambda p, x: x @ (p["w"] * p["g"][None]) @ (p["w"] * p["g"][None]).T, g=(11,)
    ),
    "reshaped": of_matrix(
        lambda p, x: x @ (p["w"] * p["g"][None]).T.reshape(11, 7).T, g=(11,)
    ),
    "broadcast": of_matrix(
        lambda p, x: x @ (p["w"] * jnp.broadcast_to(p["g"], (7, 11))), g=(11,)
    ),
    "joined": Scaled(
        lambda p, x: x @ jnp.concatenate([p["w"] * p["g"][None], p["v"] * p["h"]], 1),
        {"w": ((7, 11), OF_MATRIX), "v": ((7, 13), OF_MATRIX)},
        {"g": (11,), "h": ()},
    ),
    "siblings": Scaled(
        lambda p, x: jnp.tanh(x @ (p["w"] * p["g"][None])) @ (x @ p["v"]).T,
        {"w": ((7, 11), OF_MATRIX), "v": ((7, 11), OF_MATRIX)},
        {"g": (11,)},
    ),
    "lookup": Scaled(
        lambda p, x: x * jnp.take(p["w"] * p["g"][None], jnp.array([2, 0, 5]), axis=0),
        {"w": ((17, 11), OF_MATRIX)},
        {"g": (11,)},
        (3, 11),
    ),
    "lookup_rows": Scaled(
        lambda p, x: x * (p["w"] * p["g"][:, None])[jnp.argsort(x[:, 0])],
        {"w": ((17, 11), OF_MATRIX)},
        {"g": (17,)},
        (3, 11),
    ),
    "spectral": of_matrix(spectral),
    "from_a_layer": Scaled(
        from_an_adapted_layer,
        {"w": ((7, 11), OF_MATRIX), "v": ((7, 11), OF_MATRIX)},
        {},
    ),
    "batched": Scaled(
        lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["w"] * p["g"][:, None]),
        {"w": ((2, 7, 11), "eir,ero->eio")},
        {"g": (2, 11)},
        (2, 4, 7),
    ),
    "scan": Scaled(scanned, {"w": ((3, 7, 7), "eir,ero->eio")}, {"g": (3, 7)}, (13, 7)),
    "outside_of_scan": Scaled(
        outside_of_scan, {"w": ((3, 7, 7), "eir,ero->eio")}, {"g": (3, 7)}, (13, 7)
    ),
    "jit": of_matrix(inside_of_jit, g=(11,)),
    "remat": of_matrix(
        jax.checkpoint(lambda p, x: x @ (p["w"] * p["g"][None])), g=(11,)
    ),
    "vmap": of_matrix(
        lambda p, x: jax.vmap(lambda v: v @ (p["w"] * p["g"][None]))(x), g=(11,)
    ),
    "cond": of_matrix(inside_of_cond, g=()),
    "conv": Scaled(
        lambda p, x: conv(p["w"] * p["g"][None, None], x),
        {"w": ((3, 7, 11), "kir,ro->kio")},
        {"g": (11,)},
        (2, 13, 7),
    ),
    "conv_scalar": Scaled(
        lambda p, x: conv(p["w"] * p["g"], x),
        {"w": ((3, 7, 11), "kir,ro->kio")},
        {"g": ()},
        (2, 13, 7),
    ),
    "conv_depthwise": Scaled(
        lambda p, x: conv(p["w"] * p["g"][None, None], x, feature_group_count=7),
        {"w": ((5, 1, 7), "kir,ro->kio")},
        {"g": (7,)},
        (2, 13, 7),
    ),
    "frozen_matrix": of_matrix(
        lambda p, x: (
            x
            @ (
                (p["w"] * p["g"][:, None])
                @ (V[:, None] * jnp.linspace(1.0, 3.0, 13)[None])
            )
        ),
        g=(7,),
    ),
    "padded": of_matrix(
        lambda p, x: x @ jnp.pad(p["w"] * p["g"][None], ((0, 0), (2, 1))), g=(11,)
    ),
    "ragged": Scaled(
        lambda p, x: lax.ragged_dot(x, p["w"] * p["g"][:, None], jnp.array([1, 4])),
        {"w": ((2, 7, 11), "eir,ero->eio")},
        {"g": (2, 11)},
        (5, 7),
    ),
}


def prepared(use: Scaled, **settings: Any) -> Any:
    """Returns the adapted function, the merged one, and arguments of both."""
    rng = np.random.default_rng(3)
    normal = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    kernels = {name: normal(shape) for name, (shape, _) in use.kernels.items()}
    params = kernels | {name: normal(shape) for name, shape in use.gains.items()}
    given = settings.pop("config", {})
    configs = [jlora.LoraConfig(list(use.kernels), rank=RANK, alpha=ALPHA, **given)]
    if use.gains:
        configs.append(jlora.LoraConfig(list(use.gains), full=True))
    lora = jlora.lora(use.fn, configs, **settings)
    x = normal(use.x)
    adapter = lora.init(jax.random.key(0), params, x)
    assert set(adapter) == {*use.kernels, *use.gains}
    adapter = jax.tree.map(lambda v: normal(v.shape), adapter)

    def merged(params: Any, adapter: Any, x: Any) -> Any:
        new = {name: adapter[name] for name in use.gains}
        for name, (_, laid_out) in use.kernels.items():
            e = adapter[name]
            change = jnp.einsum(laid_out, e.a, e.b, precision="highest")
            new[name] = params[name] + ALPHA / RANK * change
            if e.magnitude is not None:
                norm = jnp.sqrt(jnp.sum(new[name] ** 2, e.axes.in_))
                fixed = e.magnitude / lax.stop_gradient(norm)
                new[name] = new[name] * jnp.expand_dims(fixed, e.axes.in_)
        return use.fn(new, x)

    return lora.apply, merged, (params, adapter, x)


def check(use: Scaled, *, structure: bool = True, **settings: Any) -> None:
    """Values and gradients agree, and no kernel is formed backward."""
    mine, merged, args = prepared(use, **settings)
    close(jax.jit(mine)(*args), jax.jit(merged)(*args), 1e-4)
    loss = lambda f: lambda p, a, x: jnp.sum(jnp.sin(f(p, a, x)))
    grad = lambda f: jax.jit(jax.grad(loss(f), (1, 2)))(*args)
    jax.tree.map(lambda g, w: close(g, w, 5e-4), grad(mine), grad(merged))
    if structure:
        program = jax.make_jaxpr(jax.grad(loss(mine), (1, 2)))(*args)
        assert_not_materialized(program, range(len(args[0])), shapes(use))


def shapes(use: Scaled) -> list[tuple[int, ...]]:
    """Returns the shapes of the kernels, and of one slice of a stack of them."""
    found = [shape for shape, _ in use.kernels.values()]
    stacks = [s[1:] for s, laid_out in use.kernels.values() if laid_out[0] == "e"]
    return found + [shape for shape in stacks if len({*shape}) > 1]


def close(got: Any, want: Any, rtol: float) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    assert relative_error(got, want) < rtol


# A value as large as the kernel is in the function itself; and depthwise kernels are
# formed by design.
FORMED = ("broadcast", "conv_depthwise")


@pytest.mark.parametrize("name", CASES)
def test_a_scale_has_its_gradient_from_the_outputs(name: str):
    check(CASES[name], structure=name not in FORMED)


REFUSED = {
    "both_sides": of_matrix(
        lambda p, x: x @ (p["w"] * p["g"][None] * p["h"][:, None]), g=(11,), h=(7,)
    ),
    "padded_across": of_matrix(
        lambda p, x: (
            jnp.pad(x, ((0, 0), (1, 0)))
            @ jnp.pad(p["w"] * p["g"][None], ((1, 0), (0, 0)))
        ),
        g=(11,),
    ),
    "scaled_sum": of_matrix(lambda p, x: x @ (p["w"] * p["g"] + V[None]), g=()),
    "trained_matrix": of_matrix(
        lambda p, x: x @ (p["w"] @ jnp.tanh(p["m"])), m=(11, 13)
    ),
    "moved_sum": of_matrix(lambda p, x: x @ (p["w"] + p["g"][None]), g=(11,)),
    "conv_inputs": Scaled(
        lambda p, x: conv(p["w"] * p["g"][None, :, None], x),
        {"w": ((3, 7, 11), "kir,ro->kio")},
        {"g": (7,)},
        (2, 13, 7),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_fits_neither_side_is_said(name: str):
    use = REFUSED[name]
    with pytest.raises(jlora.MaterializationError, match=r"'w' .* the adapter moves"):
        prepared(use)
    check(use, structure=False, materialize="allow")


@pytest.mark.parametrize("name", ["out", "in", "scalar", "spectral", "scan", "conv"])
def test_with_autodiff(name: str):
    check(CASES[name], backward="autodiff")


@pytest.mark.parametrize("name", ["out", "scalar", "lookup", "scan", "batched"])
def test_with_dora(name: str):
    check(CASES[name], config={"dora": True})


@pytest.mark.parametrize("name", ["out", "in", "scalar", "joined"])
def test_merged_form(name: str):
    check(CASES[name], contraction="merged", structure=False)


@pytest.mark.parametrize("name", ["out", "in", "scalar", "scan", "lookup"])
def test_many_adapters_at_once(name: str):
    mine, merged, (params, adapter, x) = prepared(CASES[name])
    stacked = jax.tree.map(lambda v: jnp.stack([v, 2 * v, -v]), adapter)
    run = lambda f: jax.jit(jax.vmap(f, (None, 0, None)))(params, stacked, x)
    close(run(mine), run(merged), 1e-4)


def test_the_check_sees_the_gradient_of_a_whole_kernel():
    """What a scale inside of the kernel would do: `dg = Σ W·(xᵀ·dy)`."""
    use = CASES["out"]
    _, _, (params, adapter, x) = prepared(use)
    inside = lambda p, a, x: jnp.sum(jnp.sin(x @ (p["w"] * a["g"][None])))
    program = jax.make_jaxpr(jax.grad(inside, 1))(params, {"g": adapter["g"]}, x)
    found = materialized(program, range(len(params)), shapes(use))
    assert any("dot_general" in line for line in found), found


def test_a_frozen_scale_stays_in_the_kernel():
    """Bit for bit what the function computes, where `b` is zero."""
    fn = lambda p, x: x @ (p["w"] * p["g"][None])
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params, x = {"w": normal(7, 11), "g": normal(11)}, normal(4, 7)
    lora = jlora.lora(fn, jlora.LoraConfig("w", rank=RANK))
    adapter = lora.init(jax.random.key(0), params, x)
    assert (lora.apply(params, adapter, x) == fn(params, x)).all()
