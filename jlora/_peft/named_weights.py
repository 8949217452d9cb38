"""The weights of a model on disk, under the names that an adapter has for them."""

from collections.abc import Iterator, Mapping

import jax
import numpy as np

from .._files.model_files import Weights


class NamedWeights(Mapping[str, np.ndarray]):
    """Tensors by the names of modules, read from disk when they are asked for.

    Attributes:
        weights: the tensors by their names on disk.
        added: names of tensors that are not there yet, each with the one whose values
            it has.
    """

    def __init__(self, weights: Weights) -> None:
        """Takes the tensors of a folder."""
        self.weights = weights
        self.added: dict[str, str] = {}

    def add(self, name: str, like: str) -> None:
        """Adds a tensor with the values of another."""
        self.added[name] = like

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns a tensor."""
        return self.weights[self.added.get(name, name)]

    def __iter__(self) -> Iterator[str]:
        """Yields the names."""
        yield from self.weights
        yield from self.added

    def __len__(self) -> int:
        """Returns how many tensors there are."""
        return len(self.weights) + len(self.added)

    def shape(self, name: str) -> jax.ShapeDtypeStruct:
        """Returns the shape and the dtype of a tensor."""
        return self.weights.shape(self.added.get(name, name))
