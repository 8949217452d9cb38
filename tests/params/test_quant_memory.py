"""No dense kernel lives from the forward to the backward pass.

Read from the compiled program: the bytes of what a gradient holds beside its arguments
and results, with that of plain autodiff, which keeps a dense copy of each kernel.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from releases import since

import jlora

qwix = pytest.importorskip("qwix")

LAYERS, WIDTH, TOKENS, RANK = 8, 512, 16, 4
KERNEL = 4 * WIDTH * WIDTH  # bytes of a dense one
# XLA's CPU backend unpacks the 4-bit codes of all layers, whatever is done with them.
UNPACKED = {"int8": 0, "nf4": LAYERS * WIDTH * WIDTH}
Layer = Callable[[jax.Array, Any], jax.Array]


def scanned(layer: Layer, remat: bool = False) -> Callable[[Any, jax.Array], jax.Array]:
    """A model of scanned layers."""

    def model(params: Any, x: jax.Array) -> jax.Array:
        body = lambda x, leaves: (jnp.tanh(layer(x, leaves)), None)
        return lax.scan(jax.checkpoint(body) if remat else body, x, params)[0]

    return model


def naive(x: jax.Array, leaves: Any) -> jax.Array:
    """What one writes by hand: dequantise, multiply, add the low-rank product."""
    frozen, factors = leaves
    y = x @ qwix.dequantize(frozen["w"])
    if "w" in factors:
        y = y + factors["w"].scaling * (x @ factors["w"].a) @ factors["w"].b
    return y


def temp_bytes(loss: Callable[..., Any], *args: Any) -> int:
    """The bytes of the gradient by the first argument."""
    compiled = jax.jit(jax.grad(loss)).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("remat", [False, True], ids=["", "remat"])
@pytest.mark.parametrize("adapted", [True, False], ids=["adapted", "frozen"])
@pytest.mark.parametrize("qtype", ["int8", "nf4"])
def test_a_gradient_holds_a_quarter_of_naive_autodiff(
    qtype: str, adapted: bool, remat: bool
):
    shape = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)
    params = jlora.quantize({"w": shape}, "w", qtype)
    x = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.float32)
    model = scanned(lambda x, leaves: x @ leaves["w"], remat)
    lora = jlora.lora(model, jlora.LoraConfig("w", rank=RANK))
    adapter = jax.eval_shape(lora.init, jax.random.key(0), params, x) if adapted else {}
    loss = lambda diff, p, rest: (
        lora.apply(p, diff, rest) if adapted else lora.apply(p, rest, diff)
    ).sum()
    by_hand = lambda diff, p, rest: (
        scanned(naive)((p, diff), rest) if adapted else scanned(naive)((p, rest), diff)
    ).sum()
    args = (adapter, params, x) if adapted else (x, params, adapter)
    own, kept = (temp_bytes(f, *args) - UNPACKED[qtype] for f in (loss, by_hand))
    assert kept >= LAYERS * KERNEL  # by hand all of them live
    assert own <= kept / 4


def unrolled_bytes(adapted: bool) -> int:
    """The same of layers that are no scan, but written one after the other."""
    shape = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)
    params = jlora.quantize([shape] * LAYERS, "[0-9]", "int8")
    x = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.float32)

    def model(params: Any, x: jax.Array) -> jax.Array:
        for w in params:
            x = jnp.tanh(x @ w)
        return x

    lora = jlora.lora(model, jlora.LoraConfig(rank=RANK))
    adapter = jax.eval_shape(lora.init, jax.random.key(0), params, x) if adapted else {}
    return temp_bytes(lambda x, a, p: lora.apply(p, a, x).sum(), x, adapter, params)


@since("jax", "0.11.0", "its XLA has no barriers on CPUs")
def test_unrolled_layers_are_made_again_one_by_one():
    """XLA would find that a kernel was made before, and keep it: hence the barrier.

    In a process of its own, for by default XLA's CPU backend makes all kernels at once
    where nothing keeps it from that.
    """
    flag = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    code = "from test_quant_memory import *; print(*map(unrolled_bytes, (0, 1)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={
            **os.environ,
            "XLA_FLAGS": flag,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(int(size) <= 2 * KERNEL for size in done.stdout.split())


LAYER_OF: dict[str, Layer] = {
    "conv": lambda x, p: lax.conv_general_dilated(
        x[None], p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )[0],
    "experts": lambda x, p: jnp.einsum("ti,eio->eto", x, p["w"]).sum(0),
    "scaled": lambda x, p: x @ (p["w"] * jnp.sum(x[0, :1]))[0],
    "cast": lambda x, p: x @ p["w"].astype(jnp.bfloat16).astype(x.dtype)[1],
    "transposed": lambda x, p: x @ p["w"][0].T,
}


@pytest.mark.parametrize("name", LAYER_OF)
@pytest.mark.parametrize("adapted", [True, False], ids=["adapted", "frozen"])
def test_no_use_keeps_dense_kernels(name: str, adapted: bool):
    width = WIDTH // 2
    shape = jax.ShapeDtypeStruct((LAYERS, 2, width, width), jnp.float32)
    params = jlora.quantize({"w": shape}, "w", "int8")
    x = jax.ShapeDtypeStruct((TOKENS, width), jnp.float32)
    lora = jlora.lora(scanned(LAYER_OF[name]), jlora.LoraConfig("w", rank=RANK))
    adapter = jax.eval_shape(lora.init, jax.random.key(0), params, x) if adapted else {}
    loss = lambda x, a, p: lora.apply(p, a, x).sum()
    own = temp_bytes(loss, x, adapter, params)
    # All kernels, dense, would be as large as that.
    assert own <= 0.5 * LAYERS * 2 * 4 * width * width
