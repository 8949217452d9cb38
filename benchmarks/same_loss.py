"""Whether all low-rank contenders of `train_step.py` compute the same.

On small decoders, the same weights, factors and tokens: the loss, and the norm of its
gradient by the factors. On a mesh, too, if one is given, and inside of a `shard_map`:
the values of one device.
"""

import functools
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from models import Decoder, Params
from placing import drawn, inside, on_mesh
from rivals import RIVALS
from steps import adapter_of, lora_of, low_rank_losses
from timing import table
from torch_client import TorchError, TorchProcess, save

import jlora

# GPUs multiply float32 in fewer bits.
TOLERANCE = 1e-5 if jax.default_backend() == "cpu" else 1e-2
Values = dict[str, tuple[float, float]]


def check(
    torch_python: str, without: list[str], mesh: Mesh | None, within: bool
) -> None:
    """Prints the values of all contenders; on a mesh, maybe within a `shard_map`.

    Raises:
        SystemExit: if one is further than the tolerance from jlora's on one device.
    """
    wrong = []
    for scan, remat in ((True, True), (False, False)):
        model = Decoder(
            d=64,
            ffn=96,
            layers=2,
            heads=4,
            kv_heads=2,
            vocab=128,
            batch=2,
            seq=32,
            scan=scan,
            remat=remat,
        )
        print(f"\n{'scanned' if scan else 'unrolled'}{', remat' if remat else ''}")
        wanted = ours(model)
        values = compared(model, torch_python, without, mesh, within)
        rows = [(n, f"{loss:.6f}", f"{norm:.6f}") for n, (loss, norm) in values.items()]
        print(table(("contender", "loss", "gradient norm"), rows))
        wrong += [name for name, value in values.items() if not close(value, wanted)]
    if wrong:
        raise SystemExit(f"not the same as jlora: {', '.join(wrong)}")
    print(f"\nall the same, to a relative {TOLERANCE}")


def ours(model: Decoder) -> tuple[float, float]:
    """Returns loss and gradient norm of jlora on one device."""
    params, tokens = drawn(model, None)
    adapter = adapter_of(lora_of(model), params, tokens)
    return evaluated(low_rank_losses(model)["jlora"], adapter, params, tokens)


def compared(
    model: Decoder,
    torch_python: str,
    without: list[str],
    mesh: Mesh | None,
    within: bool,
) -> Values:
    """Returns name -> loss and gradient norm."""
    model = model if mesh is None or within else on_mesh(model, mesh)
    placed = functools.partial(inside, mesh if within else None)
    params, tokens = drawn(model, mesh)
    adapter = adapter_of(lora_of(model), params, tokens)
    values = {
        name: evaluated(placed(loss), adapter, params, tokens)
        for name, loss in low_rank_losses(model).items()
    }
    left_out = lambda name: any(part.lower() in name.lower() for part in without)
    for name, maker in RIVALS.items():
        if name.startswith("Qwix") and importlib.util.find_spec("qwix") is None:
            continue
        if not left_out(name):
            made = maker(model, params, adapter, tokens)
            loss = placed(made.loss)
            values[name] = evaluated(loss, made.trained, made.frozen, tokens)
    # PyTorch's decoder has its layers in a list.
    if not model.scan and mesh is None and not left_out("PyTorch PEFT"):
        values |= torch_values(model, params, adapter, tokens, torch_python)
    return values


def evaluated(
    loss: Callable[..., jax.Array], trained: Any, params: Any, tokens: jax.Array
) -> tuple[float, float]:
    """Returns the loss and the norm of its gradient."""
    value, gradients = jax.jit(jax.value_and_grad(loss))(trained, params, tokens)
    squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradients)]
    return float(value), float(jnp.sqrt(sum(squares)))


def torch_values(
    model: Decoder,
    params: Params,
    adapter: jlora.Adapter,
    tokens: jax.Array,
    python: str,
) -> Values:
    """Returns the values of PEFT, none where it isn't installed."""
    try:
        process = TorchProcess(python, model)
    except (TorchError, OSError) as error:
        print(f"skipped PyTorch: {error}")
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.npz"
        save(path, params, adapter, tokens)
        answer = process.ask(f"check {path}")
    process.close()
    return {"PyTorch PEFT": (answer["loss"], answer["norm"])}


def close(value: tuple[float, float], wanted: tuple[float, float]) -> bool:
    """Returns whether both numbers are within the tolerance."""
    pairs = zip(value, wanted, strict=True)
    return all(abs(v - w) <= TOLERANCE * abs(w) for v, w in pairs)
