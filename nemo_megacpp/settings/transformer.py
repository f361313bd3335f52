"""The verdicts on all fields of ``TransformerConfig``. Loads no torch."""

from __future__ import annotations

from nemo_megacpp.settings.architecture import ARCHITECTURE
from nemo_megacpp.settings.experts import EXPERTS
from nemo_megacpp.settings.kernels import KERNELS
from nemo_megacpp.settings.parallelism import PARALLELISM
from nemo_megacpp.settings.verdict import Table

TRANSFORMER: Table = {**PARALLELISM, **ARCHITECTURE, **EXPERTS, **KERNELS}
"""Field -> verdict."""
