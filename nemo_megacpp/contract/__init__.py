"""What splits, what stays global, and what it costs: a layout's contract, before the run.

:func:`nemo_megacpp.contract.plan.make_plan` takes a :class:`nemo_megacpp.formulas.job.Job` and
returns a :class:`nemo_megacpp.contract.plan.Plan`: who owns which part of which parameter, every
collective of a step, the memory of each pipeline stage, and what the layout costs. Shapes come from
the real modules, built on the meta device in a fake world; bytes that no module shows (activations,
messages) come from formulas, which tests hold to recorded runs.
"""
