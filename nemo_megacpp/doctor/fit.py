"""A recipe against this machine: layout, data, kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

from nemo_megacpp.data.builtin import MAX_VOCAB_SIZE
from nemo_megacpp.doctor.machine import Finding, nvlink_domain
from nemo_megacpp.errors import UserError
from nemo_megacpp.pattern import Family
from nemo_megacpp.preflight.model_checks import validate_model, validate_recipe_layout
from nemo_megacpp.preflight.recipe_data import open_data
from nemo_megacpp.recipes.recipe import Recipe


def recipe_findings(recipe: Recipe, gpus: int) -> Iterator[Finding]:
    """Yield whether ``recipe`` can be trained here, on ``gpus`` GPUs per node."""
    yield _validated("layout", recipe.layout.describe(), lambda: validate_recipe_layout(recipe))
    yield _validated("model", _families(recipe), lambda: validate_model(recipe))
    yield _data(recipe)
    if gpus == 0:
        return
    yield _validated(
        "TP in the NVLink domain",
        f"TP={recipe.layout.tp}",
        lambda: validate_recipe_layout(recipe, nvlink_domain()),
    )
    nodes, rest = divmod(recipe.layout.world, gpus)
    if nodes > 1 or (nodes == 1 and rest):
        yield Finding(
            "ranks",
            f"{recipe.layout.world} on {gpus} GPUs",
            "limited",
            f"needs {nodes + bool(rest)} such nodes: start it with torchrun or Slurm",
        )
    yield from _kernels(recipe)


def _families(recipe: Recipe) -> str:
    counts = ", ".join(
        f"{count} {family.value}" for family, count in recipe.pattern.counts().items() if count
    )
    return f"{len(recipe.pattern)} layers: {counts}"


def _validated(part: str, found: str, check: Callable[[], object]) -> Finding:
    try:
        check()
    except UserError as error:
        return Finding(part, found, "broken", str(error))
    except ImportError as error:
        return Finding(part, found, "limited", f"not checked: {error}")
    return Finding(part, found)


def _data(recipe: Recipe) -> Finding:
    folders = ", ".join(recipe.data) if isinstance(recipe.data, dict) else recipe.data or "built-in"
    try:
        recipe, sources = open_data(recipe)
    except UserError as error:
        return Finding("data", folders, "broken", str(error))
    if sources:
        named = [data.root if recipe.data else "built-in" for data in sources]
        counts = [f"{data.tokens:,} tokens" for data in sources]
        found = ", ".join(f"{name}: {count}" for name, count in zip(named, counts, strict=True))
        return Finding("data", found)
    vocab_size = recipe.model["vocab_size"]
    if vocab_size > MAX_VOCAB_SIZE:
        return Finding(
            "data",
            "none given",
            "broken",
            f"the built-in corpus has a vocabulary of at most {MAX_VOCAB_SIZE}, not {vocab_size}: "
            f"run nemo-megacpp data prepare, then set data=FOLDER",
        )
    return Finding("data", "built-in, prepared on first use")


def _kernels(recipe: Recipe) -> Iterator[Finding]:
    import torch

    from nemo_megacpp.mixer_settings import Mamba3Settings
    from nemo_megacpp.mixers.kernels.mamba3_gpu import mamba3_gpu_reason

    if Family.MAMBA not in recipe.pattern.families:
        return
    if recipe.model.get("mode") != "mamba3":
        needed = ("mamba_ssm", "causal_conv1d")
        absent = [name for name in needed if importlib.util.find_spec(name) is None]
        if absent:
            why = "Megatron's MambaMixer does not run on a GPU without them"
            yield Finding("M blocks", f"without {' and '.join(absent)}", "broken", why)
        else:
            yield Finding("M blocks", "mamba-ssm's kernels")
    else:
        config = validate_model(recipe)
        reason = mamba3_gpu_reason(
            Mamba3Settings.of(config).dimensions(config),
            dtype=torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32,
        )
        if reason is None:
            yield Finding("Mamba-3 kernel", "Triton")
        else:
            effect = f"much slower; the Triton kernel {reason}"
            yield Finding("Mamba-3 kernel", "plain torch", "limited", effect)
