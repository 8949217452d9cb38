"""Adapters that PEFT saved, read and written by jlora; no torch is needed.

The fixtures come from `tests/oracle/make_fixtures.py`, the JAX functions and the maps
between layouts from `peft_twins.py`.
"""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import assert_close
from peft_golden import FOLDER, Golden, golden, json_of, read, save, scaled
from peft_meaning import by_pattern, meaning, selects
from peft_tables import (
    AMBIGUOUS_PATTERN,
    MOE_LAYERS,
    MOE_MODULES,
    MOE_PATTERNS,
    MOE_SELECTED,
    MOE_TARGETS,
    PATTERN_LAYERS,
    PATTERNS,
    SELECTIONS,
)
from peft_twin import Pair, affine, combined
from peft_twins import CONV_NAMES, TWINS

import jlora
import jlora.peft

pytestmark = [
    pytest.mark.usefixtures("fast_compile"),
    pytest.mark.filterwarnings("ignore:PEFT .* twice:UserWarning"),
]

PREFIX = "base_model.model."
EXACT = [name for name, twin in TWINS.items() if twin.exact]
# The file holds weights of the base, which are compared with the params.
HOLD_BASE = {"embedding_tied"}
# The file's biases are added to those of the base.
ADD_TO_BASE = ("lora_bias", "lora_bias_stack", "lora_bias_stack/scan")


# --- the twins themselves ---


@pytest.mark.parametrize("name", TWINS)
def test_twins_compute_what_torch_does(name: str) -> None:
    case = golden(name)
    fn = jax.jit(case.twin.fn)
    assert_close(fn(case.variables, case.x), case.arrays["output/base"], 1e-5)
    merged = case.twin.variables({**case.group("base"), **case.group("merged")})
    assert_close(fn(merged, case.x), case.arrays["output/adapted"], 1e-5)


# --- reading ---


@pytest.mark.parametrize("name", TWINS)
def test_outputs_are_those_of_peft(name: str) -> None:
    case = golden(name)
    output, _ = case.computed
    assert_close(output, case.arrays["output/adapted"], 1e-5)


@pytest.mark.parametrize("name", EXACT)
def test_gradients_are_those_of_peft(name: str) -> None:
    case = golden(name)
    _, gradients = case.computed
    found = gradients_under_torch_names(case, gradients)
    expected = expected_gradients(case)
    assert set(expected) <= set(found)
    for key, gradient in found.items():
        wanted = expected.get(key, np.zeros_like(gradient))
        assert_close(gradient, wanted, 1e-4, key)


def gradients_under_torch_names(case: Golden, gradients: Any) -> dict[str, np.ndarray]:
    """Maps the gradients of an adapter to torch by hand."""
    parts = []
    for path, entry in gradients.items():
        if isinstance(entry, jlora.LoraFactors):
            norm = None if entry.magnitude is None else np.asarray(entry.magnitude)
            entry = Pair(np.asarray(entry.a), np.asarray(entry.b), norm)
        else:
            entry = np.asarray(entry)
        parts.append(case.twin.leaves[path].to_torch(entry))
    return combined(parts)


def expected_gradients(case: Golden) -> dict[str, np.ndarray]:
    """Returns PEFT's gradients; those of tied tensors are one in JAX."""
    found = {plain_name(k): v for k, v in case.group("grad").items()}
    for copy, original in case.twin.tied.items():
        found[original] = found[original] + found.pop(copy).T
    return found


def plain_name(key: str) -> str:
    """Returns a key of the file without what PEFT's wrappers add to it."""
    key = key.removeprefix(PREFIX).replace(".base_layer.bias", ".bias")
    return key.replace(".base_layer.out_proj.", ".out_proj.")


@pytest.mark.parametrize("name", TWINS)
def test_merged_kernels_are_those_of_peft(name: str) -> None:
    case = golden(name)
    merged = jlora.merge(case.variables, case.adapter)
    expected = case.twin.variables({**case.group("base"), **case.group("merged")})
    jax.tree.map(lambda x, y: assert_close(x, y, 1e-6), merged, expected)


@pytest.mark.parametrize(
    "name", [n for n in TWINS if n not in (*HOLD_BASE, *ADD_TO_BASE)]
)
def test_a_plan_and_shapes_tell_as_much_as_params(name: str) -> None:
    case = golden(name)
    twin, shapes = case.twin, jax.eval_shape(lambda: case.variables)
    for base in (case.plan, shapes)[: 1 if twin.in_doubt else 2]:
        config, adapter = jlora.peft.load(
            case.folder, base, twin.names, ignore=twin.ignore
        )
        assert config == case.loaded[0]
        assert_same(adapter, case.adapter)


def assert_same(found: Any, expected: Any) -> None:
    """Asserts equality to the bit, of structure, dtypes and values."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("name", ADD_TO_BASE)
def test_a_bias_of_b_is_a_trained_bias(name: str) -> None:
    """Its gradient is PEFT's by the scaling: both are sums with the output."""
    case = golden(name)
    _, gradients = case.computed
    found = gradients_under_torch_names(case, gradients)
    given = json_of(case.folder)
    scaling = given["lora_alpha"] / given["r"]
    for key, wanted in expected_gradients(case).items():
        if module := key.partition(".lora_B.bias")[0] if "B.bias" in key else "":
            assert_close(scaling * found[f"{module}.bias"], wanted, 1e-4, key)


