"""Writes `tests/data/peft_relatives`: adapters of LoRA's relatives, by real PEFT.

    python tests/oracle/make_relatives.py [folder]

Needs torch and peft, and no JAX. With the folder of an adapter and `arrays.npz` it
prints the output that PEFT computes with it instead. Each case is a folder with the two
files that PEFT saves and `arrays.npz`: the weights under torch's names, `x`, and the
output with the adapter, `y`.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import peft
import torch
from safetensors.torch import load_file
from torch import nn

FOLDER = Path(__file__).parents[1] / "data" / "peft_relatives"
DENSE, ALL = ["up", "down"], ["up", "down", "conv"]


class Model(nn.Module):
    """A convolution between dense layers, all of other sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 90, bias=False)
        self.conv = nn.Conv2d(6, 10, (2, 3), bias=False)
        self.down = nn.Linear(80, 18, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `(rows, 18)` of `(rows, 12)`."""
        image = torch.tanh(self.up(x)).reshape(-1, 6, 3, 5)
        image = nn.functional.pad(image, (0, 1, 0, 0))
        return self.down(torch.tanh(self.conv(image)).reshape(len(x), -1))


PATTERNS = {"rank_pattern": {"down": 3}, "alpha_pattern": {"down": 5}}
CASES = {
    "loha": peft.LoHaConfig(r=2, alpha=3, target_modules=ALL, **PATTERNS),
    "lokr": peft.LoKrConfig(r=2, alpha=3, target_modules=ALL),
    "lokr_both": peft.LoKrConfig(
        r=1, alpha=3, decompose_both=True, decompose_factor=5, target_modules=DENSE
    ),
    "lokr_whole": peft.LoKrConfig(
        r=40, alpha=8, target_modules=ALL, decompose_factor=3
    ),
    "loha_tucker": peft.LoHaConfig(
        r=2, target_modules=["conv"], use_effective_conv2d=True
    ),
    "lokr_tucker": peft.LoKrConfig(
        r=2, alpha=3, target_modules=["conv"], use_effective_conv2d=True
    ),
    "vera": peft.VeraConfig(r=4, target_modules=DENSE, projection_prng_key=3),
    "ia3": peft.IA3Config(target_modules=ALL, feedforward_modules=["down"]),
}
REFUSED = {
    "vera_without": peft.VeraConfig(r=4, target_modules=DENSE, save_projection=False),
}


@torch.no_grad()
def make(name: str, config: peft.PeftConfig) -> None:
    """Writes the folder of one case."""
    torch.manual_seed(len(name))
    base = Model()
    arrays = {key: value.clone() for key, value in base.state_dict().items()}
    model = peft.get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, mean=float(name == "ia3"), std=0.4)
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text())
    values["target_modules"] = sorted(values["target_modules"])
    values["auto_mapping"] = None
    path.write_text(json.dumps(values, indent=2, sort_keys=True))
    arrays["x"] = torch.randn(3, 12)
    arrays["y"] = model(arrays["x"])
    if name in CASES:
        found = {key: value.numpy() for key, value in arrays.items()}
        np.savez(folder / "arrays.npz", **found)


@torch.no_grad()
def output_of(folder: Path) -> list[list[float]]:
    """Returns what PEFT computes with an adapter, every tensor of which it loads."""
    with np.load(folder / "arrays.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file}
    base = Model()
    base.load_state_dict({key: arrays[key] for key in base.state_dict()})
    model = peft.PeftModel.from_pretrained(base, folder)
    kept = peft.get_peft_model_state_dict(model)
    given = load_file(folder / "adapter_model.safetensors")
    assert {key: v.shape for key, v in kept.items()} == {
        key: v.shape for key, v in given.items()
    }
    for key, value in given.items():
        assert torch.equal(kept[key], value), key
    return model(arrays["x"]).tolist()


def main(folders: list[str]) -> None:
    """Prints an output, or writes the fixtures."""
    torch.set_num_threads(1)
    if folders:
        print(json.dumps(output_of(Path(folders[0]))))
        return
    for name, config in {**CASES, **REFUSED}.items():
        make(name, config)


if __name__ == "__main__":
    main(sys.argv[1:])
