"""Adapters on disk: what is saved is restored, on any devices, or refused."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from paths import DATA

import jlora
from jlora import KernelAxes, LoraConfig, LoraFactors
from jlora._checkpoint.record import sealed
from jlora.checkpoint import describe, items, restore, save

GOLDEN = DATA / "checkpoint_v1"

# Paths may be any text: Orbax's own separators, no text at all, another script.
DENSE, STACK, HEADS = "params/a.b/kernel", "params/c/*[0]'", '注意/query\\ "\n'
WHOLE = "params/norm/scale"
SHAPES = {DENSE: (8, 24), STACK: (4, 16, 40), HEADS: (16, 8, 12), WHOLE: (40,)}
AXES = {
    DENSE: KernelAxes((), (0,), (1,)),
    STACK: KernelAxes((0,), (1,), (2,)),
    HEADS: KernelAxes((), (0,), (1, 2)),
}
CONFIG = (
    LoraConfig(["kernel", r"注意/.*"], exclude="bias", rank=3, alpha=5.0),
    LoraConfig("c/.*", rank=2, alpha=7.0, rslora=True, dtype="bfloat16"),
    LoraConfig("scale", full=True),
)
RANKS = {DENSE: (3, 5 / 3), STACK: (2, 7 / 2**0.5), HEADS: (3, 5 / 3)}

kinds = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])


def random(rng: np.random.Generator, shape: Any, dtype: Any) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape).astype(jnp.dtype(dtype)))


def params_of(seed: int) -> dict[str, Any]:
    """A base with all the leaves of `SHAPES`, and one that is not adapted."""
    rng = np.random.default_rng(seed)
    shapes = {**SHAPES, "params/bias": (5,)}
    return {path: random(rng, shape, "float32") for path, shape in shapes.items()}


def adapter_of(seed: int, dtype: Any = "float32") -> dict[str, Any]:
    """An adapter of three kinds of kernels and a whole leaf; no array is zero."""
    rng = np.random.default_rng(seed)
    adapter: dict[str, Any] = {WHOLE: random(rng, SHAPES[WHOLE], dtype)}
    for path, axes in AXES.items():
        rank, scaling = RANKS[path]
        shapes = axes.factor_shapes(SHAPES[path], rank)
        a, b = (random(rng, shape, dtype) for shape in shapes)
        adapter[path] = LoraFactors(a, b, axes, scaling)
    return adapter


def assert_same(found: Any, wanted: Any) -> None:
    """Whether two trees are the same to the last bit, static fields and dtypes too."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):  # noqa: B905
        assert isinstance(ours, jax.Array) and ours.dtype == theirs.dtype
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


@pytest.fixture
def adapter() -> dict[str, Any]:
    return adapter_of(seed=0)


@pytest.fixture
def base() -> dict[str, Any]:
    return params_of(seed=1)


def mesh_of(kind: AxisType, *sizes: int) -> jax.sharding.Mesh:
    """A mesh over some of the eight devices, with axes "x" and "y"."""
    names = ("x", "y")[: len(sizes)]
    return jax.make_mesh(sizes, names, (kind,) * len(sizes))


def specs_of(mesh: jax.sharding.Mesh) -> dict[str, NamedSharding]:
    """Shardings of the params over both axes of a mesh."""
    names = [*mesh.axis_names, None][:2]
    specs = {DENSE: P(*names), STACK: P(None, *names), HEADS: P(*names), WHOLE: P("x")}
    return {path: NamedSharding(mesh, spec) for path, spec in specs.items()}


# round trips


@dtypes
def test_a_saved_adapter_is_restored_without_config(tmp_path: Path, dtype: str) -> None:
    adapter = adapter_of(0, dtype)
    save(tmp_path / "new" / "folder", adapter, config=CONFIG)
    found = restore(tmp_path / "new" / "folder")
    assert_same(found, adapter)
    assert not any(leaf.committed for leaf in jax.tree.leaves(found))


