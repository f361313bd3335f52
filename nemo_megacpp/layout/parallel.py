"""The degrees of a parallel layout, and which rank is where."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from nemo_megacpp.errors import UserError, nearest
from nemo_megacpp.printable import cut, shown

# Megatron's field name -> the names accepted for it; the first is the short one.
_NAMES: dict[str, tuple[str, ...]] = {
    "tensor_model_parallel_size": ("tp", "tensor_parallel", "tensor_parallelism", "tp_degree"),
    "sequence_parallel": ("sp", "sequence_parallelism"),
    "context_parallel_size": ("cp", "context_parallel", "context_parallelism", "cp_degree"),
    "pipeline_model_parallel_size": (
        "pp",
        "pipeline_parallel",
        "pipeline_parallelism",
        "pp_degree",
    ),
    "virtual_pipeline_model_parallel_size": (
        "vpp",
        "virtual_pipeline",
        "virtual_pipeline_parallelism",
        "vpp_degree",
    ),
    "expert_model_parallel_size": ("ep", "expert_parallel", "expert_parallelism", "ep_degree"),
    "expert_tensor_parallel_size": (
        "etp",
        "expert_tensor_parallel",
        "expert_tensor_parallelism",
        "expert_tp_degree",
        "etp_degree",
    ),
    "world_size": ("world",),
}
FIELD_OF = {name: field for field, names in _NAMES.items() for name in (field, *names)}
_OPTIONAL = (
    "virtual_pipeline_model_parallel_size",
    "expert_tensor_parallel_size",
    "world_size",
)
_BOOLEANS = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}

MAX_RANKS = 2**20
"""The largest world that is planned: more ranks than any machine has."""
_DEGREE = re.compile("[0-9]{1,18}")


@dataclass(frozen=True)
class RankCoordinates:
    """Where one global rank sits on each axis. Dense and expert layers share only ``pp``."""

    tp: int
    cp: int
    dp: int
    pp: int
    etp: int
    ep: int
    edp: int


@dataclass(frozen=True)
class ParallelLayout:
    """The parallel degrees of a run, under Megatron's field names.

    Sequence parallelism is the activation layout of TP, not an axis: it takes no ranks of its own.

    Attributes:
        tensor_model_parallel_size: ranks that share each dense matrix (TP).
        sequence_parallel: between TP regions, shard activations along the sequence (SP).
        context_parallel_size: ranks that share each sequence (CP).
        pipeline_model_parallel_size: pipeline stages (PP).
        virtual_pipeline_model_parallel_size: model chunks per stage; None: no interleaving.
        expert_model_parallel_size: ranks that share the expert bank (EP).
        expert_tensor_parallel_size: ranks that share each expert's matrices (ETP); None: TP's
            degree, as in Megatron.
        world_size: ranks of the run; None: the smallest that holds the layout.

    The constructor checks nothing, so that `check_layout` can report every fault at once.
    """

    tensor_model_parallel_size: int = 1
    sequence_parallel: bool = False
    context_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    world_size: int | None = None

    @classmethod
    def parse(cls, text: str) -> ParallelLayout:
        """Read ``tp=2,cp=2,etp=1,sp=true``; names and defaults as in `from_mapping`.

        Raises:
            UserError: all that `read_degrees` and `from_mapping` raise.
        """
        return cls.from_mapping(read_degrees(text))

    @classmethod
    def from_mapping(cls, values: Mapping[str, object]) -> ParallelLayout:
        """Read names and values, as found in YAML or on a command line.

        Names, in any case: short (``tp``, ``sp``, ``cp``, ``pp``, ``vpp``, ``ep``, ``etp``,
        ``world``), the articles' (``tensor_parallel``, ``tp_degree``, ``expert_tp_degree``, …),
        NeMo's (``tensor_parallelism``, …) and Megatron's field names. ``sequence_parallel``
        defaults to true where TP > 1: it costs nothing and MoE training needs it. The constructor
        keeps Megatron's default, false.

        Raises:
            UserError: an unknown name, a degree given twice, or a value that is no degree.
        """
        return cls().changed(values)

    def changed(self, values: Mapping[str, object]) -> ParallelLayout:
        """Return this layout with the degrees of ``values`` in it; the others stay.

        This is how the degrees that a user gives meet a recipe's layout, on every command line.
        SP, where it is not among ``values``, stays as it is while TP stays above 1; TP that becomes
        more than 1 turns it on, and TP=1 turns it off.

        Args:
            values: names and values, as for `from_mapping`.

        Raises:
            UserError: as `from_mapping`.
        """
        degrees: dict[str, int | bool | None] = {}
        spelled: dict[str, str] = {}
        for name, value in values.items():
            field = _field(str(name))
            validate_given_once(field, f"{name}={value}", spelled)
            degrees[field] = _read(field, name, value)
        layout = replace(self, **degrees)  # type: ignore[arg-type]  # _read gives each its own type
        if "sequence_parallel" not in degrees and (self.tp > 1) != (layout.tp > 1):
            layout = replace(layout, sequence_parallel=layout.tp > 1)
        return layout

    @property
    def tp(self) -> int:
        return self.tensor_model_parallel_size

    @property
    def sp(self) -> bool:
        return self.sequence_parallel

    @property
    def cp(self) -> int:
        return self.context_parallel_size

    @property
    def pp(self) -> int:
        return self.pipeline_model_parallel_size

    @property
    def vpp(self) -> int | None:
        return self.virtual_pipeline_model_parallel_size

    @property
    def ep(self) -> int:
        return self.expert_model_parallel_size

    @property
    def etp(self) -> int:
        """Expert tensor parallelism, with Megatron's default (TP) filled in."""
        etp = self.expert_tensor_parallel_size
        return self.tp if etp is None else etp

    @property
    def world(self) -> int:
        """The number of ranks: ``world_size``, or the smallest legal one."""
        return self.minimal_world_size if self.world_size is None else self.world_size

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the dense layers and share one batch: TP x CP x PP."""
        return self.tp * self.cp * self.pp

    @property
    def expert_model_parallel_span(self) -> int:
        """Ranks that hold one copy of the expert layers: ETP x EP x PP."""
        return self.etp * self.ep * self.pp

    @property
    def minimal_world_size(self) -> int:
        """The smallest world that both the dense and the expert layers divide."""
        return math.lcm(self.model_parallel_size, self.expert_model_parallel_span)

    @property
    def data_parallel_size(self) -> int:
        """DP of the dense layers. Raises UserError if the world does not divide."""
        return self._quotient("TP x CP x PP", self.model_parallel_size)

    @property
    def expert_data_parallel_size(self) -> int:
        """DP of the expert layers. Raises UserError if the world does not divide."""
        return self._quotient("ETP x EP x PP", self.expert_model_parallel_span)

    @property
    def chunks_count(self) -> int:
        """Pipeline chunks of the model: PP times virtual stages."""
        return self.pp * (1 if self.vpp is None else self.vpp)

    def chunk_index(self, pp_rank: int, vpp_rank: int = 0) -> int:
        """The depth-order index of a chunk: Megatron deals chunks out to the stages in turn."""
        return vpp_rank * self.pp + pp_rank

    def rank_coordinates(self, rank: int) -> RankCoordinates:
        """Where ``rank`` sits in Megatron's default order, ``tp-cp-ep-dp-pp``, fastest first.

        Dense layers count ``tp, cp, dp, pp``, expert layers ``etp, ep, edp, pp``, over the same
        ranks. Source: ``initialize_model_parallel`` in ``megatron/core/parallel_state.py``.

        Raises:
            UserError: no such rank, or a world that does not divide.
        """
        if not 0 <= rank < self.world:
            raise UserError(f"Rank {rank} does not exist; the world has {self.world} ranks.")
        tp, cp, dp, pp = _digits(rank, (self.tp, self.cp, self.data_parallel_size))
        etp, ep, edp, expert_pp = _digits(rank, (self.etp, self.ep, self.expert_data_parallel_size))
        assert pp == expert_pp  # both orders end with pp
        return RankCoordinates(tp=tp, cp=cp, dp=dp, pp=pp, etp=etp, ep=ep, edp=edp)

    def megatron_fields(self) -> dict[str, Any]:
        """Return the degrees as Megatron's configurations and NeMo's strategy name them."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        del found["world_size"]
        return {**found, "expert_tensor_parallel_size": self.etp}

    def describe(self) -> str:
        """For people: ``TP=2 SP CP=1 EP=1 ETP=1 PP=1 (2 ranks: DP=1, expert DP=2)``."""
        degrees = [f"TP={self.tp}"]
        if self.sp:
            degrees.append("SP")
        degrees += [f"CP={self.cp}", f"EP={self.ep}", f"ETP={self.etp}", f"PP={self.pp}"]
        if self.vpp is not None:
            degrees.append(f"VPP={self.vpp}")
        ranks = "1 rank" if self.world == 1 else f"{self.world} ranks"
        return (
            f"{' '.join(degrees)} ({ranks}: DP={self.data_parallel_size}, "
            f"expert DP={self.expert_data_parallel_size})"
        )

    def short(self) -> str:
        """What differs from the defaults: ``tp=2,sp=true,etp=1``. `parse` reads it back."""
        entries = []
        for field in fields(self):
            value = getattr(self, field.name)
            # SP is always written beside a TP degree: parse would otherwise choose it.
            if value != field.default or (field.name == "sequence_parallel" and self.tp != 1):
                entries.append(setting(field.name, value))
        return ",".join(entries) or "tp=1"

    def _quotient(self, names: str, part: int) -> int:
        if part < 1 or self.world % part:
            raise UserError(
                f"A world of {self.world} ranks is not divisible by {names} = {part} "
                f"(layout {self.short()})."
            )
        return self.world // part


