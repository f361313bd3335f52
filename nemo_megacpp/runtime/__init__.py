"""Process start: the no-GPU host, distributed initialisation, launching ranks.

This is the only room that replaces attributes of installed packages, and it does so only on a
machine without a GPU (:mod:`nemo_megacpp.runtime.host`) and in the processes of a proof
(:mod:`nemo_megacpp.runtime.torch_forms`).
"""
