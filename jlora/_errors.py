"""The errors that jlora raises, beside ValueError and TypeError."""


class TargetError(ValueError):
    """The config does not fit the params.

    Raised when a pattern matches no usable kernel, a config is shadowed by an earlier
    one, or a rank is larger than the kernel allows.
    """


class MaterializationError(ValueError):
    """An adapted kernel reaches an operation that has no low-rank rule.

    The message names the path, the shape, the primitive and the line of the model.
    `jlora.lora(..., materialize="allow")` forms `W + s·a·b` there and only there.
    """


class AdapterError(ValueError):
    """An adapter does not belong to the params it is applied to or merged into."""
