"""The estimate of a step: each part by hand, and what must make a step longer or shorter."""

from __future__ import annotations

import dataclasses
from copy import copy
from typing import Any

import pytest

from nemo_megacpp.contract.collective_time import CollectiveTime
from nemo_megacpp.contract.layer_time import LayerTimes
from nemo_megacpp.contract.layout_plan import make_plan
from nemo_megacpp.contract.machine import Efficiency, Link, Machine
from nemo_megacpp.contract.memory import stage_buffers, stage_memory
from nemo_megacpp.contract.recompute import Activations
from nemo_megacpp.contract.stages import BuiltParameter, build_stages
from nemo_megacpp.contract.step_tables import bar, legend
from nemo_megacpp.contract.step_time import StepEstimator, StepTime, places_of
from nemo_megacpp.contract.work import work_of
from nemo_megacpp.formulas.collectives import Collective, Kind
from nemo_megacpp.formulas.sizes import Job, Sizes
from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.recipes.catalog import NAM56R_MODEL

ONES = Efficiency(matmul=1.0, grouped_matmul=0.5, attention=1.0, scan=1.0, memory=1.0, link=0.5)
PLAIN = Machine(
    name="plain",
    gpus_per_node=4,
    hbm_bytes=10**11,
    hbm_bandwidth=1e12,
    flops={"bf16": 1e15},
    in_node=Link(bandwidth=1e11, latency=1e-6),
    between_nodes=Link(bandwidth=1e10, latency=1e-5),
    kernel_seconds=1e-7,
    recurrent_token_seconds=1e-6,
    efficiency=ONES,
)


def _collective(kind: Kind, group: str, size: int, count: int = 1) -> Collective:
    return Collective(kind, group, size, "forward", "sum", "x", count)


@pytest.mark.parametrize(
    ("kind", "group", "seconds"),
    [
        # tp: 2 ranks of one node; half of 1 MB leaves a rank, in one step.
        ("all_gather", "tp", 0.5e6 / 0.5e11 + 1e-6),
        ("all_reduce", "tp", 1e6 / 0.5e11 + 2e-6),
        # dp: 4 ranks, two on each of two nodes: what a ring sends leaves over two ports.
        ("all_gather", "dp", 0.75e6 / (2 * 0.5e10) + 2e-5),
        # ep: 8 ranks of two nodes; 4 of the 7 others are on the other node.
        ("all_to_all", "ep", 0.875e6 * (4 / 7) / 0.5e10 + 1e-5),
        # pp: the other stage is on other nodes.
        ("send", "pp", 1e6 / 0.5e10 + 1e-5),
        ("receive", "pp", None),
    ],
)
def test_collectives_by_hand(kind: Kind, group: str, seconds: float | None) -> None:
    links = CollectiveTime(PLAIN, ParallelLayout.parse("tp=2,pp=2,ep=8,etp=1,world=16"), 0)
    wanted = 0.0 if seconds is None else 3 * (seconds + 1e-7)
    assert links.seconds(_collective(kind, group, 10**6, 3)) == pytest.approx(wanted)


def _parameter(shape: tuple[int, ...], is_expert: bool = False) -> BuiltParameter:
    return BuiltParameter("x.weight", 0, shape, shape, is_expert, False, False, False, 2)


def test_layers_by_hand() -> None:
    sizes = Sizes(Job({**NAM56R_MODEL, "hybrid_pattern": "AER", "num_layers": 3}))
    times = LayerTimes(PLAIN, 1e15)
    nothing = times.of(sizes, "A", [], 0)
    # Large: its arithmetic counts, and the time of a kernel.
    large = times.of(sizes, "A", [_parameter((4096, 8192))], 0)
    each = 2 * 4096 * 4096 * 8192 / 1e15 + 1e-7
    assert large.forward - nothing.forward == pytest.approx(each)
    # Of the weight's gradient the bytes do: its float32 sum is read and written.
    moved = (4096 * (4096 + 8192) + 4096 * 8192) * 2 + 4096 * 8192 * 6
    assert large.backward - nothing.backward == pytest.approx(each + moved / 1e12 + 1e-7)
    # Narrow: its bytes count, and those of the gradient's float32 sum.
    narrow = times.of(sizes, "A", [_parameter((16, 3584))], 0)
    moved = (4096 * (16 + 3584) + 16 * 3584) * 2
    assert narrow.forward - nothing.forward == pytest.approx(moved / 1e12 + 1e-7)
    # Experts: 1,024 rows for each of 16, at half the peak.
    times = LayerTimes(dataclasses.replace(PLAIN, hbm_bandwidth=1e13), 1e15)
    nothing = times.of(sizes, "A", [], 0)
    expert = times.of(sizes, "E", [_parameter((1, 896, 3584), True)] * 16, 0)
    each = 16 * 2 * 1024 * 896 * 3584 / 0.5e15 + 1e-7
    assert expert.forward - times.of(sizes, "E", [], 0).forward == pytest.approx(each)
    # Attention: half of the sequence's pairs; backward 2.5 times as much.
    mixed = times.of(sizes, "A", [], 10**9)
    assert mixed.forward - nothing.forward == pytest.approx(4096 * 1e9 / 1e15)
    assert mixed.backward - nothing.backward == pytest.approx(2.5 * 4096 * 1e9 / 1e15)
    # A recurrence waits for each of its tokens.
    recurrent = times.of(sizes, "R", [], 0)
    assert recurrent.forward > 4096 * 1e-6 and recurrent.backward > 2 * 4096 * 1e-6


