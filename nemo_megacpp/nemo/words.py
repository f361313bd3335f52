"""The words of NeMo's command line, which keeps the last of two settings and says nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable

from nemo_megacpp.layout.parallel import FIELD_OF, validate_given_once
from nemo_megacpp.recipes.names import validate_not_empty

_FACTORY = re.compile(r"(?:--factory=)?[\w.]+\((.*)\)", re.DOTALL)
_SETTING = re.compile(r"[\w.\[\]]+=")  # not +=, which NeMo-Run may meet again


def validate_not_repeated(words: Iterable[str]) -> None:
    """Refuse a factory's parameter, or an override in dots, that is given twice or empty.

    Args:
        words: ``--factory``, ``"nam56r(max_steps=20, data=…)"``, ``trainer.max_steps=2``, ….

    Raises:
        UserError: with both spellings.
    """
    overrides: dict[str, str] = {}
    for word in words:
        if factory := _FACTORY.fullmatch(word.strip()):
            _validate_parameters(factory[1])
        elif _SETTING.match(word):
            key, _, value = word.partition("=")
            validate_not_empty(key, key, value)
            validate_given_once(key, word, overrides)


def _validate_parameters(text: str) -> None:
    parameters: dict[str, str] = {}
    for entry in text.split(","):  # as NeMo-Run cuts it
        key, separator, value = (part.strip() for part in entry.partition("="))
        if separator:
            name = FIELD_OF.get(key, key)
            validate_not_empty(name, key, value)
            validate_given_once(name, f"{key}={value}", parameters)
