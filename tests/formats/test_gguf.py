"""GGUF adapters: rows and names as llama.cpp has them, beside gguf's own reader."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import gguf as library
import jax.numpy as jnp
import numpy as np
import pytest
from format_files import FILES, deltas, weights
from format_files import model as folder_of
from safetensors.numpy import save_file

import jlora
from jlora import AdapterError, CorruptFileError, UnsupportedFeatureError
from jlora.__main__ import FAILED, SAME, main
from jlora._files.gguf import gguf_bytes, read_gguf
from jlora._formats import gguf

Q, K, V = (f"model.layers.1.self_attn.{n}_proj" for n in "qkv")
UP, TABLE = "model.layers.0.mlp.up_proj", "model.embed_tokens"
HEADS, KV_HEADS, HEAD = 4, 2, 6
OUT = {Q: HEADS * HEAD, K: KV_HEADS * HEAD, V: KV_HEADS * HEAD, UP: 7, TABLE: 5}
OWN = {
    Q: "blk.1.attn_q",
    K: "blk.1.attn_k",
    V: "blk.1.attn_v",
    UP: "blk.0.ffn_up",
    TABLE: "token_embd",
}


def adapter_of(*names: str, dtype: Any = np.float32) -> dict[str, Any]:
    """Factors of some modules, their scalings and ranks not alike."""
    rng, found = np.random.default_rng(0), {}
    for rank, name in enumerate(names, 1):
        fan_in = 11 if name == TABLE else 5
        a, b = rng.normal(size=(fan_in, rank)), rng.normal(size=(rank, OUT[name]))
        axes = jlora.KernelAxes((), (0,), (1,))
        factors = jlora.LoraFactors(a.astype(dtype), b.astype(dtype), axes, 1.5 / rank)
        last = "embedding" if name == TABLE else "kernel"
        found[f"params/{name.replace('.', '/')}/{last}"] = factors
    return found


def base(folder: Path, model_type: str = "llama", **changes: Any) -> Path:
    """The folder of a base, with nothing but its config."""
    folder.mkdir(exist_ok=True)
    config = {"model_type": model_type, "num_attention_heads": HEADS}
    config |= {"num_key_value_heads": KV_HEADS, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read_back(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What gguf's own reader finds in a file."""
    reader = library.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    for tensor in reader.tensors:
        assert tuple(tensor.shape)[::-1] == tensor.data.shape
    return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def delta_of(own: str, tensors: dict[str, np.ndarray], alpha: float) -> np.ndarray:
    """What llama.cpp adds to a tensor."""
    a, b = (tensors[f"{own}.weight.lora_{n}"].astype(np.float64) for n in "ab")
    rank = b.shape[1]
    return alpha / rank * (a @ b.T if own == "token_embd" else b @ a)


