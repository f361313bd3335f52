"""The door to Bridge, for :func:`nemo_megacpp.start.train_recipe`."""

from __future__ import annotations

from nemo_megacpp.bridge.settings import validate_carried
from nemo_megacpp.start import Door

BRIDGE = Door(
    worker="nemo_megacpp.bridge.worker",
    prefixes=("", "module."),
    validate=validate_carried,
)
"""Its own checkpoints name the model's tensors without a prefix; those of NeMo's runs have one."""
