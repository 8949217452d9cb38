"""Codes of four bits as bytes: through Orbax, and onto another mesh."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora

qwix = pytest.importorskip("qwix")
import jlora.quant  # noqa: E402

SHAPES = {"even": (8, 6), "odd": (8, 5), "stack": (3, 4, 16), "all_odd": (3, 5, 7)}
SPECS = [P("data", "model"), P("model", "data"), P(None, "data")]
AXES = [AxisType.Auto, AxisType.Explicit]


def params(qtype: str = "nf4") -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    plain = {
        n: jax.random.normal(k, s)
        for (n, s), k in zip(SHAPES.items(), keys, strict=True)
    }
    found = jlora.quantize(plain, "|".join(SHAPES), qtype)
    return {**found, "bias": jnp.arange(5.0)}


def codes(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(tree[name].qvalue.astype(jnp.uint8)) for name in SHAPES}


def assert_same(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    for one, other in pairs:
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(
            np.asarray(one.astype(jnp.float32)), np.asarray(other.astype(jnp.float32))
        )


def test_a_byte_has_two_neighbours() -> None:
    packed, given = jlora.quant.pack(params()), codes(params())
    even = np.asarray(packed["even"].qvalue)
    np.testing.assert_array_equal(even & 15, given["even"][:, ::2])
    np.testing.assert_array_equal(even >> 4, given["even"][:, 1::2])
    odd = np.asarray(packed["odd"].qvalue)  # along the other axis
    np.testing.assert_array_equal(odd & 15, given["odd"][::2])
    np.testing.assert_array_equal(odd >> 4, given["odd"][1::2])
    np.testing.assert_array_equal(packed["all_odd"].qvalue, given["all_odd"])
    assert {v.qvalue.dtype.name for n, v in packed.items() if n != "bias"} == {"uint8"}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("abstract", [False, True])
def test_unpack_undoes_pack(abstract: bool, jit: bool) -> None:
    given = params()
    like = jax.eval_shape(lambda: given) if abstract else given
    run = lambda tree: jlora.quant.unpack(jlora.quant.pack(tree), like)
    assert_same(jax.jit(run)(given) if jit else run(given), given)


@pytest.mark.parametrize("qtype", ["int4", "int8"])
def test_other_codes_stay_as_they_are(qtype: str) -> None:
    given = params(qtype)
    assert_same(jlora.quant.pack(given), given)
    assert_same(jlora.quant.unpack(given, given), given)


def meshes(kind: AxisType) -> tuple[Any, Any]:
    make = lambda shape: jax.make_mesh(shape, ("data", "model"), (kind, kind))
    return make((2, 4)), make((4, 2))


def placed(mesh: Any, given: Any, spec: P) -> Any:
    """The shardings of quantised params on a mesh, where sizes divide."""
    specs = {name: P(None, *spec) if len(s) > 2 else spec for name, s in SHAPES.items()}
    specs = {n: s for n, s in specs.items() if n in ("even", "stack")}
    whole = {name: P() for name in given if name not in specs}
    return jlora.quant.shardings(given, {**specs, **whole}, mesh=mesh)


@pytest.mark.parametrize("kind", AXES)
@pytest.mark.parametrize(
    "spec", [P("data", "model"), P("model", "data"), P(None, "data")]
)
def test_packed_params_are_restored_onto_another_mesh(
    kind: AxisType, spec: P, tmp_path: Path
) -> None:
    mesh, other = meshes(kind)
    given = params()
    fits = lambda mesh: SHAPES["even"][1] % mesh.shape["model"] == 0
    first = spec if fits(mesh) else P("data", None)
    start = jax.device_put(given, placed(mesh, given, first))
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "packed", jlora.quant.pack(start))
        saver.wait_until_finished()
        end = placed(other, given, P("data", "model") if fits(other) else P("data"))
        struct = lambda v, s: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=s)
        shapes = jax.tree.map(struct, given, end)
        wanted = jlora.quant.pack(shapes)
        found = saver.restore(tmp_path / "packed", wanted)
    again = jlora.quant.unpack(found, shapes)
    assert_same(again, given)
    for one, place in zip(jax.tree.leaves(again), jax.tree.leaves(end), strict=True):
        assert isinstance(place, NamedSharding) and place.mesh.shape == other.shape
        assert one.sharding.is_equivalent_to(place, one.ndim)


def test_what_is_not_packed_is_refused() -> None:
    given = params()
    with pytest.raises(ValueError, match=r"'all_odd'.*jlora\.quant\.pack"):
        jlora.quant.unpack(given, given)
    with pytest.raises(ValueError, match=r"not alike.*bias"):
        less = {n: v for n, v in jlora.quant.pack(given).items() if n != "bias"}
        jlora.quant.unpack(less, given)
    short = dataclasses.replace(
        jlora.quant.pack(given)["even"], qvalue=jnp.zeros((8, 2), jnp.uint8)
    )
    with pytest.raises(ValueError, match=r"\(8, 3\) uint8"):
        jlora.quant.unpack({**jlora.quant.pack(given), "even": short}, given)