# --- written files, by gguf's own reader ---


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_the_library_reads_what_is_written(
    architecture: str, dtype: Any, tmp_path: Path
) -> None:
    adapter, file = adapter_of(*OWN, dtype=dtype), tmp_path / "a.gguf"
    gguf.write(file, adapter, (), base=base(tmp_path / "base", architecture))
    fields, tensors = read_back(file)
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == architecture
    assert {key.rpartition(".")[0] for key in tensors} == {
        f"{own}.weight" for own in OWN.values()
    }
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(dtype)}
    for (name, own), factors in zip(OWN.items(), adapter.values(), strict=True):
        delta = np.asarray(factors.a, np.float64) @ np.asarray(factors.b, np.float64)
        expected = factors.scaling * (delta if name == TABLE else delta.T)
        heads = {Q: HEADS, K: KV_HEADS}.get(name, 0)
        if architecture == "llama" and heads:  # rows i and i + d/2 become neighbours
            halves = expected.reshape(heads, 2, HEAD // 2, -1)
            pairs = np.stack([halves[:, 0], halves[:, 1]], axis=2)
            expected = pairs.reshape(expected.shape)
        found = delta_of(own, tensors, fields["adapter.lora.alpha"])
        tolerance = 1e-5 if dtype == np.float32 else 2e-2
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_bfloat16_is_written_and_read(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    adapter = adapter_of(V, dtype=jnp.bfloat16)
    gguf.write(file, adapter, (), architecture="qwen3")
    (tensor, _) = library.GGUFReader(file).tensors
    assert tensor.tensor_type == library.GGMLQuantizationType.BF16
    _, back = gguf.read(file)
    for path, factors in adapter.items():
        assert back[path].a.dtype == jnp.bfloat16
        assert np.array_equal(back[path].a, factors.a)
        assert np.array_equal(back[path].b, factors.b)


def test_the_order_of_tensors_changes_no_byte(tmp_path: Path) -> None:
    adapter = adapter_of(V, UP)
    turned = dict(reversed(adapter.items()))
    for name, own in {"a": adapter, "b": turned}.items():
        gguf.write(tmp_path / name, own, (), architecture="qwen2")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# --- files of the library, read ---


def library_file(file: Path, change: Any = lambda fields, tensors: None) -> Path:
    """An adapter of one module by gguf's own writer, with changes."""
    rng = np.random.default_rng(0)
    fields: dict[str, Any] = {"adapter.type": "lora", "adapter.lora.alpha": 3.0}
    fields["general.type"] = "adapter"
    tensors: dict[str, Any] = {
        "blk.0.attn_v.weight.lora_a": rng.normal(size=(2, 5)).astype(np.float32),
        "blk.0.attn_v.weight.lora_b": rng.normal(size=(7, 2)).astype(np.float32),
    }
    architecture = change(fields, tensors) or "qwen2"
    writer = library.GGUFWriter(file, architecture)
    for name, value in fields.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_float32(name, value)
    for name, tensor in tensors.items():
        raw = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, raw[0], raw_dtype=raw[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("alpha, scaling", [(3.0, 1.5), (0.0, 1.0), (None, 1.0)])
def test_without_an_alpha_the_scaling_is_one(
    alpha: float | None, scaling: float, tmp_path: Path
) -> None:
    def change(fields: Any, tensors: Any) -> None:
        fields["adapter.lora.alpha"] = alpha
        if alpha is None:
            del fields["adapter.lora.alpha"]

    (module,) = gguf.modules(library_file(tmp_path / "a.gguf", change))
    assert (module.name, module.scaling) == (
        "model.layers.0.self_attn.v_proj",
        scaling,
    )


def test_fields_of_all_kinds_are_passed_over(tmp_path: Path) -> None:
    def change(fields: Any, tensors: Any) -> None:
        fields |= {"general.name": "ä", "general.tags": ["one", "two"]}
        fields |= {"general.numbers": [1, 2, 3], "general.flags": [True, False]}

    file = library_file(tmp_path / "a.gguf", change)
    fields, _ = read_gguf(file, 1 << 20, {})
    assert fields["general.name"] == "ä" and fields["general.tags"] == ["one", "two"]
    assert list(fields["general.numbers"]) == [1, 2, 3]
    assert len(gguf.modules(file)) == 1


def quantised(fields: Any, tensors: Any) -> None:
    kind = library.GGMLQuantizationType.Q8_0
    values = library.quants.quantize(np.ones((2, 32), np.float32), kind)
    tensors["blk.0.attn_v.weight.lora_a"] = (values, kind)


def renamed(new: str) -> Any:
    def change(fields: Any, tensors: Any) -> None:
        for end in "ab":
            old = f"blk.0.attn_v.weight.lora_{end}"
            tensors[f"{new}.lora_{end}"] = tensors.pop(old)

    return change


def setting(**changes: Any) -> Any:
    def change(fields: Any, tensors: Any) -> None:
        fields |= {key.replace("__", "."): value for key, value in changes.items()}

    return change


def beside(name: str, tensor: np.ndarray) -> Any:
    return lambda fields, tensors: tensors.update({name: tensor})


def packed(fields: Any, tensors: Any) -> None:
    for name in list(tensors):
        new = name.replace("attn_v", "ffn_up_exps")
        tensors[new] = np.stack([tensors.pop(name)] * 3)


LAST = "blk.0.attn_v.weight.lora_b"
ONES = np.ones((7, 2), np.float32)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (quantised, UnsupportedFeatureError, ["attn_v.weight.lora_a", "Q8_0"]),
        (packed, UnsupportedFeatureError, ["ffn_up_exps", "experts"]),
        (renamed("blk.0.nothing.weight"), UnsupportedFeatureError, ["nothing"]),
        (renamed("blk.0.attn_norm.weight"), UnsupportedFeatureError, ["attn_norm"]),
        (setting(general__type="model"), AdapterError, ["no LoRA adapter", "model"]),
        (setting(adapter__type="vec"), AdapterError, ["no LoRA adapter", "vec"]),
        (setting(adapter__lora__alpha="3"), CorruptFileError, ["alpha"]),
        (setting(adapter__lora__alpha=-1.0), CorruptFileError, ["alpha"]),
        (
            setting(adapter__alora__invocation_tokens=[1, 2]),
            UnsupportedFeatureError,
            ["--ignore adapter.alora.invocation_tokens"],
        ),
        (beside("output_norm.weight", ONES[:, 0]), UnsupportedFeatureError, ["whole"]),
        (beside("blk.0.attn_q.lora_a", ONES), AdapterError, ["attn_q.lora_a"]),
        (beside("blk.0.attn_q.weight.lora_a", ONES), AdapterError, ["attn_q"]),
        (beside(LAST, np.ones((7, 3), np.float32)), AdapterError, ["ranks"]),
        (beside(LAST, ONES.astype(np.float16)), AdapterError, ["dtypes"]),
        (beside(LAST, ONES * np.nan), AdapterError, ["NaN"]),
    ],
)
def test_what_is_wrong_is_told_by_name(
    change: Any, error: type[Exception], words: list[str], tmp_path: Path
) -> None:
    file = library_file(tmp_path / "a.gguf", change)
    with pytest.raises(error) as caught:
        gguf.modules(file)
    assert all(word in str(caught.value) for word in words), caught.value


def test_tokens_that_start_an_adapter_can_be_done_without(tmp_path: Path) -> None:
    name = "adapter.alora.invocation_tokens"
    change = setting(adapter__alora__invocation_tokens=[1, 2])
    file = library_file(tmp_path / "a.gguf", change)
    assert len(gguf.modules(file, ignore=[name])) == 1


# --- rows and names ---


def test_rows_need_the_base_of_the_same_kind(tmp_path: Path, capsys: Any) -> None:
    file, own = FILES["gguf"], base(tmp_path / "own", "qwen2")
    for command in (
        ["inspect", str(file)],
        ["convert", str(file), str(tmp_path / "o")],
    ):
        assert main([*command, "--base", str(own)]) == FAILED
        line = capsys.readouterr().err
        assert "'qwen2'" in line and "'llama'" in line


@pytest.mark.parametrize("heads", [None, 0, 5, 8, "4"])
def test_heads_that_do_not_divide_the_rows_are_refused(
    heads: Any, tmp_path: Path
) -> None:
    own = base(tmp_path / "own", num_attention_heads=heads, num_key_value_heads=heads)
    with pytest.raises(AdapterError, match="num_key_value_heads"):
        gguf.modules(FILES["gguf"], base=own)


def test_what_the_config_says_of_a_part_counts(tmp_path: Path) -> None:
    part = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}
    own = base(tmp_path / "own", "llava", text_config=part, num_attention_heads=1)
    found = deltas(gguf.modules(FILES["gguf"], base=own))
    expected = deltas(gguf.modules(FILES["gguf"], base=FILES["gguf"].parent))
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_an_unknown_architecture_is_shown_and_not_converted(
    tmp_path: Path, capsys: Any
) -> None:
    file = library_file(tmp_path / "a.gguf", lambda fields, tensors: "mamba")
    assert main(["inspect", str(file)]) == SAME
    assert "params/blk/0/attn_v/kernel" in capsys.readouterr().out
    assert main(["convert", str(file), str(tmp_path / "out")]) == FAILED
    assert "'mamba'" in capsys.readouterr().err
    base_of = str(base(tmp_path / "own"))
    assert main(["merge", base_of, str(file), str(tmp_path / "out")]) == FAILED


