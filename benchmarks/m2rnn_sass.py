"""Compile the Triton M²RNN for a GPU that need not be there, and count what the compiler made.

    python -m benchmarks.m2rnn_sass                  # sm_90, every tile the kernels accept
    python -m benchmarks.m2rnn_sass --arch 80 --value-dims 16,64

Registers a thread, bytes of stack that registers are spilled to, and for each loop over tokens the
instructions of a warp, those on tensor cores, and barriers. Needs the ptxas and cuobjdump that come
with Triton. A program of the kernels is ``block_v / 16`` warps.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nemo_megacpp.mixers.kernels import m2rnn_triton_kernels
from nemo_megacpp.mixers.kernels.m2rnn_triton import tile_options
from nemo_megacpp.render import Table, make_console, print_table

_TYPES = dict.fromkeys(("length", "heads", "q_heads", "k_heads"), "i32") | {
    "bound": "fp32",
    "keep": "*i8",
}
_ACTIVATIONS = ("q", "k", "v", "forget", "weight", "grad_y")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass
class Figures:
    """Of one kernel; the last three are of a warp and a token, by loop (see ``LOOPS``)."""

    kernel: str
    value_dim: int
    warps: int
    registers: int
    spilled: int
    shared: int
    instructions: list[int]
    tensor_core: list[int]
    barriers: list[int]


LOOPS = {"m2rnn_forward": "each token", "m2rnn_backward": "recompute, then walk back"}


def compile_kernel(
    name: str, value_dim: int, arch: int = 90, dtype: str = "bf16", **constants: Any
) -> Any:
    """Compile a kernel as training launches it, with packs and the clip unless told otherwise."""
    function = getattr(m2rnn_triton_kernels, name)
    options = tile_options(64, value_dim, 64)
    warps = options.pop("num_warps")
    options |= {"HAS_RESETS": True, "CLIP": 1, "q_heads": 1, "k_heads": 1} | constants
    values = {k: v for k, v in options.items() if k in function.arg_names}
    types = {
        argument: "constexpr"
        if argument in values
        else _TYPES.get(argument) or ("*" + (dtype if argument in _ACTIVATIONS else "fp32"))
        for argument in function.arg_names
    }
    target = GPUTarget("cuda", arch, 32)
    return triton.compile(
        ASTSource(function, types, values), target=target, options={"num_warps": warps}
    )


def figures(name: str, value_dim: int, arch: int = 90, **constants: Any) -> Figures:
    """Compile a kernel and return what its machine code holds."""
    compiled = compile_kernel(name, value_dim, arch, **constants)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run(
                [_CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    loops = list(_innermost_loops(code))
    return Figures(
        name,
        value_dim,
        compiled.metadata.num_warps,
        int(found[1]),
        int(found[2]),
        compiled.metadata.shared,
        [len(loop) for loop in loops],
        [sum("MMA" in opcode for opcode in loop) for loop in loops],
        [sum(opcode.startswith("BAR") for opcode in loop) for loop in loops],
    )


def _innermost_loops(code: str) -> Iterator[list[str]]:
    """Return the opcodes of every loop that holds no other, in order: from the target of a branch
    back to the branch. The compiler ends a program with a branch to itself, which is none."""
    instructions = [(int(at, 16), opcode, rest) for at, opcode, rest in _INSTRUCTION.findall(code)]
    spans = []
    for at, opcode, rest in instructions:
        target = re.search(r"0x([0-9a-f]+)", rest) if opcode.startswith("BRA") else None
        if target and int(target[1], 16) < at:
            spans.append((int(target[1], 16), at))
    for first, last in spans:
        if not any(s != (first, last) and first <= s[0] and s[1] <= last for s in spans):
            yield [opcode for at, opcode, _ in instructions if first <= at <= last]


def main() -> int:
    """Compile, print the table; exit status 1 if a kernel spills."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90, help="compute capability, 90 is an H100's")
    parser.add_argument("--value-dims", default="16,32,64", help="one for each width of a tile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # else a run finds what an older Triton made
        rows = [
            figures(name, int(value_dim), arguments.arch)
            for value_dim in arguments.value_dims.split(",")
            for name in LOOPS
        ]
    columns = ["<kernel", "V", "warps", "registers", "spilled", "shared", "<loops over tokens"]
    table = Table([*columns, "<instructions", "<tensor core", "<barriers"])
    for row in rows:
        counts = (row.instructions, row.tensor_core, row.barriers)
        table.add(
            row.kernel,
            str(row.value_dim),
            str(row.warps),
            str(row.registers),
            f"{row.spilled} B",
            f"{row.shared} B",
            LOOPS[row.kernel],
            *(", ".join(map(str, numbers)) for numbers in counts),
        )
    print(f"Triton {triton.__version__}, sm_{arguments.arch}, bfloat16, packs, clip before output")
    print_table(make_console(160), table)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return int(any(row.spilled for row in rows))


if __name__ == "__main__":
    sys.exit(main())
