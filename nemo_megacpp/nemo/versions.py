"""The versions of NeMo and Megatron-Core that this package supports."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from nemo_megacpp.errors import UserError

WANTED = {"nemo-toolkit": "2.7", "megatron-core": "0.16", "nemo_run": None}
"""Distribution and series; None: any."""
REQUIREMENT = (
    "nemo_megacpp's NeMo recipes need nemo-toolkit 2.7 with megatron-core 0.16 "
    "(pip install 'nemo_megacpp[nemo]', or a container that has them)"
)


def describe_mismatch() -> str | None:
    """Return what is missing or of another series, as one phrase; None if all is there."""
    wrong = []
    for name, series in WANTED.items():
        found = _installed(name)
        if found is None:
            wrong.append(f"{name} is not installed")
        elif series is not None and ".".join(found.split(".")[:2]) != series:
            wrong.append(f"{name} is {found}")
    return " and ".join(wrong) or None


def require_nemo() -> None:
    """Refuse a command that trains through NeMo where that is not installed.

    Raises:
        UserError: naming what is missing.
    """
    mismatch = describe_mismatch()
    if mismatch is not None:
        raise UserError(f"{REQUIREMENT}, but {mismatch}.")


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