def test_params_place_the_rows_of_their_base_alone(tmp_path: Path) -> None:
    shapes = {f"params/{TABLE.replace('.', '/')}/embedding": (11, 24)}
    for name in gguf.modules(FILES["gguf"]):
        path = f"params/{name.name.replace('.', '/')}/kernel"
        if not name.is_table:
            shapes[path] = name.kernel_shape
    with pytest.raises(UnsupportedFeatureError, match="--base FOLDER"):
        gguf.read(FILES["gguf"], params=shapes)
    _, adapter = gguf.read(FILES["gguf"], params=shapes, base=FILES["gguf"].parent)
    assert set(adapter) == set(shapes)


# --- what can not be written ---


@pytest.mark.parametrize(
    "names, options, error, words",
    [
        ([V], {}, ValueError, "--architecture"),
        ([Q], {"architecture": "llama"}, AdapterError, "--base FOLDER"),
        ([V], {"architecture": "gpt2"}, UnsupportedFeatureError, "'gpt2'"),
        ([V], {"architecture": "nothing"}, UnsupportedFeatureError, "'nothing'"),
    ],
)
def test_what_is_not_known_of_the_base_is_asked_for(
    names: list[str],
    options: dict[str, Any],
    error: type[Exception],
    words: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=re.escape(words)):
        gguf.write(tmp_path / "a.gguf", adapter_of(*names), (), **options)
    assert not list(tmp_path.iterdir())


