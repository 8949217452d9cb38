"""Bad inputs are refused early, with the path, the nearest paths and what to do."""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jlora
from jlora import LoraConfig


def make_params() -> dict[str, Any]:
    return {
        "encoder": {
            "query": {"kernel": jnp.ones((5, 7)), "bias": jnp.ones(7)},
            "query_norm": {"scale": jnp.ones(5)},
            "value": {"kernel": jnp.ones((5, 11))},
        },
        "table": jnp.ones((13, 5)),
        "order": jnp.arange(3),
        "codes": {"kernel": jnp.ones((5, 3), jnp.int8)},
        "idle": {"kernel": jnp.ones((5, 3))},
    }


def model(params: Any, x: jax.Array) -> Any:
    encoder = params["encoder"]
    x = (x + params["table"][params["order"]]) * encoder["query_norm"]["scale"][None]
    query = x @ encoder["query"]["kernel"] + encoder["query"]["bias"][None]
    codes = params["codes"]["kernel"].astype(x.dtype)
    return query, x @ encoder["value"]["kernel"], x @ codes


PARAMS, X = make_params(), jnp.ones((3, 5))


def adapter_of(*configs: LoraConfig) -> dict[str, Any]:
    return jlora.lora(model, configs).init(jax.random.key(0), PARAMS, X)


def refusal(*configs: LoraConfig) -> str:
    """The message of the error; plan and init must refuse alike."""
    lora = jlora.lora(model, configs)
    with pytest.raises(jlora.TargetError) as planned:
        lora.plan(PARAMS, X)
    with pytest.raises(jlora.TargetError) as begun:
        lora.init(jax.random.key(0), PARAMS, X)
    assert str(planned.value) == str(begun.value)
    return str(planned.value)


def assert_in_order(message: str, *parts: str) -> None:
    """All parts occur in the message, one after the other."""
    pattern = ".*".join(re.escape(part) for part in parts)
    assert re.search(pattern, message, re.DOTALL), f"{parts} not in:\n{message}"


# --- patterns ---


def test_nothing_matched_names_the_pattern_and_the_nearest_paths():
    message = refusal(LoraConfig("qeury"))
    assert_in_order(message, "'qeury'", "none of the 8 leaves", "encoder/query/kernel")
    assert "whole path segments" in message


def test_part_of_a_segment_is_no_match():
    message = refusal(LoraConfig("quer"))
    assert_in_order(message, "'quer'", "encoder/query/kernel")


def test_one_dead_pattern_among_good_ones():
    message = refusal(LoraConfig(["query", "vlaue"], rank=2))
    assert_in_order(message, "'vlaue'", "encoder/value/kernel")
    assert "'query'" not in message


def test_all_dead_patterns_are_told_at_once():
    message = refusal(LoraConfig("kee"), LoraConfig("vlaue"))
    assert_in_order(message, "'kee'", "'vlaue'")


def test_dead_exclude():
    message = refusal(LoraConfig("encoder", exclude="vlaue", rank=2))
    assert_in_order(message, "exclude", "'vlaue'", "encoder/value/kernel")


def test_everything_excluded():
    message = refusal(LoraConfig("query", exclude="encoder", rank=2))
    assert_in_order(message, "'query'", "'encoder/query/kernel'", "excluded")


def test_bias_alone_is_no_target():
    message = refusal(LoraConfig("query/bias"))
    assert_in_order(message, "'query/bias'", "'encoder/query/bias'", "(7,)", "add")
    assert "test_bad_inputs.py:" in message
    assert "full=True" in message


def test_norm_scale_alone_is_no_target():
    message = refusal(LoraConfig("query_norm"))
    told = "'encoder/query_norm/scale'", "(5,)", "dot_general", "gives it no roles"
    assert_in_order(message, *told)
    assert "full=True" in message


def test_bias_beside_a_kernel_is_listed_and_left_out():
    plan = jlora.lora(model, LoraConfig("query", rank=2)).plan(PARAMS, X)
    assert [t.path for t in plan.targets] == ["encoder/query/kernel"]
    assert [u.path for u in plan.unusable] == ["encoder/query/bias"]
    assert_in_order(str(plan), "encoder/query/bias", "add")


def test_unused_kernel():
    message = refusal(LoraConfig("idle"))
    assert_in_order(message, "'idle'", "'idle/kernel'", "(5, 3)", "not used")


def test_integer_leaves():
    message = refusal(LoraConfig("codes|order"))
    assert_in_order(message, "'codes|order'", "'codes/kernel'", "int8")
    assert_in_order(message, "'order'", "int32")


