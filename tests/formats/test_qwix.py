"""States of Qwix, Tunix and `nnx.LoRA`: adapters beside what their models compute."""

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import qwix_models as models
from flax import nnx

import jlora
import jlora.checkpoint
import jlora.tunix
from jlora import KernelAxes
from jlora.__main__ import DIFFERENT, FAILED, SAME, main
from jlora._formats import qwix_steps
from jlora._formats.qwix_axes import axes_of_factors, laid_out, shape_alone

pytestmark = pytest.mark.usefixtures("fast_compile")

NAMES = ("conv", "experts", "heads", "out", "proj", "value")


def run(*words: Any) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def model() -> Any:
    return models.adapted()


@pytest.fixture(scope="module")
def params() -> Any:
    """Those of the model without LoRA."""
    return nnx.state(models.plain(), nnx.Param)


def check_outputs(adapter: Any, expected: Any) -> None:
    """The plain model with the adapter merged in computes what Qwix's model does."""
    graphdef, own, rest = nnx.split(models.plain(), nnx.Param, ...)
    moved = nnx.merge(graphdef, jlora.merge(own, adapter), rest)
    x = models.inputs()
    before, after = models.plain()(x), moved(x)
    leaves = map(jax.tree.leaves, (expected, after, before))
    for one, two, base in zip(*leaves, strict=True):
        assert jnp.abs(one - base).max() > 0.1
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)


def same(one: Any, other: Any) -> bool:
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


# --- the delta is Qwix's ---


def test_a_live_state_gives_what_qwix_computes(model: Any) -> None:
    config, adapter = jlora.tunix.adapter_of(nnx.state(model), alpha=models.ALPHA)
    paths = {f"layers/{i}/{n}/kernel" for i in range(2) for n in NAMES}
    assert set(adapter) == paths
    assert {e.scaling for e in adapter.values()} == {3.0}
    assert (config.rank, config.alpha) == (2, 6.0)
    check_outputs(adapter, models.outputs(model))


def test_shapes_of_params_do_for_factors_alone(model: Any, params: Any) -> None:
    state = nnx.state(model, nnx.LoRAParam)
    shapes = jax.eval_shape(lambda: params)
    _, adapter = jlora.tunix.adapter_of(state, shapes, alpha=models.ALPHA)
    check_outputs(adapter, models.outputs(model))


