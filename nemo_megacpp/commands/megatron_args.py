"""``nemo-megacpp megatron-args``."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

from nemo_megacpp.commands.arguments import add_recipe, print_json, read_recipe

_DESCRIPTION = """\
Print the arguments with which Megatron-LM's own script trains a recipe, as one line of shell words:
pretrain_mamba.py of 0.16, pretrain_hybrid.py of 0.19. Remarks are printed on standard error."""
_EPILOG = """\
nemo-megacpp megatron-args nam56r data=DIR | xargs torchrun --nproc-per-node 2 pretrain_mamba.py
With tensor or context parallelism Megatron-LM needs CUDA_DEVICE_MAX_CONNECTIONS=1.
Without a GPU: … | xargs torchrun --nproc-per-node 2 -m nemo_megacpp.runtime pretrain_mamba.py"""


def add_parser(commands: Any) -> None:
    """Add the command to the parser of ``nemo-megacpp``."""
    parser = commands.add_parser(
        "megatron-args",
        help="print a recipe as arguments of Megatron-LM's own script",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_recipe(parser)
    parser.add_argument(
        "--megatron",
        metavar="PATH|RELEASE",
        help="the Megatron-LM that will read them: a checkout, or a release such as core_v0.19.0; "
        "default: that of the installed Megatron-Core",
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), help="of the run (default: what this machine has)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from nemo_megacpp.core.releases import imported
    from nemo_megacpp.megatron_args.dialect import choose

    dialect, release = choose(args.megatron)  # before anything imports Megatron

    from nemo_megacpp.megatron_args.argument_list import megatron_arguments
    from nemo_megacpp.preflight.outputs import new_run_dir
    from nemo_megacpp.runtime.host import current_host

    recipe = read_recipe(args)
    run_dir = recipe.run_dir or new_run_dir(recipe.name, started_by_parent=False)
    device = args.device or current_host().device
    words, remarks = megatron_arguments(recipe, dialect, run_dir, device)
    if dialect is not choose(None)[0]:
        remarks.append(f"the recipe was validated with the installed Megatron-Core {imported()}")
    if args.device is None and device == "cpu":
        remarks.append("this machine has no GPU: these are arguments for a CPU (--device cuda)")
    for remark in remarks:
        print(f"{recipe.name}: {remark}", file=sys.stderr)
    if args.json:
        document = {
            "script": dialect.script,
            "megatron": release,
            "ranks": recipe.layout.world,
            "arguments": words,
        }
        print_json(document)
    else:
        print(shlex.join(words))
    return 0
