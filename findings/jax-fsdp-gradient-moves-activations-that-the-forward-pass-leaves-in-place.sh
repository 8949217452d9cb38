#!/usr/bin/env bash
# jax 0.12.0.1: under FSDP on an Auto mesh the gradient step moves whole activations between
# devices, though the forward pass of the same function gathers kernels alone.
#
# Guessed: where the compiler gathers kernels and leaves rows in place forward, it does so
# backward; what moves activations is a mistake of the layer that was added. Seen, compiled
# from shapes for four CPU devices: a looked-up table and two scanned residual blocks of
# width 2048, kernels and rows sharded over one axis. Forward: gathers of kernels. The
# gradient of a mere vector of scales: all-to-alls of each block's activations and gathers
# of the global ones, rows given up for features. One constraint of the rows, right behind
# the lookup, takes all of them away. jax 0.10.2 does the same.
# For LoRA in JAX: adapters, written by hand or not, are blamed for it, and are 1.7 to 1.9
# times slower than the frozen step on four GPUs; `with_sharding_constraint` on the embedded
# tokens mends it.
set -euo pipefail
python=${PYTHON:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.12.0.1 jaxlib==0.12.0.1
JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4 "$folder/venv/bin/python" - 2>/dev/null <<'PY'
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

ROWS, SEQ = 32, 1024
mesh = jax.make_mesh((4,), ("fsdp",), (AxisType.Auto,))
place = lambda *spec: NamedSharding(mesh, P(*spec))


def shaped(*dims, spec=(), dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=place(*spec))


def moves(step, width, constrained=False):
    """Collectives of the activations (rows of 1024) in a compiled step."""
    inner = 11 * width // 4
    params = {
        "table": shaped(32000, width, spec=("fsdp",)),
        "scale": shaped(2, width),
        "up": shaped(2, width, inner, spec=(None, "fsdp")),
        "down": shaped(2, inner, width, spec=(None, "fsdp")),
        "head": shaped(width, 32000, spec=("fsdp",)),
    }

    def loss(params, tokens):
        x = params["table"][tokens]
        if constrained:
            x = jax.lax.with_sharding_constraint(x, place("fsdp"))

        @jax.checkpoint
        def block(x, layer):
            hidden = jnp.tanh((x * layer["scale"]) @ layer["up"])
            return x + hidden @ layer["down"], None

        layers = {name: params[name] for name in ("scale", "up", "down")}
        x, _ = jax.lax.scan(block, x, layers)
        return jnp.square((x @ params["head"]).astype(jnp.float32)).mean()

    tokens = shaped(ROWS, SEQ, spec=("fsdp",), dtype=jnp.int32)
    lowered = jax.jit(lambda p, t: step(loss, p, t), out_shardings=place()).lower(params, tokens)
    text = lowered.compile().as_text()
    kinds = "all-gather|all-to-all|collective-permute"
    lines = re.findall(rf"= (\(?[a-z0-9]+\[[^=]*?) ({kinds})(?:-start)?\(", text)
    found = {(kind, dims) for shapes, kind in lines for dims in re.findall(r"\[([0-9,]+)\]", shapes)}
    return sorted((kind, dims) for kind, dims in found if str(SEQ) in dims.split(","))


def forward(loss, params, tokens):
    return loss(params, tokens)


def of_scales(loss, params, tokens):
    return jax.grad(lambda scale: loss({**params, "scale": scale}, tokens))(params["scale"])


assert moves(forward, 2048) == []
print("forward: no activation moves")
moved = moves(of_scales, 2048)
print("gradient of the scales:", *(f"{kind} of ({dims})" for kind, dims in moved))
assert {kind for kind, _ in moved} >= {"all-to-all", "all-gather"}
assert ("all-gather", f"{ROWS},{SEQ},2048") in moved
assert moves(of_scales, 2048, constrained=True) == []
print("with the rows constrained behind the lookup: no activation moves")
PY
