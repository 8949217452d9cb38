"""What jlora raises, beside ValueError and TypeError, and what it warns of."""


class TargetError(ValueError):
    """The config does not fit the params.

    Raised when a pattern matches no usable kernel, or a config is shadowed by an
    earlier one.
    """


class MaterializationError(ValueError):
    """An adapted kernel reaches an operation that has no low-rank rule.

    The message names the path, the shape, the primitive and the line of the model.
    `jlora.lora(..., materialize="allow")` forms `W + s·a·b` there and only there.
    """


class AdapterError(ValueError):
    """An adapter does not belong to the params it is applied to or merged into."""


class CorruptFileError(AdapterError):
    """A file of an adapter is truncated, altered, or not what its format allows."""


class UnsafeFormatError(AdapterError):
    """A file is of a kind that jlora does not open, such as a pickle or a link."""


class UnsupportedFeatureError(AdapterError):
    """A file asks for something that jlora, or the profile it is saved for, lacks."""


class FormatVersionError(AdapterError):
    """A file was written in a format that is newer than this jlora."""


class HubError(AdapterError):
    """A repository of the Hugging Face Hub is not there, not reached, or refused.

    The message says what to do: log in, ask for access, or set HF_HUB_OFFLINE.
    """


class NonFiniteError(AdapterError):
    """An adapter holds NaNs or infinities."""


class BaseMismatchError(AdapterError):
    """An adapter was trained beside other params than it is restored for."""


class LeftOutWarning(UserWarning):
    """A config matches leaves that may be wanted and are left out.

    They look like kernels and go into operations without a low-rank rule, and into none
    that has one; or they are in a collection beside "params" that no pattern names. The
    plan lists them among those that are matched and left out.
    """