def test_integer_leaves_trained_whole():
    message = refusal(LoraConfig("codes", full=True))
    assert_in_order(message, "'codes/kernel'", "int8")


# --- several configs ---


def test_first_of_two_configs_decides():
    adapter = adapter_of(LoraConfig("query", rank=2), LoraConfig("encoder", rank=3))
    ranks = {path: factors.rank for path, factors in adapter.items()}
    assert ranks == {"encoder/query/kernel": 2, "encoder/value/kernel": 3}


def test_shadowed_config_is_a_conflict():
    message = refusal(LoraConfig("encoder", rank=2), LoraConfig("query", rank=3))
    assert_in_order(message, "'query'", "earlier", "encoder/query/kernel", "first")


def test_kernels_adapted_and_bias_trained_whole():
    configs = LoraConfig("query", rank=2), LoraConfig("bias", full=True)
    for order in (configs, configs[::-1]):
        adapter = adapter_of(*order)
        assert isinstance(adapter["encoder/query/kernel"], jlora.LoraFactors)
        assert adapter["encoder/query/bias"].shape == (7,)


def test_all_linear_and_norms_trained_whole():
    adapter = adapter_of(LoraConfig(rank=2), LoraConfig("query_norm", full=True))
    assert adapter["encoder/query_norm/scale"].shape == (5,)
    assert "encoder/value/kernel" in adapter


# --- values of a config ---


@pytest.mark.parametrize("rank", [0, -3, 2.0, True, "8", None])
def test_bad_rank(rank):
    with pytest.raises(
        (ValueError, TypeError), match=r"rank.*" + re.escape(repr(rank))
    ):
        LoraConfig("query", rank=rank)


@pytest.mark.parametrize("alpha", [0, -1.0, math.nan, math.inf, True, "16", None])
def test_bad_alpha(alpha):
    with pytest.raises(
        (ValueError, TypeError), match=r"alpha.*" + re.escape(repr(alpha))
    ):
        LoraConfig("query", alpha=alpha)


@pytest.mark.parametrize("field", ["target", "exclude"])
@pytest.mark.parametrize("pattern", ["(query", 3, ["query", None], [], b"query"])
def test_bad_pattern(field, pattern):
    with pytest.raises((ValueError, TypeError), match=field):
        LoraConfig(**{field: pattern})


@pytest.mark.parametrize("dtype", ["int8", jnp.complex64, "float99", bool])
def test_bad_dtype(dtype):
    with pytest.raises((ValueError, TypeError), match="dtype"):
        LoraConfig("query", dtype=dtype)


def test_bad_init():
    with pytest.raises(ValueError, match=r"'xavier'") as error:
        LoraConfig("query", init="xavier")
    assert "kaiming_uniform" in str(error.value)


@pytest.mark.parametrize("field", ["full", "rslora"])
def test_bad_switch(field):
    with pytest.raises(TypeError, match=field):
        LoraConfig("query", **{field: "yes"})


@pytest.mark.parametrize(
    "config", ["query", None, [], [LoraConfig("query"), "value"], {}]
)
def test_config_of_another_type(config):
    with pytest.raises(TypeError, match="LoraConfig"):
        jlora.lora(model, config)


@pytest.mark.parametrize(
    "settings",
    [{"materialize": "yes"}, {"materialize": True}, {"backward": "fast"}],
    ids=str,
)
def test_bad_setting(settings):
    (name, value), *_ = settings.items()
    with pytest.raises(ValueError, match=re.escape(repr(value))) as error:
        jlora.lora(model, LoraConfig("query"), **settings)
    assert name in str(error.value)


def test_no_function():
    with pytest.raises(TypeError, match="function"):
        jlora.lora({"params": 1}, LoraConfig("query"))  # pyright: ignore


@pytest.mark.parametrize("argnum", [-1, 1.0, "params", True])
def test_bad_argnum(argnum):
    with pytest.raises((TypeError, ValueError), match="argnum"):
        jlora.lora(model, LoraConfig("query"), argnum=argnum)


def test_argnum_beyond_the_arguments():
    lora = jlora.lora(model, LoraConfig("query"), argnum=2)
    with pytest.raises(TypeError, match="argnum=2"):
        lora.plan(PARAMS, X)


# --- wrong tree, wrong adapter ---


@pytest.fixture
def adapter() -> dict[str, Any]:
    return adapter_of(LoraConfig("query", rank=2))


