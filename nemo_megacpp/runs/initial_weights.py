"""The weights that a run starts from, where its recipe names a folder of Hugging Face's form.

Before the ranks start, the folder is imported as a checkpoint into a temporary folder, which every
check and every layout then reads like any other. A link in the run's folder says where it is; the
recipe that the run records names what the user has given.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from nemo_megacpp.checkpoint.folder import newest_checkpoint
from nemo_megacpp.errors import UserError
from nemo_megacpp.hf.folder import is_hf_folder
from nemo_megacpp.hf.importing import import_hf
from nemo_megacpp.printable import say
from nemo_megacpp.recipes.recipe import Recipe
from nemo_megacpp.runs.run_folder import INITIAL_WEIGHTS


@contextlib.contextmanager
def imported_weights(recipe: Recipe) -> Iterator[Path | None]:
    """Yield a checkpoint of the folder that ``init_from`` names, which is removed at the end.

    Yields None where it names something else, and where the run will resume its own checkpoint.

    Args:
        recipe: resolved.

    Raises:
        UserError: the folder cannot be imported, or what the block raises, about this folder.
    """
    from nemo_megacpp.runtime.scratch import scratch_folder

    source = Path(recipe.init_from or "")
    if recipe.init_from is None or not is_hf_folder(source) or _will_resume(recipe):
        yield None
        return
    with scratch_folder() as scratch:
        imported = scratch / "imported"
        count = import_hf(source, imported, verify=recipe.training.verify_checkpoint, say=say)
        say(f"{source}: imported {count} tensors")
        try:
            yield imported
        except UserError as error:
            raise UserError(str(error).replace(str(imported), str(source))) from None


def _will_resume(recipe: Recipe) -> bool:
    if recipe.resume is None or recipe.run_dir is None:
        return recipe.resume is not None
    folder = Path(recipe.run_dir) / "checkpoints"
    return recipe.resume != "auto" or newest_checkpoint(folder) is not None


@contextlib.contextmanager
def link_weights(imported: Path | None, run_dir: Path) -> Iterator[None]:
    """Let the ranks find the imported checkpoint, if there is one, for as long as they run.

    Raises:
        UserError: the link cannot be written.
    """
    link = run_dir / INITIAL_WEIGHTS
    try:
        link.unlink(missing_ok=True)  # of a run that was killed
        if imported is not None:
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(imported.absolute())
    except OSError as error:
        raise UserError(f"{link} cannot be written: {error.strerror}.") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            link.unlink(missing_ok=True)


def initial_weights(recipe: Recipe, run_dir: Path) -> Path | None:
    """Return the checkpoint whose weights the ranks load; None where they start from none."""
    if recipe.init_from is None:
        return None
    link = (run_dir / INITIAL_WEIGHTS).absolute()
    return link if link.exists() else Path(recipe.init_from)
