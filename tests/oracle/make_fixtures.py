"""Writes the golden fixtures of `tests/data/peft` with real PEFT.

    python tests/oracle/make_fixtures.py [case ...]

Needs torch, peft and transformers, and no JAX. Each case is a folder with the two files
that PEFT saves and `arrays.npz`: the base under torch's names (`base/`), the inputs
(`input/`), the output without and with the adapter (`output/base`, `output/adapted`),
the weights of the loss `sum(output * weights)` (`loss/weights`), its gradients under
the keys of the file (`grad/`), and the weights that merging changes (`merged/`).
"""

import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from torch_models import CASES, Arrays, Case, base_model, inputs_of, uniform

FOLDER = Path(__file__).parents[1] / "data" / "peft"
ADAPTER = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
# PEFT writes these as sets, in an order that changes from run to run.
SETS = ("target_modules", "exclude_modules", "target_parameters", "modules_to_save")


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the tensors of an adapter under the keys of its file."""
    return peft.get_peft_model_state_dict(model)


@torch.no_grad()
def fill_adapter(model: nn.Module) -> None:
    """Gives every trained tensor numbers of its own; those that are tied stay so."""
    trained = [p for p in model.parameters() if p.requires_grad]
    storages = {p.data_ptr() for p in trained}
    for key, tensor in state_of(model).items():
        if tensor.data_ptr() in storages and ".lm_head." not in key:
            new = torch.from_numpy(uniform(key, tensor.shape, 0.25))
            started = tensor if "lora_" not in key else 0 * tensor
            tensor.copy_((started + new).to(tensor.dtype))


@torch.no_grad()
def train(model: nn.Module) -> None:
    """Moves every factor a little away from where its initialiser put it."""
    for key, tensor in state_of(model).items():
        tensor += torch.from_numpy(uniform(key, tensor.shape, 0.1))


def write_adapter(name: str, folder: Path) -> None:
    """Saves the adapter of a case as PEFT does."""
    case, model = CASES[name], base_model(name)
    if case.dtype != torch.float32:
        model = model.to(case.dtype)
    config = peft.LoraConfig(**case.config)
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    if case.converted:
        with tempfile.TemporaryDirectory() as start:
            model.peft_config["default"].init_lora_weights = True
            model.save_pretrained(f"{start}/initial")
            model.peft_config["default"].init_lora_weights = case.config[
                "init_lora_weights"
            ]
            train(model)
            model.save_pretrained(
                folder, path_initial_model_for_weight_conversion=f"{start}/initial"
            )
    else:
        fill_adapter(model)
        model.save_pretrained(folder)
    (folder / "README.md").unlink()
    sort_config(folder / CONFIG)


def sort_config(path: Path) -> None:
    """Writes a config again, with its sets in order."""
    config = json.loads(path.read_text())
    for key in SETS:
        if isinstance(config[key], list):
            config[key] = sorted(config[key])
    path.write_text(json.dumps(config, indent=2, sort_keys=True))


def merged_once(base: nn.Module, model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the weights of torch's attention with each delta added once."""
    outer = model.base_model.model.attn
    inner = outer.base_layer.out_proj
    added = {"attn.in_proj_weight": outer, "attn.out_proj.weight": inner}
    return {
        name: base.get_parameter(name)
        + layer.scaling["default"]
        * layer.lora_B["default"].weight
        @ layer.lora_A["default"].weight
        for name, layer in added.items()
    }


def merged_tied(base: nn.Module, model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns what merging should give where it unties the head, see README.md."""
    layers = {
        name: module
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, LoraLayer) and name != "lm_head"
    }
    return {
        f"{name}.weight": base.get_parameter(f"{name}.weight")
        + layer.get_delta_weight("default")
        for name, layer in layers.items()
    }


def evaluate(name: str, folder: Path) -> Arrays:
    """Returns what PEFT computes with the adapter that it saved."""
    case, inputs, base = CASES[name], inputs_of(name), base_model(name)
    model = peft.PeftModel.from_pretrained(base_model(name), folder, is_trainable=True)
    model.eval()
    peft_output = output = case.call(model, *inputs)
    if case.out_proj_once:
        weights = merged_once(base, model)
        output = torch.func.functional_call(base, weights, inputs)
    weights = uniform("loss", output.shape)
    (output * torch.from_numpy(weights)).sum().backward()
    arrays = {f"base/{k}": v for k, v in unique_state(base).items()}
    arrays |= {f"input/{i}": x for i, x in enumerate(inputs)}
    arrays |= {"output/base": case.call(base, *inputs), "output/adapted": output}
    if case.out_proj_once:
        arrays["output/peft"] = peft_output
    arrays["loss/weights"] = torch.from_numpy(weights)
    arrays |= {f"grad/{k}": v for k, v in gradients(model).items()}
    arrays |= {f"merged/{k}": v for k, v in merged(case, base, model).items()}
    check(name, arrays)
    return {k: v.detach().numpy() for k, v in arrays.items()}


def unique_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the parameters; the second name of a tied one is left out."""
    return dict(model.named_parameters())


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the gradients of the trained tensors under the keys of the file."""
    named = model.named_parameters()
    found = {k: p.grad for k, p in named if p.requires_grad and p.grad is not None}
    return peft.get_peft_model_state_dict(
        model, state_dict=found, save_embedding_layers=False
    )


def merged(case: Case, base: nn.Module, model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the weights that merging changes."""
    before = unique_state(base)
    if case.out_proj_once:
        return merged_once(base, model)
    if case.config.get("ensure_weight_tying"):
        return merged_tied(base, model)
    after = unique_state(model.merge_and_unload())
    return {k: v for k, v in after.items() if not torch.equal(v, before[k])}


def check(name: str, arrays: dict[str, torch.Tensor]) -> None:
    """Checks that the adapter does something, and gradients flow to all of it."""
    change = (arrays["output/adapted"] - arrays["output/base"]).abs().max()
    assert change > 1e-2 * arrays["output/base"].abs().max(), (name, change)
    for key, value in arrays.items():
        assert torch.isfinite(value).all(), (name, key)
        assert not key.startswith("grad/") or value.abs().max() > 0, (name, key)


def make(name: str) -> None:
    """Writes the folder of one case."""
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_adapter(name, folder)
        arrays = {} if CASES[name].refused else evaluate(name, folder)
    if arrays:
        np.savez(folder / "arrays.npz", **dict(sorted(arrays.items())))
    tensors = load_file(folder / ADAPTER)
    print(name, {k: tuple(v.shape) for k, v in tensors.items()})


def write_manifest() -> None:
    """Records which cases there are and what made them."""
    cases: dict[str, Any] = {
        name: "refused" if case.refused else "golden" for name, case in CASES.items()
    }
    made_by = {m.__name__: m.__version__ for m in (torch, peft, transformers)}
    text = json.dumps({"made_by": made_by, "cases": cases}, indent=2)
    (FOLDER / "manifest.json").write_text(text + "\n")


def main(names: Iterable[str]) -> None:
    """Writes the cases that are named, or all of them, and the manifest."""
    torch.set_num_threads(1)
    for name in names or CASES:
        make(name)
    write_manifest()


if __name__ == "__main__":
    main(sys.argv[1:])
