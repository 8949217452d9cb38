"""Combines LoRA adapters of one linear layer by PEFT's `add_weighted_adapter`.

    python combine_adapters.py FOLDER

Reads the factors in JAX's layout (given.npz) and what to do with them (asked.json);
writes the combined factors (found.npz). Where PEFT drops values at random, it is given
the masks of jlora, in the order in which it draws: those of `a`, then those of `b`.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model


def main(folder: Path) -> None:
    """Writes the results of all methods."""
    given, asked = (
        np.load(folder / "given.npz"),
        json.loads((folder / "asked.json").read_text()),
    )
    tensor = lambda name: torch.tensor(given[name].T.copy(), dtype=torch.float32)
    numbers = range(len(asked["weights"]))
    (fan_in, rank), fan_out = given["a0"].shape, given["b0"].shape[1]
    model = None
    for i, scaling in enumerate(asked["scalings"]):
        config = LoraConfig(r=rank, lora_alpha=rank * scaling, target_modules=["w"])
        if model is None:
            base = torch.nn.ModuleDict({"w": torch.nn.Linear(fan_in, fan_out)})
            model = get_peft_model(base, config, adapter_name="0")
        else:
            model.add_adapter(str(i), config)
    layer = model.base_model.model["w"]
    for i in numbers:
        layer.lora_A[str(i)].weight.data = tensor(f"a{i}")
        layer.lora_B[str(i)].weight.data = tensor(f"b{i}")
    found = {}
    for method in [*asked["methods"], "cat", "svd"]:
        masks = iter([tensor(f"mask/{side}{i}") for side in "ab" for i in numbers])
        torch.bernoulli = lambda input, masks=masks: next(masks)
        options = (
            {} if method in ("linear", "cat", "svd") else {"density": asked["density"]}
        )
        model.add_weighted_adapter(
            [str(i) for i in numbers], asked["weights"], method, method, **options
        )
        found[f"{method}/a"] = layer.lora_A[method].weight.detach().numpy().T
        found[f"{method}/b"] = layer.lora_B[method].weight.detach().numpy().T
        if layer.scaling[method] != 1:
            sys.exit(f"PEFT gives {method} a scaling of {layer.scaling[method]}")
    np.savez(folder / "found.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
