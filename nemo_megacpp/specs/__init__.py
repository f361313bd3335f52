"""Layer specs, and the named objects for Megatron's ``--spec nemo_megacpp.specs NAME``.

``hybrid_stack_spec``: the hybrid stack in mode ``nemo_native``.
``hybrid_mamba3_stack_spec``: the same in mode ``mamba3``.
Either may carry settings in brackets (:mod:`nemo_megacpp.specs.named`).

The objects are built when first named: which backend they hold depends on the installation, and
importing this package must cost nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec

    hybrid_stack_spec: ModuleSpec
    hybrid_mamba3_stack_spec: ModuleSpec

__all__ = ["hybrid_mamba3_stack_spec", "hybrid_stack_spec"]


def __getattr__(name: str) -> Any:
    if name not in __all__ and not name.endswith(")"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nemo_megacpp.specs.named import read_spec_name
    from nemo_megacpp.specs.stack_spec import build_hybrid_stack_spec

    # Megatron's import_module looks the name up in vars(module), so it must stay there.
    fields = read_spec_name(name)
    globals()[name] = build_hybrid_stack_spec(fields, pattern=fields.hybrid_pattern or None)
    return globals()[name]
