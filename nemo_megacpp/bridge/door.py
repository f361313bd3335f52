"""The door to Bridge, for :func:`nemo_megacpp.start.train_recipe`."""

from __future__ import annotations

from nemo_megacpp.bridge.settings import validate_carried
from nemo_megacpp.start import Door

BRIDGE = Door(
    worker="nemo_megacpp.bridge.worker",
    validate=validate_carried,
)
