"""The parity suite as data: which models are run in which layouts."""

from __future__ import annotations

from typing import Any

from torch.nn import functional as F

from nemo_megacpp.core.multi_token import missing_prediction
from nemo_megacpp.proof.small_models import tiny_model

_TP = ("tp=2", "tp=2,sp=false", "tp=4")
_CP = ("cp=2", "cp=4", "tp=2,cp=2")
_EP = ("ep=2", "ep=4", "tp=2,etp=1", "tp=1,etp=2", "tp=2,ep=2,etp=1", "tp=2,ep=2,etp=2")
# Without SP, Megatron's MoE layer refuses TP.
_TP_WITH_SP = ("tp=2", "tp=4")

FAMILIES: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
    ("A", tiny_model("A"), _TP + _CP),
    ("M", tiny_model("M"), _TP + _CP),
    ("M3", tiny_model("M", mode="mamba3"), _TP + _CP),
    (
        "M3-mimo",
        tiny_model("M", mode="mamba3", mamba3_mimo_rank=2, mamba_num_groups=2),
        ("tp=2", "tp=2,sp=false", "cp=2", "cp=4", "tp=2,cp=2"),
    ),
    ("E", tiny_model("E"), (*_TP_WITH_SP, "cp=2", "cp=2,ep=2", *_EP)),
    (
        "E-allgather",
        tiny_model("E", moe_token_dispatcher_type="allgather"),
        ("tp=2", "ep=2", "tp=2,etp=1", "tp=1,etp=2", "tp=2,ep=2,etp=1"),
    ),
    (
        "E-capacity",
        tiny_model("E", moe_expert_capacity_factor=0.75),
        ("tp=2", "tp=2,etp=1", "ep=2", "cp=2", "tp=2,ep=2,etp=2", "tp=2,cp=2,ep=2,etp=1"),
    ),
    (
        "E-aux-z",
        tiny_model("E", moe_router_load_balancing_type="aux_loss", moe_z_loss_coeff=1e-3),
        ("tp=2,etp=1", "cp=2", "tp=2,cp=2,ep=2,etp=1"),
    ),
    ("R", tiny_model("R"), (*_TP, *_CP)),
    ("R-serial", tiny_model("R", m2rnn_context_parallel="serial"), _CP),
    ("R-odd-heads", tiny_model("R", m2rnn_num_heads=6), ("tp=2", "cp=2", "cp=4", "tp=2,cp=2")),
    ("F", tiny_model("F"), (*_TP, *_CP)),
    (
        "F-ungated-biases",
        tiny_model("F", gated_linear_unit=False, activation_func=F.gelu, add_bias_linear=True),
        ("tp=2", "tp=2,sp=false"),
    ),
)
"""Families alone: label, model, layouts."""

MIXED: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
    (
        "AEMR",
        tiny_model("AEMR"),
        (
            "tp=2,etp=1",
            "tp=4,etp=1",
            "tp=4,etp=2",
            "cp=2",
            "cp=4",
            "ep=2",
            "ep=4",
            "tp=1,etp=2",
            "tp=1,ep=2,etp=2",
            "pp=2",
            "pp=4",
            "world=2",
            "world=4",
            "tp=2,cp=2,etp=1",
            "tp=2,ep=2,etp=1",
            "tp=2,ep=2,etp=2",
            "tp=2,pp=2,etp=1",
            "cp=2,ep=2",
            "cp=2,ep=4",
            "cp=2,pp=2",
            "ep=2,pp=2",
            "tp=2,cp=2,ep=2,etp=1",
            "tp=2,cp=2,ep=4,etp=1",
        ),
    ),
    (
        "AEMEAEMEAEMR",
        tiny_model("AEMEAEMEAEMR"),
        (
            "tp=2,etp=1",
            "pp=2",
            "pp=4",
            "pp=2,vpp=2",
            "pp=2,vpp=3",
            "pp=4,vpp=3",
            "tp=2,pp=2,vpp=2,etp=1",
            "pp=2,vpp=2,ep=2",
            "pp=2,vpp=2,cp=2",
        ),
    ),
    (
        "AEMR-mamba3",
        tiny_model("AEMR", mode="mamba3"),
        ("tp=2,etp=1", "pp=2", "tp=2,cp=2,ep=2,etp=1", "tp=2,pp=2,etp=1"),
    ),
    ("cuts", tiny_model("AE|MEAEM|E|AEMR"), ("tp=2,etp=1", "pp=4", "pp=2,vpp=2")),
    ("no-E-stage", tiny_model("ARM|EA"), ("pp=2", "tp=2,pp=2,etp=1", "pp=2,ep=2")),
    (
        "with-F",
        tiny_model("AFMFEFRF"),
        ("tp=2,etp=1", "pp=4", "pp=2,vpp=2", "tp=2,cp=2,ep=2,etp=1", "tp=2,pp=2,vpp=2,etp=1"),
    ),
)
"""Families together: label, model, layouts."""

