"""The device on which a model runs: the user's choice, the result of ``auto``, and the reasons."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from topt_deploy.arguments import check_choice
from topt_deploy.errors import NoDevice, ToptError, UsageError

log = logging.getLogger(__name__)

CPU, CUDA, TENSORRT, AUTO = DEVICES = ("cpu", "cuda", "tensorrt", "auto")
BEST_FIRST = (TENSORRT, CUDA, CPU)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A device, and how it came to that.

    Attributes:
        asked: One of :data:`DEVICES`.
        used: One of them, never ``auto``.
        instead_of: Better devices that ``auto`` did not take, and why.
        how: The library that runs the model there, and the alternatives.
    """

    asked: str
    used: str
    instead_of: Mapping[str, str] = field(default_factory=dict)
    how: str = ""

    def __str__(self) -> str:
        why = [self.how] if self.how else []
        why += [f"not {name}: {reason}" for name, reason in self.instead_of.items()]
        return f"{self.used}, asked for {self.asked}" + (f" ({'; '.join(why)})" if why else "")

    def as_dict(self) -> dict[str, Any]:
        """The same for machines."""
        return {"asked": self.asked, "used": self.used, "instead_of": dict(self.instead_of), "how": self.how}


def choose(asked: str, ways: Mapping[str, Callable[[], T]], *, what: str) -> tuple[T, Chosen]:
    """Open something on the device that is asked for; with ``auto`` on the best that works, which the log tells.

    Args:
        asked: One of :data:`DEVICES`.
        ways: Opens it, by device.
        what: Its name in the log.

    Raises:
        NoDevice: If the device that was asked for is not there; ``auto`` ends with the CPU.
        UsageError: If there is no such device.
    """
    check_choice("device", asked, DEVICES)
    if asked != AUTO:
        opened = ways[asked]()
        chosen = Chosen(asked=asked, used=asked, how=_how(opened))
        if asked != CPU:
            log.info("%s: device %s", what, chosen)
        return opened, chosen
    reasons: dict[str, str] = {}
    for device in BEST_FIRST:
        try:
            opened = ways[device]()
        except (NoDevice, UsageError) as error:  # the latter of a zip, which engines are not built from
            if device == CPU:
                raise
            reasons[device] = reason(error)
            continue
        chosen = Chosen(asked=asked, used=device, instead_of=reasons, how=_how(opened))
        log.info("%s: device %s", what, chosen)
        return opened, chosen
    raise AssertionError("the CPU is the last")


def reason(error: ToptError) -> str:
    """An error in a line."""
    return error.message + (f" ({error.found})" if error.found else "")


def _how(opened: Any) -> str:
    return str(getattr(opened, "how", ""))
