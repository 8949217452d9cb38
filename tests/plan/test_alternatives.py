"""Alternatives of a pattern: each finds something, as each pattern of a list does."""

import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jlora
from jlora._params.alternatives import alternatives, failing
from jlora._params.paths import compile_pattern, matching

LEAVES = ("in_proj", "out_proj", "q_proj", "head")


def fn(params: Any, x: jax.Array) -> jax.Array:
    """All leaves are kernels, but `odd` and `norm`."""
    for name in LEAVES:
        x = jnp.tanh(x @ params["block"][name]["kernel"])
    return x * params["block"]["norm"]["scale"][None]


PARAMS = {
    "block": {
        **{name: {"kernel": jnp.ones((5, 5))} for name in LEAVES},
        "norm": {"scale": jnp.ones(5)},
    }
}
X = jnp.ones((2, 5))


def plan(target: Any, **kwargs: Any) -> list[str]:
    config = jlora.LoraConfig(target, rank=2, **kwargs)
    targets = jlora.lora(fn, config).plan(PARAMS, X).targets
    return [target.path.split("/")[1] for target in targets]


FINE = {
    "in_proj|out_proj": ["in_proj", "out_proj"],
    "(in|out)_proj": ["in_proj", "out_proj"],
    "(?:in|out)_proj/kernel": ["in_proj", "out_proj"],
    "(?P<side>in|out)_proj": ["in_proj", "out_proj"],
    "block/((in|out)_proj|head)": ["head", "in_proj", "out_proj"],
    "(in|out)_proj/(kernel|k.*)": ["in_proj", "out_proj"],
    # Options, lookarounds, repetitions, classes and escapes are no alternatives.
    "(in|none)?_?(q_proj|head)": ["head", "q_proj"],
    "(?=q|never)q_proj": ["q_proj"],
    "(q|z|_|proj)+": ["q_proj"],
    "[q|z]_proj": ["q_proj"],
    "(q|)_?proj": ["q_proj"],
    "q_proj(?#or|this)": ["q_proj"],
    "(?i)Q_PROJ|Head": ["head", "q_proj"],
    "(?i:Q|IN)_proj": ["in_proj", "q_proj"],
}


@pytest.mark.parametrize("pattern", FINE)
def test_alternatives_that_all_find_something(pattern: str) -> None:
    assert plan(pattern) == FINE[pattern]
    assert plan([pattern]) == FINE[pattern]


DEAD = {
    "q_proj|v_prj": ["v_prj"],
    "v_prj|q_proj": ["v_prj"],
    "(q|w)_proj": ["w"],
    "(?:q|w)_proj/kernel": ["w"],
    "(?P<side>in|side)_proj": ["side"],
    "block/((in|inn)_proj|head)": ["inn"],
    "block/((in|inn)_proj|heat)": ["heat", "inn"],
    "heat|w_proj|(q|z)_proj": ["heat", "w_proj", "z"],
    "(in|out)_proj/(kernel|bias)": ["bias"],
    "head|(w|z)_proj": [r"\(w|z\)_proj"],  # and not its parts besides
    "(?i)HEAD|Heat": ["Heat"],
    "(?i:q|Z)_proj": ["Z"],
    r"q_proj|a\|b": [r"a\\\|b"],
    "q_proj|[|]b": [r"\[|\]b"],
}


def said(error: pytest.ExceptionInfo[Any]) -> list[str]:
    return re.findall(r"The alternative '(.*?)' of", str(error.value))


@pytest.mark.parametrize("pattern", DEAD)
def test_an_alternative_that_finds_nothing_is_an_error(pattern: str) -> None:
    with pytest.raises(jlora.TargetError) as error:
        plan(pattern)
    wanted = [re.sub(r"\\([^\\])", r"\1", text) for text in DEAD[pattern]]
    assert sorted(said(error)) == sorted(wanted)
    assert repr(pattern) in str(error.value)
    assert "Nearest: 'block/" in str(error.value)