def test_a_plan_tells_the_roles_that_the_program_has(model: Any) -> None:
    graphdef, params, rest = nnx.split(models.plain(), nnx.Param, ...)
    fn = lambda p, x: nnx.merge(graphdef, p, rest)(x)
    configs = jlora.LoraConfig(".*kernel", rank=2, alpha=6.0)
    lora = jlora.lora(fn, configs)
    x = models.inputs()
    plan = lora.plan(params, x)
    _, adapter = jlora.tunix.adapter_of(
        nnx.state(model, nnx.LoRAParam), plan, alpha=models.ALPHA
    )
    assert adapter["layers/0/experts/kernel"].axes.batch == (0,)
    like = lora.init(jax.random.key(0), params, x)
    roles = lambda entries: {path: entry.axes for path, entry in entries.items()}
    assert roles(adapter) == roles(like)
    found = jax.tree.leaves(lora.apply(params, adapter, x))
    for one, other in zip(found, models.outputs(model), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_a_quantised_base_has_the_shapes_of_its_codes() -> None:
    layer = nnx.LinearGeneral(6, (4, 3), rngs=nnx.Rngs(0))
    options = {"weight_qtype": "int8", "tile_size": None}
    made = models.adapted(layer, jnp.ones((2, 6)), **options)
    _, adapter = jlora.tunix.adapter_of(nnx.state(made), alpha=models.ALPHA)
    (entry,) = adapter.values()
    state = nnx.state(made, nnx.LoRAParam)
    a, b = (state[f"kernel_lora_{side}"][...] for side in "ab")
    delta = 3.0 * np.einsum("ir,rhd->ihd", a, np.reshape(b, (2, 4, 3)))
    np.testing.assert_allclose(jlora.delta(entry), delta, 1e-5, 1e-6)


# --- what Orbax has saved ---


def save(place: Path, state: Any) -> Path:
    with ocp.StandardCheckpointer() as saver:
        saver.save(place, state)
    return place


def save_run(folder: Path, *states: Any) -> Path:
    """Steps 10, 20, … of a run as Tunix saves them, with an optimizer's beside."""
    handlers = {n: ocp.PyTreeCheckpointHandler() for n in ("model_params", "optimizer")}
    with ocp.CheckpointManager(folder, item_handlers=handlers) as manager:
        for number, state in enumerate(states, 1):
            items = {name: ocp.args.PyTreeSave(state) for name in handlers}
            manager.save(10 * number, args=ocp.args.Composite(**items), force=True)
    return folder


LAYOUTS = {
    "variables": lambda model: nnx.state(model),
    "arrays": lambda model: nnx.to_pure_dict(nnx.state(model)),
    "factors alone": lambda model: nnx.state(model, nnx.LoRAParam),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_orbax_saved_is_the_live_state(
    layout: str, model: Any, params: Any, tmp_path: Path
) -> None:
    _, expected = jlora.tunix.adapter_of(nnx.state(model), params, alpha=6.0)
    place = save(tmp_path / "state", LAYOUTS[layout](model))
    _, found = jlora.tunix.restore(place, params, alpha=6.0)
    assert same(found, expected)


def test_a_run_has_steps(model: Any, tmp_path: Path) -> None:
    late = nnx.state(model)
    early = jax.tree.map(lambda array: array * 2, late)
    folder = save_run(tmp_path / "run", early, late)
    read = lambda place, **options: jlora.tunix.restore(place, alpha=6.0, **options)[1]
    expected = [jlora.tunix.adapter_of(s, alpha=6.0)[1] for s in (early, late)]
    assert not same(*expected)
    assert same(read(folder), expected[1])
    assert same(read(folder, step=10), expected[0])
    assert same(read(folder / "10"), expected[0])
    assert same(read(folder / "20" / "model_params"), expected[1])
    assert same(read(folder, item="optimizer"), expected[1])
    with pytest.raises(FileNotFoundError, match=r"no finished step 30.*\[10, 20\]"):
        read(folder, step=30)
    with pytest.raises(FileNotFoundError, match="no item 'other'"):
        read(folder, item="other")
    shutil.rmtree(folder / "20" / "model_params")
    assert same(read(folder), expected[1])  # the only state that is left


def test_of_several_states_one_is_chosen(model: Any, tmp_path: Path) -> None:
    state = nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))
    for name in ("one", "two"):
        save(tmp_path / name, state)
    with pytest.raises(jlora.AdapterError, match=r"several states.*'one', 'two'"):
        jlora.tunix.restore(tmp_path, alpha=6.0)
    assert jlora.tunix.restore(tmp_path, alpha=6.0, item="two")[1]


def test_only_factors_are_read(model: Any, tmp_path: Path) -> None:
    """A base that is too large, or damaged, is none of the adapter's business."""
    state = nnx.to_pure_dict(nnx.state(model))
    state["layers"][0]["value"]["kernel"] = jnp.full((6, 5), jnp.nan)
    place = save(tmp_path / "state", state)
    assert len(jlora.tunix.restore(place, alpha=6.0)[1]) == 12


# --- alpha ---


def test_a_missing_alpha_says_what_to_give(model: Any) -> None:
    with pytest.raises(jlora.AdapterError, match="Qwix stores no alpha") as caught:
        jlora.tunix.adapter_of(nnx.state(model))
    assert "`alpha=16.0`" in str(caught.value) and "--alpha 16" in str(caught.value)


