"""Whether this installation can train through Megatron-Bridge."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from nemo_megacpp.errors import UserError

WANTED = {"megatron-bridge": "0.6", "megatron-core": "0.19"}
"""Distribution and series. Bridge 0.6 is written for Megatron-Core 0.19 and Python 3.12."""


def describe_mismatch() -> str | None:
    """Return what is missing or of another series, as one phrase; None if all is there."""
    wrong = []
    for name, series in WANTED.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            wrong.append(f"{name} is not installed")
            continue
        if ".".join(found.split(".")[:2]) != series:
            wrong.append(f"{name} is {found}")
    return " and ".join(wrong) or None


def require_bridge() -> None:
    """Refuse to train through Bridge where that is not installed.

    Raises:
        UserError: naming what is missing.
    """
    mismatch = describe_mismatch()
    if mismatch is not None:
        wanted = " with ".join(f"{name} {series}" for name, series in WANTED.items())
        raise UserError(
            f"--through bridge needs {wanted} (Python 3.12; docs/bridge.md), but {mismatch}. "
            f"'nemo-megacpp doctor' lists the doors that are open here."
        )
