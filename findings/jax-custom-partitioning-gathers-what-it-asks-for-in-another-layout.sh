#!/usr/bin/env bash
# jax 0.12.0.1: an operand that a `custom_partitioning` rule asks for in another layout is gathered whole on each device.
#
# Guessed: rows along a mesh axis that a rule wants along that same axis, but cut by
# features, travel as under `with_sharding_constraint`: by one all-to-all, of which each
# device sends and keeps a part. Seen: the constraint gives the all-to-all; the rule
# alone gives an all-gather of the whole array, and XLA logs "Involuntary full
# rematerialization" (the program names layouts by mesh axes, the rule's are tiles). A
# constraint in front of the operation brings the all-to-all back.
# For LoRA in JAX: a fused product that sums parts of `x·W` where a kernel lies by its
# inputs must move `x` before its rule asks for it, or gather it knowingly.
set -euo pipefail
python=${PYTHON:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.12.0.1 jaxlib==0.12.0.1
JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8 "$folder/venv/bin/python" - 2>"$folder/log" <<'PY' || { cat "$folder/log" >&2; exit 1; }
import re

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

mesh = jax.make_mesh((2, 4), ("i", "j"), axis_types=(AxisType.Auto,) * 2)
rows = NamedSharding(mesh, PartitionSpec("i", None))
columns = NamedSharding(mesh, PartitionSpec(None, "i"))
norm = custom_partitioning(lambda x: jnp.sum(x * x, axis=0))


def partition(_, operands, result):
    whole = NamedSharding(mesh, PartitionSpec("i"))
    return mesh, lambda x: jnp.sum(x * x, axis=0), whole, (columns,)


norm.def_partition(partition=partition, sharding_rule="n k -> m")
move = lambda x: jax.lax.with_sharding_constraint(x, columns)
x = jax.ShapeDtypeStruct((8, 512), jnp.float32, sharding=rows)


def first_move(fn):
    text = jax.jit(fn).lower(x).compile().as_text()
    return re.findall(r" (all-to-all|all-gather|collective-permute)\(", text)[0]


seen = {
    "constraint": first_move(lambda x: jnp.sum(move(x) ** 2, axis=0)),
    "rule": first_move(norm),
    "constraint, rule": first_move(lambda x: norm(move(x))),
}
expected = dict.fromkeys(seen, "all-to-all") | {"rule": "all-gather"}
assert seen == expected, seen
print("rows to features on 2 of 8 devices:", seen)
PY
grep -q "Involuntary full rematerialization" "$folder/log" || { echo "XLA says nothing of it now" >&2; exit 1; }
