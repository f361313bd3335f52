"""What splits, what stays global, and what it costs: a layout's contract, before the run.

:func:`nemo_megacpp.contract.layout_plan.make_plan` takes a :class:`nemo_megacpp.formulas.sizes.Job`
and returns a :class:`nemo_megacpp.contract.layout_plan.Plan`: who owns which part of which
parameter, every collective of a step, the memory of each pipeline stage, and what the layout costs.
Shapes come from the real modules, built on the meta device in a fake world; bytes that no module
shows (activations, messages) come from formulas, which tests compare with recorded runs.
:func:`nemo_megacpp.contract.layout_search.search_layouts` prices every legal layout of a world.
"""
