#!/usr/bin/env bash
# mlx-lm 0.14.0 and 0.32.2: one adapter folder with `alpha` and `scale` has two deltas; and `__metadata__` is null.
#
# Guessed: `alpha` in `lora_parameters` means what it means elsewhere, or nothing. Seen: mlx-lm up to
# 0.14.0 multiplies by scale·alpha/rank, and 0.32.2 by scale alone, of the same folder; configs had
# the default `alpha: 16` for a while after it was no longer read. Of a file that MLX wrote, the
# header says `"__metadata__": null`, where the format has an object or nothing.
# For LoRA in JAX: nothing in a folder with both tells which one wrote it, so a reader has to ask;
# and it has to take null for no metadata.
set -euo pipefail
python=${PYTHON:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "mlx[cpu]==0.32.4" mlx-lm==0.32.2
# The old release needs an old MLX: its source alone is looked at.
"$folder/venv/bin/pip" download -q --no-deps -d "$folder" mlx-lm==0.14.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import glob
import json
import zipfile

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear

(wheel,) = glob.glob("mlx_lm-0.14.0*.whl")
old = zipfile.ZipFile(wheel).read("mlx_lm/tuner/lora.py").decode()
assert "self.scale = scale * (alpha / r)" in old
layer = LoRALinear.from_base(nn.Linear(5, 7), r=2, scale=3.0)
layer.lora_b = mx.random.normal((2, 7))
delta = layer.fuse().weight - layer.linear.weight
assert mx.allclose(delta, 3.0 * (layer.lora_a @ layer.lora_b).T, atol=1e-5)
print("scale 3, alpha 16, rank 2: mlx-lm 0.14.0 multiplies by 24, and 0.32.2 by 3")

mx.save_safetensors("one.safetensors", {"w": mx.ones((2, 3))})
data = open("one.safetensors", "rb").read()
header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
assert "__metadata__" in header and header["__metadata__"] is None, header
print("the header of a file of MLX's without metadata says that it is null")
PY