def test_modules_without_a_name_are_listed(tmp_path: Path) -> None:
    (factors,) = adapter_of(V).values()
    paths = ["model/layers/0/other", "transformer/h/0/attn/c_attn", "lm_head"]
    adapter = {f"params/{path}/kernel": factors for path in paths}
    with pytest.raises(UnsupportedFeatureError) as caught:
        gguf.write(tmp_path / "a.gguf", adapter, (), architecture="gemma2")
    for path in paths:  # Gemma's head is its table
        assert path.replace("/", ".") in str(caught.value)


def test_a_table_that_is_no_table_is_refused(tmp_path: Path) -> None:
    (factors,) = adapter_of(V).values()
    for path in ("model/embed_tokens/kernel", "lm_head/embedding"):
        with pytest.raises(UnsupportedFeatureError, match=path.rpartition("/")[0][-7:]):
            own = {f"params/{path}": factors}
            gguf.write(tmp_path / "a.gguf", own, (), architecture="qwen2")


def test_float64_has_no_place() -> None:
    with pytest.raises(AdapterError, match="float64"):
        gguf_bytes({}, {"a": np.ones((2, 2))})


def test_a_mistral_is_a_llama(tmp_path: Path) -> None:
    file, own = tmp_path / "a.gguf", base(tmp_path / "base", "mistral")
    gguf.write(file, adapter_of(Q, K), (), base=own)
    assert read_back(file)[0]["general.architecture"] == "llama"
    _, back = gguf.read(file, base=own)
    for path, factors in adapter_of(Q, K).items():
        np.testing.assert_allclose(jlora.delta(back[path]), jlora.delta(factors), 1e-5)


def test_an_adapter_is_merged_under_its_own_names(tmp_path: Path, capsys: Any) -> None:
    model = folder_of(tmp_path / "model", "gguf")
    (model / "adapter.gguf").write_bytes(FILES["gguf"].read_bytes())
    name = "model.layers.0.self_attn.q_proj.weight"
    shape = weights(model)[name].shape
    save_file({name: np.zeros(shape, np.float32)}, model / "model.safetensors")
    out = tmp_path / "out"
    words = ["merge", str(model), str(model / "adapter.gguf"), str(out)]
    assert main(words) == FAILED  # the other modules have no weights
    assert "k_proj" in capsys.readouterr().err
    assert not out.exists()


def test_without_the_package_it_is_said_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main(["inspect", str(FILES["gguf"])]) == FAILED
    assert "pip install gguf" in capsys.readouterr().err