def read_degrees(text: str) -> dict[str, str]:
    """Return the names and values of ``tp=2,cp=2,etp=1``, as they are written.

    Raises:
        UserError: an entry that is not ``name=value``, an unknown name, or a degree given twice.
    """
    degrees: dict[str, str] = {}
    spelled: dict[str, str] = {}
    for entry in text.split(","):
        name, separator, value = (part.strip() for part in entry.partition("="))
        if not (name and separator and value):
            raise UserError(
                f"{shown(entry.strip())} in layout {shown(text)} is not name=value; "
                f"write a layout as 'tp=2,cp=2,etp=1'."
            )
        validate_given_once(_field(name), entry.strip(), spelled)
        degrees[name] = value
    return degrees


def validate_given_once(name: str, spelling: str, spelled: dict[str, str]) -> None:
    """Refuse a setting that was given before, and remember this one.

    Args:
        name: full name of the setting.
        spelling: what was written, such as ``tp=2``.
        spelled: full name -> what was written before; ``name`` is added to it.

    Raises:
        UserError: with both spellings.
    """
    if name in spelled:
        both = f"{cut(spelled[name])} and {cut(spelling)}"
        raise UserError(f"{name} is given twice: {both}. Give it once.")
    spelled[name] = spelling


def setting(field: str, value: object) -> str:
    """``name=value`` under the field's short name, as `ParallelLayout.parse` reads it."""
    text = str(value).lower() if value is None or isinstance(value, bool) else str(value)
    return f"{_NAMES[field][0]}={text}"


