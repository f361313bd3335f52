"""A process in which Triton kernels run on the CPU, in the interpreter that Triton brings.

Triton asks when a kernel is defined whether to interpret it, so this cannot be the test process.
What the interpreter of Triton 3.6 cannot do is added to it there, and nowhere else.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.jit import KernelInterface


@contextmanager
def interpreter_process() -> Iterator[ProcessPoolExecutor]:
    """Start the process; functions submitted to it find Triton interpreting."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            # mamba_ssm asserts that tensors are on a CUDA device.
            patch.setenv("PYTHONOPTIMIZE", "1")
            pool.submit(_complete_the_interpreter).result()
        yield pool


def _complete_the_interpreter() -> None:
    from triton.runtime import interpreter

    # numpy 2.4 no longer turns an array of one number, such as a loop's bound, into an integer.
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_and_index

    # numpy has no bfloat16: the interpreter holds its bits in integers, and computes with those.
    builder: Any = interpreter.InterpreterBuilder
    handle, dot, binary = interpreter.TensorHandle, builder.create_dot, builder.binary_op

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot_of_numbers(self: Any, a: Any, b: Any, d: Any, precision: Any, *rest: Any) -> Any:
        a, b = widened(a), widened(b)
        if precision.name == "TF32x3":
            (a, a_rest), (b, b_rest) = in_tf32(a), in_tf32(b)
            for left, right in ((a, b_rest), (a_rest, b)):
                d = dot(self, left, right, d, precision, *rest)
        return dot(self, a, b, d, precision, *rest)

    def in_tf32(x: Any) -> Any:
        """Return ``x`` in the 11 bits of TF32, and the rest, in TF32 too."""

        def rounded(data: Any) -> Any:
            bits = data.view(np.uint32).astype(np.uint64) + 0x1000 & 0xFFFFE000
            return bits.astype(np.uint32).view(np.float32)

        near = rounded(x.data)
        return handle(near, tl.float32), handle(rounded(x.data - near), tl.float32)

    def binary_of_numbers(self: Any, a: Any, b: Any, op: Any) -> Any:
        result = binary(self, widened(a), widened(b), op)
        narrow = a.dtype.scalar == tl.bfloat16
        return self.create_fp_to_fp(result, tl.bfloat16, None) if narrow else result

    def constant(self: Any, value: float) -> Any:
        bits = np.array([value], np.float32).view(np.uint32) >> 16
        return handle(bits.astype(np.uint16), tl.bfloat16)

    builder.create_dot, builder.binary_op = dot_of_numbers, binary_of_numbers
    builder.get_bf16 = constant


# -- mamba_ssm's kernels: PTX for these functions, which the interpreter cannot read ---------------


@triton.jit
def cos_approx(x):
    return tl.cos(x)


@triton.jit
def sin_approx(x):
    return tl.sin(x)


@triton.jit
def tanh_approx(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def sech2_approx(x):
    tanh = 2.0 * tl.sigmoid(2.0 * x) - 1.0
    return 1.0 - tanh * tanh


def peer_kernels(name: str) -> ModuleType:
    """In the interpreter's process: import a module of mamba_ssm whose kernels then run there."""
    from triton.runtime.autotuner import Autotuner

    if "mamba_ssm" not in sys.modules:
        package = ModuleType("mamba_ssm")  # its own __init__ asks for CUDA extensions
        package.__path__ = [str(Path(sys.prefix) / "oracles" / "mamba_ssm")]
        sys.modules["mamba_ssm"] = package
        cuda: Any = torch.cuda
        cuda.device = lambda *_: nullcontext()
        cuda.get_device_properties = lambda *_: SimpleNamespace(multi_processor_count=1)
    wanted = importlib.import_module(name)
    here = {f.__name__: f for f in (cos_approx, sin_approx, tanh_approx, sech2_approx)}
    modules = [m for name, m in sys.modules.items() if name.startswith("mamba_ssm.ops.triton.")]
    for module in modules:
        for name, value in list(vars(module).items()):
            if name in here:
                setattr(module, name, here[name])
            while isinstance(value, KernelInterface) and not isinstance(value, Autotuner):
                value = getattr(value, "fn", None)
            if isinstance(value, Autotuner):
                # With one configuration there is nothing to measure.
                value.configs = value.configs[:1]
    return wanted
