"""The colours of classes."""

import numpy as np

# Okabe and Ito's seven colours, which people with any kind of colour blindness can tell apart; then the same hues at
# other lightnesses and saturations, each the farthest from all before it in CIELAB, as people with normal sight, with
# protanopia, deuteranopia and tritanopia (Machado et al. 2009) see them. They differ by 15 and more among the first 12,
# by 11 among the first 20, by 6.5 among all.
PALETTE = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
    (197, 242, 222), (105, 77, 34), (140, 62, 107), (245, 186, 152), (171, 192, 220), (135, 128, 74), (0, 95, 67),
    (195, 185, 81), (172, 89, 36), (68, 147, 214), (195, 160, 112), (158, 102, 132), (132, 175, 156), (193, 140, 53),
    (134, 214, 181), (44, 125, 95), (137, 60, 4), (233, 147, 194), (160, 202, 252), (232, 197, 215), (196, 217, 246),
    (43, 93, 136), (142, 92, 63), (199, 111, 57), (244, 233, 174), (94, 138, 184), (78, 98, 124), (119, 161, 209),
    (45, 178, 133), (125, 180, 217), (122, 246, 198), (226, 135, 79), (238, 114, 30),
)  # fmt: skip


def class_colour(label: int) -> tuple[int, int, int]:
    """The RGB colour of a class, 1..K: the same in every picture; it repeats after len(PALETTE) classes. Objects
    without a class, 0, have that of class 1."""
    return PALETTE[(max(label, 1) - 1) % len(PALETTE)]


def readable_on(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever has the higher contrast by WCAG 2: they are even at a luminance of 0.179."""
    light = np.array(colour) / 255
    linear = np.where(light <= 0.04045, light / 12.92, ((light + 0.055) / 1.055) ** 2.4)
    return (0, 0, 0) if linear @ (0.2126, 0.7152, 0.0722) > 0.179 else (255, 255, 255)
