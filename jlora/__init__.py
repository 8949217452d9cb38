"""jlora: LoRA as a functional transform.

`jlora.lora(fn, config)` turns an apply function into one that takes an adapter beside
the frozen params and computes `x·W + s·(x·a)·b` wherever `fn` uses an adapted kernel.
"""

import importlib as _importlib
import sys as _sys
import typing as _typing
from importlib import metadata as _metadata

from . import adalora as adalora
from ._adapter.config import LoraConfig as LoraConfig
from ._adapter.factors import Adapter as Adapter
from ._adapter.factors import LoraFactors as LoraFactors
from ._adapter.factors import delta as delta
from ._adapter.merge import merge as merge
from ._adapter.own import VariantEntry as VariantEntry
from ._adapter.own import register_variant as register_variant
from ._adapter.own import variant_names as variant_names
from ._adapter.shardings import shardings as shardings
from ._adapter.shardings import state_shardings as state_shardings
from ._adapter.variants.core import CoreFactors as CoreFactors
from ._adapter.variants.fixed import FixedFactors as FixedFactors
from ._adapter.variants.hadamard import HadamardFactors as HadamardFactors
from ._adapter.variants.kronecker import KroneckerFactors as KroneckerFactors
from ._adapter.variants.layers import LayerFactors as LayerFactors
from ._adapter.variants.rows import TrainedRows as TrainedRows
from ._adapter.variants.scale import KernelScale as KernelScale
from ._adapter.variants.sliced import SlicedFactors as SlicedFactors
from ._adapter.variants.vectors import VectorFactors as VectorFactors
from ._algebra.combine import combine as combine
from ._algebra.prepared import PreparedFactors as PreparedFactors
from ._algebra.prepared import prepare as prepare
from ._algebra.spectrum import effective_rank as effective_rank
from ._algebra.spectrum import energy_kept as energy_kept
from ._algebra.spectrum import entropy_rank as entropy_rank
from ._algebra.spectrum import spectrum as spectrum
from ._algebra.spectrum import stable_rank as stable_rank
from ._algebra.stack import put as put
from ._algebra.stack import stack as stack
from ._algebra.stack import take as take
from ._algebra.stack import unstack as unstack
from ._algebra.vectors import add as add
from ._algebra.vectors import scale as scale
from ._algebra.vectors import subtract as subtract
from ._algebra.vectors import truncate as truncate
from ._errors import AdapterError as AdapterError
from ._errors import BaseMismatchError as BaseMismatchError
from ._errors import CorruptFileError as CorruptFileError
from ._errors import FormatVersionError as FormatVersionError
from ._errors import HubError as HubError
from ._errors import LeftOutWarning as LeftOutWarning
from ._errors import MaterializationError as MaterializationError
from ._errors import NonFiniteError as NonFiniteError
from ._errors import TargetError as TargetError
from ._errors import UnsafeFormatError as UnsafeFormatError
from ._errors import UnsupportedFeatureError as UnsupportedFeatureError
from ._inits.corda import corda as corda
from ._inits.eva import eva as eva
from ._inits.loftq import loftq as loftq
from ._inits.lora_ga import lora_ga as lora_ga
from ._inits.milora import milora as milora
from ._inits.olora import olora as olora
from ._inits.pissa import pissa as pissa
from ._lora.lora import lora as lora
from ._lora.quantize import quantize as quantize
from ._lora.transform import Lora as Lora
from ._params.axes import KernelAxes as KernelAxes
from ._params.input_stats import InputStats as InputStats
from ._plan.memory import Memory as Memory
from ._plan.plan import Plan as Plan
from ._plan.plan import print_trainable as print_trainable
from ._plan.target import Target as Target
from ._plan.target import Unusable as Unusable

if _typing.TYPE_CHECKING:
    from . import checkpoint as checkpoint
    from . import linen as linen
    from . import nnx as nnx
    from . import optim as optim
    from . import peft as peft
    from . import quant as quant
    from . import tunix as tunix
    from . import weights as weights

# The doors to other libraries, which are imported when they are first asked for.
_DOORS = (
    "checkpoint",
    "linen",
    "nnx",
    "optim",
    "peft",
    "quant",
    "tunix",
    "weights",
)


def __getattr__(name: str) -> _typing.Any:
    """Imports a door: `import jlora` is enough for `jlora.peft.load`."""
    if name in _DOORS:
        return _importlib.import_module(f".{name}", __name__)
    raise AttributeError(
        f"module 'jlora' has no attribute {name!r}",
        name=name,
        obj=_sys.modules[__name__],
    )


try:
    __version__ = _metadata.version("jlora")
except (
    _metadata.PackageNotFoundError
):  # a checkout that is on the path but not installed
    __version__ = "0.0.0"
