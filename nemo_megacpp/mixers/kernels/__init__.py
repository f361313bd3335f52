"""The maths of the mixers, in plain torch: no process groups and no Megatron import.

For each op there is a tiny reference (a loop over time, ``*_naive``) and the form that trains.
Shapes use the field's letters: ``b`` batch, ``l`` sequence, ``h`` heads, ``p`` head dim, ``g``
groups, ``n`` state, ``r`` rank.
"""