def test_several_alphas_by_patterns(model: Any) -> None:
    alpha = {"layers/0/value": 4, "value|out": 3.0, ".*": 6}
    _, adapter = jlora.tunix.adapter_of(nnx.state(model), alpha=alpha)
    found = {path: entry.scaling for path, entry in adapter.items()}
    assert found["layers/0/value/kernel"] == 2.0
    assert found["layers/1/value/kernel"] == found["layers/0/out/kernel"] == 1.5
    assert found["layers/0/heads/kernel"] == 3.0
    del alpha[".*"]
    with pytest.raises(jlora.AdapterError, match="of 8 kernels"):
        jlora.tunix.adapter_of(nnx.state(model), alpha=alpha)


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf"), True, "6"])
def test_an_alpha_is_a_positive_number(alpha: Any, model: Any) -> None:
    with pytest.raises(ValueError, match="positive number"):
        jlora.tunix.adapter_of(nnx.state(model), alpha=alpha)


def test_an_alpha_that_nothing_takes_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="no path matches 'missing'"):
        jlora.tunix.adapter_of(nnx.state(model), alpha={"missing": 6.0, ".*": 2.0})


# --- nnx.LoRA ---


class WithLora(nnx.Module):
    """A layer of each kind."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.own = nnx.LoRALinear(6, 5, lora_rank=2, rngs=rngs)
        around = nnx.Linear(5, 7, rngs=rngs)
        self.around = nnx.LoRA(5, 3, 7, base_module=around, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.around(self.own(x))


class Without(nnx.Module):
    """The same without LoRA."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.own = nnx.Linear(6, 5, rngs=rngs)
        self.around = nnx.Linear(5, 7, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.around(self.own(x))


@pytest.mark.parametrize("kept", ["all", "factors", "split", "saved"])
def test_nnx_lora_gives_what_it_computes(kept: str, tmp_path: Path) -> None:
    model, x = WithLora(nnx.Rngs(0)), jnp.asarray(np.eye(6)[:4], jnp.float32)
    rng = np.random.default_rng(3)
    new = lambda array: jnp.asarray(rng.normal(size=array.shape), array.dtype)
    nnx.update(model, jax.tree.map(new, nnx.state(model, nnx.LoRAParam)))
    state = nnx.state(model)
    if kept == "saved":
        configs, adapter = jlora.tunix.restore(save(tmp_path / "state", state))
    else:
        part = state if kept == "all" else nnx.state(model, nnx.LoRAParam)
        if kept == "split":  # variables in dicts, as EasyDeL's `split_lora_params`
            layers = {"own": model.own.lora, "around": model.around}
            each = {n: (m.lora_a, m.lora_b) for n, m in layers.items()}
            part = {n: {"lora_a": a, "lora_b": b} for n, (a, b) in each.items()}
        configs, adapter = jlora.tunix.adapter_of(part)
    shapes = {path: entry.kernel_shape for path, entry in adapter.items()}
    assert shapes == {"own/kernel": (6, 5), "around/kernel": (5, 7)}
    assert {(c.rank, c.scaling) for c in configs} == {(2, 1.0), (3, 1.0)}
    other = Without(nnx.Rngs(0))
    for name, layer in (("own", model.own), ("around", model.around.base_module)):
        nnx.update(getattr(other, name), nnx.state(layer, nnx.Not(nnx.LoRAParam)))
    graphdef, params, rest = nnx.split(other, nnx.Param, ...)
    merged = nnx.merge(graphdef, jlora.merge(params, adapter), rest)
    np.testing.assert_allclose(merged(x), model(x), rtol=1e-4, atol=1e-4)
    assert jnp.abs(other(x) - model(x)).max() > 0.1


def test_nnx_lora_has_no_alpha() -> None:
    state = nnx.state(WithLora(nnx.Rngs(0)))
    with pytest.raises(ValueError, match="act as they are"):
        jlora.tunix.adapter_of(state, alpha=6.0)


# --- roles of axes ---

ROLES = [
    KernelAxes((), (0,), (1,)),
    KernelAxes((), (1,), (0,)),
    KernelAxes((), (0,), (1, 2)),
    KernelAxes((), (1, 2), (0,)),
    KernelAxes((), (1,), (0, 2)),
    KernelAxes((), (0, 2), (1, 3)),
    KernelAxes((0,), (1,), (2,)),
    KernelAxes((1,), (0,), (2,)),
    KernelAxes((0,), (2,), (1, 3)),
    KernelAxes((0, 1), (2,), (3,)),
]
SIZES = (5, 7, 11, 13)


def made_by_qwix(axes: KernelAxes, flat: bool, rank: int = 3) -> tuple[Any, ...]:
    """A kernel's shape, factors as Qwix lays them out, and their product by NumPy."""
    shape, letters = SIZES[: axes.ndim], "abcd"[: axes.ndim]
    rng = np.random.default_rng(0)
    names = lambda own: "".join(letters[i] for i in own)
    batch, in_, out = map(names, (axes.batch, axes.in_, axes.out))
    size = dict(zip(letters, shape, strict=True)) | {"r": rank}
    draw = lambda text: rng.normal(size=[size[c] for c in text])
    if flat:
        a, b = draw(f"{batch}{in_}r"), draw(f"{batch}r{out}")
        delta = np.einsum(f"{batch}{in_}r,{batch}r{out}->{letters}", a, b)
        lead = [size[c] for c in batch]
        return shape, a.reshape(*lead, -1, rank), b.reshape(*lead, rank, -1), delta
    both = "".join(sorted(batch + in_))
    a, b = draw(f"{both}r"), draw(f"r{out}")
    return shape, a, b, np.einsum(f"{both}r,r{out}->{letters}", a, b)


def product(a: Any, b: Any, axes: KernelAxes) -> Any:
    f32 = lambda x: jnp.asarray(x, jnp.float32)
    return jlora.delta(jlora.LoraFactors(f32(a), f32(b), axes, 1.0))


@pytest.mark.parametrize("told", [False, True], ids=["shapes", "plan"])
@pytest.mark.parametrize("flat", [False, True], ids=["einsum", "dot_general"])
@pytest.mark.parametrize("axes", ROLES, ids=str)
def test_roles_give_the_delta(axes: KernelAxes, flat: bool, told: bool) -> None:
    shape, a, b, delta = made_by_qwix(axes, flat)
    found = axes_of_factors("w", a.shape, b.shape, shape, axes if told else None)
    if told:
        assert found == axes
    own = laid_out(a, b, shape, found)
    np.testing.assert_allclose(product(*own, found), delta, 1e-4, 1e-5)


@pytest.mark.parametrize("flat", [False, True], ids=["einsum", "dot_general"])
@pytest.mark.parametrize("axes", ROLES, ids=str)
def test_factors_alone_give_the_delta_up_to_its_layout(
    axes: KernelAxes, flat: bool
) -> None:
    _, a, b, delta = made_by_qwix(axes, flat)
    shape, found = shape_alone("w", a.shape, b.shape)
    own = product(*laid_out(a, b, shape, found), found)
    both = (np.sort(np.ravel(x)) for x in (own, delta))
    np.testing.assert_allclose(*both, rtol=1e-3, atol=1e-4)


def test_a_square_kernel_of_flax_has_inputs_first() -> None:
    shapes = ((6, 2), (2, 6), (6, 6))
    assert axes_of_factors("up/kernel", *shapes, None) == KernelAxes((), (0,), (1,))
    general = ((6, 2), (2, 6), (6, 2, 3))
    assert axes_of_factors("up/kernel", *general, None) == KernelAxes((), (0,), (1, 2))
    with pytest.raises(jlora.AdapterError, match=r"\(0,\) or \(1,\); a plan tells"):
        axes_of_factors("up/w", *shapes, None)
    turned = KernelAxes((), (1,), (0,))
    assert axes_of_factors("up/w", *shapes, turned) == turned


def test_axes_of_size_one_leave_no_doubt() -> None:
    found = axes_of_factors("w", (5, 2), (2, 7), (1, 5, 7), None)
    assert found.out[-1] == 2 and 1 in found.in_


# --- what is wrong ---


def state_of(**changes: Any) -> dict[str, Any]:
    """A layer with its kernel, as a dict; `...` takes a leaf out."""
    rng = np.random.default_rng(0)
    shapes = {"w": (6, 5), "w_lora_a": (6, 2), "w_lora_b": (2, 5)}
    leaves = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    return {"up": {n: x for n, x in {**leaves, **changes}.items() if x is not ...}}


def ones(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.ones(shape, dtype)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"w_lora_b": ...}, "'up/w_lora' has no b"),
        ({"w_lora_a": ...}, "'up/w_lora' has no a"),
        ({"w_lora_a": ..., "w_lora_b": ...}, "no factors"),
        ({"w_lora_b": ones(2, 7)}, r"\(6, 5\) with factors.*no roles"),
        ({"w_lora_b": ones(3, 5)}, "no roles"),
        ({"w_lora_a": ones(6)}, "none of one kernel"),
        ({"w_lora_a": ones(6, 0), "w_lora_b": ones(0, 5)}, "none of one kernel"),
        ({"w_lora_a": ones(6, 2, dtype=np.float16)}, "float16 and float32"),
        ({"w_lora_a": ones(6, 2, dtype=np.int32)}, "no arrays of floating"),
        ({"w_lora_a": ones(6, 2) * np.inf}, "NaN or infinite"),
        ({"w": ..., "w_lora_b": ones(3, 5)}, "no kernel that can be told"),
        ({"w": ones(1, 1, 1, 1, 1, 6, 5)}, "more than 6 axes"),
    ],
)
def test_what_does_not_fit_is_told(changes: Any, message: str) -> None:
    with pytest.raises(jlora.AdapterError, match=message):
        jlora.tunix.adapter_of(state_of(**changes), alpha=6.0)


