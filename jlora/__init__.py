"""jlora: LoRA as a functional transform.

`jlora.lora(fn, config)` turns an apply function into one that takes an adapter beside
the frozen params and computes `x·W + s·(x·a)·b` wherever `fn` uses an adapted kernel.
"""

from importlib import metadata as _metadata

from ._axes import KernelAxes as KernelAxes
from ._config import LoraConfig as LoraConfig
from ._errors import AdapterError as AdapterError
from ._errors import BaseMismatchError as BaseMismatchError
from ._errors import CorruptFileError as CorruptFileError
from ._errors import FormatVersionError as FormatVersionError
from ._errors import MaterializationError as MaterializationError
from ._errors import NonFiniteError as NonFiniteError
from ._errors import TargetError as TargetError
from ._errors import UnsafeFormatError as UnsafeFormatError
from ._errors import UnsupportedFeatureError as UnsupportedFeatureError
from ._factors import Adapter as Adapter
from ._factors import LoraFactors as LoraFactors
from ._factors import delta as delta
from ._memory import Memory as Memory
from ._merge import merge as merge
from ._placement import shardings as shardings
from ._placement import state_shardings as state_shardings
from ._plan import Plan as Plan
from ._quantize import quantize as quantize
from ._targets import Target as Target
from ._targets import Unusable as Unusable
from ._transform import Lora as Lora
from ._transform import lora as lora

try:
    __version__ = _metadata.version("jlora")
except (
    _metadata.PackageNotFoundError
):  # a checkout that is on the path but not installed
    __version__ = "0.0.0"
