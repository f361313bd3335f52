"""NeMo recipe factories: ``nemo llm pretrain --factory nam56r``.

The entry point group ``nemo_run.cli`` leads NeMo's command line here. A factory resolves a recipe
of the catalogue, checks it as ``nemo-megacpp train`` does, and returns its NeMo-Run configuration.
"""

# NeMo-Run reads a command-line value by its parameter's annotation at run time, and knows
# Optional[int], but neither "int | None" nor postponed annotations.
# ruff: noqa: UP007, UP045

import dataclasses
import inspect
import sys
from collections.abc import Callable
from typing import Any, NoReturn, Optional, Union

from nemo_megacpp.errors import UserError
from nemo_megacpp.nemo.versions import describe_mismatch, requirement
from nemo_megacpp.nemo.words import validate_not_repeated
from nemo_megacpp.preflight import preflight
from nemo_megacpp.preflight.model_checks import validate_recipe_layout
from nemo_megacpp.preflight.outputs import new_run_dir, validate_shared
from nemo_megacpp.recipes.catalog import CATALOG
from nemo_megacpp.recipes.recipe import Recipe, from_mapping
from nemo_megacpp.runtime.launch import launched


def _refuse_to_load(reason: str) -> NoReturn:
    """Say why there are no factories: NeMo-Run would go on to "No matching factory found"."""
    if _on_nemo_command_line() and any(name in word for word in sys.argv[1:] for name in CATALOG):
        print(f"nemo_megacpp: {reason}", file=sys.stderr)
        sys.exit(2)
    raise ImportError(reason)


def _on_nemo_command_line() -> bool:
    """Say whether this is the program ``nemo``, the only one that imports this module of NeMo-Run.

    It makes exit code 1 of any exception; a script that calls a factory wants the exception.
    """
    return "nemo_run.__main__" in sys.modules


if mismatch := describe_mismatch():
    _refuse_to_load(f"{requirement()}, but {mismatch}.")
try:
    import nemo_run as run
    from nemo.collections import llm
    from nemo.utils.get_rank import is_global_rank_zero

    from nemo_megacpp.nemo.pretrain_task import to_pretrain
except Exception as error:
    _refuse_to_load(f"{requirement()}. They are installed but do not load: {error}")


