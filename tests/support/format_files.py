"""The golden files of other formats than PEFT's, and folders of the models they fit.

`tests/oracle/make_formats.py` writes them.
"""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from paths import DATA
from safetensors.numpy import load_file, save_file

FORMATS = DATA / "formats"
FILES = {
    "diffusers": FORMATS / "diffusers" / "pytorch_lora_weights.safetensors",
    "kohya": FORMATS / "kohya" / "adapter.safetensors",
    "gguf": FORMATS / "gguf" / "adapter.gguf",
}


@functools.cache
def arrays(case: str, group: str) -> dict[str, np.ndarray]:
    """The weights that a case changes: those of `base` or `merged`."""
    with np.load(FORMATS / case / "arrays.npz") as found:
        of_group = [key for key in found if key.startswith(f"{group}/")]
        return {key.removeprefix(f"{group}/"): found[key] for key in of_group}


def names(case: str) -> list[str]:
    """The names of all weights of the base of a case."""
    return json.loads((FORMATS / case / "names.json").read_text())


def pipeline(folder: Path, case: str) -> Path:
    """A folder as diffusers has them, with the weights that change, and others."""
    (folder / "scheduler").mkdir(parents=True)
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "model_index.json").write_text('{"_class_name": "Tiny"}')
    base = arrays(case, "base")
    others = {name: np.zeros(2, np.float32) for name in names(case) if name not in base}
    for part in sorted({name.partition(".")[0] for name in base}):
        own = {
            name.partition(".")[2]: value
            for name, value in {**base, **others}.items()
            if name.startswith(f"{part}.")
        }
        file = "diffusion_pytorch_model" if part == "unet" else "model"
        (folder / part).mkdir()
        save_file(own, folder / part / f"{file}.safetensors")
        (folder / part / "config.json").write_text("{}")
    vae = {"conv.weight": np.arange(3, dtype=np.float32)}
    (folder / "vae").mkdir()
    save_file(vae, folder / "vae" / "diffusion_pytorch_model.safetensors")
    return folder


def model(folder: Path, case: str) -> Path:
    """A folder as transformers has them, with the weights that change."""
    folder.mkdir(parents=True)
    save_file(arrays(case, "base"), folder / "model.safetensors")
    config = FORMATS / case / "config.json"
    (folder / "config.json").write_text(config.read_text())
    return folder


def weights(folder: Path) -> dict[str, np.ndarray]:
    """All weights in a folder, and those in folders within under their names."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        head = "" if file.parent == folder else f"{file.parent.name}."
        found |= {f"{head}{name}": value for name, value in load_file(file).items()}
    return found


def deltas(modules: Any) -> dict[str, np.ndarray]:
    """ΔW of torch modules in torch's layout, by NumPy in float64."""
    found = {}
    for module in modules:
        a, b = (x.astype(np.float64) for x in (module.lora_a, module.lora_b))
        delta = np.einsum("or,r...->o...", b.reshape(b.shape[:2]), a)
        turned = delta.T if module.is_table else delta
        found[f"{module.name}.weight"] = module.scaling * turned
    return found


def assert_merged(case: str, found: dict[str, np.ndarray]) -> None:
    """Compares the weights that change with what the real library merged."""
    expected = arrays(case, "merged")
    assert expected
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=2e-6)
