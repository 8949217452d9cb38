"""The other end of `torch_peft.py`: starts it, and has it run steps."""

import dataclasses
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from models import Decoder, Params
from steps import ALPHA, RANK

import jlora

SCRIPT = Path(__file__).parent / "torch_peft.py"
# Repeated here, for that script imports PyTorch.
NAMES = ("PyTorch PEFT, eager", "PyTorch PEFT, compiled", "PyTorch full, compiled")


class TorchError(RuntimeError):
    """What PyTorch's process could not do."""


class TorchProcess:
    """A process that holds PyTorch's contenders for one decoder.

    Attributes:
        versions: of PyTorch and PEFT.
    """

    def __init__(self, python: str, model: Decoder):
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [python, str(SCRIPT), json.dumps(config_of(model))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            # Threads that spin where they wait would take the cores that JAX's steps
            # run on, and wait for whole time slices where another process has one.
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
        )
        try:
            self.versions = self._answer()
        except TorchError:
            self.close()
            raise

    def ask(self, line: str) -> dict[str, Any]:
        """Returns the answer to a line.

        Raises:
            TorchError: if there is none, or if it tells of an error.
        """
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # The process has ended, which reading finds out.
        return self._answer()

    def step(self, name: str) -> tuple[()]:
        """Runs one step of a contender; its state is over there."""
        self.ask(name)
        return ()

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            last = self._log.read().strip().splitlines()[-1:]
            raise TorchError(last[0] if last else "the process ended without a word")
        answer = json.loads(line)
        if "error" in answer:
            raise TorchError(answer["error"])
        return answer


def config_of(model: Decoder) -> dict[str, Any]:
    """Returns what `torch_peft.py` needs to know."""
    fields = dataclasses.asdict(model) | {"dtype": jnp.dtype(model.dtype).name}
    return fields | {
        "kernels": model.kernel_shapes(),
        "rank": RANK,
        "alpha": ALPHA,
        "device": "cuda" if jax.default_backend() == "gpu" else "cpu",
    }


def save(path: Path, params: Params, adapter: jlora.Adapter, tokens: jax.Array) -> None:
    """Writes weights and a batch under the names of PEFT's state, unrolled ones."""
    arrays = {
        "tokens": tokens,
        "embedding.weight": params["embedding"],
        "head.weight": params["head"].T,
        "norm.weight": params["norm"],
    }
    for i, layer in enumerate(params["layers"]):
        arrays |= layer_arrays(f"layers.{i}", f"layers/{i}", layer, adapter)
    np.savez(path, **{name: np.asarray(array) for name, array in arrays.items()})


def layer_arrays(
    place: str, path: str, layer: Mapping[str, jax.Array], adapter: jlora.Adapter
) -> dict[str, jax.Array]:
    """Returns one layer's arrays; PyTorch's matrices are (d_out, d_in)."""
    arrays = {f"{place}.{n}.weight": layer[n] for n in ("norm_1", "norm_2")}
    for name in Decoder.kernels:
        factors, linear = adapter[f"{path}/{name}"], f"{place}.{name}"
        arrays[f"{linear}.base_layer.weight"] = layer[name].T
        arrays[f"{linear}.lora_A.default.weight"] = factors.a.T
        arrays[f"{linear}.lora_B.default.weight"] = factors.b.T
    return arrays
