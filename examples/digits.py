"""The data of classify_images.py: scikit-learn's handwritten digits, and a shift."""

from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


class Images(NamedTuple):
    """Images (n, 8, 8, 1) from 0 to 1, and the digits that they show."""

    x: np.ndarray
    y: np.ndarray


def load() -> tuple[Images, Images]:
    """Returns the images to train on and those held out, a quarter of all."""
    digits = load_digits()
    x = (digits.images[..., None] / 16).astype(np.float32)
    x, x_test, y, y_test = train_test_split(x, digits.target, random_state=0)
    return Images(x, y), Images(x_test, y_test)


def shifted(images: Images) -> Images:
    """Returns the images turned by 90 degrees and inverted."""
    return Images(1 - np.rot90(images.x, axes=(1, 2)), images.y)
