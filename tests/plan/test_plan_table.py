"""Plans that people read: layers folded, few lines of what is left, 100 columns."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jlora
from jlora import LoraConfig

LAYERS = 12


class Stack(nn.Module):
    """Blocks by number, with biases and norms, and a head."""

    layers: int = LAYERS
    name_of: str = "layers_{}"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.layers):
            inner = nn.LayerNorm(name=self.name_of.format(i) + "_norm")(x)
            queries = nn.Dense(24, name=self.name_of.format(i) + "_q_proj")(inner)
            values = nn.Dense(24, name=self.name_of.format(i) + "_v_proj")(inner)
            x = x + nn.Dense(10, name=self.name_of.format(i) + "_up")(queries * values)
        return nn.Dense(5, name="head")(x)


def planned(config: LoraConfig, module: nn.Module | None = None) -> jlora.Plan:
    module, x = module or Stack(), jax.ShapeDtypeStruct((3, 10), jnp.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), x)
    return jlora.lora(module.apply, config).plan(params, x)


ATTENTION = LoraConfig(r"layers_\d+_(q|v)_proj", rank=4, alpha=6.0)


def table(text: str) -> list[str]:
    """The rows of the table, without its head and what follows it."""
    lines = text.splitlines()[2:]
    behind = lambda line: line.startswith(("scaling ", "trainable "))
    return lines[: next(i for i, line in enumerate(lines) if behind(line))]


def test_layers_are_one_row() -> None:
    plan = planned(ATTENTION)
    rows = table(str(plan))
    assert [row.split("  ")[0] for row in rows if "/" in row] == [
        "params/layers_[0-11]_q_proj/kernel × 12",
        "params/layers_[0-11]_v_proj/kernel × 12",
    ]
    assert f"{LAYERS * 4 * (10 + 24):,}" in rows[0]
    assert len(plan.targets) == 2 * LAYERS


def test_the_whole_list_on_request() -> None:
    plan = planned(ATTENTION)
    text = plan.table(fold=False, width=None)
    for target in plan.targets:
        assert f"{target.path}  " in text
    for one in plan.unusable:
        assert f"{one.path} {one.shape}: {one.reason}" in text
    for path in plan.frozen:
        assert path in text


def test_what_differs_is_in_rows_of_its_own() -> None:
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            for i in range(6):
                x = nn.Dense(10 + i // 4, name=f"up_{i}")(x)
            return x

    rows = table(str(planned(LoraConfig("up_.*", rank=2), Two())))
    names = [row.split("  ")[0] for row in rows]
    assert names == [
        "params/up_[0-3]/kernel × 4",  # 10×10
        "params/up_4/kernel",  # 10×11
        "params/up_5/kernel",  # 11×11
    ]


def test_numbers_that_are_part_of_a_name_are_kept() -> None:
    def fn(params: Any, x: jax.Array) -> jax.Array:
        return x @ params["w1"] @ params["w2"]

    params = {"w1": jnp.ones((10, 10)), "w2": jnp.ones((10, 10))}
    plan = jlora.lora(fn, LoraConfig(rank=2)).plan(params, jnp.ones((3, 10)))
    assert [row.split()[0] for row in table(str(plan))] == ["w1", "w2"]


def test_biases_beside_adapted_kernels_are_one_line_with_a_count() -> None:
    plan = planned(LoraConfig(r"layers_\d+_(q|v)_proj", rank=4))
    text = str(plan)
    assert f"matched and left out: {2 * LAYERS}" in text
    lines = [line for line in text.splitlines() if "bias" in line]
    assert len(lines) == 1
    assert f"{2 * LAYERS} biases beside adapted kernels" in lines[0]
    assert "bias='adapted'" in lines[0]
    assert len(plan.unusable) == 2 * LAYERS  # as data they are all there


def test_other_leaves_are_a_line_for_all_layers() -> None:
    text = str(planned(LoraConfig(r"layers_\d+_.*", rank=4)))
    assert "params/layers_[0-11]_norm/scale × 12 (10,): " in text
    assert "params/layers_[0-11]_norm/bias × 12 (10,): reaches add" in text


def test_many_kinds_of_other_leaves_are_cut() -> None:
    def fn(params: Any, x: jax.Array) -> jax.Array:
        for name in "abcdefghijklmnop":
            x = x + params[name][None]
        return x @ params["w"]

    params = {name: jnp.ones(10) for name in "abcdefghijklmnop"}
    params["w"] = jnp.ones((10, 4))
    plan = jlora.lora(fn, LoraConfig(".*", rank=2)).plan(params, jnp.ones((3, 10)))
    text = str(plan)
    assert "and 6 more" in text and "fold=False" in text
    assert len([line for line in text.splitlines() if "reaches add" in line]) == 10


def test_kernels_that_could_be_adapted_are_a_count_and_examples() -> None:
    plan = planned(ATTENTION)
    ups = [f"params/layers_{i}_up/kernel" for i in range(LAYERS)]
    assert set(plan.frozen) == {*ups, "params/head/kernel"}
    text = str(plan)
    assert f"though they could be adapted: {LAYERS + 1} kernels" in text
    assert "params/layers_[0-11]_up/kernel × 12" in text
    assert not planned(LoraConfig(rank=2)).frozen
    head = planned(LoraConfig(rank=2, exclude="head"))
    assert head.frozen == ("params/head/kernel",)
    assert "though it could be adapted: 1 kernel" in str(head)


def test_frozen_kernels_are_told_in_three_examples() -> None:
    names = [f"w{letter}" for letter in "abcdefg"]

    def fn(params: Any, x: jax.Array) -> Any:
        return [x @ params[name] for name in names]

    params = {name: jnp.ones((10, 4)) for name in names}
    plan = jlora.lora(fn, LoraConfig("wa", rank=2)).plan(params, jnp.ones((3, 10)))
    lines = str(plan).splitlines()
    place = next(i for i, line in enumerate(lines) if "left frozen" in line)
    assert lines[place + 1 :] == ["  wb", "  wc", "  wd", "  and 3 more"]


def test_repr_is_short() -> None:
    plan = planned(ATTENTION)
    assert len(repr(plan)) < 120
    assert repr(plan).startswith("Plan(24 targets, trainable 3,264 of ")


LONG = "a_module_of_a_model_with_a_long_name_{}"


@pytest.mark.parametrize("name_of", ["layers_{}", LONG, "a_module_" * 9 + "{}"])
@pytest.mark.parametrize("fold", [True, False])
def test_the_table_fits_a_hundred_columns(name_of: str, fold: bool) -> None:
    """Names, counts and ranks are all there; the column of uses is cut first."""
    plan = planned(LoraConfig(rank=4), Stack(name_of=name_of))
    text = plan.table(fold=fold)
    assert max(map(len, [*text.splitlines()[:2], *table(text)])) <= 100
    assert text == str(plan) if fold else len(table(text)) >= 3 * LAYERS
    wide = plan.table(fold=fold, width=None)
    assert max(map(len, wide.splitlines())) > 100
    for row in table(text):
        assert "kernel" in row
    assert "test_plan_table.py:" in wide


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_a_table_of_a_width(width: int) -> None:
    lines = table(planned(LoraConfig(rank=4)).table(width=width))
    assert max(map(len, lines)) <= max(width, 75)


def test_scaling_is_told_where_its_column_is_not() -> None:
    text = planned(LoraConfig(rank=4, alpha=6.0), Stack(name_of=LONG)).table()
    assert "scaling 1.5" in text
    configs = [LoraConfig(".*q_proj", rank=4), LoraConfig(".*v_proj", rank=8)]
    x = jax.ShapeDtypeStruct((3, 10), jnp.float32)
    module = Stack(name_of=LONG)
    params = jax.eval_shape(module.init, jax.random.key(0), x)
    both = jlora.lora(module.apply, configs).plan(params, x).table()
    assert "scaling" in both.splitlines()[0]


def test_html_has_folded_rows_and_lists() -> None:
    plan = planned(ATTENTION)
    page = plan._repr_html_()
    assert "params/layers_[0-11]_q_proj/kernel × 12" in page
    assert page.count("<tr>") == 3
    assert page.count("<ul>") == page.count("</ul>") == 2
    assert "<p>matched and left out: 24</p><ul><li>24 biases" in page
    sizes = [math.prod(target.shape) for target in plan.targets]
    assert len(sizes) == 24


@pytest.mark.parametrize("name", ["w", "a_long_name_of_a_kernel" * 3])
def test_what_is_formed_is_told_however_narrow_the_table(name: str) -> None:
    fn = lambda p, x: x @ jnp.cumsum(p[f"{name}_0"], 0) @ jnp.cumsum(p[f"{name}_1"], 0)
    params = {f"{name}_{i}": jnp.ones((10, 10)) for i in range(2)}
    config = LoraConfig(".*", rank=2)
    lora = jlora.lora(fn, config, materialize="allow")
    plan = lora.plan(params, jnp.ones((3, 10)))
    lines = str(plan).splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("materialized"))
    told = " ".join(map(str.strip, lines[place + 1 : place + 3]))
    assert f"{name}_[0-1] × 2: cumsum (test_plan_table.py:" in told


@pytest.mark.parametrize("target", [None, "w"])
def test_where_no_kernel_is_found_the_error_says_what_each_reaches(
    target: str | None,
) -> None:
    params, x = {"w": jnp.ones((8, 6)), "b": jnp.ones((1, 6))}, jnp.ones((3, 8))
    noisy = lambda p, x: x @ (p["w"] + x.sum()) + p["b"]
    lora = jlora.lora(noisy, jlora.LoraConfig(target, rank=2))
    with pytest.raises(jlora.TargetError, match=r"'w' \(8, 6\) reaches add at") as told:
        lora.plan(params, x)
    assert "projection_seed" not in str(told.value)
