"""`Memory`: what a training step holds on each device, as people read it."""

import dataclasses
import html

from .._jax.symbolic import are_known


@dataclasses.dataclass(frozen=True)
class Memory:
    """The bytes that a training step holds on each device, activations aside.

    Beside the memory of training the adapter stands that of training every floating
    leaf of the params with the same optimizer (`full_…`). Printing it gives a table;
    in a notebook it is shown as HTML. An array of four bits counts half a byte per
    value, as XLA counts it, and a PRNG key what its dtype says.

    Attributes:
        devices: the number of devices that the arrays are laid out over.
        trainable: the number of trained values.
        params: the number of values in the params.
        base: bytes of the frozen params on a device, those of leaves that are trained
            whole among them: a step does not use these, and yet they are held.
        factors: bytes of the adapter on a device, leaves trained whole among them.
        optimizer: bytes of the optimizer's state for the adapter on a device.
        batch: bytes of the batch on a device.
        full_gradients: bytes of the gradients of all floating params on a device.
        full_optimizer: bytes of the optimizer's state for them; None if the optimizer
            refuses a tree without factors, as `jlora.optim.lora_plus` does.
        checkpoint: bytes of the whole adapter, over all devices.
        full_checkpoint: bytes of the whole params, over all devices.
    """

    devices: int
    trainable: int
    params: int
    base: int
    factors: int
    optimizer: int
    batch: int
    full_gradients: int
    full_optimizer: int | None
    checkpoint: int
    full_checkpoint: int

    @property
    def gradients(self) -> int:
        """Bytes of the gradients: those of the adapter, whose dtypes they have."""
        return self.factors

    @property
    def arguments(self) -> int:
        """Bytes of the arguments of a step: base, factors, optimizer and batch."""
        return self.base + self.factors + self.optimizer + self.batch

    @property
    def total(self) -> int:
        """Bytes of the arguments and of the gradients, which live within a step."""
        return self.arguments + self.gradients

    @property
    def full_arguments(self) -> int | None:
        """The same as `arguments` for training everything."""
        if self.full_optimizer is None:
            return None
        return self.base + self.full_optimizer + self.batch

    @property
    def full_total(self) -> int | None:
        """The same as `total` for training everything."""
        whole = self.full_arguments
        return None if whole is None else whole + self.full_gradients

    def __str__(self) -> str:
        """Returns the memory as a table."""
        rows = [_HEAD, *self._rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([name.ljust(widths[0]), a.rjust(widths[1]), b.rjust(widths[2])])
            for name, a, b in rows
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*lines, *self._notes()])

    def _repr_html_(self) -> str:
        """Returns the memory as an HTML table."""
        cells = lambda tag, row: "".join(f"<{tag}>{_safe(c)}</{tag}>" for c in row)
        head = f"<thead><tr>{cells('th', _HEAD)}</tr></thead>"
        body = "".join(f"<tr>{cells('td', row)}</tr>" for row in self._rows())
        notes = "<br>".join(map(_safe, self._notes()))
        return f"<table>{head}<tbody>{body}</tbody></table><p>{notes}</p>"

    def _rows(self) -> list[tuple[str, str, str]]:
        rows = [
            ("base", self.base, self.base),
            ("factors", self.factors, 0),
            ("optimizer state", self.optimizer, self.full_optimizer),
            ("batch", self.batch, self.batch),
            ("arguments of a step", self.arguments, self.full_arguments),
            ("gradients, within a step", self.gradients, self.full_gradients),
            ("total", self.total, self.full_total),
        ]
        return [(name, human(ours), human(full)) for name, ours, full in rows]

    def _notes(self) -> list[str]:
        share = 100 * self.trainable / max(self.params, 1)
        fewer = self.params / max(self.trainable, 1)
        plural = "" if self.devices == 1 else "s"
        return [
            f"trainable {self.trainable:,} of {self.params:,} ({share:.3f} %), "
            f"{fewer:,.0f}× fewer",
            f"checkpoint {human(self.checkpoint)}, of all params "
            f"{human(self.full_checkpoint)}",
            f"{self.devices:,} device{plural}; 1 kB is 1000 bytes; "
            "activations are not counted",
        ]


_HEAD = ("bytes on each device", "adapter", "full fine-tuning")
_safe = html.escape


def human(size: int | None) -> str:
    """Returns a number of bytes in decimal units, three digits of it.

    >>> human(512), human(75_497_472), human(1_047_625_555_968), human(None)
    ('512 B', '75.5 MB', '1.05 TB', 'unknown')
    """
    if size is None:
        return "unknown"
    if not are_known([size]):
        return f"{size} B"
    power = min(max(len(str(size)) - 1, 0) // 3, len(_UNITS) - 1)
    scaled = float(f"{size / 1000**power:.3g}")
    if scaled >= 1000 and power < len(_UNITS) - 1:  # 999.6 kB is 1.00 MB
        power, scaled = power + 1, scaled / 1000
    digits = 0 if power == 0 or scaled >= 100 else 1 if scaled >= 10 else 2
    return f"{scaled:.{digits}f} {_UNITS[power]}"


_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
