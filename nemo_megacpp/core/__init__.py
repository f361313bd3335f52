"""The seam to Megatron-Core: everything that differs between its releases.

The rest of the package asks no version and imports from Megatron only what all supported releases
have alike (``tests/test_rooms.py``). What a release has is read from its signatures and fields
wherever they show it.

- :mod:`~nemo_megacpp.core.releases`: which releases are proved, tried and refused.
- :mod:`~nemo_megacpp.core.model`: the model class, and how it is given pattern, stack and stage.
- :mod:`~nemo_megacpp.core.layers`: keywords of layers, the Mamba mixer, the residual's dtype.
- :mod:`~nemo_megacpp.core.moe`: experts, router, shared expert, the tracker of auxiliary losses.
- :mod:`~nemo_megacpp.core.batches`: the deal of a batch over cp, packed rows.
"""
