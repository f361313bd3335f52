"""The verdicts on all fields of ``TransformerConfig``. Loads no torch."""

from __future__ import annotations

from nemo_megacpp.settings.architecture_verdicts import ARCHITECTURE
from nemo_megacpp.settings.implementation_verdicts import KERNELS
from nemo_megacpp.settings.moe_verdicts import EXPERTS
from nemo_megacpp.settings.parallelism_verdicts import PARALLELISM
from nemo_megacpp.settings.verdict import Table

TRANSFORMER: Table = {**PARALLELISM, **ARCHITECTURE, **EXPERTS, **KERNELS}
"""Field -> verdict."""
