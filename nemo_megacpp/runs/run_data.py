"""The data that a checkpoint's run was given."""

from __future__ import annotations

from pathlib import Path

import yaml

from nemo_megacpp.errors import UserError
from nemo_megacpp.json_files import read_limited
from nemo_megacpp.recipes.sources import read_sources
from nemo_megacpp.runs.run_folder import RECIPE_FILE
from nemo_megacpp.yaml_files import LIMIT, parse_yaml


def data_of_run(checkpoint: Path) -> list[Path]:
    """Return the folders of prepared data in the recipe of the run that saved a checkpoint.

    The recipe is read as data: nothing that it names is imported. It says where to look and no
    more, so none that can be read, or none at all, is no error.

    Args:
        checkpoint: in the run's folder, or in ``checkpoints`` there.

    Returns:
        The folders as the recipe names them; none for the built-in corpus.
    """
    for folder in list(checkpoint.absolute().parents)[:2]:
        try:
            held, _ = parse_yaml(read_limited(folder / RECIPE_FILE, LIMIT).decode())
            sources = read_sources(held["data"])
        except (UserError, yaml.YAMLError, ValueError, KeyError, TypeError):
            continue
        if sources is not None:
            return [Path(each) for each in ([sources] if isinstance(sources, str) else sources)]
    return []
