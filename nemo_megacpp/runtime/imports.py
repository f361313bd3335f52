"""Import large libraries in less time."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Suspend the garbage collector while large libraries are imported.

    An import allocates millions of objects that stay, and the collector traverses all of them again
    and again: a quarter of the time of ``from nemo.collections import llm``. What exists at the end
    is exempt from later collections, too.
    """
    # A CUDA build of torch remarks on a machine with CUDA's compiler and without a GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
