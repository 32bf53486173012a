"""The colours of the storybook world, red, green, blue from 0 to 255.

Subjects are saturated; backgrounds and landmarks are muted, so that a subject can be told from what is behind it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

Color = tuple[int, int, int]

SUBJECT_COLOURS: Mapping[str, Color] = {
    "red": (222, 42, 48),
    "orange": (250, 138, 22),
    "yellow": (252, 218, 32),
    "green": (24, 158, 66),
    "blue": (36, 92, 226),
    "purple": (146, 58, 196),
}

ACCENT_COLOURS: Mapping[str, Color] = {
    "rose": (206, 150, 150),
    "sage": (150, 174, 142),
    "slate": (112, 126, 152),
    "sand": (206, 186, 150),
    "plum": (140, 112, 138),
    "teal": (98, 146, 146),
    "clay": (164, 116, 94),
    "olive": (132, 132, 92),
}


@dataclass(frozen=True, kw_only=True)
class Scenery:
    """The colours of one background; `far_height` is how far the far layer rises above the ground, in pixels."""

    sky_top: Color
    sky_bottom: Color
    light: Color
    far: Color
    far_height: tuple[float, float]
    ground: Color
    speck_dark: Color
    speck_light: Color


SCENERIES: Mapping[str, Scenery] = {
    "meadow": Scenery(
        sky_top=(122, 190, 236), sky_bottom=(216, 238, 250), light=(255, 246, 214), far=(156, 204, 178),
        far_height=(30, 12), ground=(126, 186, 104), speck_dark=(88, 148, 78), speck_light=(240, 246, 226),
    ),
    "desert": Scenery(
        sky_top=(246, 196, 142), sky_bottom=(255, 236, 206), light=(255, 250, 226), far=(224, 172, 124),
        far_height=(22, 14), ground=(238, 204, 150), speck_dark=(192, 148, 104), speck_light=(252, 230, 190),
    ),
    "night": Scenery(
        sky_top=(20, 24, 62), sky_bottom=(64, 66, 124), light=(240, 240, 222), far=(44, 46, 96),
        far_height=(32, 14), ground=(52, 66, 88), speck_dark=(32, 44, 64), speck_light=(112, 132, 156),
    ),
    "snow": Scenery(
        sky_top=(184, 202, 222), sky_bottom=(230, 237, 244), light=(250, 250, 246), far=(162, 180, 204),
        far_height=(36, 16), ground=(242, 246, 251), speck_dark=(190, 206, 224), speck_light=(255, 255, 255),
    ),
    "beach": Scenery(
        sky_top=(108, 206, 214), sky_bottom=(224, 246, 240), light=(255, 248, 220), far=(62, 150, 182),
        far_height=(20, 1.5), ground=(242, 226, 182), speck_dark=(206, 178, 138), speck_light=(255, 250, 238),
    ),
}  # fmt: skip
