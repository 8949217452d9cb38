"""The rank of the factors of one kernel."""

from .._params.axes import KernelAxes, Shape
from .config import LoraConfig


def capped_rank(config: LoraConfig, axes: KernelAxes, shape: Shape) -> int:
    """Returns the rank of the factors that a config gives a kernel.

    No ΔW has a larger rank than the number of features that its kernel maps from or
    to, or each of its slices: more columns would train nothing else. The scaling stays
    that of the rank that was asked, so that one learning rate suits all kernels.

    >>> axes = KernelAxes(batch=(0,), in_=(1,), out=(2, 3))
    >>> [capped_rank(LoraConfig(rank=8), axes, (12, 64, 2, n)) for n in (1, 3, 5)]
    [2, 6, 8]
    """
    fan_in, fan_out = axes.fans(shape)
    if config.slices is not None:
        fan_out = min(stop - first for first, stop in config.slices)
    return min(config.rank, fan_in, fan_out)
