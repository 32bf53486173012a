"""Everything known about model families in one table, and finding a row of it; whoever asks reads it when it asks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from vidaccel.catalog.families.family import Family
from vidaccel.catalog.families.rows_cogvideox import COGVIDEOX_FAMILIES
from vidaccel.catalog.families.rows_cosmos import COSMOS_FAMILIES
from vidaccel.catalog.families.rows_hunyuan import HUNYUAN_FAMILIES
from vidaccel.catalog.families.rows_ltx import LTX_FAMILIES
from vidaccel.catalog.families.rows_modular import MODULAR_FAMILIES
from vidaccel.catalog.families.rows_open_sora import OPEN_SORA_FAMILIES
from vidaccel.catalog.families.rows_others import OTHER_FAMILIES
from vidaccel.catalog.families.rows_wan import WAN_FAMILIES
from vidaccel.catalog.families.rows_wan_based import WAN_BASED_FAMILIES
from vidaccel.catalog.traits import (
    PIPELINES,
    TRANSFORMERS,
    USUAL_GUIDANCE,
    PipelineTraits,
    TransformerTraits,
)
from vidaccel.errors import UserError

Row = TypeVar("Row")
UNKNOWN = TransformerTraits(splits_batch=False)
USUAL = PipelineTraits()


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """The families that are tested, and the rows of their pipelines and transformers by class name."""

    families: tuple[Family, ...]
    pipelines: Mapping[str, PipelineTraits]
    transformers: Mapping[str, TransformerTraits]


CATALOG = Catalog(
    families=(
        *WAN_FAMILIES,
        *HUNYUAN_FAMILIES,
        *LTX_FAMILIES,
        *COGVIDEOX_FAMILIES,
        *COSMOS_FAMILIES,
        *OTHER_FAMILIES,
        *OPEN_SORA_FAMILIES,
        *WAN_BASED_FAMILIES,
        *MODULAR_FAMILIES,
    ),
    pipelines=PIPELINES,
    transformers=TRANSFORMERS,
)


def family_named(name: str) -> Family:
    """The row of that name; raises `UserError`, with all names, if there is none."""
    for family in CATALOG.families:
        if family.name == name:
            return family
    names = ", ".join(family.name for family in CATALOG.families)
    raise UserError(f"A family must be one of {names}; got {name!r}.")


def component_modules() -> frozenset[str]:
    """The modules that the families' components are from."""
    components = (component for family in CATALOG.families for component in family.components.values())
    return frozenset(component.kind.partition(":")[0] for component in components)


def transformer_traits(transformer: Any) -> TransformerTraits:
    """The row of a transformer, its class, or the name of that; `UNKNOWN` where there is none."""
    return _first_row(transformer, CATALOG.transformers, UNKNOWN)


def pipeline_traits(pipe: Any) -> PipelineTraits:
    """The row of a pipeline, its class, or the name of that; `USUAL` where there is none."""
    return _first_row(pipe, CATALOG.pipelines, USUAL)


def batched_guidance_of(pipe: Any, *, is_named: bool) -> tuple[str, ...]:
    """The branches that a pipeline puts into one batch, in order; empty if it calls the model for each on its own.

    What the pipeline says itself (`batched_guidance`) comes first, then its row. `is_named`: the call is marked with
    diffusers' name for both branches in one batch, where all pipelines of diffusers put the unconditional one first.
    """
    own = getattr(pipe, "batched_guidance", None)
    if own is not None:
        return tuple(own)
    return pipeline_traits(pipe).batched_guidance or (USUAL_GUIDANCE if is_named else ())


def has_several_loops(pipe: Any) -> bool | None:
    """Whether a call may go through its steps more than once; None where nobody says.

    What the pipeline says itself (`has_several_loops`) comes first, then the row of the class whose call it is. A call
    of diffusers or of vidaccel without a row has one loop; what others do is not known.
    """
    own = getattr(pipe, "has_several_loops", None)
    if own is not None:
        return bool(own)
    caller = next((kind for kind in type(pipe).__mro__ if "__call__" in vars(kind)), type(pipe))
    if (row := CATALOG.pipelines.get(caller.__name__)) is not None:
        return row.several_loops
    is_known = str(caller.__call__.__module__).startswith(("diffusers.", "vidaccel."))
    return pipeline_traits(pipe).several_loops if is_known else None


def _first_row(owner: Any, table: Mapping[str, Row], otherwise: Row) -> Row:
    """The row of a class or of its nearest base class that has one."""
    kind = owner if isinstance(owner, type | str) else type(owner)
    names: Iterable[str] = [kind] if isinstance(kind, str) else [base.__name__ for base in kind.__mro__]
    return next((table[name] for name in names if name in table), otherwise)
