"""Things said once: a slow path taken, memory spent for a reason the user may not know."""

from __future__ import annotations

import logging
from functools import cache

log = logging.getLogger("qft")


@cache
def say_once(message: str) -> None:
    """Log `message` as a warning the first time it is said in this process."""
    log.warning(message)
