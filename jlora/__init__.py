"""jlora: LoRA as a functional transform.

`jlora.lora(fn, config)` turns an apply function into one that takes an adapter beside
the frozen params and computes `x·W + s·(x·a)·b` wherever `fn` uses an adapted kernel.
"""

from importlib import metadata as _metadata

from . import _adalora as adalora  # noqa: F401 (its names are short in there)
from ._algebra import add as add
from ._algebra import scale as scale
from ._algebra import subtract as subtract
from ._algebra import truncate as truncate
from ._axes import KernelAxes as KernelAxes
from ._combine import combine as combine
from ._config import LoraConfig as LoraConfig
from ._data_init import corda as corda
from ._data_init import eva as eva
from ._data_init import lora_ga as lora_ga
from ._entries import SlicedFactors as SlicedFactors
from ._entries import TrainedRows as TrainedRows
from ._errors import AdapterError as AdapterError
from ._errors import BaseMismatchError as BaseMismatchError
from ._errors import CorruptFileError as CorruptFileError
from ._errors import FormatVersionError as FormatVersionError
from ._errors import LeftOutWarning as LeftOutWarning
from ._errors import MaterializationError as MaterializationError
from ._errors import NonFiniteError as NonFiniteError
from ._errors import TargetError as TargetError
from ._errors import UnsafeFormatError as UnsafeFormatError
from ._errors import UnsupportedFeatureError as UnsupportedFeatureError
from ._factors import Adapter as Adapter
from ._factors import LoraFactors as LoraFactors
from ._factors import delta as delta
from ._input_stats import InputStats as InputStats
from ._memory import Memory as Memory
from ._merge import merge as merge
from ._moving_init import loftq as loftq
from ._moving_init import milora as milora
from ._moving_init import olora as olora
from ._moving_init import pissa as pissa
from ._placement import shardings as shardings
from ._placement import state_shardings as state_shardings
from ._plan import Plan as Plan
from ._quantize import quantize as quantize
from ._spectrum import effective_rank as effective_rank
from ._spectrum import energy_kept as energy_kept
from ._spectrum import entropy_rank as entropy_rank
from ._spectrum import spectrum as spectrum
from ._spectrum import stable_rank as stable_rank
from ._stack import put as put
from ._stack import stack as stack
from ._stack import take as take
from ._stack import unstack as unstack
from ._target import Target as Target
from ._target import Unusable as Unusable
from ._transform import Lora as Lora
from ._transform import lora as lora

try:
    __version__ = _metadata.version("jlora")
except (
    _metadata.PackageNotFoundError
):  # a checkout that is on the path but not installed
    __version__ = "0.0.0"
