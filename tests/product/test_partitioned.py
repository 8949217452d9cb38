"""The forms for meshes of several devices: one operation with a partitioning rule.

The kernel of the fused one runs on GPUs alone; a device's part is summed by XLA here.
The reference is the materialized kernel on one device.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from case import randomized
from forms import choose
from hlo import collectives
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from oracle import assert_close

import jlora
from jlora._product import fused

pytestmark = pytest.mark.usefixtures("fast_compile")

ROWS, WIDTH, IN, OUT, R = 8, 12, 32, 64, 3
# How kernels and inputs lie on a mesh of two axes.
LAYOUTS: dict[str, tuple[Any, Any]] = {
    "rows": (P(), P(("i", "j"))),
    "fsdp": (P("i"), P("i")),
    "fsdp over outputs": (P(None, "i"), P("i")),
    "columns": (P(None, "j"), P("i")),
    "both": (P("i", "j"), P("i")),
    "partial sums": (P("j"), P("i", None, "j")),
    "sequence": (P(), P("i", "j")),
    "sequence, fsdp": (P(("i", "j")), P("i", "j")),
}
# Where a product is summed over devices, of which Explicit types must be told.
SUMMED = ("columns", "partial sums", "both")
KINDS = [AxisType.Auto, AxisType.Explicit]
each_kind = pytest.mark.parametrize("kind", KINDS)
# Explicit types refuse rows and outputs over one axis, without factors too.
each_layout = pytest.mark.parametrize(
    ("layout", "kind"),
    [
        (layout, kind)
        for layout in LAYOUTS
        for kind in KINDS
        if (layout, kind) != ("fsdp over outputs", AxisType.Explicit)
    ],
)


each_form = pytest.mark.parametrize("form", ["fused", "ruled"])


def model(out: Any = None) -> Callable[[Any, jax.Array], jax.Array]:
    """Two products of one input, laid out as is said where it must be said."""
    dot = lambda x, w: jnp.dot(x, w, out_sharding=out)
    return lambda p, x: jnp.tanh(dot(x, p["q"])) * dot(x, p["k"])


def case() -> tuple[Any, ...]:
    """The config, params, a random adapter and an input."""
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
    params = {"q": draw(0, IN, OUT) / 6, "k": draw(1, IN, OUT) / 6}
    x = draw(2, ROWS, WIDTH, IN)
    config = jlora.LoraConfig(rank=R, alpha=5.0)
    adapter = jlora.lora(model(), config).init(jax.random.key(3), params, x)
    return config, params, randomized(adapter, jax.random.key(4)), x


def compiled(
    layout: str, kind: AxisType, sizes: tuple[int, int] = (2, 4)
) -> tuple[Any, Any]:
    """Compiles the step on a mesh, and returns it with its arguments."""
    config, params, adapter, x = case()
    of_w, of_x = LAYOUTS[layout]
    # Explicit types leave open how a sum over a sharded axis is laid out.
    said = kind is AxisType.Explicit and layout == "partial sums"
    lora = jlora.lora(model(P("i") if said else None), config)
    loss = lambda a, x, p: jnp.sum(lora.apply(p, a, x) ** 2)
    devices = jax.devices()[: sizes[0] * sizes[1]]
    mesh = jax.make_mesh(sizes, ("i", "j"), axis_types=(kind,) * 2, devices=devices)
    with jax.set_mesh(mesh):
        args = jax.device_put((adapter, x, params), (P(), of_x, of_w))
        step = jax.jit(jax.value_and_grad(loss, (0, 1)))
        return step.lower(*args).compile(), args


@each_form
@each_layout
def test_values_and_gradients(
    layout: str, kind: AxisType, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, params, adapter, x = case()
    merged = lambda a, x: jnp.sum(model()(jlora.merge(params, a), x) ** 2)
    expected = jax.value_and_grad(merged, (0, 1))(adapter, x)
    choose(monkeypatch, form)
    step, args = compiled(layout, kind)
    assert_close(*jax.tree.map(np.asarray, (step(*args), expected)), 1e-4)


FORMS = ["separate", "singly", "extended", "joined", "copied", "fused"]


@pytest.mark.parametrize("form", FORMS)
def test_each_form_on_a_mesh_of_one_device(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the program says how its products lie, which most forms have none of."""
    _, params, adapter, x = case()
    merged = lambda a, x: jnp.sum(model()(jlora.merge(params, a), x) ** 2)
    expected = jax.value_and_grad(merged, (0, 1))(adapter, x)
    choose(monkeypatch, form)
    step, args = compiled("partial sums", AxisType.Explicit, (1, 1))
    assert_close(*jax.tree.map(np.asarray, (step(*args), expected)), 1e-4)


