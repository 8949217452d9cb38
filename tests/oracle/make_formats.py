"""Writes the golden files of `tests/data/formats` with diffusers, PEFT and gguf.

    python tests/oracle/make_formats.py [format ...]

Needs torch, peft, transformers, diffusers and gguf, and no JAX. Each case is a folder
with the file of an adapter, `arrays.npz`, which has the weights that change before and
after (`base/` and `merged/`, under torch's names), and `names.json`, the names of all
weights of the base. The merged weights are what diffusers fuses. Those of GGUF are what
transformers makes of sums in llama.cpp's order of rows.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors.numpy import save_file
from torch import nn
from torch_models import uniform
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

FOLDER = Path(__file__).parents[1] / "data" / "formats"
CONVOLUTIONS = ("conv1", "proj_in")


@torch.no_grad()
def filled(model: nn.Module, scale: float, only: str = "") -> nn.Module:
    """Gives every tensor of a model numbers of its own."""
    for name, tensor in model.named_parameters():
        if only in name:
            tensor.copy_(torch.from_numpy(uniform(name, tensor.shape, scale)))
    return model


def unet() -> UNet2DConditionModel:
    """A unet with convolutions and attentions, as small as they come."""
    model = UNet2DConditionModel(
        sample_size=4,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(4, 6),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("UpBlock2D",) * 2,
        cross_attention_dim=5,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    return filled(model, 0.5)


def text_encoder() -> CLIPTextModel:
    """A text encoder of one layer."""
    config = CLIPTextConfig(
        vocab_size=11,
        hidden_size=6,
        intermediate_size=7,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=5,
        projection_dim=4,
        bos_token_id=0,
        eos_token_id=1,
    )
    return filled(CLIPTextModel(config), 0.5)


def weights(model: nn.Module, prefix: str = "") -> dict[str, np.ndarray]:
    """The weights of a model, or of what PEFT made of it, by their first names."""
    found = {}
    for name, tensor in model.state_dict().items():
        if ".lora_" not in name:
            plain = prefix + name.replace(".base_layer", "")
            found[plain] = tensor.detach().float().numpy().copy()
    return found


def save(case: str, base: dict[str, Any], merged: dict[str, Any]) -> None:
    """Writes what changes, and all names."""
    changed = [n for n in base if not np.array_equal(base[n], merged[n])]
    assert changed, case
    arrays = {f"base/{n}": base[n] for n in changed}
    arrays |= {f"merged/{n}": merged[n] for n in changed}
    np.savez_compressed(FOLDER / case / "arrays.npz", **arrays)
    text = json.dumps(sorted(base), indent=0)
    (FOLDER / case / "names.json").write_text(text + "\n")


# --- diffusers ---


def make_diffusers() -> None:
    """Saves an adapter of a unet and a text encoder as diffusers does, and fuses it."""
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["to_q", "to_out.0", *CONVOLUTIONS],
        rank_pattern={"conv1": 2},
        alpha_pattern={"conv1": 5},
    )
    model, encoder = unet(), text_encoder()
    base = weights(model, "unet.") | weights(encoder, "text_encoder.")
    model.add_adapter(config)
    second = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "fc1"])
    peft.inject_adapter_in_model(second, encoder)
    encoder.peft_config = {"default": second}
    for one in (model, encoder):
        filled(one, 0.4, ".lora_")
    state = {
        one: convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(one))
        for one in (model, encoder)
    }
    for own in (config, second):  # sets, in an order that changes from run to run
        own.target_modules = sorted(own.target_modules)
    StableDiffusionPipeline.save_lora_weights(
        FOLDER / "diffusers",
        unet_lora_layers=state[model],
        text_encoder_lora_layers=state[encoder],
        unet_lora_adapter_metadata=config.to_dict(),
        text_encoder_lora_adapter_metadata=second.to_dict(),
    )
    # Not by loading the file: diffusers 0.42.1 looks at its first key alone, and drops
    # what has the other naming.
    model.fuse_lora()
    for layer in encoder.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.merge()
    merged = weights(model, "unet.") | weights(encoder, "text_encoder.")
    save("diffusers", base, merged)


# --- kohya ---


def make_kohya() -> None:
    """Writes a file as kohya's scripts do, which diffusers reads and fuses."""
    model, rng = unet(), np.random.default_rng(0)
    tensors = {}
    alpha = np.array(1.75)  # of all: diffusers 0.42.1 takes others of attentions for it
    for name, module in model.named_modules():
        rank, own = len(name) % 3 + 1, f"lora_unet_{name.replace('.', '_')}"
        if isinstance(module, nn.Linear) and name.endswith(("to_k", "to_v", "net.2")):
            down, up = (rank, module.in_features), (module.out_features, rank)
        elif isinstance(module, nn.Conv2d) and name.endswith("proj_out"):
            down = (rank, module.in_channels, *module.kernel_size)
            up = (module.out_channels, rank, 1, 1)
        else:
            continue
        tensors[f"{own}.lora_down.weight"] = rng.normal(size=down) / 2
        tensors[f"{own}.lora_up.weight"] = rng.normal(size=up) / 2
        tensors[f"{own}.alpha"] = alpha
    folder = FOLDER / "kohya"
    folder.mkdir(exist_ok=True)
    narrow = {n: t.astype(np.float16) for n, t in tensors.items()}
    file = folder / "adapter.safetensors"
    save_file(narrow, file, {"ss_network_module": "networks.lora"})
    base = weights(model, "unet.")
    state, alphas = StableDiffusionPipeline.lora_state_dict(
        file, unet_config=model.config
    )
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, model)
    model.fuse_lora()
    save("kohya", base, weights(model, "unet."))


