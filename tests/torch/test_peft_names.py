"""Names of well-known models, rotary orders, experts, and what vLLM takes."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import DATA, EXAMPLES
from safetensors.numpy import load_file

import jlora.peft

sys.path.insert(0, str(EXAMPLES))

import llama

CASES = DATA / "peft"
CONFIG = llama.LlamaConfig(
    vocab=41, hidden=24, mlp=40, layers=2, heads=4, kv_heads=2, head_dim=8, tied=False
)


def random_like(shapes: Any, seed: int = 0) -> Any:
    """Arrays of the given shapes."""
    generator = np.random.default_rng(seed)
    number = lambda x: jnp.asarray(generator.normal(size=x.shape), x.dtype)
    return jax.tree.map(number, shapes)


def factors(shape: tuple[int, ...], n_batch: int, rank: int = 3) -> jlora.LoraFactors:
    """Factors of `(*batch, in, out)`, none of them zero."""
    axes = jlora.KernelAxes(tuple(range(n_batch)), (n_batch,), (n_batch + 1,))
    shapes = axes.factor_shapes(shape, rank)
    a, b = random_like([jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes])
    return jlora.LoraFactors(a, b, axes, 0.5)


def assert_same(found: Any, expected: Any) -> None:
    """Asserts equality to the bit."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))


# --- families ---