def test_a_relative_path_is_one_of_the_working_directory(
    tmp_path: Path, adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save("here", adapter, config=CONFIG)
    assert_same(restore(tmp_path / "here"), adapter)


def test_numpy_arrays_and_boxes_are_saved_as_what_they_hold(
    tmp_path: Path, adapter: Any
) -> None:
    from flax import linen as nn

    box = lambda x: nn.Partitioned(np.asarray(x), names=(None,) * x.ndim)
    save(tmp_path, jax.tree.map(box, adapter), config=CONFIG)
    assert_same(restore(tmp_path, like=jax.tree.map(box, adapter)), adapter)


def test_arrays_may_be_donated_as_soon_as_save_returns(
    tmp_path: Path, adapter: Any
) -> None:
    wanted = jax.tree.map(lambda x: np.array(x), adapter)
    save(tmp_path, adapter, config=CONFIG)
    step = jax.jit(lambda tree: jax.tree.map(lambda x: 3 * x, tree), donate_argnums=0)
    jax.block_until_ready(step(adapter))
    assert_same(restore(tmp_path), wanted)


def test_what_lora_init_gives_is_explained_by_its_config(
    tmp_path: Path, getkey: Callable[[], jax.Array]
) -> None:
    params = {"w": jnp.ones((5, 7)), "bias": jnp.ones((1, 7))}
    config = [LoraConfig(rank=3, alpha=5.0), LoraConfig("bias", full=True)]
    lora = jlora.lora(lambda p, x: x @ p["w"] + p["bias"], config)
    adapter = lora.init(getkey(), params, jnp.ones((2, 5)))
    save(tmp_path, adapter, config=config, base=params)
    assert_same(restore(tmp_path, base=params), adapter)
    assert describe(tmp_path).config == tuple(config)


@pytest.mark.parametrize("exclude", [None, "bias"])
def test_a_bias_that_the_config_excludes_is_not_explained_by_it(
    tmp_path: Path, exclude: str | None
) -> None:
    config = LoraConfig("kernel", exclude=exclude, rank=3, bias="all")
    if exclude is None:
        save(tmp_path, {"dense/bias": jnp.ones(7)}, config=config)
        return
    with pytest.raises(
        jlora.AdapterError, match=r"(?s)not one of `config`.*dense/bias"
    ):
        save(tmp_path, {"dense/bias": jnp.ones(7)}, config=config)


# the record


def test_the_record_says_everything_that_is_no_array(
    tmp_path: Path, adapter: Any, base: Any
) -> None:
    save(tmp_path, adapter, config=CONFIG, base=base)
    record = describe(tmp_path)
    assert record.config == CONFIG and record.version == 1
    shapes = jax.eval_shape(lambda: adapter)
    assert record.adapter == shapes and list(record.adapter) == sorted(adapter)
    found = {e.path: (e.rank, e.scaling, e.alpha) for e in record.entries}
    assert found[DENSE] == (*RANKS[DENSE], 5.0) and found[WHOLE] == (None, None, None)
    assert found[STACK] == (*RANKS[STACK], 7.0)
    assert {p: k.shape for p, k in record.kernels.items()} == SHAPES
    assert {k.dtype for k in record.kernels.values()} == {"float32"}


def test_one_config_comes_back_as_one(tmp_path: Path, adapter: Any) -> None:
    save(tmp_path, {DENSE: adapter[DENSE]}, config=CONFIG[0])
    assert describe(tmp_path).config == CONFIG[0]


def record_file(folder: Path) -> Path:
    """The file of the record of the only step in a folder."""
    (file,) = folder.glob("*/record/metadata")
    return file


def test_the_record_is_the_same_text_at_every_save(
    tmp_path: Path, adapter: Any, base: Any
) -> None:
    for name in ("one", "two"):
        save(tmp_path / name, adapter, config=CONFIG, base=base)
    one, two = (record_file(tmp_path / name) for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def edit(change: Callable[[Any], Any]) -> Callable[[str], str]:
    """A change of the text of a record by a change of its value, digest and all."""

    def edited(text: str) -> str:
        values = json.loads(text)
        change(values)
        return json.dumps(sealed(values))

    return edited


FIRST = '"path": '
BROKEN: dict[str, Callable[[str], str]] = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "trailing": lambda text: text + "}",
    "list": lambda text: "[]",
    "deep": lambda text: text.replace(
        FIRST, '"x": ' + "[" * 90 + "]" * 90 + ", " + FIRST
    ),
    "endless": lambda text: "[" * 100_000,
    "twin key": lambda text: text.replace(FIRST, FIRST + '"x", ' + FIRST, 1),
    "NaN": lambda text: text.replace("5.0", "NaN"),
    "infinity": lambda text: text.replace("5.0", "1e999"),
    "other number": lambda text: text.replace('"scaling": 1.', '"scaling": 2.', 1),
    "other digest": lambda text: text.replace('"digest": "', '"digest": "0', 1),
    "no UTF-8": lambda text: text.replace("jlora", "\udcff", 1),
    "format": edit(lambda v: v.update(format="other")),
    "no version": edit(lambda v: v.pop("version")),
    "version of no number": edit(lambda v: v.update(version=True)),
    "field more": edit(lambda v: v.update(more=1)),
    "entry of no object": edit(lambda v: v["entries"].append(3)),
    "entry twice": edit(lambda v: v["entries"].append(v["entries"][-1])),
    "not sorted": edit(lambda v: v["entries"].reverse()),
    "shape": edit(lambda v: v["entries"][0]["arrays"]["a"].update(shape=[9, 3])),
    "negative": edit(lambda v: v["entries"][0]["kernel"].update(shape=[-8, 24])),
    "huge": edit(lambda v: v["entries"][2]["kernel"].update(shape=[10**30])),
    "bool": edit(lambda v: v["entries"][0].update(rank=True)),
    "rank": edit(lambda v: v["entries"][0].update(rank=4)),
    "alpha": edit(lambda v: v["entries"][0].update(alpha=-1.0)),
    "axes": edit(lambda v: v["entries"][0]["axes"].update(out=[0])),
    "axes of no list": edit(lambda v: v["entries"][0]["axes"].update(out=3)),
    "dtype": edit(lambda v: v["entries"][0]["arrays"]["a"].update(dtype="object")),
    "no dtype": edit(lambda v: v["entries"][0]["arrays"]["a"].update(dtype="?!")),
    "integer": edit(lambda v: v["entries"][0]["arrays"]["a"].update(dtype="int8")),
    "no b": edit(lambda v: v["entries"][0]["arrays"].pop("b")),
    "whole of factors": edit(lambda v: v["entries"][0].pop("axes")),
    "config": edit(lambda v: v["config"][0].update(rank=0)),
    "config of no object": edit(lambda v: v["config"].append("x")),
    "pattern": edit(lambda v: v["config"][0].update(target="(")),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to be copied and damaged."""
    folder = tmp_path_factory.mktemp("saved")
    save(folder, adapter_of(0), config=CONFIG)
    return folder


@pytest.mark.parametrize("name", BROKEN)
def test_a_record_that_is_damaged_is_refused(
    tmp_path: Path, saved: Path, name: str
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    file = record_file(folder)
    text = file.read_text(encoding="utf-8")
    changed = BROKEN[name](text)
    assert changed != text
    file.write_bytes(changed.encode("utf-8", "surrogateescape"))
    with pytest.raises(jlora.CorruptFileError, match=r"record.metadata"):
        describe(folder)


@pytest.mark.parametrize(
    "change",
    [lambda v: v.update(version=2), lambda v: v["config"][0].update(novel=1)],
    ids=["version", "config"],
)
def test_a_record_of_a_newer_version_is_named_as_such(
    tmp_path: Path, saved: Path, change: Callable[[Any], Any]
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    file = record_file(folder)
    file.write_text(edit(change)(file.read_text(encoding="utf-8")))
    with pytest.raises(jlora.FormatVersionError, match="newer jlora"):
        restore(folder)


# damaged files


def test_every_damaged_file_is_found_or_harmless(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    # Large enough for a file of its own, whose bits nobody but jlora checks.
    axes = KernelAxes((), (0,), (1,))
    a, b = (random(rng, shape, "float32") for shape in ((200, 16), (16, 24)))
    adapter = {"w": LoraFactors(a, b, axes, 0.5)}
    config = LoraConfig("w", rank=16, alpha=8.0)
    save(tmp_path, adapter, config=config)
    outcomes = {}
    for file in sorted(p for p in tmp_path.rglob("*") if p.is_file()):
        data = file.read_bytes()
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]
        for how, damaged in {
            "flip": flipped,
            "cut": data[:middle],
            "gone": b"",
        }.items():
            file.unlink()
            if how != "gone":
                file.write_bytes(damaged)
            try:
                assert_same(restore(tmp_path), adapter)
                outcome = "harmless"
            except jlora.CorruptFileError:
                outcome = "found"
            outcomes[file.name, how] = outcome
            file.write_bytes(data)
    assert {outcomes[name, "cut"] for name in ("metadata", "_METADATA")} == {"found"}
    assert list(outcomes.values()).count("found") > 12
    assert_same(restore(tmp_path), adapter)


def test_a_checksum_tells_values_from_others_that_orbax_would_take(
    tmp_path: Path, saved: Path
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    save(tmp_path / "other", adapter_of(1), config=CONFIG)
    shutil.copy(record_file(tmp_path / "other"), record_file(folder))
    with pytest.raises(jlora.CorruptFileError) as caught:
        restore(folder)
    for path in SHAPES:
        assert repr(path) in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_arrays_that_are_not_those_of_the_record_are_all_named(
    tmp_path: Path, dtype: str
) -> None:
    config = LoraConfig("w|v", rank=3, alpha=5.0)
    axes = KernelAxes((), (0,), (1,))
    factors = lambda n, d: LoraFactors(
        jnp.ones((n, 3), d), jnp.ones((3, 7), d), axes, 5 / 3
    )
    save(tmp_path / "one", {"w": factors(5, "float32")}, config=config)
    several = {"v": factors(4, dtype), "w": factors(4, dtype)}
    save(tmp_path / "two", several, config=config)
    shutil.copy(record_file(tmp_path / "two"), record_file(tmp_path / "one"))
    with pytest.raises(jlora.CorruptFileError, match=r"(?s)0/a .*1/a .*1/b "):
        restore(tmp_path / "one")


def test_what_is_not_there_is_said_to_be_missing(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        restore(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
        describe(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no finished step 3, but \[0\]"):
        describe(saved, step=3)


# on other devices


@kinds
def test_a_sharded_adapter_is_restored_on_another_mesh(
    tmp_path: Path, adapter: Any, base: Any, kind: AxisType
) -> None:
    def on(mesh: jax.sharding.Mesh) -> tuple[Any, Any, Any]:
        specs = specs_of(mesh)
        params = {p: jax.device_put(base[p], where) for p, where in specs.items()}
        places = jlora.shardings(params, adapter)
        return params, places, jax.device_put(adapter, places)

    params, _, sharded = on(mesh_of(kind, 4, 2))
    with jax.set_mesh(mesh_of(kind, 4, 2)):
        save(tmp_path, sharded, config=CONFIG, base=params)
    for sizes in [(2, 4), (8,), (2, 1)]:
        params, places, like = on(mesh_of(kind, *sizes))
        given: list[dict[str, Any]] = [{"shardings": places}, {"like": like}]
        given += [{"shardings": jlora.shardings(params, describe(tmp_path).adapter)}]
        for where in given:
            found = restore(tmp_path, base=params, **where)
            assert_same(found, adapter)
            for array, place in zip(
                jax.tree.leaves(found), jax.tree.leaves(places), strict=True
            ):
                assert array.sharding.is_equivalent_to(place, array.ndim)
    assert_same(restore(tmp_path, base=base), adapter)


def test_one_sharding_serves_for_all(saved: Path) -> None:
    place = NamedSharding(mesh_of(AxisType.Auto, 8), P())
    found = restore(saved, shardings=place)
    assert {leaf.sharding for leaf in jax.tree.leaves(found)} == {place}


def test_shardings_that_do_not_fit_are_all_named(saved: Path) -> None:
    place = NamedSharding(mesh_of(AxisType.Auto, 8), P("x"))
    with pytest.raises(jlora.AdapterError) as caught:
        restore(saved, shardings=place)
    for path, name in [(DENSE, "b"), (STACK, "a"), (HEADS, "b")]:
        assert f"{path!r}, {name}" in str(caught.value)
    with pytest.raises(jlora.AdapterError, match="no place in `shardings`"):
        restore(saved, shardings={DENSE: place})
    with pytest.raises(jlora.AdapterError) as caught:
        restore(saved, shardings={"params/a.b/kernl": place, "params/more": place})
    for path in ("params/a.b/kernl", "params/more"):
        assert f"{path!r} is missing in it, and `shardings` has it" in str(caught.value)
    assert f"the nearest: {DENSE!r}" in str(caught.value)
    assert f"{DENSE!r} has no place in `shardings`" in str(caught.value)
    abstract = NamedSharding(place.mesh.abstract_mesh, P())
    with pytest.raises(jlora.AdapterError, match="cannot be laid out"):
        restore(saved, shardings=abstract)
    with pytest.raises(TypeError, match="`shardings` is a dict"):
        restore(saved, shardings=[place])
    with pytest.raises(TypeError, match="`like` is a dict"):
        restore(saved, like=place)  # type: ignore[arg-type]


# like another adapter


def test_shapes_without_shardings_are_restored_on_the_default_device(
    saved: Path,
) -> None:
    wanted = adapter_of(0)
    assert_same(restore(saved, like=jax.eval_shape(lambda: wanted)), wanted)


def test_all_differences_from_what_is_wanted_are_named(saved: Path) -> None:
    like = jax.eval_shape(lambda: adapter_of(0))
    a = jax.ShapeDtypeStruct((8, 4), jnp.float32)
    like[DENSE] = LoraFactors(a, like[DENSE].b, AXES[DENSE], 0.5)
    like[STACK] = like.pop(WHOLE)
    b = jax.ShapeDtypeStruct((3, 8, 12), jnp.bfloat16)
    like[HEADS] = dataclasses.replace(like[HEADS], b=b)
    like["params/other"] = like[HEADS]
    with pytest.raises(jlora.AdapterError) as caught:
        restore(saved, like=like)
    for part in [
        f"{WHOLE!r} is not wanted",
        "'params/other' is missing in it, and `like` has it; the nearest: ",
        f"{DENSE!r}: shape of a is (8, 3), and (8, 4) is wanted",
        f"{DENSE!r}: scaling is {5 / 3}, and 0.5 is wanted",
        f"{DENSE!r}: rank is 3, and 4 is wanted",
        f"{STACK!r}: roles is KernelAxes",
        f"{HEADS!r}: dtype of b is float32, and bfloat16 is wanted",
    ]:
        assert part in str(caught.value)


@pytest.mark.parametrize("odd", [None, 3, "float32", (8, 3)])
def test_what_is_no_array_in_what_is_wanted_is_named(saved: Path, odd: Any) -> None:
    like = jax.eval_shape(lambda: adapter_of(0))
    like[WHOLE] = odd
    like[DENSE] = dataclasses.replace(like[DENSE], b=odd)
    with pytest.raises(jlora.AdapterError) as caught:
        restore(saved, like=like)
    for path in (WHOLE, DENSE):
        said = f"{path!r} in `like` holds a {type(odd).__name__}"
        assert said in str(caught.value)


# beside which base


def test_another_base_is_refused_with_all_differences(
    tmp_path: Path, adapter: Any, base: Any
) -> None:
    save(tmp_path, adapter, config=CONFIG, base=base)
    other = dict(base)
    other["params/a.b/kernels"] = other.pop(DENSE)
    other[STACK] = other[STACK].astype(jnp.bfloat16)
    other[HEADS] = other[HEADS].reshape(16, 12, 8)
    other[WHOLE] = other[WHOLE] + 1e-6
    with pytest.raises(jlora.BaseMismatchError) as caught:
        restore(tmp_path, base=other)
    for part in [
        f"{DENSE!r} (8, 24) is missing. Nearest: 'params/a.b/kernels'",
        f"{STACK!r} has dtype bfloat16, and had float32",
        f"{HEADS!r} has shape (16, 12, 8), and had (16, 8, 12)",
        f"{WHOLE!r} (40,) has other values",
    ]:
        assert part in str(caught.value)
    assert_same(restore(tmp_path, base=other, base_mismatch="allow"), adapter)
    with pytest.raises(ValueError, match="'error' or 'allow', got 'warn'"):
        restore(tmp_path, base_mismatch="warn")


def test_only_what_is_known_of_both_bases_is_compared(
    tmp_path: Path, adapter: Any, base: Any
) -> None:
    abstract = jax.eval_shape(lambda: base)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    other = jax.tree.map(lambda x: -x, base)
    save(tmp_path / "arrays", adapter, config=CONFIG, base=base)
    assert_same(restore(tmp_path / "arrays", base=abstract), adapter)
    save(tmp_path / "shapes", adapter, config=CONFIG, base=abstract)
    assert_same(restore(tmp_path / "shapes", base=other), adapter)
    with pytest.raises(jlora.BaseMismatchError, match="dtype bfloat16"):
        restore(tmp_path / "shapes", base=half)
    save(tmp_path / "none", adapter, config=CONFIG)
    assert_same(restore(tmp_path / "none", base=half), adapter)
    with pytest.raises(jlora.BaseMismatchError, match="has shape"):
        restore(tmp_path / "none", base={**base, DENSE: base[DENSE].T})


# The pieces of the large one are read on their devices.
@pytest.mark.parametrize("shape", [(8, 24, 6), (4, 400, 312)], ids=["small", "large"])
@kinds
@dtypes
def test_digests_do_not_depend_on_the_sharding(
    dtype: str, kind: AxisType, shape: tuple[int, ...]
) -> None:
    from jlora._checkpoint.fingerprint import contents, fingerprint

    x = random(np.random.default_rng(0), shape, dtype)
    both = lambda x: (fingerprint({"w": x}, ["w"]), contents([x]))
    wanted = both(np.asarray(x))
    mesh = mesh_of(kind, 2, 4)
    for spec in [P(), P("x"), P("y", None, "x"), P(None, ("x", "y"))]:
        placed = jax.device_put(x, NamedSharding(mesh, spec))
        assert both(placed) == wanted
        with jax.set_mesh(mesh):
            assert both(placed) == wanted


def test_a_checksum_sees_each_value_and_its_place() -> None:
    from jlora._checkpoint.fingerprint import contents

    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    changed = [x, x.reshape(4, 3)[::-1], x.T, np.where(x == 7, np.float32(-7), x)]
    changed += [np.where(x == i, np.nextafter(x, np.float32(99)), x) for i in range(12)]
    found = contents([np.asarray(c, np.float32) for c in changed])
    assert len({content.checksum for content in found}) == len(changed)


# what cannot be saved


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda a: [1], TypeError, "got list"),
        (lambda a: {3: a[DENSE]}, TypeError, "dict from path"),
        (lambda a: {}, jlora.AdapterError, "it is empty"),
        (lambda a: {**a, "w": 3}, jlora.AdapterError, "no array but a int"),
        (lambda a: {"w": jnp.arange(3)}, jlora.AdapterError, "dtype int32"),
        (lambda a: {"w": jnp.ones((0, 3))}, jlora.AdapterError, "no values"),
        (lambda a: jax.eval_shape(lambda: a), jlora.AdapterError, "ShapeDtypeStruct"),
        (
            lambda a: {DENSE: LoraFactors(a[DENSE].a, a[HEADS].b, AXES[DENSE], 5 / 3)},
            jlora.AdapterError,
            r"\(3, 8, 12\).*KernelAxes",
        ),
        (
            lambda a: {"kernel": LoraFactors(a[DENSE].a, a[DENSE].b, AXES[DENSE], 0.5)},
            jlora.AdapterError,
            r"scaling 0.5.*LoraConfig\('kernel', rank=3, alpha=1.5\)",
        ),
        (lambda a: {**a, "w": a[DENSE]}, jlora.AdapterError, "'w' has rank 3"),
        (lambda a: {"kernel": a[WHOLE]}, jlora.AdapterError, "is `full`"),
        (lambda a: {**a, WHOLE: a[WHOLE] / 0}, jlora.NonFiniteError, "40 of 40"),
    ],
)  # fmt: skip
def test_what_is_no_adapter_of_the_config_is_not_saved(
    tmp_path: Path, adapter: Any, change: Callable[[Any], Any], error: Any, match: str
) -> None:
    with pytest.raises(error, match=match):
        save(tmp_path / "new", change(adapter), config=CONFIG)
    assert not (tmp_path / "new").exists()


def test_a_traced_adapter_is_not_saved(tmp_path: Path, adapter: Any) -> None:
    with pytest.raises(jlora.AdapterError, match="Tracer"):
        jax.jit(lambda a: save(tmp_path, a, config=CONFIG))(adapter)


def test_a_base_that_the_adapter_does_not_fit_is_refused_before_writing(
    tmp_path: Path, adapter: Any, base: Any
) -> None:
    with pytest.raises(jlora.AdapterError, match="no path of the params"):
        save(tmp_path / "new", adapter, config=CONFIG, base={DENSE: base[DENSE]})
    with pytest.raises(TypeError, match="`LoraConfig` or several, got 'kernel'"):
        save(tmp_path / "new", adapter, config="kernel", base=base)  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


# over another


def test_an_adapter_is_replaced_only_when_asked(tmp_path: Path, adapter: Any) -> None:
    save(tmp_path, adapter, config=CONFIG)
    other = jax.tree.map(lambda x: -x, adapter)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save(tmp_path, other, config=CONFIG)
    assert_same(restore(tmp_path), adapter)
    for tree in (other, {DENSE: adapter[DENSE]}):
        save(tmp_path, tree, config=CONFIG, overwrite=True)
        assert_same(restore(tmp_path), tree)
        assert len(list(tmp_path.iterdir())) == 1  # the old one is gone


@pytest.mark.parametrize("what", ["file", "folder of files", "run"])
def test_what_save_did_not_write_is_never_replaced(
    tmp_path: Path, adapter: Any, what: str
) -> None:
    path = tmp_path / "there"
    if what == "file":
        path.write_text("mine")
    elif what == "folder of files":
        path.mkdir()
        (path / "mine").write_text("mine")
    else:
        with ocp.CheckpointManager(path) as manager:
            args = {**items(adapter, config=CONFIG), "more": ocp.args.JsonSave([1])}
            manager.save(7, args=ocp.args.Composite(**args))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match="something else"):
        save(path, adapter, config=CONFIG, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_interrupted_saves_left_is_cleared(tmp_path: Path, adapter: Any) -> None:
    torn = tmp_path / "0.orbax-checkpoint-tmp" / "adapter"
    torn.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
        restore(tmp_path)
    save(tmp_path, adapter, config=CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == ["0"]


# training runs


@kinds
def test_a_run_is_restored_with_its_optimizer_on_another_mesh(
    tmp_path: Path, adapter: Any, base: Any, kind: AxisType
) -> None:
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 3, 20)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))

    def places_on(mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
        places = jlora.shardings(specs_of(mesh), adapter, mesh=mesh)
        return places, jlora.state_shardings(tx, adapter, places)

    places, state_places = places_on(mesh_of(kind, 4, 2))
    trained = jax.device_put(adapter, places)
    state = jax.jit(tx.init, out_shardings=state_places)(trained)
    _, state = jax.jit(tx.update)(trained, state, trained)
    with ocp.CheckpointManager(tmp_path) as manager:
        for step in (10, 20):
            args = ocp.args.Composite(
                **items(trained, config=CONFIG, base=base),
                opt_state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave({"position": step}),
            )
            manager.save(step, args=args)

    places, state_places = places_on(mesh_of(kind, 2, 2))
    like = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        jax.eval_shape(tx.init, adapter),
        state_places,
    )
    with ocp.CheckpointManager(tmp_path) as manager:
        found = restore(tmp_path, step=10, shardings=places, base=base)
        args = ocp.args.Composite(
            opt_state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore()
        )
        rest = manager.restore(10, args=args)
    assert_same(found, adapter)
    assert_same(rest.opt_state, state)
    assert rest.data == {"position": 10}
    assert restore(tmp_path, shardings=places)[DENSE].a.sharding == places[DENSE].a


# files of earlier versions


def test_a_checkpoint_of_version_1_is_still_restored() -> None:
    axes = KernelAxes(batch=(), in_=(0,), out=(1,))
    a = np.arange(10, dtype=np.float32).reshape(5, 2) - 3
    b = (np.arange(14).reshape(2, 7) / 4).astype(jnp.bfloat16)
    whole = np.float16([1, -2, 0.5])
    adapter = {"params/w": LoraFactors(a, b, axes, 1.5), "params/scale": whole}  # type: ignore[arg-type]
    config = (LoraConfig("w", rank=2, alpha=3.0), LoraConfig("scale", full=True))
    base = {
        "params": {
            "w": np.linspace(-1, 1, 35, dtype=np.float32).reshape(5, 7),
            "scale": np.ones(3, np.float32),
        }
    }
    # It was written by `save(GOLDEN, adapter, config=config, base=base)`.
    record = describe(GOLDEN)
    assert record.config == config
    assert [e.alpha for e in record.entries] == [None, 3.0]
    assert_same(restore(GOLDEN, like=adapter, base=base), adapter)
    base["params"]["w"][0, 0] = 0
    with pytest.raises(jlora.BaseMismatchError, match=re.escape("'params/w'")):
        restore(GOLDEN, base=base)
