"""Everything that is validated before a rank is started or a file written.

Every door calls :func:`preflight`; what trains afterwards is what it returns.
"""

from nemo_megacpp.preflight.settled import Settled, preflight

__all__ = ["Settled", "preflight"]