@pytest.mark.parametrize("scan", [True, False])
def test_names_of_llama_are_those_of_transformers(scan: bool, tmp_path: Path) -> None:
    model = llama.Llama(dataclasses.replace(CONFIG, scan=scan))
    tokens = jnp.ones((2, 5), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    variables, names = random_like(shapes), jlora.peft.names("llama")
    lora = jlora.lora(model.apply, jlora.LoraConfig(None, rank=3, alpha=7.0))
    plan = lora.plan(variables, tokens)
    state = jlora.peft.params_to_torch(variables, names, plan=plan)
    arrays = np.load(CASES / "llama" / "arrays.npz")
    expected = {
        k.removeprefix("base/"): arrays[k].shape
        for k in arrays.files
        if k.startswith("base/")
    }
    layers = lambda name: not name.startswith(("model.embed", "model.norm", "lm_head"))
    found = {name for name in state if layers(name)}
    assert found == {name for name in expected if layers(name)}
    assert_same(jlora.peft.params_from_torch(state, variables, names), variables)
    adapter = random_like(lora.init(jax.random.key(1), variables, tokens), 1)
    jlora.peft.save(tmp_path, plan, adapter, lora.configs, names)
    config, loaded = jlora.peft.load(tmp_path, plan, names)
    assert_same(loaded, adapter)
    assert (config.rank, config.alpha) == (3, 7.0)


@pytest.mark.parametrize(
    "family, path, module",
    [
        ("llama", "params/decoder/layers/self_attention/query", "self_attn.q_proj"),
        ("mistral", "model/layers/3/mlp/gate_proj", "mlp.gate_proj"),
        ("qwen3", "layers/3/attn/q_norm", "self_attn.q_norm"),
        ("gemma2", "params/layers_3/pre_ffw_norm", "pre_feedforward_layernorm"),
        ("gpt2", "params/h_3/mlp/c_fc", "mlp.c_fc"),
        ("bert", "params/layer/3/attention/self/key", "attention.self.key"),
        ("vit", "params/layers/3/layernorm_before", "layernorm_before"),
        ("vit4", "params/layer/3/output/dense", "output.dense"),
    ],
)
def test_usual_names_are_known(family: str, path: str, module: str) -> None:
    kernel = np.zeros((4, 2, 3) if "decoder" in path else (2, 3), np.float32)
    leaf = "scale" if "norm" in path else "kernel"
    value = kernel[0] if leaf == "scale" else kernel
    state = jlora.peft.params_to_torch(
        {f"{path}/{leaf}": value}, jlora.peft.names(family)
    )
    names = {name.removesuffix(".weight") for name in state}
    assert all(name.endswith(f".{module}") for name in names)
    layers = {0, 1, 2, 3} if "decoder" in path else {3}
    assert {
        int(n.removesuffix(f".{module}").rsplit(".", 1)[1]) for n in names
    } == layers


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'llama'.*got 'lama'"):
        jlora.peft.names("lama")


GEMMA = {
    "embedder/input_embedding": (11, 6),
    "layers_0/attn/q_einsum/w": (2, 6, 3),
    "layers_0/attn/attn_vec_einsum/w": (2, 3, 6),
}


def gemma(params: Any, tokens: Any) -> jax.Array:
    """A layer with the leaves of the Gemma library, and the table as the head, too."""
    table, query, out = (params[path] for path in GEMMA)
    x = table[tokens]
    return jnp.einsum("tnh,nhd->td", jnp.einsum("td,ndh->tnh", x, query), out) @ table.T


def test_kernels_of_gemma_need_a_plan() -> None:
    shapes = {p: jax.ShapeDtypeStruct(s, np.float32) for p, s in GEMMA.items()}
    params, names = random_like(shapes), jlora.peft.names("gemma")
    plan = jlora.lora(gemma, jlora.LoraConfig(".*", rank=1)).plan(params, jnp.arange(4))
    state = jlora.peft.params_to_torch(params, names, plan=plan)
    query, out = (f"model.layers.0.self_attn.{x}_proj.weight" for x in "qo")
    assert state["model.embed_tokens.weight"].shape == (11, 6)
    kernel = np.asarray(params["layers_0/attn/q_einsum/w"])
    np.testing.assert_array_equal(state[query], kernel.swapaxes(1, 2).reshape(6, 6))
    kernel = np.asarray(params["layers_0/attn/attn_vec_einsum/w"])
    np.testing.assert_array_equal(state[out], kernel.reshape(6, 6).T)
    assert_same(jlora.peft.params_from_torch(state, plan, names), params)
    told = 'the plan.*"same".*"parameter"'
    with pytest.raises(jlora.AdapterError, match=f"vec_einsum.*q_einsum.*{told}"):
        jlora.peft.params_to_torch(params, names)
    with pytest.raises(jlora.AdapterError, match=f"_einsum.*{told}"):
        jlora.peft.params_from_torch(state, params, names)


def test_the_table_of_gemma_is_one_without_a_plan(tmp_path: Path) -> None:
    params, names = {"embedder/input_embedding": np.ones((11, 6))}, "gemma"
    rules = jlora.peft.names(names)
    (found,) = jlora.peft.params_to_torch(params, rules).items()
    assert (found[0], found[1].shape) == ("model.embed_tokens.weight", (11, 6))
    (found,) = jlora.peft.params_to_torch(params).items()
    assert (found[0], found[1].shape) == ("embedder.weight", (11, 6))
    adapter = {"embedder/input_embedding": factors((11, 6), 0)}
    jlora.peft.save(tmp_path, params, adapter, (), rules)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.rpartition(".")[2] for name in tensors} == {
        "lora_embedding_A",
        "lora_embedding_B",
    }
    assert_same(jlora.peft.load(tmp_path, params, rules)[1], adapter)


def test_scales_and_biases_of_several_axes_are_vectors() -> None:
    params = {
        "layers/attn/q_norm/scale": np.arange(24.0).reshape(2, 3, 4),
        "layers/attn/query/bias": np.arange(24.0).reshape(2, 3, 4),
    }
    names = jlora.peft.names("qwen3")
    state = jlora.peft.params_to_torch(params, names)
    assert {tensor.shape for tensor in state.values()} == {(12,)}
    assert_same(jlora.peft.params_from_torch(state, params, names), params)
    wide = {name: tensor.reshape(3, 4) for name, tensor in state.items()}
    assert_same(jlora.peft.params_from_torch(wide, params, names), params)


def test_a_weight_has_the_layout_of_torch_in_the_mechanical_map() -> None:
    params = {
        "lin/weight": np.arange(6.0).reshape(3, 2),
        "conv/weight": np.arange(30.0).reshape(5, 2, 3),
        "norm/weight": np.arange(3.0),
    }
    state = jlora.peft.params_to_torch(params)
    assert_same({n.replace(".", "/"): tensor for n, tensor in state.items()}, params)
    assert_same(jlora.peft.params_from_torch(state, params), params)
    turned = state | {"lin.weight": state["lin.weight"].T}
    with pytest.raises(jlora.AdapterError, match=r"'lin/weight' is \(3, 2\)"):
        jlora.peft.params_from_torch(turned, params)