def test_all_offenders_are_told() -> None:
    good, bad = state_of()["up"], state_of(w_lora_b=...)["up"]
    with pytest.raises(jlora.AdapterError, match=r"(?s)'one/w_lora'.*'two/w_lora'"):
        state = {"good": good, "one": bad, "two": bad}
        jlora.tunix.adapter_of(state, alpha=6.0)


def test_params_without_the_kernel_are_refused() -> None:
    params = {"down": {"w": ones(6, 5)}}
    with pytest.raises(jlora.AdapterError, match=r"no 'up/w'; the nearest:.*down/w"):
        jlora.tunix.adapter_of(state_of(), params, alpha=6.0)
    with pytest.raises(TypeError, match="got int"):
        jlora.tunix.adapter_of(state_of(), 3, alpha=6.0)


def test_a_plan_of_other_roles_is_refused() -> None:
    lora = jlora.lora(lambda p, x: p["up"]["w"] @ x, jlora.LoraConfig("w", rank=2))
    plan = lora.plan({"up": {"w": ones(6, 5)}}, ones(5, 3))
    with pytest.raises(jlora.AdapterError, match="none for the roles of the plan"):
        jlora.tunix.adapter_of(state_of(), plan, alpha=6.0)


# --- files that are none ---


def test_no_link_is_followed(tmp_path: Path) -> None:
    place = save(tmp_path / "state", state_of())
    (place / "manifest.ocdbt").rename(tmp_path / "elsewhere")
    (place / "manifest.ocdbt").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(jlora.UnsafeFormatError, match="is a link"):
        jlora.tunix.restore(place, alpha=6.0)


