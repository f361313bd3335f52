"""The maths of the mixers, in plain torch and Triton: no process groups and no Megatron import.

For each op there is a tiny reference (a loop over time, ``*_naive``) and the form that trains; for
M²RNN a Triton form too, and for Mamba-3 an adapter to mamba_ssm's.
Shapes use the field's letters: ``b`` batch, ``l`` sequence, ``h`` heads, ``p`` head dim, ``g``
groups, ``n`` state, ``r`` rank.
"""