def _digits(rank: int, sizes: tuple[int, int, int]) -> tuple[int, int, int, int]:
    first, rest = rank % sizes[0], rank // sizes[0]
    second, rest = rest % sizes[1], rest // sizes[1]
    return first, second, rest % sizes[2], rest // sizes[2]


def _read(field: str, name: str, value: object) -> int | bool | None:
    text = str(value).strip().lower()
    if field == "sequence_parallel":
        if text not in _BOOLEANS:
            raise UserError(f"{name} must be true or false; got {shown(value)}.")
        return _BOOLEANS[text]
    if field in _OPTIONAL and text in ("none", "null"):
        return None
    if isinstance(value, bool) or not (_DEGREE.fullmatch(text) and int(text)):
        choices = "a positive whole number" + (" or none" if field in _OPTIONAL else "")
        raise UserError(f"{name} must be {choices}; got {shown(value)}.")
    return int(text)


def _field(name: str) -> str:
    """Return Megatron's name for one of the names of a degree."""
    field = FIELD_OF.get(name.lower())
    if field is None:
        known = [names[0] for names in _NAMES.values()]
        message = f"A layout has no {shown(name)}; it has {', '.join(known)}."
        if name.lower() in ("dp", "dp_degree", "data_parallel", "data_parallel_size"):
            message += " Data parallelism follows from them: it is world / (tp x cp x pp)."
            raise UserError(message)
        raise UserError(message + nearest(name.lower(), FIELD_OF))
    return field
