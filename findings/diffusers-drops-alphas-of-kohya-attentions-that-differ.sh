#!/usr/bin/env bash
# diffusers 0.42.1, peft 0.21.2: of a kohya file whose alphas differ, those of SD 1.5's attention are not used.
#
# Guessed: each module of a kohya file is scaled by its own alpha over its rank, as kohya
# does. Seen: with one alpha for all it is. Where they differ, as with a conv_alpha of its
# own, diffusers names the modules of the unet's attention by old names in PEFT's
# `alpha_pattern`, which match none: they get the commonest alpha.
# For LoRA in JAX: who checks a reader of kohya's files against diffusers' merge finds
# itself wrong where it is right.
#
# The CPU wheel of torch will do: set PIP_INDEX_URL where pip finds it.
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q diffusers==0.42.1 peft==0.21.2 transformers==5.24.0 torch
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - "$folder" 2>/dev/null <<'PY'
import os
import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file

ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
OTHER = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
THIRD = "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
RANK = 2


def scales(alphas):
    """What the deltas of modules are multiplied by, with one alpha each."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4, in_channels=3, out_channels=3, layers_per_block=1,
        block_out_channels=(4, 6), cross_attention_dim=5, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"), norm_num_groups=2,
    )
    before = {n: unet.get_submodule(n).weight.detach().clone() for n in alphas}
    tensors, deltas = {}, {}
    for name, alpha in alphas.items():
        out, features = before[name].shape
        down, up = torch.randn(RANK, features), torch.randn(out, RANK)
        own = "lora_unet_" + name.replace(".", "_")
        tensors |= {f"{own}.lora_down.weight": down, f"{own}.lora_up.weight": up}
        tensors[f"{own}.alpha"] = torch.tensor(float(alpha))
        deltas[name] = up @ down
    file = Path(sys.argv[1]) / "kohya.safetensors"
    save_file(tensors, file)
    state, found = StableDiffusionPipeline.lora_state_dict(file, unet_config=unet.config)
    StableDiffusionPipeline.load_lora_into_unet(state, found, unet)
    unet.fuse_lora()
    scale = {}
    for name, delta in deltas.items():
        moved = unet.get_submodule(name).base_layer.weight.detach() - before[name]
        scale[name] = round((moved * delta).sum().item() / (delta * delta).sum().item(), 3)
    return [scale[name] for name in alphas]


same = scales({ATTENTION: 5, OTHER: 5, THIRD: 5})
of_other = scales({ATTENTION: 1, OTHER: 5, THIRD: 1})
of_attention = scales({ATTENTION: 5, OTHER: 1, THIRD: 1})
assert same == [2.5] * 3, same
assert of_other == [0.5, 2.5, 0.5], of_other
assert of_attention == [0.5] * 3, of_attention  # 5/2 is what the file says of the first
print(
    "an alpha of 5 among others of 1 and ranks of 2 scales a feed-forward layer by "
    f"{of_other[1]}, and an attention by {of_attention[0]}",
    flush=True,
)
os._exit(0)  # threads of torch may keep a process that is done
PY
