"""Writes tests/data/mlx: adapters that mlx-lm trains, and what it makes of them.

For a Python with mlx-lm 0.32.2 and `mlx[cpu]`, which jlora does not need:

    python tests/oracle/make_mlx.py

Each case is a folder of MLX's, the base's weights and those after mlx-lm's own `fuse`.
With the names of two folders it tells instead whether mlx-lm fuses both to the same:

    python tests/oracle/make_mlx.py tests/data/mlx/linear written_by_jlora linear
"""

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import llama, mixtral
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

DATA = Path(__file__).parents[1] / "data" / "mlx"
LLAMA = {
    "model_type": "llama", "hidden_size": 12, "num_hidden_layers": 2,
    "intermediate_size": 20, "num_attention_heads": 2, "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5, "vocab_size": 22, "tie_word_embeddings": True,
}  # fmt: skip
MIXTRAL = {
    "model_type": "mixtral", "hidden_size": 12, "num_hidden_layers": 1,
    "intermediate_size": 10, "num_attention_heads": 2, "num_key_value_heads": 1,
    "vocab_size": 22, "num_local_experts": 3, "num_experts_per_tok": 2,
}  # fmt: skip
BLOCK = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
MOE = ["self_attn.q_proj", "block_sparse_moe.switch_mlp.up_proj"]
CASES = {
    "linear": (llama, LLAMA, BLOCK, False),
    "dora": (llama, LLAMA, BLOCK, True),
    "table": (llama, LLAMA, [*BLOCK, "model.embed_tokens"], False),
    "experts": (mixtral, MIXTRAL, MOE, False),
}


def model_of(case: str) -> Any:
    """The base of a case, the same at each run."""
    module, config, *_ = CASES[case]
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(config))
    mx.eval(model.parameters())
    model.freeze()
    return model


def values(tree: Any) -> dict[str, mx.array]:
    """The arrays of a model by name."""
    return dict(tree_flatten(tree))


def fused(model: Any) -> dict[str, mx.array]:
    """The weights after mlx-lm's `fuse` of each module that has one."""
    modules = [(n, m.fuse()) for n, m in model.named_modules() if hasattr(m, "fuse")]
    model.update_modules(tree_unflatten(modules))
    return values(model.parameters())


def logits(model: Any) -> mx.array:
    """What a model makes of some tokens."""
    return model(mx.array([[3, 1, 4, 1, 5, 9, 2, 6]]))


def make(case: str) -> None:
    """Writes one case."""
    folder = DATA / case
    folder.mkdir(parents=True, exist_ok=True)
    _, config, keys, dora = CASES[case]
    model = model_of(case)
    mx.save_safetensors(str(folder / "base.safetensors"), values(model.parameters()))
    parameters = {"rank": 3, "scale": 2.5, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, 16, parameters, use_dora=dora)
    mx.random.seed(1)
    own = values(model.trainable_parameters())
    moved = {
        name: (1.0 + 0.1 * mx.random.normal(x.shape)) * x
        if name.endswith(".m")
        else 0.3 * mx.random.normal(x.shape)
        for name, x in own.items()
    }
    model.load_weights(list(moved.items()), strict=False)
    mx.save_safetensors(str(folder / "adapters.safetensors"), moved)
    values_of_config = {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": 16,
        "lora_parameters": parameters,
    }
    text = json.dumps(values_of_config, indent=4, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    expected = {"logits": logits(model), **fused(model)}
    mx.save_safetensors(str(folder / "fused.safetensors"), expected)


def compare(one: Path, other: Path, case: str) -> None:
    """Raises unless mlx-lm makes the same of two adapters."""
    first, second = (load_adapters(model_of(case), str(p)) for p in (one, other))
    assert mx.allclose(logits(first), logits(second), rtol=1e-4, atol=1e-5)
    wanted, found = fused(first), fused(second)
    assert wanted.keys() == found.keys()
    for name, array in wanted.items():
        assert mx.allclose(array, found[name], rtol=1e-4, atol=1e-5), name
    print(f"mlx-lm makes the same of {one} and {other}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        compare(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    else:
        for each in CASES:
            make(each)