def test_few_rows_of_an_expert_take_the_time_of_a_tile() -> None:
    model = {**NAM56R_MODEL, "hybrid_pattern": "E", "num_layers": 1, "seq_length": 128}
    times = LayerTimes(dataclasses.replace(PLAIN, hbm_bandwidth=1e15), 1e15)
    weights = [_parameter((1, 896, 3584), True)] * 16
    seconds = [
        times.of(Sizes(Job({**model, "moe_router_topk": topk})), "E", weights, 0).forward
        for topk in (1, 2, 4)  # 8, 16, 32 rows an expert
    ]
    assert seconds[0] == pytest.approx(seconds[1], rel=0.01) == pytest.approx(seconds[2], rel=0.01)


def _step(layout: str, machine: Machine = PLAIN, **changes: Any) -> StepTime:
    fields = {"micro_batch_size": 1, "global_batch_size": 64, **changes}
    model = {**NAM56R_MODEL, **fields.pop("model", {})}
    step = make_plan(Job(model, ParallelLayout.parse(layout), **fields), machine).step
    assert step is not None
    return step


def test_model_flops_and_tokens_are_those_of_the_step() -> None:
    step = _step("tp=2,etp=1,ep=2,world=8")
    tokens = 64 * 4096
    assert step.tokens_per_gpu == pytest.approx(tokens / step.seconds / 8)
    assert step.flops_per_gpu / 1e15 == pytest.approx(step.utilization)
    per_token = step.flops_per_gpu * 8 * step.seconds / tokens
    alone = _step("tp=1,etp=1")
    assert per_token == pytest.approx(alone.flops_per_gpu * alone.seconds / tokens)
    assert 3 * 4e9 < per_token < 3 * 6e9  # of a pass 5.2 GFLOP


def test_the_recurrence_is_divided_by_no_axis_but_data() -> None:
    few = {"hybrid_pattern": "AR", "num_layers": 2}
    alone = _step("etp=1,world=8", model=few).parts["R"]
    assert _step("tp=8,etp=1,world=8", model=few).parts["R"] > 6 * alone
    assert _step("cp=8,etp=1,world=8", model=few).parts["R"] > 6 * alone


def test_overlap_hides_what_the_passes_are_long_enough_for() -> None:
    shown = _step("etp=1,world=8", use_distributed_optimizer=True)
    hidden = _step(
        *("etp=1,world=8",),
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
    )
    assert shown.parts["gradients"] > 0 and shown.parts["parameters"] > 0
    assert hidden.parts.get("gradients", 0) < shown.parts["gradients"]
    assert hidden.parts.get("parameters", 0) < shown.parts["parameters"]


def test_the_bubble_is_the_other_stages_microbatch() -> None:
    even = {"hybrid_pattern": "MMMM", "num_layers": 4, "vocab_size": 128}
    one, two = (_step(f"etp=1,pp={pp},world=4", model=even) for pp in (1, 2))
    assert "bubble" not in one.parts
    # 32 microbatches on two stages: the other's one, of equal length but for the ends.
    both = two.parts["M"] + two.parts["pp"]
    assert two.parts["bubble"] / both == pytest.approx(1 / 32, rel=0.05)


def test_selective_recomputation_adds_what_it_computes_again() -> None:
    again = {"recompute_granularity": "selective"}
    layout = "tp=2,etp=1,world=2"
    kept, core, moe = (
        _step(layout, model=model)
        for model in (
            {},
            {**again, "recompute_modules": ["core_attn"]},
            {**again, "recompute_modules": ["moe"]},
        )
    )
    assert "recompute" not in kept.parts
    assert 0 < core.parts["recompute"] < moe.parts["recompute"] < moe.parts["E"]
    for other in (core, moe):
        assert all(other.parts[f] == pytest.approx(kept.parts[f]) for f in "AEMR")


