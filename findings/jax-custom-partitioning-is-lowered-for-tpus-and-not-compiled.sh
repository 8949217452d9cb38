#!/usr/bin/env bash
# jax 0.12.0.1, libtpu 0.0.50.1: `custom_partitioning` is lowered for TPUs, and their compiler has no emitter for it.
#
# Guessed: an operation with a Shardy rule, which CPUs and GPUs take, is partitioned for
# TPUs as well, as nothing says otherwise while a program is traced and lowered. Seen: on
# a mesh of two chips `lower` succeeds and `compile` raises "Custom emitter for
# CustomSPMDPartitioning not found". The same program compiles for two CPU devices.
# For LoRA in JAX: a fused product with a partitioning rule must be left out of programs
# for TPUs, by the platform that they are lowered for.
set -euo pipefail
python=${PYTHON:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.12.0.1 jaxlib==0.12.0.1 libtpu==0.0.50.1
TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 JAX_PLATFORMS=cpu \
  XLA_FLAGS=--xla_force_host_platform_device_count=2 "$folder/venv/bin/python" - 2>"$folder/log" <<'PY' || { cat "$folder/log" >&2; exit 1; }
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

product = custom_partitioning(lambda x, w: x @ w)


def partition(mesh, operands, result):
    whole = NamedSharding(mesh, PartitionSpec())
    return mesh, lambda x, w: x @ w, result.sharding, (result.sharding, whole)


product.def_partition(partition=partition, sharding_rule="n k, k m -> n m")
chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
lowered = {}
for name, devices in (("cpu", jax.devices()), ("tpu", chips[:2])):
    rows = NamedSharding(Mesh(np.array(devices), ("d",)), PartitionSpec("d"))
    x = jax.ShapeDtypeStruct((512, 256), jnp.float32, sharding=rows)
    w = jax.ShapeDtypeStruct((256, 128), jnp.float32)
    lowered[name] = jax.jit(product, out_shardings=rows).lower(x, w)
lowered["cpu"].compile()
try:
    lowered["tpu"].compile()
except jax.errors.JaxRuntimeError as error:
    assert "CustomSPMDPartitioning" in str(error), error
else:
    raise SystemExit("it is compiled for TPUs now")
print("custom_partitioning: compiled for two CPUs; lowered for two TPUs, where compiling raises")
PY
