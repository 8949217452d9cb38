"""A variant of LoRA that is defined outside of jlora, for tests."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

import jlora


@jlora.register_variant("own")
class OwnFactors(jlora.VariantEntry):
    """`ΔW = s · a · diag(d) · b`, in which `b` is drawn and trained as `a` is."""

    a: jax.Array
    b: jax.Array
    d: jax.Array
    labels: ClassVar = {"d": "b"}

    @property
    def rank(self) -> int:
        """The number of columns."""
        return self.d.shape[-1]

    @staticmethod
    def shapes(axes: Any, shape: Any, rank: int) -> dict[str, tuple[int, ...]]:
        """Sides as matrices, one for each batch index."""
        batch = tuple(shape[i] for i in axes.batch)
        inputs, outputs = axes.fans(shape)
        a, b, d = (inputs, rank), (rank, outputs), (rank,)
        return {"a": (*batch, *a), "b": (*batch, *b), "d": (*batch, *d)}

    @classmethod
    def new(cls, new: Any) -> dict[str, jax.Array]:
        """Draws both sides; `d` is zero."""
        shapes = cls.shapes(new.axes, new.shape, new.rank)
        keys, dtype = jax.random.split(new.key), new.config.dtype
        sides = {
            n: jax.random.normal(k, shapes[n], dtype)
            for n, k in zip("ab", keys, strict=True)
        }
        return {**sides, "d": jnp.zeros(shapes["d"], dtype)}

    def lowered(self) -> jlora.LoraFactors:
        """Gives `d` to `a`."""
        return self.factors(self.a * self.d[..., None, :], self.b)

    @staticmethod
    def along(axes: Any) -> dict[str, tuple[int | None, ...]]:
        """Follows the batch axes, which factors as matrices have in front."""
        return {"d": (*axes.batch, None)}