def test_claims_of_large_factors_are_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = save(tmp_path / "state", state_of())
    monkeypatch.setattr(qwix_steps, "MAX_BYTES", 87)
    with pytest.raises(jlora.CorruptFileError, match="factors of 88 bytes"):
        jlora.tunix.restore(place, alpha=6.0)
    monkeypatch.setattr(qwix_steps, "MAX_BYTES", 88)
    assert jlora.tunix.restore(place, alpha=6.0)[1]


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    place = save(tmp_path / "state", state_of())
    (place / "manifest.ocdbt").write_bytes(b"nothing")
    with pytest.raises(jlora.CorruptFileError, match="cannot be read"):
        jlora.tunix.restore(place, alpha=6.0)


def test_no_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        jlora.tunix.restore(tmp_path / "missing", alpha=6.0)
    with pytest.raises(FileNotFoundError, match="no state"):
        jlora.tunix.restore(tmp_path, alpha=6.0)


# --- the command line ---


def test_the_command_line_reads_a_run(model: Any, tmp_path: Path, capsys: Any) -> None:
    folder = save_run(tmp_path / "run", nnx.state(model))
    for place in (folder, folder / "10", folder / "10" / "model_params"):
        assert run("inspect", place) == FAILED
        (line,) = capsys.readouterr().err.splitlines()
        assert "--alpha 16" in line
        assert run("inspect", place, "--alpha", 6) == SAME
        told = capsys.readouterr().out
        assert "12 targets" in told
        assert re.search(r"layers/0/heads/kernel +6×4×3 +2 +3 ", told)
    words = ("convert", folder, tmp_path / "own", "--to", "checkpoint")
    assert run(*words, "--alpha", 6) == SAME
    assert run("diff", folder, tmp_path / "own", "--alpha", 6) == SAME
    assert run("diff", folder, tmp_path / "own", "--alpha", 3) == DIFFERENT
    found = jlora.checkpoint.restore(tmp_path / "own")
    assert same(found, jlora.tunix.adapter_of(nnx.state(model), alpha=6.0)[1])