def test_alternatives_of_exclude_must_find_something_too() -> None:
    assert plan(None, exclude="head|q_proj") == ["in_proj", "out_proj"]
    with pytest.raises(jlora.TargetError, match=r"'heat' of `LoraConfig\.exclude`"):
        plan(None, exclude="heat|q_proj")


def test_a_list_and_alternatives_are_one_wish() -> None:
    """Of two leaves of which one is no kernel: an error that says why, both times."""
    for target in (["head", "norm"], "head|norm", "(head|norm)"):
        with pytest.raises(jlora.TargetError, match=r"'norm'.*reaches"):
            plan(target)


def fused(h: jax.Array, w: jax.Array) -> jax.Array:
    """A product in code that JAX cannot see into."""
    shape = jax.ShapeDtypeStruct(h.shape, h.dtype)
    return jax.pure_callback(lambda h, w: np.tanh(h) @ w, shape, h, w)


@jax.custom_vjp
def norms(h: jax.Array, scale: jax.Array) -> jax.Array:
    return h * scale[None] / jnp.linalg.norm(h)


norms.defvjp(
    lambda h, scale: (norms(h, scale), (h, scale)), lambda kept, g: (g, kept[1])
)

OPAQUE = {
    "custom_vjp": fused,
    "cumsum": lambda h, w: h + jnp.cumsum(w, 0)[: len(h)],
    "sort": lambda h, w: h + jnp.sort(w, 1)[: len(h)],
    "callback": fused,
}
NO_KERNELS = {
    "bias": lambda h, w: h + w[:1],
    "norm": lambda h, w: h * w[:1],
    "table": lambda h, w: h + w[: len(h)],
    "gate": lambda h, w: h * jnp.tanh(w[: len(h)]),
    "unused": lambda h, w: h,
    "penalty": lambda h, w: h + jnp.max(w),
    "stacked norms": lambda h, w: norms(h, w[2]),
    "stacked norms of a scan": lambda h, w: jax.lax.scan(
        lambda h, scale: (norms(h, scale), None), h, w
    )[0],
}
BESIDE = {"in_proj": jnp.ones((5, 5)), "out_proj": jnp.ones((5, 5))}


def two(op: Any) -> Any:
    return lambda params, x: op(x @ params["in_proj"], params["out_proj"])


