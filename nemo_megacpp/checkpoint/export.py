"""A checkpoint's weights as safetensors files, and back.

The files follow Hugging Face's convention: ``model-00001-of-00003.safetensors`` and so on, with
``model.safetensors.index.json`` to say which tensor is where. A tensor is whole, in its global
shape, under the name it has in the checkpoint without NeMo's ``module.`` in front:

=============================================  ====================================================
``embedding.word_embeddings.weight``           ``[vocabulary, hidden]``
``decoder.layers.N.self_attention.*``          A: ``linear_qkv`` (with ``layer_norm_weight``: the
                                               norm in front of it), ``linear_proj``
``decoder.layers.N.mlp.experts.experts.*``     E: ``linear_fc1.weight`` ``[experts, 2·ffn, hidden]``
                                               (gate over up), ``linear_fc2.weight``
``decoder.layers.N.mlp.router.*``              E: ``weight``, ``expert_bias``
``decoder.layers.N.mlp.linear_fc1.*``          F: ``weight`` ``[2·ffn, hidden]`` (gate over up),
                                               ``layer_norm_weight``; ``linear_fc2.weight``
``decoder.layers.N.mixer.*``                   M and R; the packed rows of Mamba-2 are separate
                                               tensors: ``in_proj.weight.z``, ``.x``, ``.B``, …
``decoder.final_norm.weight``, ``output_layer.weight``
=============================================  ====================================================

``N`` counts all layers from 0. ``config.json`` holds the checkpoint's identity. Optimizer states
are not exported.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import MinLen
from typing_extensions import TypedDict

from nemo_megacpp.checkpoint.content import CheckpointContent
from nemo_megacpp.checkpoint.folder import new_folder
from nemo_megacpp.checkpoint.identity import Identity
from nemo_megacpp.checkpoint.manifest import write_manifest
from nemo_megacpp.errors import UserError
from nemo_megacpp.json_files import Text, read_json
from nemo_megacpp.printable import shown

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

_LIMIT = 256 << 20
"""Most bytes of a JSON file."""
_FILE_BYTES = 4 << 30
"""Most bytes of a file, unless one tensor is larger; this much is in memory at a time."""


class _Config(TypedDict):
    model_type: Literal["nemo_megacpp"]
    prefix: Text
    identity: Identity | None


class _Index(TypedDict):
    weight_map: Annotated[dict[Text, Text], MinLen(1)]


def export(source: Path, out: Path) -> dict[str, Any]:
    """Write the model's tensors of a checkpoint into the new folder ``out``.

    Returns:
        The index that was written.

    Raises:
        UserError: no checkpoint, a damaged one, or ``out`` exists.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    content = CheckpointContent(source)
    groups = _group(content)
    index: dict[str, Any] = {"metadata": {"total_size": 0}, "weight_map": {}}
    with new_folder(out) as folder:
        for number, names in enumerate(groups, start=1):
            file = f"model-{number:05}-of-{len(groups):05}.safetensors"
            tensors = {name: content.read_tensor(content.prefix + name) for name in names}
            try:
                save_file(tensors, folder / file, metadata={"format": "pt"})
            except SafetensorError as error:
                raise UserError(f"{out} was not written: {error}.") from None
            index["weight_map"].update(dict.fromkeys(names, file))
            index["metadata"]["total_size"] += sum(t.nbytes for t in tensors.values())
        config = {
            "model_type": "nemo_megacpp",
            "prefix": content.prefix,
            "step": content.step,
            "identity": content.identity,
        }
        for name, held in ((INDEX, index), (CONFIG, config)):
            (folder / name).write_text(json.dumps(held, indent=1), encoding="utf-8")
        for path in folder.glob("*.safetensors"):
            shutil.copymode(folder / CONFIG, path)  # the library makes them private
        write_manifest(folder)
    return index


def _group(content: CheckpointContent) -> list[list[str]]:
    groups: list[list[str]] = []
    taken = _FILE_BYTES
    for name, info in content.model_tensors.items():
        if taken + info.bytes > _FILE_BYTES:
            groups.append([])
            taken = 0
        groups[-1].append(name)
        taken += info.bytes
    if not groups:
        raise UserError(f"{content.directory} holds no tensors of a model.")
    return groups


def read_config(source: Path) -> _Config:
    """Return ``config.json`` of an exported folder.

    Raises:
        UserError: it is missing, damaged, or describes another kind of model.
    """
    from pydantic import TypeAdapter

    return read_json(source / CONFIG, TypeAdapter(_Config), _LIMIT)


def read_export(source: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of an exported folder, by their names there.

    Raises:
        UserError: a file is missing or damaged, or does not hold what the index says.
    """
    from pydantic import TypeAdapter
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = source / INDEX
    places = read_json(path, TypeAdapter(_Index), _LIMIT)["weight_map"]
    tensors: dict[str, torch.Tensor] = {}
    for file in dict.fromkeys(places.values()):
        if Path(file).name != file:
            raise UserError(f"{path} is damaged: it names a file {shown(file)}.")
        try:
            tensors |= load_file(source / file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{source / file} cannot be read: {error}.") from None
    if tensors.keys() != places.keys():
        different = sorted(tensors.keys() ^ places.keys())
        raise UserError(
            f"{source}: {INDEX} and the files differ in {', '.join(different[:3])}"
            f"{' and more' if len(different) > 3 else ''}."
        )
    return tensors