def test_shapes_of_params_are_needed_for_factors_alone(
    model: Any, params: Any, tmp_path: Path, capsys: Any
) -> None:
    place = save(tmp_path / "state", nnx.state(model, nnx.LoRAParam))
    words = ("convert", place, tmp_path / "own", "--to", "checkpoint", "--alpha", 6)
    assert run(*words) == FAILED
    assert "--params" in capsys.readouterr().err
    leaves = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(params))[0]
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    shapes = {name(path): list(leaf.shape) for path, leaf in leaves}
    (tmp_path / "shapes.json").write_text(json.dumps(shapes))
    assert run(*words, "--params", tmp_path / "shapes.json") == SAME
    found = jlora.checkpoint.restore(tmp_path / "own")
    assert same(found, jlora.tunix.adapter_of(nnx.state(model), alpha=6.0)[1])


def test_a_dense_layer_becomes_a_folder_of_peft(tmp_path: Path) -> None:
    layer = models.adapted(nnx.Linear(6, 5, rngs=nnx.Rngs(0)), jnp.ones((2, 6)))
    place = save(tmp_path / "state", {"up": nnx.to_pure_dict(nnx.state(layer))})
    assert run("convert", place, tmp_path / "peft", "--alpha", 6) == SAME
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 6)


def test_nothing_is_written_as_such_a_state(tmp_path: Path, capsys: Any) -> None:
    place = save(tmp_path / "state", state_of())
    words = ("convert", place, tmp_path / "other", "--alpha", 6, "--to")
    assert run(*words, "tunix") == FAILED
    assert "writes none" in capsys.readouterr().err
    assert run(*words, "gguff") == FAILED
    assert "--to gguff is none of" in capsys.readouterr().err


def test_an_alpha_has_no_place_in_other_formats(tmp_path: Path, capsys: Any) -> None:
    place = save(tmp_path / "state", state_of())
    own = tmp_path / "own"
    assert run("convert", place, own, "--alpha", 6, "--to", "checkpoint") == SAME
    assert run("convert", own, tmp_path / "peft", "--alpha", 6) == FAILED
    assert "no place for --alpha" in capsys.readouterr().err


def test_a_checkpoint_of_jlora_is_none_of_these(tmp_path: Path) -> None:
    place, own = save(tmp_path / "state", state_of()), tmp_path / "own"
    assert run("convert", place, own, "--alpha", 6, "--to", "checkpoint") == SAME
    assert jlora.tunix.FORMAT.holds(place)
    assert not jlora.tunix.FORMAT.holds(own)
    assert not any(map(jlora.tunix.FORMAT.holds, own.rglob("*")))


def test_roles_of_the_test_are_distinct() -> None:
    """No two cases of `ROLES` are one, so that each tests its own layout."""
    assert all(one != other for one, other in itertools.combinations(ROLES, 2))
