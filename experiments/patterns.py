"""Regular expressions over paths of kernels, as flags give them."""

import re
from collections.abc import Sequence


def matching(pattern: str, paths: Sequence[str], *, flag: str) -> list[str]:
    """The paths that a pattern of a flag matches as a whole; raises ValueError where there are none."""
    try:
        found = [path for path in paths if re.fullmatch(pattern, path)]
    except re.error as error:
        raise ValueError(f"--{flag}: {pattern!r} is no regular expression: {error}") from error
    if not found:
        raise ValueError(f"--{flag}: {pattern!r} matches none of the kernels {list(paths)[:8]} ...")
    return found


def check_pins(pins: Sequence[str]) -> None:
    """Raise ValueError where a value of `--pin` isn't BITS:PATTERN."""
    for pin in pins:
        if not re.fullmatch(r"\d+:.+", pin):
            raise ValueError(f"--pin must be BITS:PATTERN, got {pin!r}")


def pinned_bits(pins: Sequence[str], paths: Sequence[str]) -> dict[str, int]:
    """{path: bits} of the kernels that values of `--pin` match; the last one counts where several do."""
    pinned: dict[str, int] = {}
    for pin in pins:
        bits, _, pattern = pin.partition(":")
        pinned |= dict.fromkeys(matching(pattern, paths, flag="pin"), int(bits))
    return pinned
