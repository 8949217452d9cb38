"""Every mistake with an argument is named as that mistake, and the message says more.

A row is a call, the kind of error, and words of its message in their order.
"""

import functools
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from paths import ROOT

import jlora
import jlora.linen
import jlora.nnx
from jlora import AdapterError, LoraConfig, TargetError


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(4, name="down")(nn.Dense(8, name="up")(x))


class Normed(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(16, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.up(x))

    def encode(self, x: jax.Array) -> jax.Array:
        return self.up(x)


class Plain(nnx.Module):
    """One without variables that are no params."""

    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.up(x)


X, KEY = jnp.ones((2, 16)), jax.random.key(0)
CONFIG, ANY = LoraConfig("kernel", rank=2), LoraConfig(rank=2)
MODEL = Mlp()
PARAMS: Any = MODEL.init(KEY, X)
LORA = jlora.lora(MODEL.apply, CONFIG)
ADAPTER = LORA.init(KEY, PARAMS, X)
PLAN = LORA.plan(PARAMS, X)
STACKED = jlora.stack([ADAPTER, ADAPTER])
INDEX = jnp.array([0, 1])
STATE = TrainState.create(apply_fn=LORA.apply, params=ADAPTER, tx=optax.sgd(0.1))


def bare(x: jax.Array, params: Any) -> Any:
    return MODEL.apply(params, x)


def keyword(x: jax.Array, *, params: Any) -> Any:
    return MODEL.apply(params, x)


def of_batch(batch: Any, params: Any) -> Any:
    return MODEL.apply(params, batch["x"])


def closing() -> Callable[..., Any]:
    variables = PARAMS
    return lambda x: MODEL.apply(variables, x)


def planned(fn: Any, *args: Any, config: Any = CONFIG, **kwargs: Any) -> Any:
    return jlora.lora(fn, config).plan(*args, **kwargs)


Row = tuple[Callable[[], Any], type[Exception], tuple[str, ...]]


def check(row: Row) -> None:
    call, kind, words = row
    with pytest.raises(kind) as error:
        call()
    pattern = ".*".join(map(re.escape, words))
    assert re.search(pattern, str(error.value), re.DOTALL), str(error.value)


rows = lambda table: pytest.mark.parametrize("row", table.values(), ids=table.keys())
KEY_FIRST = ("`key` must be a PRNG key", "first argument", "jax.random.key(0)")
SEED = ("number 3", "`jax.random.key(3)`")

KEYS: dict[str, Row] = {
    "forgotten": (lambda: LORA.init(PARAMS, X), TypeError, ("a dict", *KEY_FIRST[1:])),
    "last": (lambda: LORA.init(PARAMS, X, KEY), TypeError, KEY_FIRST),
    "None": (lambda: LORA.init(None, PARAMS, X), TypeError, KEY_FIRST),
    "a seed": (lambda: LORA.init(3, PARAMS, X), TypeError, ("`key`", *SEED)),
    "several": (
        lambda: LORA.init(jax.random.split(KEY), PARAMS, X),
        TypeError,
        ("(2,) of them", "jax.vmap"),
    ),
    "Rngs": (
        lambda: LORA.init(nnx.Rngs(0), PARAMS, X),
        TypeError,
        ("Rngs", "rngs.params()"),
    ),
    "of dropout": (
        lambda: LORA.apply(PARAMS, ADAPTER, X, lora_dropout_key=3),
        TypeError,
        ("`lora_dropout_key`", *SEED),
    ),
    "of dropout, mixed": (
        lambda: LORA.apply_mixed(PARAMS, STACKED, INDEX, X, lora_dropout_key=3),
        TypeError,
        ("`lora_dropout_key`", *SEED),
    ),
    "of NNX": (
        lambda: jlora.nnx.wrap(Plain(nnx.Rngs(0)), CONFIG, X, key=3),
        TypeError,
        SEED,
    ),
    "of Linen": (
        lambda: jlora.linen.wrap(MODEL, CONFIG).init(3, X),
        TypeError,
        ("`rngs`", *SEED),
    ),
    "of Linen, in a dict": (
        lambda: jlora.linen.wrap(MODEL, CONFIG).init({"params": 3}, X),
        TypeError,
        ("`rngs['params']`", *SEED),
    ),
    "of pissa": (
        lambda: jlora.pissa(PARAMS, ADAPTER, method="fast", key=3),
        TypeError,
        SEED,
    ),
    "of combine": (
        lambda: jlora.combine(
            [ADAPTER, ADAPTER], [1.0, 1.0], method="dare_ties", density=0.5, key=3
        ),
        TypeError,
        SEED,
    ),
    "of adalora": (lambda: jlora.adalora.init(3, ADAPTER), TypeError, SEED),
}


@rows(KEYS)
def test_what_is_no_key(row: Row) -> None:
    check(row)


def test_keys_of_both_kinds_are_keys() -> None:
    for key in (KEY, jax.random.PRNGKey(0), jax.random.key(0, impl="rbg")):
        assert list(LORA.init(key, PARAMS, X)) == list(ADAPTER)
    assert jax.eval_shape(LORA.init, KEY, PARAMS, X).keys() == ADAPTER.keys()


AT_1 = ("argument 0", "`argnum=0`", "argument 1: `argnum=1`")
CLOSED = ("array (2, 16)", "closes over", "argument of the function")
PLACES: dict[str, Row] = {
    "argument 1": (lambda: planned(bare, X, PARAMS), TypeError, AT_1),
    "argument 1, no target": (
        lambda: planned(bare, X, PARAMS, config=ANY),
        TypeError,
        AT_1,
    ),
    "argument 1, behind a dict": (
        lambda: planned(of_batch, {"x": X}, PARAMS),
        TargetError,
        ("matches none", *AT_1),
    ),
    "argument 1, behind a dict, no target": (
        lambda: planned(of_batch, {"x": X}, PARAMS, config=ANY),
        TypeError,
        AT_1,
    ),
    "argument 0": (
        lambda: jlora.lora(MODEL.apply, CONFIG, argnum=1).plan(PARAMS, X),
        TypeError,
        ("argument 1", "argument 0: `argnum=0`"),
    ),
    "a keyword": (
        lambda: planned(keyword, X, params=PARAMS),
        TypeError,
        ("keyword argument 'params'", "by position"),
    ),
    "a keyword alone": (
        lambda: planned(keyword, params=PARAMS),
        TypeError,
        ("0 positional", "['params']"),
    ),
    "a global": (
        lambda: planned(lambda x: MODEL.apply(PARAMS, x), X),
        TypeError,
        (*CLOSED[:2], "`PARAMS`", CLOSED[2]),
    ),
    "around the function": (
        lambda: planned(closing(), X, config=ANY),
        TypeError,
        (*CLOSED[:2], "`variables`", CLOSED[2]),
    ),
    "in a partial": (
        lambda: planned(functools.partial(MODEL.apply, PARAMS), X),
        TypeError,
        (CLOSED[0], "functools.partial"),
    ),
    "in a model around the function": (
        lambda: planned((lambda m: lambda x: m(x))(Normed(nnx.Rngs(0))), X),
        TypeError,
        (*CLOSED[:2], "`m`"),
    ),
    "in the model of a method": (
        lambda: planned(Normed(nnx.Rngs(0)).encode, X),
        TypeError,
        (*CLOSED[:2], "`self`"),
    ),
    "for data": (
        lambda: LORA.inputs(X, PARAMS),
        TypeError,
        ("argument 0", "argument 1: `argnum=1`"),
    ),
}


@rows(PLACES)
def test_params_elsewhere(row: Row) -> None:
    check(row)


def test_one_array_may_be_the_params() -> None:
    """And a tree of unusual names, beside a batch of any."""
    lora = jlora.lora(lambda w, batch: batch["x"] @ w, ANY)
    assert [t.shape for t in lora.plan(jnp.ones((16, 3)), {"x": X}).targets] == [
        (16, 3)
    ]
    lora = jlora.lora(lambda p, batch: batch["x"] @ p["one"], ANY)
    assert lora.plan({"one": jnp.ones((16, 3))}, {"x": X, "y": X}).targets


AFTER = ("after the params", "`lora.apply(params, adapter, x)`")
SWAPPED = ("'params/down/kernel'", "swapped")
ADAPTERS: dict[str, Row] = {
    "forgotten": (lambda: LORA.apply(PARAMS, X), TypeError, ("array (2, 16)", *AFTER)),
    "forgotten before a dict": (
        lambda: LORA.apply(PARAMS, {"x": X}),
        AdapterError,
        ("'x' is no path", "no adapter", *AFTER),
    ),
    "last": (lambda: LORA.apply(PARAMS, X, ADAPTER), TypeError, AFTER),
    "a plan": (lambda: LORA.apply(PARAMS, PLAN, X), TypeError, ("a Plan", *AFTER)),
    "a list": (lambda: LORA.apply(PARAMS, [ADAPTER], X), TypeError, ("a list", *AFTER)),
    "a training state": (
        lambda: LORA.apply(PARAMS, STATE, X),
        TypeError,
        ("TrainState", "`state.params`"),
    ),
    "in a dict": (
        lambda: LORA.apply(PARAMS, {"lora": ADAPTER}, X),
        AdapterError,
        ("holds an adapter", "'lora'"),
    ),
    "stacked": (
        lambda: LORA.apply(PARAMS, STACKED, X),
        AdapterError,
        ("jlora.take", "apply_mixed"),
    ),
    "for variables, beside params": (
        lambda: LORA.apply(PARAMS["params"], ADAPTER, X),
        AdapterError,
        ('{"params": params}',),
    ),
    "for params, beside variables": (
        lambda: jlora.merge(
            PARAMS, {k.removeprefix("params/"): v for k, v in ADAPTER.items()}
        ),
        AdapterError,
        ('variables["params"]',),
    ),
    "params at the adapter's place": (
        lambda: LORA.apply(X, ADAPTER, PARAMS),
        AdapterError,
        ("params, which are an array (2, 16)",),
    ),
    "swapped": (lambda: LORA.apply(ADAPTER, PARAMS, X), AdapterError, SWAPPED),
    "swapped, whole leaves": (
        lambda: jlora.merge({"params/up/bias": jnp.ones(8)}, PARAMS),
        AdapterError,
        ("'params/up/bias'", "swapped"),
    ),
    "swapped in merge": (lambda: jlora.merge(ADAPTER, PARAMS), AdapterError, SWAPPED),
    "swapped in pissa": (lambda: jlora.pissa(ADAPTER, PARAMS), AdapterError, SWAPPED),
    "swapped in shardings": (
        lambda: jlora.shardings(ADAPTER, PARAMS),
        AdapterError,
        SWAPPED,
    ),
    "swapped in apply_mixed": (
        lambda: LORA.apply_mixed(STACKED, PARAMS, INDEX, X),
        AdapterError,
        (*SWAPPED, "apply_mixed(params, stacked, index"),
    ),
    "forgotten in apply_mixed": (
        lambda: LORA.apply_mixed(PARAMS, INDEX, X),
        TypeError,
        ("apply_mixed(params, stacked, index",),
    ),
    "a list in apply_mixed": (
        lambda: LORA.apply_mixed(PARAMS, [ADAPTER], INDEX, X),
        TypeError,
        ("a list", "jlora.stack"),
    ),
    "statistics": (
        lambda: jlora.eva(LORA.inputs(PARAMS, X), ADAPTER),
        TypeError,
        ("adapter before the statistics",),
    ),
    "a list to add": (
        lambda: jlora.add([ADAPTER, ADAPTER]),
        TypeError,
        ("`jlora.add(*adapters)`",),
    ),
    "nothing to stack": (
        lambda: jlora.stack([]),
        TypeError,
        ("empty", "at least one"),
    ),
    "one to stack": (lambda: jlora.stack(ADAPTER), TypeError, ("a dict", "`[one, ")),
    "an array to stack": (lambda: jlora.stack([ADAPTER, X]), TypeError, ("at 1",)),
    "a config for quantize": (
        lambda: jlora.quantize(PARAMS, CONFIG),
        TypeError,
        ("`which`", "a LoraConfig"),
    ),
}


@rows(ADAPTERS)
def test_what_is_no_adapter_or_elsewhere(row: Row) -> None:
    check(row)


LINEN, NNX = "`jlora.linen.wrap(model, config)`", "`jlora.nnx.wrap(model, config, x)`"
NORMED = Normed(nnx.Rngs(0))
FUNCTIONS: dict[str, Row] = {
    "Linen": (lambda: jlora.lora(MODEL, CONFIG), TypeError, ("Mlp", "apply", LINEN)),
    "Linen, bound": (
        lambda: jlora.lora(MODEL.bind(PARAMS), CONFIG),
        TypeError,
        (LINEN,),
    ),
    "Linen, its call": (
        lambda: jlora.lora(MODEL.__call__, CONFIG),
        TypeError,
        (LINEN,),
    ),
    "Linen, its class": (lambda: jlora.lora(Mlp, CONFIG), TypeError, ("Mlp", LINEN)),
    "NNX": (lambda: jlora.lora(NORMED, CONFIG), TypeError, ("Normed", NNX)),
    "NNX, its call": (lambda: jlora.lora(NORMED.__call__, CONFIG), TypeError, (NNX,)),
    "NNX, jitted": (lambda: jlora.lora(nnx.jit(NORMED), CONFIG), TypeError, (NNX,)),
    "a partial": (
        lambda: jlora.lora(functools.partial(NORMED), CONFIG),
        TypeError,
        (NNX,),
    ),
    "a training state": (lambda: jlora.lora(STATE, CONFIG), TypeError, (".apply_fn",)),
    "params": (lambda: jlora.lora(PARAMS, CONFIG), TypeError, ("a dict with params",)),
    "swapped": (lambda: jlora.lora(CONFIG, MODEL.apply), TypeError, ("swapped",)),
    "a pattern": (
        lambda: jlora.lora(MODEL.apply, "kernel"),
        TypeError,
        ("`jlora.LoraConfig('kernel')`",),
    ),
    "a class": (lambda: jlora.lora(MODEL.apply, LoraConfig), TypeError, ("call it",)),
    "a dict": (
        lambda: jlora.lora(MODEL.apply, {"rank": 2}),
        TypeError,
        ("`jlora.LoraConfig(**config)`",),
    ),
    "NNX for Linen": (
        lambda: jlora.linen.wrap(NORMED, CONFIG),
        TypeError,
        ("Normed", "`jlora.nnx.wrap`"),
    ),
    "a function for Linen": (
        lambda: jlora.linen.wrap(MODEL.apply, CONFIG),
        TypeError,
        ("`jlora.lora`",),
    ),
    "Linen for NNX": (
        lambda: jlora.nnx.wrap(MODEL, CONFIG, X),
        TypeError,
        ("Mlp", "`jlora.linen.wrap`"),
    ),
    "a class for NNX": (
        lambda: jlora.nnx.wrap(Normed, CONFIG, X),
        TypeError,
        ("class Normed", "instance"),
    ),
}


@rows(FUNCTIONS)
def test_what_is_no_function_or_config(row: Row) -> None:
    check(row)


def test_a_model_of_equinox() -> None:
    import equinox as eqx

    model = eqx.nn.Linear(16, 8, key=KEY)
    with pytest.raises(TypeError, match=r"Equinox.*eqx\.partition"):
        jlora.lora(model, CONFIG)
    params, static = eqx.partition(model, eqx.is_array)
    run = eqx.filter_jit(lambda p, x: jax.vmap(eqx.combine(p, static))(x))
    assert jlora.lora(run, LoraConfig("weight", rank=2)).plan(params, X).targets


WRAPPED = jlora.nnx.wrap(NORMED, CONFIG, X)
FLAT = jlora.nnx.wrap(Plain(nnx.Rngs(0)), CONFIG, X)
REST = ("`rest`", "after the adapter", "forgotten")
IN_VARIABLES = jax.tree.map(nnx.Param, WRAPPED.adapter)
OF_NNX: dict[str, Row] = {
    "as_pure forgotten": (
        lambda: WRAPPED.lora.apply(WRAPPED.params, IN_VARIABLES, WRAPPED.rest, X),
        AdapterError,
        ("'up/kernel'", "`nnx.Param`", "`nnx.as_pure(adapter)`"),
    ),
    "rest forgotten": (
        lambda: WRAPPED.lora.apply(WRAPPED.params, WRAPPED.adapter, X),
        TypeError,
        REST,
    ),
    "an empty rest forgotten": (
        lambda: FLAT.lora.apply(FLAT.params, FLAT.adapter, X),
        TypeError,
        REST,
    ),
    "rest forgotten in init": (
        lambda: WRAPPED.lora.init(KEY, WRAPPED.params, X),
        TypeError,
        REST,
    ),
    "rest of another model": (
        lambda: WRAPPED.lora.apply(WRAPPED.params, WRAPPED.adapter, FLAT.rest, X),
        TypeError,
        ("lacks", "norm/mean"),
    ),
    "the whole state": (
        lambda: WRAPPED.lora.apply(nnx.state(NORMED), WRAPPED.adapter, WRAPPED.rest, X),
        TypeError,
        ("nnx.Param", "jlora.nnx.wrap", "norm/mean", "all variables"),
    ),
}


@rows(OF_NNX)
def test_slips_with_nnx(row: Row) -> None:
    check(row)


def test_pure_dicts_are_states() -> None:
    lora, params, adapter, rest = WRAPPED
    pure = [nnx.to_pure_dict(state) for state in (params, rest)]
    out, _ = lora.apply(pure[0], adapter, pure[1], X)
    assert (out == lora.apply(params, adapter, rest, X)[0]).all()


VARIABLES: Any = jlora.linen.wrap(MODEL, CONFIG).init(KEY, X)
METHODS = ("apply", "plan", "init_adapter", "merge", "adapter")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("given", [X, PARAMS["params"]["up"]], ids=["x", "params"])
def test_what_are_no_variables_of_linen(method: str, given: Any) -> None:
    call = getattr(jlora.linen.wrap(MODEL, CONFIG), method)
    args = (KEY, given) if method == "init_adapter" else (given,)
    with pytest.raises(TypeError, match=r"`variables` must be a dict.*\"params\""):
        call(*args, *([] if method in ("merge", "adapter") else [X]))


# fields of a config under other names

OTHER = {
    "r": "`rank=`",
    "lora_alpha": "`alpha=`",
    "target_modules": "`target=`",
    "lora_dropout": "`dropout=`",
    "use_rslora": "`rslora=`",
    "use_dora": "`dora=`",
    "exclude_modules": "`exclude=`",
    "modules_to_save": "full=True",
    "rank_pattern": "several configs",
    "ranks": "`rank=` meant",
    "nonsense": "has no `nonsense`",
}


@pytest.mark.parametrize(("name", "told"), OTHER.items())
def test_fields_of_other_libraries(name: str, told: str) -> None:
    with pytest.raises(TypeError, match=f"`{name}`") as error:
        LoraConfig("up", **{name: 4})
    assert told in str(error.value)


def test_several_such_fields_are_told_at_once() -> None:
    with pytest.raises(TypeError, match=r"`r`.*`rank=`.*`lora_alpha`.*`alpha=`"):
        LoraConfig("up", r=4, lora_alpha=8)


@pytest.mark.parametrize("name", ["pissa", "eva", "loftq", "corda", "olora", "milora"])
def test_initializers_that_look_at_something(name: str) -> None:
    for given in ({"init_lora_weights": name}, {"init": name}):
        with pytest.raises((TypeError, ValueError), match=f"`jlora.{name}`"):
            LoraConfig("up", **given)


def test_a_rank_by_position() -> None:
    with pytest.raises(TypeError, match=r"by position.*rank=8"):
        LoraConfig("up", 4)  # pyright: ignore


def test_a_config_is_made_as_before() -> None:
    config = LoraConfig("up", rank=3)
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(ValueError, match="PEFT's 'lora_only' is 'adapted'"):
        LoraConfig("up", bias="lora_only")


# patterns that are paths

PATHS = {
    "blocks[0]/w": r"r'blocks\[0\]/w'",
    "['blocks[0]']['w']": "",
    "['other']['w']": "'other/w'",
    "other['w']": "'other/w'",
    "/other/w": "'other/w'",
}


@pytest.mark.parametrize(("pattern", "told"), PATHS.items())
def test_a_path_for_a_pattern(pattern: str, told: str) -> None:
    params = {"blocks[0]": {"w": jnp.ones((16, 4))}, "other": {"w": jnp.ones((4, 3))}}
    fn = lambda p, x: x @ p["blocks[0]"]["w"] @ p["other"]["w"]
    with pytest.raises(TargetError) as error:
        planned(fn, params, X, config=LoraConfig(pattern, rank=2))
    assert told in str(error.value)
    meant = r"blocks\[0\]/w" if "blocks" in pattern else "other/w"
    assert planned(fn, params, X, config=LoraConfig(meant, rank=2)).targets


# what is traced, and how it is differentiated


def flagged(params: Any, x: jax.Array, training: Any = False, **more: Any) -> Any:
    return x @ params["w"] * (2 if training or any(more.values()) else 1)


@pytest.mark.parametrize("name", ["training", "deterministic"])
def test_a_traced_flag_is_called_by_its_name(name: str) -> None:
    params = {"w": jnp.ones((16, 3))}
    lora = jlora.lora(flagged, LoraConfig("w", rank=2))
    adapter = lora.init(KEY, params, X)
    told = f"function flagged.*argument.*{name}"
    with pytest.raises(jax.errors.TracerBoolConversionError) as error:
        jax.jit(lora.apply)(params, adapter, X, **{name: True})
    assert re.search(told, str(error.value), re.DOTALL)
    with pytest.raises(jax.errors.TracerBoolConversionError) as error:
        lora.plan(params, X, **{name: jnp.array(True)})
    assert re.search(told, str(error.value), re.DOTALL)


@pytest.mark.parametrize("of", ["adapter", "input"])
def test_forward_mode_names_the_setting(of: str) -> None:
    call = {
        "adapter": (lambda a: LORA.apply(PARAMS, a, X), ADAPTER),
        "input": (lambda x: LORA.apply(PARAMS, ADAPTER, x), X),
    }
    fn, at = call[of]
    for forward in (lambda: jax.jvp(fn, (at,), (at,)), lambda: jax.jacfwd(fn)(at)):
        with pytest.raises(TypeError, match='backward="autodiff"'):
            forward()
    other = jlora.lora(MODEL.apply, CONFIG, backward="autodiff")
    jax.jvp(lambda a: other.apply(PARAMS, a, X), (ADAPTER,), (ADAPTER,))
    jax.hessian(lambda a: LORA.apply(PARAMS, a, X).sum())(ADAPTER)


# doors

DOORS = (
    "checkpoint",
    "linen",
    "nnx",
    "optim",
    "peft",
    "quant",
    "tunix",
    "weights",
)


@pytest.mark.parametrize("door", DOORS)
def test_a_door_opens_when_it_is_asked_for(door: str) -> None:
    code = f"import jlora, sys; assert 'jlora.{door}' not in sys.modules; jlora.{door}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_what_is_no_door() -> None:
    with pytest.raises(
        AttributeError, match=r"'jlora' has no attribute 'pefd'"
    ) as error:
        _ = jlora.pefd  # pyright: ignore
    assert (error.value.name, error.value.obj) == ("pefd", jlora)


def test_no_hint_where_the_paths_are_right():
    wide = jax.tree.map(lambda leaf: jnp.ones((*leaf.shape[:-1], 12)), PARAMS)
    with pytest.raises(AdapterError, match="needs a") as error:
        jlora.merge(wide, ADAPTER)
    assert str(error.value).splitlines()[-1].startswith("'params/")
