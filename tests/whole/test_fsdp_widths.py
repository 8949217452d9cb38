"""FSDP at the widths of real models: compiled from shapes, no array is made.

A frozen step leaves rows where they are. The adapted one moves what that does, and
besides it factors alone, whether or not the model says behind its embedding where rows
are. (A step of plain autodiff gives rows up for features in its backward pass where
nothing says so: findings/jax-fsdp-gradient-moves-activations-...)
"""

import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hlo import collectives
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from paths import ROOT
from placed import at, compiled

import jlora

sys.path.append(str(ROOT / "benchmarks"))
from models import Decoder  # isort: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("broadcasting"),
]
ROWS, SEQ, RANK = 32, 1024, 16


@pytest.fixture
def broadcasting() -> Iterator[None]:
    """The model of the benchmarks broadcasts its norms."""
    with jax.numpy_rank_promotion("allow"):
        yield


class Step:
    """A decoder on four devices, all of whose kernels are sharded along their input."""

    def __init__(self, d: int, scan: bool, kind: AxisType = AxisType.Auto) -> None:
        devices = jax.devices()[:4]
        self.mesh = jax.make_mesh((4,), ("fsdp",), (kind,), devices=devices)
        size = {"d": d, "ffn": 11 * d // 4, "heads": d // 128, "kv_heads": d // 128}
        run = {"layers": 2, "batch": ROWS, "seq": SEQ, "scan": scan, "remat": True}
        self.model = Decoder(vocab=32000, dtype=jnp.bfloat16, **size, **run)
        shapes = jax.eval_shape(self.model.init, jax.random.key(0))
        self.params = jax.tree.map(self.placed, shapes)
        rows = self.place("fsdp")
        self.batch = jax.ShapeDtypeStruct((ROWS, SEQ + 1), jnp.int32, sharding=rows)

    def place(self, *spec: Any) -> NamedSharding:
        """A layout on the mesh."""
        return NamedSharding(self.mesh, P(*spec))

    def placed(self, leaf: Any) -> jax.ShapeDtypeStruct:
        """A leaf sharded along its input axis; vectors are whole."""
        stacked = leaf.ndim == 3
        spec = (None, "fsdp") if stacked else ("fsdp",)
        matrix = stacked or (leaf.ndim == 2 and leaf.shape[0] > 64)
        place = self.place(*spec) if matrix else self.place()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    def told(self, params: Any, batch: Any) -> jax.Array:
        """The loss, with the embedded tokens left where their rows are."""
        x = self.model.embed(params, batch)
        x = jax.lax.with_sharding_constraint(x, self.place("fsdp"))
        return self.model.loss(params, batch, x)

    def frozen(self, params: Any, batch: Any) -> Any:
        """The gradient of the embedded tokens alone."""
        x = self.model.embed(params, batch)
        x = jax.lax.with_sharding_constraint(x, self.place("fsdp"))
        return jax.grad(lambda x: self.model.loss(params, batch, x))(x)


@pytest.mark.parametrize(
    ("d", "scan", "told"),
    [
        (2048, True, False),
        (2048, False, False),
        (4096, True, False),
        (4096, False, False),
        (2048, True, True),
        (4096, False, True),
    ],
)
def test_factors_alone_travel_besides_what_the_base_does(
    d: int, scan: bool, told: bool
) -> None:
    step = Step(d, scan)
    target = f"layers/.*({'|'.join(step.model.kernels)})$"
    loss = step.told if told else step.model.loss
    lora = jlora.lora(loss, jlora.LoraConfig(target, rank=RANK, alpha=32.0))
    shapes = jax.eval_shape(lora.init, jax.random.key(1), step.params, step.batch)
    places = jlora.shardings(step.params, shapes)
    adapter = at(shapes, places)
    assert len(adapter) == 7 * (1 if scan else 2)

    def adapted(adapter: Any, params: Any, batch: Any) -> Any:
        return jax.grad(lambda a: lora.apply(params, a, batch))(adapter)

    rows, args = step.place("fsdp"), (step.params, step.batch)
    base = compiled(step.frozen, *args, out_shardings=rows)
    own = compiled(adapted, adapter, *args, out_shardings=places)
    more = collectives(own) - collectives(base)
    # A factor of each of three siblings, of two stacked layers at most.
    largest = 2 * 3 * RANK * 11 * d // 4
    assert more
    assert {size for _, size in more if size > largest} <= {
        size for _, size in collectives(base)
    }, more
