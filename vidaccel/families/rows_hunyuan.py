"""The HunyuanVideo families."""

from vidaccel.families.family import Family

HUNYUAN_FAMILIES: tuple[Family, ...] = ()