# --- GGUF ---

MODULES = {
    "blk.0.attn_q": "model.layers.0.self_attn.q_proj",
    "blk.0.attn_k": "model.layers.0.self_attn.k_proj",
    "blk.0.attn_v": "model.layers.0.self_attn.v_proj",
    "blk.0.ffn_down": "model.layers.0.mlp.down_proj",
    "token_embd": "model.embed_tokens",
}
HEADS = {"attn_q": 4, "attn_k": 2}
ALPHA = 5.0


def make_gguf() -> None:
    """Writes an adapter by gguf's writer, and adds it in llama.cpp's order of rows."""
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=24,
        intermediate_size=10,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    base = weights(filled(LlamaForCausalLM(config), 0.5))
    folder = FOLDER / "gguf"
    folder.mkdir(exist_ok=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    writer = gguf.GGUFWriter(folder / "adapter.gguf", "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, ALPHA)
    back = LlamaTensorProcessor(
        {"num_attention_heads": 4, "num_key_value_heads": 2}
    ).process
    merged, rng = dict(base), np.random.default_rng(1)
    for rank, (own, module) in enumerate(MODULES.items(), 1):
        weight = base[f"{module}.weight"]
        a = rng.normal(size=(rank, weight.shape[1])).astype(np.float32) / 2
        b = rng.normal(size=(weight.shape[0], rank)).astype(np.float32) / 2
        if own == "token_embd":  # its `lora_a` has the rows
            a, b = b, a.T.copy()
        dtype = np.float16 if own == "blk.0.ffn_down" else np.float32
        a, b = a.astype(dtype), b.astype(dtype)
        writer.add_tensor(f"{own}.weight.lora_a", a)
        writer.add_tensor(f"{own}.weight.lora_b", b)
        a, b = a.astype(np.float32), b.astype(np.float32)
        delta = ALPHA / rank * (a @ b.T if own == "token_embd" else b @ a)
        total = permuted(weight, own) + delta
        merged[f"{module}.weight"] = back(total, name=f"{own}.weight").weights
        kept = back(permuted(weight, own), name=f"{own}.weight").weights
        assert np.array_equal(kept, weight), own
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save("gguf", base, merged)


def permuted(weight: np.ndarray, own: str) -> np.ndarray:
    """Puts the two features of a rotary pair of each head beside each other."""
    heads = HEADS.get(own.rpartition(".")[2])
    if heads is None:
        return weight
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(weight.shape)


MAKERS: dict[str, Callable[[], None]] = {
    "diffusers": make_diffusers,
    "kohya": make_kohya,
    "gguf": make_gguf,
}

if __name__ == "__main__":
    for chosen in sys.argv[1:] or MAKERS:
        MAKERS[chosen]()
        print(chosen, *sorted(f.name for f in (FOLDER / chosen).iterdir()))
