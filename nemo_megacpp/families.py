"""Block families: one declaration holds everything about a family.

A family is a letter, a layer spec, the rules of legal layouts, and what a layer communicates, saves
and computes. The built-in families are declared in :mod:`nemo_megacpp.specs`, one file each. A
user's module adds one by calling :func:`register`; a recipe (or ``HybridConfig``) names the module
in ``family_modules``, and every rank imports it before it parses the pattern.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nemo_megacpp.errors import UserError
from nemo_megacpp.pattern import BUILT_IN, Family, add_family

if TYPE_CHECKING:
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.transformer.spec_utils import ModuleSpec

    from nemo_megacpp.hybrid_fields import HybridFields

BUILT_IN_MODULES = tuple(
    f"nemo_megacpp.specs.{name}"
    for name in ("attention", "mamba", "expert", "recurrent", "feed_forward")
)
"""They load no torch before a layer spec or a formula is called."""


@dataclass(frozen=True)
class BlockFamily:
    """A family of blocks.

    Attributes:
        letter: its letter in a pattern, ``A`` to ``Z``.
        layer_spec: takes the backend and the model's hybrid fields, and returns the spec of one
            layer: a ``MambaLayer`` around a mixer, or a ``TransformerLayer``. The mixer's settings
            are its ``params``.
        name: for people.
        rules: what a layout must divide (:mod:`nemo_megacpp.layout.rules`); validated for models
            that have the family. Without a rule, every layout is legal.
        required: sizes of :class:`nemo_megacpp.layout.ModelShape` that the family needs.
        collectives: takes :class:`nemo_megacpp.formulas.sizes.Sizes` and returns what a layer sends
            in one microbatch, forward and backward (:mod:`nemo_megacpp.formulas.collectives`);
            messages within a group of one rank are ignored. None: ``plan`` and ``layouts`` refuse
            the family.
        saved_activations: likewise, what a layer saves of one microbatch
            (:mod:`nemo_megacpp.formulas.saved`). None: as for ``collectives``.
        mixing: likewise, the operations between tokens and on states: for one token, forward, in
            the whole model. Those of the weights are counted from the parameters. None: no others.
        sequential_steps: likewise, the tokens of a microbatch that must follow one another in a
            pass, whichever ranks compute them. None: the mixing is parallel.
        inference_state: likewise, what a layer keeps of one sequence while it generates
            (:mod:`nemo_megacpp.formulas.inference`); an empty list for a layer whose tokens do not
            meet. None: the family has no inference.

    The owner of a parameter is not declared: it is read from the tags of the built modules, by
    which Megatron trains.
    """

    letter: str
    layer_spec: Callable[[BackendSpecProvider, HybridFields], ModuleSpec]
    name: str = ""
    rules: tuple[Callable[[Any], Any], ...] = ()
    required: tuple[str, ...] = ()
    collectives: Callable[[Any], list[Any]] | None = None
    saved_activations: Callable[[Any], list[Any]] | None = None
    mixing: Callable[[Any], int] | None = None
    sequential_steps: Callable[[Any], int] | None = None
    inference_state: Callable[[Any], list[Any]] | None = None

    @property
    def family(self) -> Family:
        """The family as patterns hold it."""
        return Family(self.letter)

    @property
    def is_priced(self) -> bool:
        """Whether a plan knows what the family sends and saves."""
        return self.collectives is not None and self.saved_activations is not None


_registered: dict[str, BlockFamily] = {}


def register(block: BlockFamily) -> BlockFamily:
    """Make ``block`` known to patterns, layouts, stacks and plans of this process.

    Raises:
        UserError: its letter is not one of A to Z, or belongs to another family.
    """
    if block.layer_spec.__module__ not in BUILT_IN_MODULES:
        add_family(block.letter)
    if block.letter in _registered and _registered[block.letter] != block:
        raise UserError(f"Two block families are registered under the letter {block.letter!r}.")
    _registered.setdefault(block.letter, block)
    return block


def registered() -> tuple[BlockFamily, ...]:
    """Return all families: the built-in ones, then the others in the order of registration."""
    for module in BUILT_IN_MODULES:
        import_module(module)
    first = [_registered[family.value] for family in BUILT_IN]
    return (*first, *(block for block in _registered.values() if block not in first))


def added() -> tuple[BlockFamily, ...]:
    """Return the families that users added."""
    return registered()[len(BUILT_IN) :]


def block_of(family: Family) -> BlockFamily:
    """Return the declaration of a family."""
    if family.value not in _registered:
        registered()
    return _registered[family.value]


def load_families(
    modules: Sequence[str] | None, say: Callable[[str], object] | None = None
) -> None:
    """Import the modules that register families, each once per process.

    Args:
        modules: importable names (``mypackage.family``) or paths of Python files.
        say: is called before a module is imported, which runs its code; a door through which names
            of modules come into the process gives it.

    Raises:
        UserError: a module does not exist, cannot be imported, or registers no family.
    """
    for name in modules or ():
        is_file = name.endswith(".py")
        if say is not None and (_file_name(Path(name)) if is_file else name) not in sys.modules:
            shown = name if name.isprintable() else ascii(name)
            say(f"family module {shown}: its code runs in this process")
        try:
            module = _from_file(Path(name)) if is_file else import_module(name)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"family_modules: {name} cannot be imported: {type(error).__name__}: {error}"
            ) from error
        if all(block.layer_spec.__module__ != module.__name__ for block in added()):
            raise UserError(
                f"family_modules: {name} registers no family; it has to call "
                f"nemo_megacpp.families.register(BlockFamily(...))."
            )


def _file_name(path: Path) -> str:
    """Return the name under which a file is imported."""
    return "nemo_megacpp_family_" + "_".join(path.resolve().with_suffix("").parts[1:])


def _from_file(path: Path) -> ModuleType:
    """Import a file once, under a name made from its path."""
    path = path.resolve()
    if not path.is_file():
        raise UserError(f"family_modules: file not found: {path}.")
    name = _file_name(path)
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