def factory_parameters(
    *,
    tensor_model_parallel_size: Optional[int] = None,
    sequence_parallel: Optional[bool] = None,
    context_parallel_size: Optional[int] = None,
    pipeline_model_parallel_size: Optional[int] = None,
    virtual_pipeline_model_parallel_size: Optional[int] = None,
    expert_model_parallel_size: Optional[int] = None,
    expert_tensor_parallel_size: Optional[int] = None,
    tensor_parallelism: Optional[int] = None,
    sequence_parallelism: Optional[bool] = None,
    context_parallelism: Optional[int] = None,
    pipeline_parallelism: Optional[int] = None,
    virtual_pipeline_parallelism: Optional[int] = None,
    expert_parallelism: Optional[int] = None,
    expert_tensor_parallelism: Optional[int] = None,
    num_nodes: Optional[int] = None,
    devices: Optional[int] = None,
    num_gpus_per_node: Optional[int] = None,
    max_steps: Optional[int] = None,
    stop_after: Optional[int] = None,
    micro_batch_size: Optional[int] = None,
    global_batch_size: Optional[int] = None,
    seq_length: Optional[int] = None,
    lr: Optional[float] = None,
    min_lr: Optional[float] = None,
    warmup_steps: Optional[int] = None,
    lr_warmup_init: Optional[float] = None,
    lr_decay_style: Optional[str] = None,
    lr_wsd_decay_steps: Optional[int] = None,
    lr_wsd_decay_style: Optional[str] = None,
    weight_decay: Optional[float] = None,
    adam_beta1: Optional[float] = None,
    adam_beta2: Optional[float] = None,
    adam_eps: Optional[float] = None,
    clip_grad: Optional[float] = None,
    use_distributed_optimizer: Optional[bool] = None,
    precision: Optional[str] = None,
    val_check_interval: Optional[int] = None,
    limit_val_batches: Optional[int] = None,
    save_interval: Optional[int] = None,
    keep_latest: Optional[int] = None,
    keep_every: Optional[int] = None,
    async_save: Optional[bool] = None,
    log_interval: Optional[int] = None,
    tensorboard: Optional[bool] = None,
    wandb_project: Optional[str] = None,
    wandb_name: Optional[str] = None,
    seed: Optional[int] = None,
    data: Optional[Union[dict[str, float], list[str], str]] = None,
    tokenizer: Optional[str] = None,
    packed_documents: Optional[bool] = None,
    run_dir: Optional[str] = None,
    resume: Optional[str] = None,
    init_from: Optional[str] = None,
    verify_checkpoint: Optional[bool] = None,
) -> dict[str, Any]:
    """Return the parameters that are given: one signature and one text for every factory.

    Args:
        tensor_model_parallel_size: TP. None, here and below: the recipe's own value.
        sequence_parallel: TP's activation layout. None: on where TP is given and above 1.
        context_parallel_size: CP.
        pipeline_model_parallel_size: PP.
        virtual_pipeline_model_parallel_size: chunks of the model per pipeline stage.
        expert_model_parallel_size: EP.
        expert_tensor_parallel_size: ETP, TP of each expert.
        tensor_parallelism: TP as NeMo's recipes name it; the next six likewise.
        sequence_parallelism: SP.
        context_parallelism: CP.
        pipeline_parallelism: PP.
        virtual_pipeline_parallelism: chunks per stage.
        expert_parallelism: EP.
        expert_tensor_parallelism: ETP.
        num_nodes: nodes. None: the launcher's; 1 without a launcher.
        devices: ranks per node. None: the launcher's; what the layout needs without one.
        num_gpus_per_node: ``devices`` as NeMo's recipes name it.
        max_steps: optimizer steps, and the length of the learning-rate schedule.
        stop_after: save and stop after this step, leaving the rest to a resume.
        micro_batch_size: rows of ``seq_length`` tokens per forward pass.
        global_batch_size: rows per optimizer step.
        seq_length: tokens per row.
        lr: peak learning rate.
        min_lr: final learning rate.
        warmup_steps: steps of linear warm-up.
        lr_warmup_init: learning rate of its first step. None: lr / (warmup_steps + 1).
        lr_decay_style: Megatron's schedule after it: constant, linear, cosine or WSD.
        lr_wsd_decay_steps: with WSD, the last steps, in which the learning rate decays.
        lr_wsd_decay_style: how it then decays: exponential, linear, cosine or minus_sqrt.
        weight_decay: AdamW weight decay.
        adam_beta1: AdamW beta1.
        adam_beta2: AdamW beta2.
        adam_eps: AdamW epsilon.
        clip_grad: bound on the gradient's norm.
        use_distributed_optimizer: shard optimizer state over data-parallel ranks.
        precision: ``fp32`` or ``bf16``.
        val_check_interval: steps between evaluations on held-out data.
        limit_val_batches: global batches per evaluation.
        save_interval: steps between checkpoints.
        keep_latest: newest checkpoints to keep. None: all.
        keep_every: steps whose multiples are kept beside them. None: none.
        async_save: write checkpoints in the background. None: no.
        log_interval: steps between progress lines.
        tensorboard: write TensorBoard files. None: yes.
        wandb_project: Weights & Biases project to log to. None: it is not used.
        wandb_name: name of the run in Weights & Biases. None: the run folder's.
        seed: seed of weights and data order.
        data: folder of ``nemo-megacpp data prepare``, or a blend: a list of folders, weights by
            folder, or Megatron's ``0.7 code 0.3 prose``. None: the built-in corpus.
        tokenizer: folder of the tokenizer that the data must have been made with. None: its own.
        packed_documents: start attention, M and R anew at each document of a row. None: no.
        run_dir: where the run writes. None: a new folder under ``runs/``.
        resume: checkpoint or run folder to resume, or ``auto`` for the newest in ``run_dir``.
        init_from: checkpoint or run folder whose weights a new run starts from, at step 0.
        verify_checkpoint: compare every byte of it with its manifest first. None: yes.

    Returns:
        Configuration of ``llm.pretrain``.

    Raises:
        UserError: for an illegal layout, data or checkpoint; on NeMo's command line, exit code 2.
    """
    return {name: value for name, value in locals().items() if value is not None}


