"""All features of the public surface."""

import surface_algebra
import surface_files
import surface_start
import surface_training
from surface import FEATURES as FEATURES
from surface import Place as Place

__all__ = ["FEATURES", "Place"]
MODULES = (surface_algebra, surface_files, surface_start, surface_training)
