"""Fuses files that jlora wrote by diffusers, and saves the weights.

    python tests/oracle/fuse_formats.py diffusers|kohya FILE OUT.npz

Needs torch, peft, transformers and diffusers, and no JAX.
"""

import os
import sys
from pathlib import Path

import numpy as np
from diffusers import StableDiffusionPipeline
from make_formats import unet, weights

if __name__ == "__main__":
    case, file, out = sys.argv[1:]
    model = unet()
    if case == "kohya":
        state, alphas = StableDiffusionPipeline.lora_state_dict(
            Path(file), unet_config=model.config
        )
        metadata = None
    else:
        state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
            Path(file), return_lora_metadata=True
        )
    own = {name: tensor for name, tensor in state.items() if name.startswith("unet.")}
    StableDiffusionPipeline.load_lora_into_unet(own, alphas, model, metadata=metadata)
    model.fuse_lora()
    np.savez(out, **weights(model, "unet."))
    os._exit(0)  # threads of torch may keep a process that is done