# With eight chunks some cuts lie before the first R or after the last, and carry no state.
DEPTH_STATE = tiny_model("MRARMRAM", m2rnn_depth_state=True)


# Saved as, and loaded as: a layout, or a layout and another way to write the pattern.
Place = str | tuple[str, str]

_CUT = "AE|MEAEM|E|AEMR"
_MIMO = {"mode": "mamba3", "mamba3_mimo_rank": 2, "mamba_num_groups": 2}

RESHARDINGS: tuple[tuple[str, dict[str, Any], Place, tuple[Place, ...]], ...] = (
    (
        "AEMR",
        tiny_model("AEMR"),
        "tp=2,etp=1",
        ("tp=1", "tp=4,etp=2", "pp=2", "cp=2", "ep=2", "tp=1,etp=2", "world=2", "cp=2,ep=4"),
    ),
    ("AEMR", tiny_model("AEMR"), "pp=2,ep=2", ("tp=2,cp=2,etp=1", "world=4", "pp=4")),
    ("AEMR", tiny_model("AEMR"), "tp=2,ep=2,etp=2", ("tp=2,ep=2,etp=1", "tp=1", "cp=2,pp=2")),
    ("AMR", tiny_model("AMR"), "tp=2,sp=false", ("tp=2", "tp=4,sp=false", "cp=4")),
    (
        "deep",
        tiny_model("AEMEAEMEAEMR"),
        "pp=2,vpp=3",
        ("pp=4", "pp=2,vpp=2", "tp=2,etp=1", ("pp=4", _CUT), ("pp=2,vpp=2", _CUT)),
    ),
    ("cuts", tiny_model(_CUT), "pp=4", ("pp=2,vpp=2", ("pp=4,vpp=3", "AEMEAEMEAEMR"), "tp=2")),
    ("no-E-stage", tiny_model("ARM|EA"), "pp=2", ("tp=2,etp=1", "ep=2,pp=2", "tp=2,pp=2,etp=1")),
    (
        "AEMR-mamba3",
        tiny_model("AEMR", mode="mamba3"),
        "tp=2,etp=1",
        ("tp=1", "tp=4,etp=1", "pp=2", "cp=2"),
    ),
    ("AEMR-mimo", tiny_model("AEMR", **_MIMO), "tp=2,etp=1", ("tp=1", "pp=2", "cp=2", "ep=2")),
    (
        "with-F",
        tiny_model("FAFM"),
        "tp=2,pp=2",
        ("tp=1", "tp=4", "cp=2", ("pp=2,vpp=2", "F|A|F|M"), ("pp=2", "FAF|M")),
    ),
    ("R-depth-state", DEPTH_STATE, "pp=2,vpp=4", ("tp=2,pp=2", "cp=2", "pp=4,vpp=2")),
)
"""Label, model, where a training state is saved, where it is loaded."""

if missing_prediction() is None:
    RESHARDINGS += (
        (
            "prediction",
            tiny_model("AEMR/EAFMR/EAFMR"),
            "tp=2,pp=2,etp=1",
            ("cp=2", "tp=1", ("ep=2,pp=2", "AEM|R/EAFMR/EAFMR")),
        ),
    )

SHARDED_RESHARDINGS: tuple[tuple[str, dict[str, Any], Place, tuple[Place, ...]], ...] = (
    (
        "AEMR",
        tiny_model("AEMR"),
        "world=4,tp=2,etp=1",
        ("world=4", "world=2", "world=4,pp=2", "world=4,ep=2", "tp=4,etp=1", "world=4,cp=2"),
    ),
    ("AEMR", tiny_model("AEMR"), "world=4,ep=2", ("world=4,tp=2,etp=1", "tp=1,etp=2")),
    ("deep", tiny_model("AEMEAEMEAEMR"), "pp=2,vpp=2,world=4", ("pp=4", ("pp=4", _CUT))),
    ("no-E-stage", tiny_model("ARM|EA"), "world=4,pp=2", ("world=2", "tp=2,pp=2,etp=1")),
    ("AEMR-mimo", tiny_model("AEMR", **_MIMO), "world=4,tp=2,etp=1", ("world=2", "world=4,pp=2")),
    ("with-F", tiny_model("FAFM"), "world=4,tp=2", ("world=2", "world=4,pp=2", "tp=4")),
)
"""The same with the distributed optimizer."""

if missing_prediction() is None:
    SHARDED_RESHARDINGS += (
        ("prediction", tiny_model("AMRE/EF"), "world=4,pp=2", ("world=2", "tp=2,pp=2,etp=1")),
    )
