"""Objects that NeMo writes down in a checkpoint's ``context/`` and constructs again from it."""

import inspect
from collections.abc import Callable
from typing import Any

from nemo.lightning.io import IOMixin


class Recorded(IOMixin):
    """NeMo's ``IOMixin`` for objects that ``nemo.lightning.io.load_context`` can read back.

    NeMo 2.7.3 records ``**kwargs`` as one argument of the name ``kwargs``, and takes an object with
    a single argument for the name of a pickle. Here each keyword argument is recorded by its own
    name, and arguments that are not given with their defaults; a class has none or several.
    """

    def io_transform_args(
        self, init_fn: Callable[..., None], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Return what is recorded of a call of ``init_fn``, by the names of arguments."""
        signature = inspect.signature(init_fn)
        bound = signature.bind_partial(self, *args, **kwargs)
        bound.apply_defaults()
        _, *given = bound.arguments.items()
        flat: dict[str, Any] = {}
        for name, value in given:
            keywords = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            flat.update(value if keywords else {name: value})
        recorded: dict[str, Any] = {}
        for name, value in flat.items():
            for written in super().io_transform_args(_one, value).values():
                recorded[name] = written
        return recorded


def _one(self: Any, value: Any) -> None:
    """Has the signature of a constructor of one argument."""
