"""Block families that a user adds to A, M, E and R.

A family is a letter, a layer spec and the rules of the layouts it can be split in. A module that
calls :func:`register` defines it; a recipe (or ``HybridConfig``) names the module in
``family_modules``, and every rank imports it before it reads the pattern.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from nemo_megacpp.errors import UserError
from nemo_megacpp.layout.rules import RULES, Broken, Case, Rule
from nemo_megacpp.pattern import Family, add_family

if TYPE_CHECKING:
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.transformer.spec_utils import ModuleSpec


@dataclass(frozen=True)
class BlockFamily:
    """A family of blocks beside the four.

    Attributes:
        letter: its letter in a pattern, ``A`` to ``Z`` but for A, M, E and R.
        layer_spec: from the backend to the spec of one layer: a ``MambaLayer`` around a mixer, or a
            ``TransformerLayer``.
        rules: what a layout must divide, beside the rules of the four families
            (:mod:`nemo_megacpp.layout.rules`), asked of models that have the family. Without a
            rule, every layout counts as legal.
    """

    letter: str
    layer_spec: Callable[[BackendSpecProvider], ModuleSpec]
    rules: tuple[Rule, ...] = ()

    @property
    def family(self) -> Family:
        """The family as patterns hold it."""
        return Family(self.letter)


_registered: dict[str, BlockFamily] = {}


def register(block: BlockFamily) -> BlockFamily:
    """Make ``block`` known to patterns, layouts and stacks of this process.

    Raises:
        UserError: its letter is no letter, or another family's.
    """
    add_family(block.letter)
    if block.letter in _registered and _registered[block.letter] != block:
        raise UserError(f"Two block families are registered under the letter {block.letter!r}.")
    if block.letter not in _registered:
        _registered[block.letter] = block
        RULES.extend(_where_there_is(block.family, rule) for rule in block.rules)
    return block


def _where_there_is(family: Family, rule: Rule) -> Rule:
    """Return ``rule`` for the models that have ``family``: others need not have its sizes."""

    def asked(case: Case) -> Iterator[Broken]:
        if case.has(family):
            yield from rule(case)

    return asked


def registered() -> tuple[BlockFamily, ...]:
    """Return the families that were added, in the order of their registration."""
    return tuple(_registered.values())


def load_families(modules: Sequence[str] | None) -> None:
    """Import the modules that define families; one that is imported already stays as it is.

    Args:
        modules: importable names (``mypackage.family``) or paths of Python files.

    Raises:
        UserError: a module that is not there, cannot be imported, or registers no family.
    """
    for name in modules or ():
        try:
            module = _from_file(Path(name)) if name.endswith(".py") else import_module(name)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"family_modules: {name} cannot be imported: {type(error).__name__}: {error}"
            ) from error
        if all(block.layer_spec.__module__ != module.__name__ for block in registered()):
            raise UserError(
                f"family_modules: {name} registers no family; it has to call "
                f"nemo_megacpp.families.register(BlockFamily(...))."
            )


def _from_file(path: Path) -> ModuleType:
    """Import a file under a name made of its path, once."""
    path = path.resolve()
    if not path.is_file():
        raise UserError(f"family_modules: there is no file {path}.")
    name = "nemo_megacpp_family_" + "_".join(path.with_suffix("").parts[1:])
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
