#!/usr/bin/env bash
# jax 0.8.2, 0.10.2 and 0.12.0.1: a batched product, summed over one mesh axis, comes back with its batch in another order where its batch is asked for along that axis and a feature axis along the batch's old one.
#
# Guessed: a layout says where values lie, never what they are. Seen, on 8 CPU devices as
# (data=2, model=4): operands (expert, token, features) cut as P("model", "data") and their
# product over tokens asked for as P("data", "model"). Its eight matrices are right and come
# as 0, 2, 4, 6, 1, 3, 5, 7. After the all-reduce each device keeps its share by `data` of
# its own block of experts and one all-to-all along `model` joins the shares; the permute
# that brings experts 0 to 3 together is left out. `out_sharding` on an Explicit mesh does
# the same, and so did jax 0.8.2 and 0.10.2. Axes of one size are right; so is the product
# that is first constrained to P("model"), where it lies by itself.
# For LoRA in JAX: where tokens, and what lies between two factors, are constrained to
# P("model", "data") and kernels or factors of experts are stored as P("data", "model"), each
# expert is trained with the gradient of another one, and the loss is right. Constrain such
# gradients to P("model") first, or store experts along the axis that their tokens have.
set -euo pipefail
python=${PYTHON:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.12.0.1 jaxlib==0.12.0.1
JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8 "$folder/venv/bin/python" - 2>/dev/null <<'PY'
import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import with_sharding_constraint
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

EXPERTS, TOKENS, FEATURES, RANK = 8, 16, 8, 4
random = np.random.default_rng(0)
normal = lambda *shape: random.normal(size=shape).astype(np.float32)
tokens, cotangents = normal(EXPERTS, TOKENS, FEATURES), normal(EXPERTS, TOKENS, FEATURES)
shapes = (FEATURES, FEATURES), (FEATURES, RANK), (RANK, FEATURES)  # kernels, and their factors
params = tuple(normal(EXPERTS, *shape) for shape in shapes)


def mesh_of(data, model, kind=AxisType.Auto):
    devices = jax.devices()[: data * model]
    return jax.make_mesh((data, model), ("data", "model"), (kind, kind), devices=devices)


def order(found, wanted):
    """Which matrix of `wanted` each one of `found` is."""
    same = lambda a, b: np.allclose(a, b, atol=1e-4)
    return [next((n for n, b in enumerate(wanted) if same(a, b)), None) for a in np.asarray(found)]


def product(mesh, first=None, **how):
    """The order in which `out_shardings` gives the product over tokens."""
    put = lambda value: jax.device_put(value, NamedSharding(mesh, P("model", "data")))

    def compute(rows, others):
        found = jnp.einsum("eti,eto->eio", rows, others, **how)
        return found if first is None else with_sharding_constraint(found, NamedSharding(mesh, first))

    with jax.set_mesh(mesh):
        out = NamedSharding(mesh, P("data", "model"))
        found = jax.jit(compute, out_shardings=out)(put(tokens), put(cotangents))
    return order(found, np.einsum("eti,eto->eio", tokens, cotangents))


def gradients(constrain, params, tokens):
    def loss(params):
        kernels, down, up = params
        hidden = constrain(jnp.einsum("eti,eir->etr", tokens, down))
        out = jnp.einsum("eti,eio->eto", tokens, kernels) + jnp.einsum("etr,ero->eto", hidden, up)
        return jnp.sum(jnp.sin(constrain(out)))

    value, found = jax.value_and_grad(loss)(params)
    return value, jax.tree.map(lambda param, gradient: gradient + 0 * param, params, found)


swapped = product(mesh_of(2, 4))
assert swapped == [0, 2, 4, 6, 1, 3, 5, 7], swapped
assert product(mesh_of(4, 2)) == [0, 4, 1, 5, 2, 6, 3, 7]
explicit = product(mesh_of(2, 4, AxisType.Explicit), out_sharding=P("data", "model"))
assert explicit == swapped, explicit
assert product(mesh_of(2, 2)) == product(mesh_of(2, 4), first=P("model")) == list(range(EXPERTS))

value, wanted = jax.jit(lambda *args: gradients(lambda rows: rows, *args))(params, tokens)
mesh = mesh_of(2, 4)
at = lambda *names: NamedSharding(mesh, P(*names))
constrain = lambda rows: with_sharding_constraint(rows, at("model", "data"))
step = jax.jit(lambda *args: gradients(constrain, *args))
for names, places in (("data", "model"), swapped), (("model", "data"), list(range(EXPERTS))):
    loss, found = step(jax.device_put(params, at(*names)), jax.device_put(tokens, at("model", "data")))
    assert np.allclose(loss, value, rtol=1e-4), (loss, value)
    assert [order(a, b) for a, b in zip(found, wanted)] == [places] * 3, names
print(
    f"P('data', 'model') of a product that lies as P('model'): matrices {swapped}, with "
    "out_sharding on an Explicit mesh too; so come the gradients of experts, with the right loss"
)
PY