@pytest.mark.parametrize("name", ADD_TO_BASE)
def test_a_bias_of_b_needs_that_of_the_base(name: str, tmp_path: Path) -> None:
    case = golden(name)
    with pytest.raises(jlora.UnsupportedFeatureError, match=r"lora_bias.*as arrays"):
        jlora.peft.load(case.folder, case.plan, case.twin.names)
    bare = jax.tree_util.tree_map_with_path(
        lambda path, leaf: None if "bias" in str(path) else leaf, case.variables
    )
    with pytest.raises(jlora.UnsupportedFeatureError, match=r"lora_bias.*no bias of"):
        jlora.peft.load(case.folder, bare, case.twin.names)


@pytest.mark.parametrize("name", ADD_TO_BASE)
def test_a_bias_of_b_is_saved_as_a_trained_bias(name: str, tmp_path: Path) -> None:
    case = golden(name)
    save(case, tmp_path)
    assert json_of(tmp_path)["bias"] == "lora_only"
    assert not json_of(tmp_path)["lora_bias"]
    _, adapter = jlora.peft.load(tmp_path, case.base, case.twin.names)
    assert_same(adapter, case.adapter)


def test_mha_adds_each_delta_once() -> None:
    """PEFT 0.21 adds the delta of `out_proj` twice (huggingface/peft#3774)."""
    case = golden("mha")
    twice = {
        path: scaled(entry, 2.0) if "/out/" in path else entry
        for path, entry in case.adapter.items()
    }
    found = case.lora().apply(case.variables, twice, case.x)
    assert_close(found, case.arrays["output/peft"], 1e-5)
    with pytest.warns(UserWarning, match=r"'attn.out_proj' twice"):
        jlora.peft.load(case.folder, case.base, case.twin.names)


# --- the base ---


@pytest.mark.parametrize("name", TWINS)
def test_params_come_from_torch_and_go_back(name: str) -> None:
    case = golden(name)
    base = case.group("base")
    params = jlora.peft.params_from_torch(base, case.plan, case.twin.names)
    assert_same(params, case.twin.variables(base))
    back = jlora.peft.params_to_torch(params, case.twin.names, plan=case.plan)
    assert_same(back, base)


# --- writing ---


@pytest.mark.parametrize("name", EXACT)
def test_saved_tensors_are_those_of_peft(name: str, tmp_path: Path) -> None:
    case = golden(name)
    expected = read(case.folder)
    # PEFT adds the frozen tables of adapted embeddings; it loads files without them.
    expected = {
        k: v for k, v in expected.items() if not k.endswith("base_layer.weight")
    }
    assert_same(read(save(case, tmp_path)), expected)


@pytest.mark.parametrize("name", EXACT)
def test_saved_config_means_the_same(name: str, tmp_path: Path) -> None:
    case = golden(name)
    names = list(case.group("base"))
    found = meaning(json_of(save(case, tmp_path)), names)
    assert found == meaning(json_of(case.folder), names)


@pytest.mark.parametrize("name", EXACT)
def test_what_is_saved_is_read_again(name: str, tmp_path: Path) -> None:
    case = golden(name)
    save(case, tmp_path)
    _, adapter = jlora.peft.load(tmp_path, case.base, case.twin.names)
    assert_same(adapter, case.adapter)


def test_scalings_of_a_stack_survive(tmp_path: Path) -> None:
    case = golden("patterns/scan")
    save(case, tmp_path)
    _, adapter = jlora.peft.load(tmp_path, case.base, case.twin.names)
    for path, entry in case.adapter.items():
        again = jlora.delta(adapter[path])
        assert_close(again, jlora.delta(entry), 1e-6, path)


# --- which modules are selected ---


@pytest.mark.parametrize("row", SELECTIONS)
def test_the_port_selects_as_peft_does(row: Any) -> None:
    *args, expected = row
    assert selects(*args) is expected


@pytest.mark.parametrize("pattern", MOE_PATTERNS)
def test_an_expert_is_no_layer(pattern: Any) -> None:
    found = [m for m in MOE_MODULES if selects(m, MOE_TARGETS, MOE_LAYERS, pattern)]
    assert found == MOE_SELECTED


@pytest.mark.parametrize("row", [*PATTERNS, AMBIGUOUS_PATTERN])
def test_the_port_gives_the_ranks_of_peft(row: Any) -> None:
    found = tuple(by_pattern(row.pattern, name, 8) for name in PATTERN_LAYERS)
    assert found == row.ranks


# --- refusals ---


@pytest.mark.parametrize(
    ("case", "word", "features", "channels", "options"),
    [
        ("conv_grouped", "group", 8, 6, {"feature_group_count": 2}),
        ("conv_dilated", "dilat", 7, 5, {"kernel_dilation": 2}),
    ],
)
def test_convolutions_that_peft_gets_wrong_are_refused(
    case: str, word: str, features: int, channels: int, options: dict[str, int]
) -> None:
    conv = nn.Conv(features, (3, 3), padding="VALID", **options)
    x = np.ones((2, 8, 7, channels), np.float32)
    variables = {
        "params": {
            "conv": conv.init(jax.random.key(0), x)["params"],
            "head": {"kernel": jnp.ones((features, 3))},
        }
    }

    def fn(variables: Any, x: Any) -> jax.Array:
        y = conv.apply({"params": variables["params"]["conv"]}, x)
        return affine(variables["params"]["head"], y.mean((1, 2)))

    plan = jlora.lora(fn, jlora.LoraConfig("conv", rank=4)).plan(variables, x)
    with pytest.raises(jlora.UnsupportedFeatureError, match=word):
        jlora.peft.load(FOLDER / case, plan, CONV_NAMES)
