#!/usr/bin/env bash
# jax 0.8.1: on CPUs, `jnp.take` along the second axis, under `jax.jit`, of a table and ids that are both constants of the program gives other rows as soon as one id is out of range.
#
# Guessed: what is closed over is what is passed in, and an id out of range makes its own
# row NaN and no other. Seen: passed as arguments table and ids give the right rows, and
# closed over the rows of ids that are in range are mixed up. jax 0.8.2 is right.
# For LoRA in JAX: pass params as arguments; on this release a base that is closed over is
# no reference for lookups.
set -euo pipefail
python=${PYTHON:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/take.py" <<'PY'
import sys

import jax
import jax.numpy as jnp
import numpy as np

table = jnp.arange(30.0).reshape(6, 5)
ids = jnp.array([[0, 3], [2, 99], [5, 1]])
take = lambda table, ids: jnp.take(table.T, ids, axis=1)
wanted = np.asarray(table).T[:, [[0, 3], [2, 0], [5, 1]]]
wanted[:, 1, 1] = np.nan
same = lambda found: np.array_equal(found, wanted, equal_nan=True)
assert same(take(table, ids)), "without jit"
assert same(jax.jit(take)(table, ids)), "arguments"
assert same(jax.jit(lambda ids: take(table, ids))(ids)), "a constant table"
right = same(jax.jit(lambda: take(table, ids))())
assert right == (sys.argv[1] == "right"), right
said = "the rows of eager" if right else "other rows than eager, in range too"
print(f"jax {jax.__version__}: take of constants under jit gives {said}")
PY
for version in 0.8.1:wrong 0.8.2:right; do
  "$python" -m venv "$folder/${version%:*}"
  "$folder/${version%:*}/bin/pip" install -q "jax==${version%:*}" "jaxlib==${version%:*}"
  JAX_PLATFORMS=cpu "$folder/${version%:*}/bin/python" "$folder/take.py" "${version#*:}"
done
