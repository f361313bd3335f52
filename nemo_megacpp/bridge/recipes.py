"""The catalogue's recipes as Bridge's recipe functions.

A recipe of Bridge is a function without required arguments that returns a ``ConfigContainer``,
which a program may change and then gives to ``pretrain``::

    from megatron.bridge.training.pretrain import pretrain
    from nemo_megacpp.bridge.forward_step import hybrid_forward_step
    from nemo_megacpp.bridge.recipes import nam56r_pretrain_config

    config = nam56r_pretrain_config(tensor_model_parallel_size=4, data="prepared")
    config.train.train_iters = 1000
    pretrain(config, hybrid_forward_step)

Without a GPU, ``ensure_host(bridge=True)`` of :mod:`nemo_megacpp.runtime.host` has to be called
before Bridge is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.bridge.training.config import ConfigContainer

from nemo_megacpp.bridge.config import to_config
from nemo_megacpp.bridge.settings import validate_carried
from nemo_megacpp.preflight.model_checks import validate_recipe_layout
from nemo_megacpp.recipes.recipe import from_mapping


def _pretrain_config(name: str, settings: dict[str, Any]) -> ConfigContainer:
    recipe = from_mapping({"recipe": name, **settings})
    validate_carried(recipe)
    validate_recipe_layout(recipe)
    return to_config(recipe, Path(recipe.run_dir or "nemo_experiments/default"))


def _recipe(name: str) -> Callable[..., ConfigContainer]:
    def pretrain_config(**settings: Any) -> ConfigContainer:
        return _pretrain_config(name, settings)

    pretrain_config.__name__ = pretrain_config.__qualname__ = f"{name}_pretrain_config"
    pretrain_config.__doc__ = f"""Return Bridge's configuration of the recipe ``{name}``.

    Args:
        settings: of the recipe, by Megatron's names or short ones (``nemo-megacpp recipes``).

    Raises:
        UserError: everything that is wrong with the settings.
    """
    return pretrain_config


nam56r_pretrain_config = _recipe("nam56r")
nam56r_tiny_pretrain_config = _recipe("nam56r_tiny")
nam52_pretrain_config = _recipe("nam52")
nam56r_mamba3_pretrain_config = _recipe("nam56r_mamba3")
nam52_mamba3_pretrain_config = _recipe("nam52_mamba3")
nam56r_tiny_mamba3_pretrain_config = _recipe("nam56r_tiny_mamba3")
