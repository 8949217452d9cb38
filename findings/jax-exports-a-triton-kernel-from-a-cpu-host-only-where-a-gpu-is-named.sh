#!/usr/bin/env bash
# jax 0.12.0.1: a program with a Pallas kernel for Triton is exported for GPUs on a host without one only within a mesh that names a GPU, though what is written is the same for all.
#
# Guessed: `jax.export` with `platforms=("cuda",)` needs no GPU, as it needs no TPU for
# "tpu"; and where a kind of GPU has to be said, the program is for that kind.
# Seen: jax 0.10.2 exports it. jax 0.11.2 and 0.12.0.1 raise a RuntimeError which asks for
# an AbstractDevice; that is a part of an abstract mesh, so that a program without any
# mesh is exported within one. The kind must be that of a GPU that JAX knows ("a GPU" is
# refused by the same words), and of an H100 and an A100 comes the same module.
# For LoRA in JAX: who exports a base model with such a kernel (attention, mostly), with
# an adapter or merged, on a host that only builds, sets one abstract mesh around it.
set -euo pipefail
python=${PYTHON:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/run.py" <<'PY'
import jax
import jax.numpy as jnp
from jax import export
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton


def twice(x, out):
    out[...] = 2 * x[...]


x = jax.ShapeDtypeStruct((128,), jnp.float32)
params = triton.CompilerParams()
run = jax.jit(pl.pallas_call(twice, out_shape=x, compiler_params=params))
# A call of this kind is kept stable by nobody, which has to be accepted.
accepted = [export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]


def module():
    made = export.export(run, platforms=("cuda",), disabled_checks=accepted)
    return made(x).mlir_module()


def within(kind, cores):
    gpu = jax.sharding.AbstractDevice(
        device_kind=kind, num_cores=cores, platform="gpu"
    )
    mesh = jax.sharding.AbstractMesh((1,), ("d",), abstract_device=gpu)
    with jax.sharding.use_abstract_mesh(mesh):
        return module()


def outcome(make):
    try:
        make()
    except RuntimeError as error:
        assert "specify an abstract GPU device" in str(error), error
        return "asks for an abstract GPU"
    return "exported"


print("jax", jax.__version__, "alone:", outcome(module))
if jax.__version_info__ < (0, 11):
    assert outcome(module) == "exported"
else:
    assert outcome(module) == "asks for an abstract GPU"
    assert outcome(lambda: within("a GPU", 1)) == "asks for an abstract GPU"
    kinds = {"NVIDIA H100 80GB HBM3": 132, "NVIDIA A100-SXM4-40GB": 108}
    # One line makes both: its number is written into the module.
    modules = {within(*each) for each in kinds.items()}
    print("for an H100 and for an A100 the same module:", len(modules) == 1)
    assert len(modules) == 1 and "triton" in modules.pop()
PY
for version in 0.10.2 0.11.2 0.12.0.1; do
  "$python" -m venv "$folder/$version"
  "$folder/$version/bin/pip" install -q "jax==$version" "jaxlib==$version"
  JAX_PLATFORMS=cpu "$folder/$version/bin/python" "$folder/run.py"
done
