"""Runs real PEFT on what jlora wrote; a script of its own, because it needs torch.

    python check_adapter.py cases FOLDER
    python check_adapter.py pretrained FOLDER

`cases` takes `FOLDER/jobs.json`, a map from the name of a job to the case whose model
it is for, with the adapter of each in a folder of that name. `pretrained` takes the
checkpoints `base` and `merged`, the adapter `adapter` for the former, and
`tokens.npy`, and writes an adapter of its own into `from_peft`. Outputs are written as
`.npy` files; JSON about the loading is printed.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import peft
import torch
from torch import nn
from torch_models import CASES, base_model, inputs_of, uniform
from transformers import AutoModelForCausalLM


def load_adapter(model: nn.Module, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Returns the model with a folder's adapter, and what PEFT said of its keys."""
    results = []
    original = peft.PeftModel.load_adapter

    def recorded(*args: Any, **kwargs: Any) -> Any:
        results.append(original(*args, **kwargs))
        return results[-1]

    with mock.patch.object(peft.PeftModel, "load_adapter", recorded):
        adapted = peft.PeftModel.from_pretrained(model, folder).eval()
    (result,) = results
    return adapted, {
        "missing": list(result.missing_keys),
        "unexpected": list(result.unexpected_keys),
    }


@torch.no_grad()
def check_case(name: str, folder: Path) -> dict[str, Any]:
    """Writes the output of a case with an adapter, and returns what was said."""
    try:
        model, said = load_adapter(base_model(name), folder)
        output = CASES[name].call(model, *inputs_of(name))
    except Exception as error:  # the test that reads this fails with it
        return {"error": f"{type(error).__name__}: {error}"}
    np.save(folder / "output.npy", output.numpy())
    return said


def check_cases(folder: Path) -> dict[str, Any]:
    """Checks every job."""
    jobs = json.loads((folder / "jobs.json").read_text())
    return {job: check_case(case, folder / job) for job, case in jobs.items()}


@torch.no_grad()
def check_pretrained(folder: Path) -> dict[str, Any]:
    """Writes the logits of the base, with both adapters, and of the merged model."""
    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    said = {}

    def write(name: str, model: nn.Module) -> None:
        np.save(folder / f"{name}.npy", model(tokens).logits.numpy())

    model = read_model(folder / "base")
    write("base", model)
    model, said["adapter"] = load_adapter(model, folder / "adapter")
    write("adapter", model)
    model = new_adapter(model.unload(), folder / "from_peft")
    write("from_peft", model)
    del model
    write("merged", read_model(folder / "merged"))
    return said


def read_model(folder: Path) -> nn.Module:
    """Returns a checkpoint as transformers reads it, every weight of it."""
    model, said = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(said.values()), said
    return model.eval()


def new_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """Gives a model an adapter of PEFT's own, and saves it."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "k_proj", "o_proj", "down_proj"],
        rank_pattern={"k_proj": 2},
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(model, config).eval()
    for key, tensor in peft.get_peft_model_state_dict(model).items():
        tensor.copy_(torch.from_numpy(uniform(key, tensor.shape, 0.05)))
    model.save_pretrained(folder)
    return model


def main(mode: str, folder: Path) -> None:
    """Prints what the checks of a folder say."""
    check = {"cases": check_cases, "pretrained": check_pretrained}[mode]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = check(folder)
    print(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
