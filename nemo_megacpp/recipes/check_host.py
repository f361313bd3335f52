"""What of a recipe this machine has no modules or kernels for, found before a rank is started."""

from __future__ import annotations

from nemo_megacpp.errors import UserError
from nemo_megacpp.pattern import Family
from nemo_megacpp.recipes.recipe import Recipe
from nemo_megacpp.runtime.host import current_host


def check_host_of(recipe: Recipe) -> None:
    """Refuse a recipe that cannot be computed here.

    Raises:
        UserError: settings that need Transformer Engine or a GPU where there is none, or that the
            modules would refuse in the first step.
    """
    from nemo_megacpp.config import HybridConfig
    from nemo_megacpp.mixers.core_attention import refuse_what_torch_attention_lacks
    from nemo_megacpp.mixers.norm import refuse_what_torch_lacks
    from nemo_megacpp.recipes.settings import model_settings
    from nemo_megacpp.specs.backend import TorchBackend, default_backend

    device = current_host().device
    config = HybridConfig(**model_settings(recipe, device))
    present = config.pattern.families
    if isinstance(default_backend(), TorchBackend):
        refuse_what_torch_lacks(config)
        if Family.ATTENTION in present:
            refuse_what_torch_attention_lacks(config)
    kernels = {"m2rnn_kernel": Family.RECURRENT in present}
    kernels["mamba3_kernel"] = Family.MAMBA in present and config.mode == "mamba3"
    for name, used in kernels.items():
        if used and getattr(config, name) == "triton" and device == "cpu":
            raise UserError(f"{name}='triton' needs a GPU, and there is none. Leave it at 'auto'.")
    layout = recipe.layout
    heads, rest = divmod(config.m2rnn_num_heads or 0, layout.tp)
    exchange = config.m2rnn_context_parallel
    if Family.RECURRENT in present and exchange == "all_to_all" and (rest or heads % layout.cp):
        raise UserError(
            f"m2rnn_context_parallel='all_to_all' needs the heads of a tensor-parallel rank to "
            f"divide by CP: m2rnn_num_heads={config.m2rnn_num_heads} / TP={layout.tp} = {heads}, "
            f"CP={layout.cp}. Choose 'serial' or 'auto'."
        )
    capacity = config.moe_expert_capacity_factor
    packed = recipe.training.packed_documents and layout.cp > 1
    if packed and capacity is not None and Family.EXPERT in present:
        raise UserError(
            f"packed_documents with CP={layout.cp} and moe_expert_capacity_factor={capacity}: "
            f"which of two equally probable tokens is dropped would depend on the layout. Leave "
            f"the capacity factor out, or use CP=1."
        )
