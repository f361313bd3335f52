"""The spec of a hybrid stack, for Megatron's model and for ``--spec``."""

from __future__ import annotations

from functools import partial

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.spec_utils import ModuleSpec

from nemo_megacpp.core.multi_token import prediction_spec
from nemo_megacpp.core.releases import require_supported
from nemo_megacpp.families import registered
from nemo_megacpp.hybrid_fields import HybridFields
from nemo_megacpp.specs.backend import default_backend
from nemo_megacpp.specs.layer_stack import HybridStackSubmodules
from nemo_megacpp.specs.prediction import build_prediction_stack
from nemo_megacpp.specs.stack import HybridStack


def build_hybrid_stack_spec(
    fields: HybridFields,
    backend: BackendSpecProvider | None = None,
    vp_stage: int | None = None,
    pattern: str | None = None,
) -> ModuleSpec:
    """Return the spec of a stack.

    Args:
        fields: the model's hybrid fields (a :class:`HybridConfig` has them): the mode of M blocks
            and the settings of the mixers.
        backend: where the modules come from; this installation's default if not given.
        vp_stage: virtual pipeline stage of the chunk to be built.
        pattern: of the whole model; without one it is the model's, which from 0.18 on takes
            Megatron's own letters only.

    Raises:
        UserError: a mixer's setting is illegal, or the installed Megatron-Core is not supported.
    """
    require_supported()
    backend = backend or default_backend()
    norm = backend.layer_norm(rms_norm=True)
    return ModuleSpec(
        module=HybridStack,
        params={"vp_stage": vp_stage, "hybrid_fields": fields, "pattern": pattern},
        submodules=HybridStackSubmodules(
            layers={block.letter: block.layer_spec(backend, fields) for block in registered()},
            final_norm=norm,
            mtp_block_spec=prediction_spec(
                norm,
                backend.column_parallel_linear(),
                partial(build_prediction_stack, pattern=pattern),
            ),
        ),
    )
