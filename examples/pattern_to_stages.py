"""Pattern to stages: a pattern cut into pipeline stages, and what each stage owns besides layers.

Equal numbers of layers are not equal stages: the first also owns the embedding, the last the head
and the loss. ``|`` in the pattern chooses the cuts. Needs no GPU::

    python examples/pattern_to_stages.py
"""

from __future__ import annotations

from nemo_megacpp.contract.layout_plan import make_plan
from nemo_megacpp.recipes.recipe import resolve
from nemo_megacpp.recipes.views import job_of
from nemo_megacpp.render import show_bytes


def main() -> None:
    """Print the stages of three pipelines: cut equally, by choice, and interleaved."""
    for pattern, layout in (
        ("AEMEAEMEAEMR", "pp=2"),
        ("AEMEAEM|EAEMR", "pp=2"),
        ("AEMEAEMEAEMR", "pp=2,vpp=2"),
    ):
        recipe = resolve("nam56r_tiny", [f"pattern={pattern}", "depth=12"], layout=f"tp=1,{layout}")
        print(f"{pattern}, {layout}")
        for stage in make_plan(job_of(recipe, kernels="torch")).stages:
            chunks = []
            for chunk in stage.built.chunks:
                edges = ("embedding", *chunk.letters, "head")
                first, last = not chunk.owns_embedding, len(edges) - (not chunk.owns_head)
                chunks.append(" ".join(edges[first:last]))
            print(
                f"  stage {stage.pp_rank}: {' and '.join(chunks)}: "
                f"{stage.parameters:,} parameters, {show_bytes(stage.memory.total)}"
            )


if __name__ == "__main__":
    main()
