"""Whether what is asked for can be held in this machine's memory at all."""

import os

from adacm2_jax.errors import UserError


def host_memory() -> int:
    """Bytes of memory that this machine has; 0 if it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not everywhere
        return 0


def check_room(needed: int, what: str, remedy: str, kind: type[UserError] = UserError) -> None:
    """Refuses what is larger than the machine's whole memory.

    Args:
      needed: bytes.
      what: takes them.
      remedy: what to do.
      kind: of the error.

    Raises:
      UserError: naming all four.
    """
    there = host_memory()
    if there and needed > there:
        raise kind(
            f"{what} need {needed / 1e9:,.0f} GB of memory ({needed:,} bytes), and this machine "
            f"has {there / 1e9:,.0f} GB: {remedy}"
        )
