"""The mathematics of the mixers, in plain torch and Triton, without process groups or Megatron.

M²RNN has a Triton kernel too, and Mamba-3 an adapter to mamba_ssm's. The reference loops that tests
compare them with are in ``tests/mixers/kernels/naive.py`` and ``benchmarks/m2rnn.py``.
Shapes use the field's letters: ``b`` batch, ``l`` sequence, ``h`` heads, ``p`` head dim, ``g``
groups, ``n`` state, ``r`` rank.
"""