def warned(op: Any, **kwargs: Any) -> list[str]:
    config = jlora.LoraConfig(**kwargs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapter = jlora.lora(two(op), config).init(jax.random.key(0), BESIDE, X)
    assert "in_proj" in adapter
    assert all(w.category is jlora.LeftOutWarning for w in caught)
    assert all(w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("op", OPAQUE.values(), ids=OPAQUE)
def test_a_kernel_that_is_left_out_is_warned_of(op: Any) -> None:
    (message,) = warned(op, target="[a-z]+_proj", rank=2)
    assert "'out_proj' (5, 5) reaches" in message
    assert "test_alternatives.py" in message
    plan = jlora.lora(two(op), jlora.LoraConfig(".*", rank=2)).plan(BESIDE, X)
    assert [u.path for u in plan.unusable if u.is_doubtful] == ["out_proj"]
    assert "out_proj (5, 5): reaches" in str(plan)


@pytest.mark.parametrize("op", OPAQUE.values(), ids=OPAQUE)
def test_nobody_asked_for_it(op: Any) -> None:
    assert not warned(op, rank=2)
    assert not warned(op, target=".*", exclude="out_proj", rank=2)
    assert not warned(op, target=".*", full=True)


@pytest.mark.parametrize("op", OPAQUE.values(), ids=OPAQUE)
def test_what_another_config_takes_is_not_left_out(op: Any) -> None:
    low = jlora.LoraConfig(".*", rank=2)
    whole = jlora.LoraConfig("out_proj", full=True)
    adapter = jlora.lora(two(op), [low, whole]).init(jax.random.key(0), BESIDE, X)
    assert sorted(adapter) == ["in_proj", "out_proj"]


@pytest.mark.parametrize("op", NO_KERNELS.values(), ids=NO_KERNELS)
def test_what_is_no_kernel_is_left_out_without_a_word(op: Any) -> None:
    assert not warned(op, target=".*", rank=2)


def test_uses_that_disagree_are_the_reason() -> None:
    """Not that it is no kernel, or goes into an operation without a rule."""
    params = {"w": jnp.ones((3, 5, 7)), "v": jnp.ones((3, 4))}

    def fn(p: Any, x: jax.Array, y: jax.Array) -> Any:
        whole = jnp.einsum("ti,ijk->tjk", x, p["w"])
        return x @ p["v"], whole, jnp.einsum("ni,nij->nj", y, p["w"])

    args = params, jnp.ones((2, 3)), jnp.ones((3, 5))
    reason = "has uses that disagree on the roles of its axes: "
    reason += "dot_general (in 0 out 1,2) and dot_general (batch 0 in 1 out 2)"
    lora = jlora.lora(fn, jlora.LoraConfig(".*", rank=2))
    assert [u.reason for u in lora.plan(*args).unusable] == [reason]
    with pytest.warns(jlora.LeftOutWarning, match=r"'w' .* disagree"):
        lora.init(jax.random.key(0), *args)
    with pytest.raises(jlora.TargetError, match=r"'w' .* disagree"):
        jlora.lora(fn, jlora.LoraConfig("w", rank=2)).plan(*args)


def test_all_that_is_left_out_is_in_one_warning() -> None:
    params = {"a": jnp.ones((5, 5)), "b": jnp.ones((5, 5)), "c": jnp.ones((5, 5))}
    fn = lambda p, x: fused(fused(x @ p["a"], p["b"]), p["c"])
    with pytest.warns(jlora.LeftOutWarning, match=r"'b' (.|\n)*'c' ") as caught:
        jlora.lora(fn, jlora.LoraConfig(".*", rank=2)).init(
            jax.random.key(0), params, X
        )
    assert len(caught) == 1


# --- the reader of patterns ---

_words = st.text("ab_", min_size=1, max_size=3)
_patterns = st.recursive(
    _words,
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map(lambda p: "(" + "|".join(p) + ")"),
        st.lists(inner, min_size=2, max_size=3).map("".join),
        inner.map(lambda p: f"(?:{p})?"),
        inner.map(lambda p: f"(?:{p}|[|)(]){{1,2}}"),
    ),
    max_leaves=6,
)
_texts = st.lists(st.text("ab_|()", max_size=6), max_size=20)


@given(st.lists(_patterns, min_size=2, max_size=3), _texts)
def test_alternatives_match_parts_of_what_the_pattern_matches(
    parts: list[str], texts: list[str]
) -> None:
    pattern = "|".join(parts)
    everything = set(matching(pattern, texts))
    found = alternatives(pattern)
    assert [one.text for one in found if not one.within] == parts
    for one in found:
        assert set(matching(one.alone, texts)) <= everything
    for outer in found:  # and of the alternative that they are a part of
        for one in (one for one in found if outer.place in one.within):
            hits = set(matching(one.alone, texts))
            assert hits <= set(matching(outer.alone, texts))
    assert not failing(pattern, lambda _: True)


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("(?i)QUERY", "a/query/kernel"),
        ("(?i)(Query|VALUE)/kernel", "a/value/kernel"),
        ("(?i)(?s)QUERY", "a/query"),
        ("(?x) query / kernel  # the query's", "a/query/kernel"),
        ("(?i:QUERY)", "query"),
    ],
)
def test_inline_flags(pattern: str, path: str) -> None:
    assert compile_pattern(pattern).search(path)
    assert not compile_pattern(pattern).search("a/queryx/kernelx")


def test_flags_in_a_config() -> None:
    assert plan("(?i)HEAD") == ["head"]
    assert plan(None, exclude="(?i)(in|Q)_PROJ") == ["head", "out_proj"]
    assert "w" in jlora.quantize({"w": jnp.ones((4, 4))}, "(?i)W", "int8")
