#!/usr/bin/env bash
# libtpu 0.0.50.1 with jax 0.12.0.1: the compiler's `estimated_cycles` of a lookup are 2^63 - 1 on a v5p, and a constant on a v5e.
#
# Guessed: the estimates that the optimised program carries for each fusion can be added
# up, and those of an embedding grow with what it reads.
# Seen: rows of a table of 32,000 by 512, compiled for a v5p, are offloaded, and carry
# the largest integer of 64 bits: one such lookup makes the sum of a whole program
# 9.2e18. For a v6e a table of 128,256 by 4,096 does so too. For a v5e 8,192 rows carry
# the same two thousand cycles of a table of either size, be it 8 MB of rows or 64.
# For LoRA in JAX: whoever compares steps by these sums, without a TPU, has to leave the
# largest integer out, and to know that the embedding counts for nothing.
set -euo pipefail
python=${PYTHON:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "jax==0.12.0.1" "jaxlib==0.12.0.1" "libtpu==0.0.50.1"
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 TPU_LOG_DIR="$folder/logs"
"$folder/venv/bin/python" - <<'PY'
import re

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

NONE = 2**63 - 1
SMALL, LARGE = (32000, 512), (128256, 4096)


def cycles(topology, table):
    """The estimates in the program that looks 8,192 rows up."""
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    place = SingleDeviceSharding(found.devices[0])
    shapes = [(table, jnp.bfloat16), ((8192,), jnp.int32)]
    args = [jax.ShapeDtypeStruct(*each, sharding=place) for each in shapes]
    program = jax.jit(lambda table, ids: table[ids]).lower(*args).compile()
    return [int(n) for n in re.findall(r'estimated_cycles":"(\d+)"', program.as_text())]


seen = {}
for topology in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2"):
    for table in (SMALL, LARGE):
        seen[topology, table] = cycles(topology, table)
        print(f"{topology}, a table of {table}: {seen[topology, table]}")
assert NONE in seen["v5p:2x2x1", SMALL] and NONE in seen["v5p:2x2x1", LARGE]
assert NONE in seen["v6e:2x2", LARGE] and NONE not in seen["v6e:2x2", SMALL]
assert seen["v5e:2x2", SMALL] == seen["v5e:2x2", LARGE]
assert sum(seen["v5e:2x2", LARGE]) < 10_000
PY