def test_full_recomputation_computes_and_sends_forward_again() -> None:
    job = Job(NAM56R_MODEL, ParallelLayout.parse("tp=2,etp=1,world=2"), 1, 4)
    whole = Sizes(dataclasses.replace(job, layout=ParallelLayout()))
    sizes, stages = Sizes(job), build_stages(job)
    places, buffers = places_of(stages), [stage_buffers(job, stage) for stage in stages]
    estimator = StepEstimator(PLAIN, whole, work_of(whole, places))
    saved = Activations(sizes)
    memory = [stage_memory(sizes, stages[0], buffers[0], saved)]
    kept = estimator.estimate(sizes, places, stages, memory, buffers)
    config = copy(sizes.config)
    config.recompute_granularity, config.recompute_method = "full", "block"
    found = []
    for config.recompute_num_layers in (26, 52):
        full = Sizes(job, copy(config))
        found.append(estimator.estimate(full, places, stages, memory, buffers).parts)
    assert "recompute" not in kept.parts
    assert found[0]["recompute"] < found[1]["recompute"] < sum(kept.parts[f] for f in "AEMR")
    assert kept.parts["tp"] < found[0]["tp"] < found[1]["tp"]


def test_side_channels_take_time() -> None:
    """By hand: two ranks under SP, a table of each kind of rows, the second joined by a projection
    that each rank has whole."""
    added = {"name": "language", "vocab_size": 8, "field": "lang", "owner": [1, 3]}
    joined = {
        **{"name": "bigram", "vocab_size": 64, "ngram": 2, "owner": [2]},
        **{"partition": "vocabulary", "combine": "concat", "width": 128},
    }
    few = {"hybrid_pattern": "AMAM", "num_layers": 4}
    layout, count = "tp=2,etp=1,world=2", 64  # microbatches
    plain = _step(layout, model=few)
    both = _step(layout, model={**few, "side_channels": [added, joined]})
    assert "side channels" not in plain.parts
    tokens, h = 2048, 3584
    # Ids of 8 bytes and rows of h numbers: written and read; read, written and read.
    moved = 4096 * 8 + tokens * h * 2
    expected = 2 * (2 + 3) * moved / 1e12
    # Ids and their mask, rows of 128 numbers, and what the projection takes.
    moved = 4096 * 9 + tokens * 128 * 2 + tokens * (h + 128) * 2
    least = 16 * 1e-7  # kernels
    expected += max(2 * moved / 1e12, least) + max(3 * moved / 1e12, 2 * least)
    # Three products, bound by their bytes; the projection's gradient is summed in float32.
    weights = h * (h + 128)
    moved = (tokens * (h + h + 128) + weights) * 2
    assert moved / 1e12 > 2 * tokens * weights / 1e15
    expected += (3 * moved + 6 * weights) / 1e12 + 3 * 1e-7
    assert both.parts["side channels"] == pytest.approx(count * expected)
    # A table of split rows: reduce-scatter, and its gradient's all-gather.
    sent = 2 * (4096 * 128 * 2 / 2 / 0.5e11 + 1e-6 + 1e-7)
    assert both.parts["tp"] - plain.parts["tp"] == pytest.approx(count * sent)


def test_whole_layers_are_recomputed_with_their_side_channels() -> None:
    channel = {"name": "language", "vocab_size": 8, "field": "lang", "owner": [1]}
    model = {"hybrid_pattern": "AM", "num_layers": 2, "recompute_granularity": "full"}
    model |= {"recompute_method": "block", "side_channels": [channel]}
    one, two = (_step("etp=1", model={**model, "recompute_num_layers": n}) for n in (1, 2))
    channels, layer = one.parts["side channels"] / 5 * 2, one.parts["M"]
    again = two.parts["recompute"] - one.parts["recompute"]
    assert channels < again < channels + layer
    alone = _step("etp=1", model={**model, "side_channels": None, "recompute_num_layers": 2})
    assert two.parts["recompute"] - alone.parts["recompute"] == pytest.approx(channels)


def test_the_depth_states_collectives_take_time() -> None:
    """Taken by the second R block, handed on by the first: an all-gather and a reduce-scatter over
    tp for each, as the gradient goes the other way."""
    few = {"hybrid_pattern": "RMR", "num_layers": 3}
    plain, state = (
        _step("tp=2,etp=1,world=2", model={**few, "m2rnn_depth_state": on}) for on in (False, True)
    )
    each = 4096 * 16 * 2 / 2 / 0.5e11 + 1e-6 + 1e-7
    assert state.parts["tp"] - plain.parts["tp"] == pytest.approx(64 * 4 * each)


def test_a_bar_is_as_long_as_its_share_of_the_longest() -> None:
    step = StepTime({"A": 1.0, "M": 0.26, "tp": 0.24, "bubble": 0.5}, 0, 1.0, 1.0, 0.1)
    assert bar(step, 2.0, 8) == "AAAAMt.."
    assert bar(step, 4.0, 8) == "AAM."
    assert "t collectives of TP" in legend([step]) and ". pipeline bubble" in legend([step])
