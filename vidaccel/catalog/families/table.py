"""The families EasyCache is tested on: every row of every group, and finding one by its name."""

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
from vidaccel.errors import UserError

FAMILIES: tuple[Family, ...] = (
    *WAN_FAMILIES,
    *HUNYUAN_FAMILIES,
    *LTX_FAMILIES,
    *COGVIDEOX_FAMILIES,
    *COSMOS_FAMILIES,
    *OTHER_FAMILIES,
    *OPEN_SORA_FAMILIES,
    *WAN_BASED_FAMILIES,
    *MODULAR_FAMILIES,
)


def family_named(name: str) -> Family:
    """The row of that name; raises `UserError`, with all names, if there is none."""
    for family in FAMILIES:
        if family.name == name:
            return family
    names = ", ".join(family.name for family in FAMILIES)
    raise UserError(f"A family must be one of {names}; got {name!r}.")