def test_a_weight_that_a_plan_knows_has_its_axes(tmp_path: Path) -> None:
    """Those of a kernel that has torch's layout, and of one that has not."""
    params = random_like(
        {
            "one/weight": jax.ShapeDtypeStruct((4, 4), np.float32),
            "two/weight": jax.ShapeDtypeStruct((4, 4), np.float32),
        }
    )
    fn = lambda p, x: x @ p["one/weight"].T + x @ p["two/weight"]
    lora = jlora.lora(fn, jlora.LoraConfig(None, rank=2))
    plan = lora.plan(params, jnp.ones((1, 4)))
    state = jlora.peft.params_to_torch(params, plan=plan)
    np.testing.assert_array_equal(state["one.weight"], params["one/weight"])
    np.testing.assert_array_equal(state["two.weight"], params["two/weight"].T)
    assert_same(jlora.peft.params_from_torch(state, plan), params)
    adapter = random_like(lora.init(jax.random.key(0), params, jnp.ones((1, 4))))
    jlora.peft.save(tmp_path, plan, adapter, lora.configs)
    assert_same(jlora.peft.load(tmp_path, plan)[1], adapter)


# --- two leaves of one name ---

COLLISIONS = {
    "open prefix": (
        [f"{side}/layers_0/self_attn/q_proj/kernel" for side in ("encoder", "decoder")],
        jlora.peft.names("llama"),
    ),
    "dots": (["a.b/kernel", "a/b/kernel"], None),
    "no field": ([f"layers_{i}/q/kernel" for i in range(2)], [(r"layers_\d/q", "q")]),
    "stack and numbers": (
        ["layers/attn/q/kernel", "layers_1/attn/q/kernel"],
        jlora.peft.names("llama"),
    ),
    "parts": (
        ["h_0/attn/c_attn/kernel", "h_0/attn/q/kernel"],
        jlora.peft.names("gpt2"),
    ),
}


@pytest.mark.parametrize("case", COLLISIONS)
@pytest.mark.parametrize("which", [slice(None), slice(1), slice(1, 2)])
def test_two_leaves_of_one_name_are_refused(
    case: str, which: slice, tmp_path: Path
) -> None:
    """Also where one of them is adapted: the reader could not tell which."""
    paths, names = COLLISIONS[case]
    n_batch = lambda path: int("layers/" in path)
    shape = lambda path: (2, 4, 6)[1 - n_batch(path) :]
    params = {path: np.ones(shape(path), np.float32) for path in paths}
    adapter = {path: factors(shape(path), n_batch(path)) for path in paths[which]}
    whole = {path: params[path] for path in paths[which]}
    told = "made of " + "".join(f"(?=.*{path!r})" for path in paths)
    for entries in (adapter, whole):
        with pytest.raises(jlora.AdapterError, match=told):
            jlora.peft.save(tmp_path / "a", params, entries, (), names)
    with pytest.raises(jlora.AdapterError, match=told):
        jlora.peft.params_to_torch(params, names)
    assert not (tmp_path / "a").exists()


def test_numbered_layers_go_on_where_a_stack_ends(tmp_path: Path) -> None:
    stack, single = "layers/attn/q/kernel", "layers_2/attn/q/kernel"
    params = random_like(
        {
            stack: jax.ShapeDtypeStruct((2, 4, 6), np.float32),
            single: jax.ShapeDtypeStruct((4, 6), np.float32),
        }
    )
    names = jlora.peft.names("llama")
    state = jlora.peft.params_to_torch(params, names)
    assert len(state) == 3
    assert_same(jlora.peft.params_from_torch(state, params, names), params)
    adapter = {stack: factors((2, 4, 6), 1), single: factors((4, 6), 0)}
    jlora.peft.save(tmp_path, params, adapter, (), names)
    assert_same(jlora.peft.load(tmp_path, params, names)[1], adapter)


# --- dtypes ---


def cast(entry: jlora.LoraFactors, a: Any, b: Any) -> jlora.LoraFactors:
    """The factors in other dtypes."""
    return dataclasses.replace(entry, a=entry.a.astype(a), b=entry.b.astype(b))


