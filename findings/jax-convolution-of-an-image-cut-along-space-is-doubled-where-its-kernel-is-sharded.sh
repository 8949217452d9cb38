#!/usr/bin/env bash
# jax 0.12.0.1: the output of an ordinary convolution is multiplied by the size of a mesh
# axis, where the image is sharded along space and the kernel along its features.
#
# Guessed: under jit, shardings change where a value lies and never the value; the known
# fault is of gradients of grouped convolutions. Seen, on CPU devices: on a mesh of 2 × 2,
# with space over one axis and any feature axis of the kernel over either, the forward
# values are exactly twice the right ones; on one of 4 × 2 four times. With a
# replicated kernel, or on a mesh of one axis, they are right. No error, no warning.
# For LoRA in JAX: a convolution (Whisper, ConvNeXt, video models) under FSDP, whose
# sequence or image is sharded too, starts from a wrong frozen base. Gather its kernel, or
# leave space whole.
set -euo pipefail
python=${PYTHON:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.12.0.1 jaxlib==0.12.0.1
JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8 "$folder/venv/bin/python" - 2>/dev/null <<'PY'
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

rng = np.random.default_rng(0)
image = rng.normal(size=(2, 16, 8)).astype(np.float32)
kernel = rng.normal(size=(3, 8, 4)).astype(np.float32)


def convolution(image, kernel):
    return jax.lax.conv_general_dilated(
        image, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )


wanted = np.asarray(convolution(image, kernel))


def ratio(shape, spec):
    size = shape[0] * shape[1]
    mesh = jax.make_mesh(
        shape, ("data", "model"), (AxisType.Auto,) * 2, devices=jax.devices()[:size]
    )
    put = lambda value, spec: jax.device_put(value, NamedSharding(mesh, spec))
    space = put(image, P(None, "model", None))
    got = np.asarray(jax.jit(convolution)(space, put(kernel, spec)))
    factor = float(np.median(got / wanted))
    assert np.allclose(got, factor * wanted, rtol=1e-4, atol=1e-4)
    return round(factor, 4)


features = {"in": P(None, "data", None), "out": P(None, None, "data")}
found = {name: ratio((2, 2), spec) for name, spec in features.items()}
print("mesh (2, 2), kernel sharded along", found)
assert found == {"in": 2.0, "out": 2.0}
print("mesh (4, 2):", ratio((4, 2), features["in"]))
assert ratio((4, 2), features["in"]) == 4.0
assert ratio((2, 2), P()) == 1.0
assert ratio((4, 1), features["in"]) == ratio((1, 4), P(None, "model")) == 1.0
print("replicated kernel, or one axis: 1.0")
PY