def chain(said: bool = False) -> Callable[[Any, jax.Array], jax.Array]:
    """Two products that share no input, laid out as is said where it must be said."""
    dot = lambda x, w: jnp.dot(x, w, out_sharding=P("i") if said else None)
    return lambda p, x: dot(jnp.tanh(dot(x, p["q"])), p["v"])


@each_layout
def test_values_without_a_backward_pass(layout: str, kind: AxisType) -> None:
    """Where nothing else needs `x·a` it is made on each device, of its own part."""
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
    params = {"q": draw(0, IN, OUT) / 6, "v": draw(1, OUT, IN) / 8}
    x, config = draw(2, ROWS, WIDTH, IN), jlora.LoraConfig(rank=R, alpha=5.0)
    fresh = jlora.lora(chain(), config).init(jax.random.key(3), params, x)
    adapter = randomized(fresh, jax.random.key(4))
    of_w, of_x = LAYOUTS[layout]
    explicit = kind is AxisType.Explicit
    lora = jlora.lora(chain(explicit and layout in SUMMED), config)
    mesh = jax.make_mesh((2, 4), ("i", "j"), axis_types=(kind,) * 2)
    turned = P(*(of_w[::-1] if len(of_w) == 2 else (None, *of_w)))
    refused = explicit and layout.endswith("fsdp")  # rows and outputs over one axis
    places = {"q": of_w, "v": P() if refused else turned}
    with jax.set_mesh(mesh):
        args = jax.device_put((params, adapter, x), (places, P(), of_x))
        found = jax.jit(lora.apply)(*args)
    expected = chain()(jlora.merge(params, adapter), x)
    assert_close(np.asarray(found), expected, 1e-5)


@each_layout
def test_what_each_device_sums(
    layout: str, kind: AxisType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows and outputs stay divided as they are, whatever else is gathered."""
    choose(monkeypatch, "fused")
    seen = []
    matrices = fused._matrices

    def spied(terms: fused.Terms, turned: bool) -> Any:
        seen.append((tuple(terms.h.shape), terms.b.shape[:-1]))
        return matrices(terms, turned)

    monkeypatch.setattr(fused, "_matrices", spied)
    compiled(layout, kind)
    rows = {"rows": (1, 12), "sequence": (4, 3), "sequence, fsdp": (4, 3)}
    divided = rows.get(layout, (4, 12))
    outputs = OUT // 4 if layout in ("columns", "both") else OUT
    own = [rows for rows, _ in seen if rows[:2] == divided]
    assert own and ((*divided, R), (outputs,)) in seen


@each_form
@each_kind
@pytest.mark.parametrize("layout", ["rows", "sequence"])
def test_nothing_but_gradients_of_factors_is_moved(
    layout: str, kind: AxisType, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, form)
    step, _ = compiled(layout, kind)
    moved = collectives(step)
    assert all(size <= 2 * R * OUT for _, size in moved), moved


@each_form
@pytest.mark.parametrize("parts", [2, 4])
def test_microbatches_lie_along_parts_of_an_axis(
    parts: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sharded rows are cut into parts, of which each lies along a part of the axis."""
    choose(monkeypatch, form)
    config, params, adapter, x = case()
    lora = jlora.lora(model(), config)

    def accumulated(apply: Any, adapter: Any, params: Any, x: jax.Array) -> Any:
        loss = lambda a, x: jnp.sum(apply(params, a, x) ** 2)
        add = lambda total, x: (
            jax.tree.map(jnp.add, total, jax.grad(loss)(adapter, x)),
            None,
        )
        zeros = jax.tree.map(jnp.zeros_like, adapter)
        return jax.lax.scan(add, zeros, x.reshape(parts, -1, *x.shape[1:]))[0]

    formed = lambda params, adapter, x: model()(jlora.merge(params, adapter), x)
    expected = accumulated(formed, adapter, params, x)
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
    place = lambda *spec: jax.NamedSharding(mesh, P(*spec))
    args = jax.device_put((adapter, params, x), (place(), place("i"), place("i")))
    found = jax.jit(lambda *args: accumulated(lora.apply, *args))(*args)
    assert_close(*jax.tree.map(np.asarray, (found, expected)), 1e-4)