@pytest.mark.parametrize(
    "dtypes, common",
    [
        ("bfloat16 bfloat16 float32 float32", "float32"),
        ("float32 bfloat16 bfloat16 bfloat16", "float32"),
        ("bfloat16 bfloat16 float16 float16", "float32"),
        ("bfloat16 bfloat16 bfloat16 bfloat16", "bfloat16"),
    ],
)
@pytest.mark.parametrize("fused", [True, False])
def test_factors_of_several_dtypes_are_promoted(
    dtypes: str, common: str, fused: bool, tmp_path: Path
) -> None:
    names = jlora.peft.names("gpt2") if fused else None
    params = {f"h_0/attn/{n}/kernel": np.ones((4, 6), np.float32) for n in "qkv"}
    query, value = (f"h_0/attn/{n}/kernel" for n in "qv")
    one, two, three, four = dtypes.split()
    entry = factors((4, 6), 0)
    adapter = {query: cast(entry, one, two), value: cast(entry, three, four)}
    jlora.peft.save(tmp_path, params, adapter, (), names)
    _, loaded = jlora.peft.load(tmp_path, params, names)
    for path, given in adapter.items():
        found, wanted = loaded[path], jnp.promote_types(given.a.dtype, given.b.dtype)
        assert found.a.dtype == found.b.dtype == (common if fused else wanted)
        np.testing.assert_array_equal(jlora.delta(found), jlora.delta(given))


# --- rotary orders ---


def halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Torch's `(out, in)` of features 2i and 2i + 1, for features i and i + half."""
    out, features = weight.shape
    pairs = weight.reshape(heads, out // heads // 2, 2, features)
    return pairs.swapaxes(1, 2).reshape(out, features)


@pytest.mark.parametrize("split", [True, False])
def test_interleaved_heads_are_reordered(split: bool, tmp_path: Path) -> None:
    heads, head, features = 3, 4, 5
    wide = factors((features, heads * head), 0)
    rules = jlora.peft.names("llama", rope="interleaved", head_dim=head)
    path, shape = "layers/0/attn/q_proj/kernel", (features, heads * head)
    if split:
        rules = jlora.peft.names("llama", rope="interleaved")
        axes = jlora.KernelAxes((), (0,), (1, 2))
        b = wide.b.reshape(3, heads, head)
        wide, shape = jlora.LoraFactors(wide.a, b, axes, 0.5), (features, heads, head)
    params = {path: np.random.default_rng(0).normal(size=shape)}
    jlora.peft.save(tmp_path, params, {path: wide}, (), rules)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    own = np.asarray(wide.b).reshape(3, -1).T
    found = tensors[f"{prefix}.lora_B.weight"]
    np.testing.assert_array_equal(found, halves(own, heads))
    _, loaded = jlora.peft.load(tmp_path, params, rules)
    assert_same(loaded, {path: wide})
    if not split:  # the kernel alone does not tell where its heads begin
        state = jlora.peft.params_to_torch(params, rules)
        (weight,) = state.values()
        np.testing.assert_array_equal(weight, halves(params[path].T, heads))
        assert_same(jlora.peft.params_from_torch(state, params, rules), params)


def test_heads_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    path = "layers/0/attn/q_proj/kernel"
    rules = jlora.peft.names("llama", rope="interleaved", head_dim=8)
    params = {path: np.zeros((5, 12))}
    with pytest.raises(jlora.AdapterError, match="heads of 8"):
        jlora.peft.save(tmp_path, params, {path: factors((5, 12), 0)}, (), rules)


# --- experts ---

EXPERTS = [
    (r"layers/experts/gate", "model.layers.{i}.experts.gate_up_proj[0]", "experts"),
    (r"layers/experts/up", "model.layers.{i}.experts.gate_up_proj[1]", "experts"),
    (r"layers/experts/down", "model.layers.{i}.experts.down_proj", "experts"),
]
MIXTURE = {
    "layers/experts/gate/kernel": (2, 4, 5, 7),
    "layers/experts/up/kernel": (2, 4, 5, 7),
    "layers/experts/down/kernel": (2, 4, 7, 5),
}


def mixture() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Params and an adapter of two layers of four experts, one of them all zero."""
    params = {path: np.zeros(shape, np.float32) for path, shape in MIXTURE.items()}
    adapter = {}
    for path, shape in MIXTURE.items():
        whole = factors(shape, 2)
        a, b = whole.a.at[1, 2].set(0), whole.b.at[1, 2].set(0)
        adapter[path] = jlora.LoraFactors(a, b, whole.axes, whole.scaling)
    return params, adapter


def test_an_expert_of_zeros_keeps_its_place(tmp_path: Path) -> None:
    params, adapter = mixture()
    jlora.peft.save(tmp_path, params, adapter, (), EXPERTS)
    _, loaded = jlora.peft.load(tmp_path, params, EXPERTS)
    for path, entry in adapter.items():
        found = jlora.delta(loaded[path])
        np.testing.assert_allclose(found, jlora.delta(entry), rtol=0, atol=1e-6)


# --- vLLM ---


def test_vllm_gets_one_rank_and_one_alpha(tmp_path: Path) -> None:
    params = {f"{n}/kernel": np.zeros((20, 30), np.float32) for n in ("q", "v")}
    small, large = factors((20, 30), 0, 3), factors((20, 30), 0, 9)
    large = jlora.LoraFactors(large.a, large.b, large.axes, 2.0)
    adapter = {"q/kernel": small, "v/kernel": large}
    jlora.peft.save(tmp_path, params, adapter, profile="vllm")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 16 and not config["rank_pattern"]
    assert not config["alpha_pattern"] and not config["use_rslora"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for name, entry in (("q", small), ("v", large)):
        a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        assert (a.shape, b.shape) == ((16, 20), (30, 16))
        found = config["lora_alpha"] / 16 * (b @ a).T
        np.testing.assert_allclose(found, jlora.delta(entry), rtol=0, atol=1e-4)


def test_vllm_gets_experts_apart(tmp_path: Path) -> None:
    params, adapter = mixture()
    jlora.peft.save(tmp_path, params, adapter, (), EXPERTS, profile="vllm")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] is None
    scaling = config["lora_alpha"] / config["r"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for layer, expert in np.ndindex(2, 4):
        for leaf in ("gate", "up", "down"):
            module = f"model.layers.{layer}.experts.{expert}.{leaf}_proj"
            key = f"base_model.model.{module}.lora_"
            change = jlora.delta(adapter[f"layers/experts/{leaf}/kernel"])[
                layer, expert
            ]
            if f"{key}A.weight" not in tensors:
                assert not change.any()
                continue
            found = scaling * tensors[f"{key}B.weight"] @ tensors[f"{key}A.weight"]
            np.testing.assert_allclose(found.T, change, rtol=0, atol=1e-5)


@pytest.mark.parametrize("what", ["whole", "conv", "mha"])
def test_vllm_is_spared_what_it_would_drop(what: str, tmp_path: Path) -> None:
    params: dict[str, Any] = {"q/kernel": np.zeros((20, 30), np.float32)}
    adapter: dict[str, Any] = {"q/kernel": factors((20, 30), 0)}
    names: Any = None
    if what == "whole":
        params["head/kernel"] = adapter["head/kernel"] = np.ones((3, 4), np.float32)
    elif what == "mha":
        leaves = [f"attn/{name}/kernel" for name in ("q", "k", "v", "out")]
        params = {path: np.zeros((20, 20), np.float32) for path in leaves}
        adapter = {path: factors((20, 20), 0) for path in leaves[:3]}
        names = [(f"attn/{n}", f"attn[{i}]", "mha") for i, n in enumerate("qkv")]
        names += [("attn/out", "attn.out_proj")]
    else:
        params = {"conv/kernel": np.zeros((3, 5, 7), np.float32)}
        axes = jlora.KernelAxes((), (0, 1), (2,))
        a, b = np.ones((3, 5, 2), np.float32), np.ones((2, 7), np.float32)
        adapter = {
            "conv/kernel": jlora.LoraFactors(*map(jnp.asarray, (a, b)), axes, 1.0)
        }
        names = [("conv", "conv", "conv")]
    with pytest.raises(jlora.UnsupportedFeatureError, match="merge"):
        jlora.peft.save(tmp_path, params, adapter, (), names, profile="vllm")