def mismatch(
    params: Any, adapter: Any, kind: type[Exception] = jlora.AdapterError
) -> str:
    """The message of the error; apply and merge must refuse alike."""
    lora = jlora.lora(model, LoraConfig("query", rank=2))
    with pytest.raises(kind) as applied:
        lora.apply(params, adapter, X)
    with pytest.raises(kind) as merged:
        jlora.merge(params, adapter)
    assert str(applied.value) == str(merged.value)
    return str(applied.value)


def test_params_without_the_path(adapter):
    renamed = {**PARAMS, "encoder": {**PARAMS["encoder"]}}
    renamed["encoder"]["querry"] = renamed["encoder"].pop("query")
    message = mismatch(renamed, adapter)
    assert_in_order(message, "'encoder/query/kernel'", "encoder/querry/kernel")


def test_params_one_level_too_deep(adapter):
    message = mismatch({"params": PARAMS}, adapter)
    assert_in_order(message, "'encoder/query/kernel'", "params/encoder/query/kernel")


def test_kernel_of_another_shape(adapter):
    other = jax.tree.map(lambda x: x, PARAMS)
    other["encoder"]["query"]["kernel"] = jnp.ones((5, 9))
    message = mismatch(other, adapter)
    assert_in_order(message, "'encoder/query/kernel'", "(5, 9)", "(2, 9)", "(2, 7)")


def test_transposed_factors(adapter):
    path = "encoder/query/kernel"
    factors = adapter[path]
    a, b = jnp.swapaxes(factors.b, 0, 1), jnp.swapaxes(factors.a, 0, 1)
    message = mismatch(PARAMS, {path: dataclasses.replace(factors, a=a, b=b)})
    assert_in_order(message, path, "(5, 2)", "(7, 2)", "transposed")


def test_ranks_of_a_and_b_differ(adapter):
    path = "encoder/query/kernel"
    longer = dataclasses.replace(adapter[path], b=jnp.zeros((3, 7)))
    message = mismatch(PARAMS, {path: longer})
    assert_in_order(message, path, "(3, 7)")


def test_unexpected_path(adapter):
    message = mismatch(PARAMS, {**adapter, "encoder/key/kernel": adapter.popitem()[1]})
    assert_in_order(message, "'encoder/key/kernel'", "encoder/")


def test_factors_of_a_whole_leaf(adapter):
    message = mismatch(PARAMS, {"encoder/query/bias": jnp.ones(8)})
    assert_in_order(message, "'encoder/query/bias'", "(7,)", "(8,)")


def test_all_misfits_are_told_at_once(adapter):
    factors = adapter["encoder/query/kernel"]
    wrong = {"encoder/key": factors, "encoder/value/kernel": factors}
    assert_in_order(mismatch(PARAMS, wrong), "'encoder/key'", "'encoder/value/kernel'")


@pytest.mark.parametrize("adapter", [None, [1, 2], "adapter", 3])
def test_adapter_of_another_type(adapter):
    message = mismatch(PARAMS, adapter, TypeError)
    kind = "None" if adapter is None else type(adapter).__name__
    assert_in_order(message, "LoraFactors", kind)


def test_entry_of_another_type():
    message = mismatch(PARAMS, {"encoder/query/kernel": "factors"})
    assert_in_order(message, "'encoder/query/kernel'", "str")


def test_arguments_swapped(adapter):
    """The adapter where the params belong: the paths of both are told."""
    lora = jlora.lora(model, LoraConfig("query", rank=2))
    with pytest.raises((TypeError, jlora.AdapterError)) as error:
        lora.apply(adapter, PARAMS, X)
    assert "encoder" in str(error.value)


def test_axes_in_doubt_without_example_arguments():
    params = {"attention": {"kernel": jnp.ones((5, 3, 7))}}
    fn = lambda params, x: jnp.einsum("bi,iho->bho", x, params["attention"]["kernel"])
    lora = jlora.lora(fn, LoraConfig("attention", rank=2))
    with pytest.raises(jlora.TargetError) as error:
        lora.init(jax.random.key(0), params)
    assert_in_order(str(error.value), "attention/kernel", "example arguments")
    assert "ShapeDtypeStruct" in str(error.value)


def test_separator_in_a_key():
    params = {"a": {"b": jnp.ones((5, 7))}, "a/b": jnp.ones((5, 7))}
    fn = lambda params, x: x @ params["a"]["b"] + x @ params["a/b"]
    with pytest.raises(ValueError, match=r"a/b"):
        jlora.lora(fn, LoraConfig("a", rank=2)).plan(params, X)
