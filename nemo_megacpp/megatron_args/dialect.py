"""The Megatron-LM that reads the arguments: releases differ in scripts and option names."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from nemo_megacpp.core.releases import imported
from nemo_megacpp.errors import UserError

_PACKAGE_INFO = Path("megatron") / "core" / "package_info.py"
_RELEASE = re.compile(r"(?:core_)?v?(\d+)\.(\d+)(?:\.\S+)?")
_LATER = (
    "From 0.17 on the pattern is an argument of another name and another language "
    "(--hybrid-layer-pattern), and from 0.18 the script is pretrain_hybrid.py; nemo_megacpp's "
    "modules are written for 0.16, so other arguments alone would not help."
)


@dataclass(frozen=True)
class Dialect:
    """Script and options of one series of Megatron-LM releases.

    Attributes:
        series: of its releases.
        script: the training script.
        pattern_option: which option takes the pattern.
    """

    series: str
    script: str
    pattern_option: str

    @cached_property
    def options(self) -> dict[str, dict[str, Any]]:
        """Its options (:mod:`nemo_megacpp.megatron_args.list_options`)."""
        table = resources.files(__package__).joinpath(f"options_{self.series}.json")
        return json.loads(table.read_text(encoding="utf-8"))

    @cached_property
    def by_destination(self) -> dict[str, dict[str, dict[str, Any]]]:
        """The options that set each destination."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for name, option in self.options.items():
            found.setdefault(option["dest"], {})[name] = option
        return found

    def default(self, dest: str) -> Any:
        """Return the default of ``dest``."""
        return next(iter(self.by_destination[dest].values()))["default"]

    def words(self, dest: str, value: Any) -> list[str] | None:
        """Return the words that set ``dest`` to ``value``; None where no option can."""
        default = self.default(dest)
        if value == default or (value is False and default is None):
            return []
        for name, option in self.by_destination[dest].items():
            if "const" in option:
                if option["const"] == value:
                    return [name]
            elif isinstance(value, (list, tuple)):
                if option["nargs"] in ("*", "+"):
                    return [name, *map(str, value)]
            elif value is not None:
                return [name, str(value)]
        return None


_DIALECTS = {"0.16": Dialect("0.16", "pretrain_mamba.py", "--hybrid-override-pattern")}


def choose(megatron: str | None) -> tuple[Dialect, str]:
    """Return the dialect of a Megatron-LM, and its release.

    Args:
        megatron: a checkout, a release (``0.16.1``, ``core_v0.16.1``), or None for the installed
            Megatron-Core.

    Raises:
        UserError: neither folder nor release, or another series than the stack is written for.
    """
    if megatron is None:
        release = imported()
    elif Path(megatron).is_dir():
        release = _release_at(Path(megatron))
    else:
        release = megatron
    match = _RELEASE.fullmatch(release)
    if match is None:
        raise UserError(
            f"--megatron {release}: there is no such folder, and it is not a release such as "
            f"core_v0.16.1."
        )
    dialect = _DIALECTS.get(f"{match[1]}.{match[2]}")
    if dialect is None:
        raise UserError(f"Megatron-LM {release} is not {' or '.join(_DIALECTS)}. {_LATER}")
    return dialect, release


def _release_at(checkout: Path) -> str:
    try:
        text = (checkout / _PACKAGE_INFO).read_text(encoding="utf-8")
    except OSError:
        text = ""
    numbers = dict(re.findall(r"^(MAJOR|MINOR|PATCH) = (\d+)$", text, re.MULTILINE))
    if len(numbers) < 3:
        raise UserError(
            f"{checkout} is not a checkout of Megatron-LM: it has no readable {_PACKAGE_INFO}."
        )
    return "{MAJOR}.{MINOR}.{PATCH}".format(**numbers)