def _factory(name: str) -> Callable[..., run.Partial]:
    """Return the factory of recipe ``name``, registered with NeMo-Run."""

    def factory(**settings: Any) -> run.Partial:
        return _pretrain(name, **factory_parameters(**settings))

    factory.__name__ = factory.__qualname__ = name
    factory.__annotations__ = {**factory_parameters.__annotations__, "return": run.Partial}
    # NeMo-Run reads names and types of parameters from the signature.
    factory.__signature__ = inspect.signature(factory_parameters).replace(  # type: ignore[attr-defined]
        return_annotation=run.Partial
    )
    _, rest = (factory_parameters.__doc__ or "").split("\n", 1)
    factory.__doc__ = f"Pre-train {CATALOG[name].summary}.\n{rest}"
    return run.cli.factory(factory, target=llm.pretrain, name=name)


nam56r = _factory("nam56r")
nam56r_mamba3 = _factory("nam56r_mamba3")
nam52 = _factory("nam52")
nam52_mamba3 = _factory("nam52_mamba3")
nam56r_tiny = _factory("nam56r_tiny")
nam56r_tiny_mamba3 = _factory("nam56r_tiny_mamba3")


def _pretrain(
    name: str,
    *,
    devices: Optional[int] = None,
    num_gpus_per_node: Optional[int] = None,
    num_nodes: Optional[int] = None,
    **settings: Any,
) -> run.Partial:
    """Return the configuration of recipe ``name`` with these settings."""
    try:
        if _on_nemo_command_line():
            validate_not_repeated(sys.argv[1:])
        if None not in (devices, num_gpus_per_node):
            raise UserError("devices and num_gpus_per_node are two names of one number; give one.")
        devices = num_gpus_per_node if devices is None else devices
        recipe = from_mapping({"recipe": name, **settings})
        recipe, devices, num_nodes = _place(recipe, devices, num_nodes)
        if recipe.run_dir is None and recipe.resume != "auto":
            by_parent = launched() is not None or not is_global_rank_zero()
            recipe = dataclasses.replace(recipe, run_dir=new_run_dir(name, by_parent))
        settled = preflight(recipe, announce=is_global_rank_zero())
    except UserError as error:
        if not _on_nemo_command_line():
            raise
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    return to_pretrain(settled.recipe, settled.run_dir, devices=devices, num_nodes=num_nodes)


def _place(
    recipe: Recipe, devices: Optional[int], num_nodes: Optional[int]
) -> tuple[Recipe, int, int]:
    """Lay the ranks out on nodes: the launcher's way if there is one, else as asked.

    Returns:
        The recipe with its world settled, ranks per node, nodes.
    """
    if (here := launched()) is not None:
        nodes = here.world_size // here.local_world_size
        _validate_launched("devices", devices, here.local_world_size)
        _validate_launched("num_nodes", num_nodes, nodes)
        validate_shared(recipe.run_dir, nodes)
        devices, num_nodes = here.local_world_size, nodes
    num_nodes = 1 if num_nodes is None else num_nodes
    ranks = recipe.layout.world
    if devices is None and num_nodes > 0 and ranks % num_nodes == 0:
        devices = ranks // num_nodes
    if devices is None or min(devices, num_nodes) < 1:
        raise UserError(
            f"num_nodes={num_nodes}, devices={devices}: the layout needs a multiple of {ranks} "
            f"ranks; give num_nodes and devices (ranks per node) whose product is one."
        )
    if devices * num_nodes != ranks:
        layout = dataclasses.replace(recipe.layout, world_size=devices * num_nodes)
        recipe = dataclasses.replace(recipe, layout=layout)
    if num_nodes > 1:
        validate_recipe_layout(recipe, gpus_per_node=devices)
    return recipe, devices, num_nodes


def _validate_launched(name: str, asked: Optional[int], found: int) -> None:
    if asked not in (None, found):
        raise UserError(
            f"{name}={asked} was asked for, and the launcher has started {found}. Leave {name} "
            f"out, or start the job otherwise."
        )
