"""Drawing of single letters and of whole synthetic pictures for :mod:`rethink_d2.data.glyphs`.

Letters are kept as outlines, not bitmaps: one outline is traced per (font, character), and both the painted
pixels and the annotated polygons are the same outline under the same affine map, so that they agree by
construction. Nothing here touches Detectron2 or the disk, except for reading the fonts.
"""

from __future__ import annotations

import functools
import os
import zlib
from dataclasses import dataclass
from typing import Any

import cv2
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

# A detector is trained with horizontal flips, so no class may look like the mirror image of another one:
# this leaves out e.g. J (L), G (D), Z (S), N (rather like H and M) and all pairs such as b/d and p/q.
DETECTION_CLASSES: tuple[str, ...] = tuple("ABCDEFHKLMPQRSTUVWXY")

# Folder name -> character. Sorted by name, as torchvision's ImageFolder numbers its classes that way.
CLASSIFICATION_CLASSES: dict[str, str] = dict(
    sorted(
        {
            **{f"digit_{c}": c for c in "123456789"},
            **{f"upper_{c}": c for c in "GJNZ"},
            "greek_Delta": "\u0394",
            "greek_Gamma": "\u0393",
            "greek_Lambda": "\u039b",
            "greek_Omega": "\u03a9",
            "greek_Phi": "\u03a6",
            "greek_Pi": "\u03a0",
            "greek_Psi": "\u03a8",
            "greek_Sigma": "\u03a3",
            "greek_Theta": "\u0398",
            "greek_Xi": "\u039e",
            "greek_lambda": "\u03bb",
            "greek_pi": "\u03c0",
        }.items()
    )
)

KEYPOINT_NAMES: tuple[str, ...] = ("top", "bottom", "left", "right")

# Everything that decides the pixels; its digest names the cache folder. Stroke widths (in pixels of the
# reference outline) thicken the fonts whose hairlines would vanish in a letter of 22 pixels.
PARAMS: dict[str, Any] = {
    "version": 1,
    "seed": 20181121,
    "fonts": {
        "DejaVuSans.ttf": 3,
        "DejaVuSans-Bold.ttf": 0,
        "DejaVuSans-Oblique.ttf": 3,
        "DejaVuSansMono.ttf": 3,
        "DejaVuSansMono-Bold.ttf": 0,
        "DejaVuSerif.ttf": 4,
        "DejaVuSerif-Bold.ttf": 0,
        "STIXGeneral.ttf": 6,
        "STIXGeneralBol.ttf": 3,
    },
    "reference_size": 240,
    "side": (96, 160),
    "letters": (2, 6),
    "letter_size": (22, 70),
    "rotation": 15.0,
    "classify_side": 64,
    "classify_letter_size": (30, 54),
    "contrast": (85, 130),
    "jpeg_quality": 90,
    "detection": list(DETECTION_CLASSES),
    "classification": CLASSIFICATION_CLASSES,
}

_SUPERSAMPLE = 8
_SHIFT = 4  # fractional bits of the coordinates that cv2.fillPoly takes


@dataclass(frozen=True)
class Glyph:
    """The outline of one character in one font, centred at the origin, its longer side being 1.

    Attributes:
        rings: outer contours and holes, each an (N, 2) float array; to be filled by the even-odd rule.
        polygons: one (N, 2) float array per connected part, its holes joined to it by zero-width bridges.
        keypoints: (4, 2) float array in the order of ``KEYPOINT_NAMES``, in the upright letter.
    """

    rings: tuple[np.ndarray, ...]
    polygons: tuple[np.ndarray, ...]
    keypoints: np.ndarray


def font_path(name: str) -> str:
    """Returns the path of a font file that matplotlib brings along.

    Args:
        name: file name, e.g. ``DejaVuSans.ttf``.
    """
    return os.path.join(matplotlib.get_data_path(), "fonts", "ttf", name)


def keyhole(outer: np.ndarray, holes: list[np.ndarray]) -> np.ndarray:
    """Joins holes to an outer contour, giving one closed polygon.

    Each hole is reached by a bridge that is walked there and back. COCO's rasterizer toggles at each
    crossing, so that the two passes cancel and only the hole is cut out, whatever the bridge crosses.

    Args:
        outer: (N, 2) float array.
        holes: (M_i, 2) float arrays.

    Returns:
        (N + sum(M_i + 2), 2) float array.
    """
    merged = outer
    for hole in holes:
        dist = ((merged[:, None] - hole[None]) ** 2).sum(-1)
        i, j = np.unravel_index(int(dist.argmin()), dist.shape)
        merged = np.concatenate([merged[: i + 1], np.roll(hole, -j, axis=0), hole[j : j + 1], merged[i:]])
    return merged


def _edge_points(mask: np.ndarray) -> np.ndarray:
    """The middle of the mask's extreme edge at the top, bottom, left and right, as (4, 2) pixel coordinates.

    The middle (of the two arms of a U, say), and not any one extreme pixel, makes mirroring the letter the
    same as mirroring its points with left and right swapped; being midway between two points of the mask it
    also stays within the letter's box under any rotation, but for the width of the band.
    """
    ys, xs = np.nonzero(mask)
    band = 0.03 * max(np.ptp(xs), np.ptp(ys))

    def middle(values: np.ndarray, near: np.ndarray) -> float:
        chosen = values[near]
        return (float(chosen.min()) + float(chosen.max())) / 2

    x0, x1, y0, y1 = xs.min(), xs.max(), ys.min(), ys.max()
    return np.array(
        [
            (middle(xs, ys <= y0 + band), y0),
            (middle(xs, ys >= y1 - band), y1),
            (x0, middle(ys, xs <= x0 + band)),
            (x1, middle(ys, xs >= x1 - band)),
        ],
        dtype=np.float64,
    )


@functools.lru_cache(maxsize=1024)
def glyph(font: str, char: str) -> Glyph:
    """Traces a character.

    Args:
        font: a key of ``PARAMS["fonts"]``.
        char: one character.

    Returns:
        The outline in units of its longer side.

    Raises:
        ValueError: the font draws nothing for the character.
        RuntimeError: matplotlib's copy of the font is missing.
    """
    size, stroke = PARAMS["reference_size"], PARAMS["fonts"][font]
    canvas = Image.new("L", (3 * size, 3 * size))
    try:
        face = ImageFont.truetype(font_path(font), size)
    except OSError as e:  # not to be taken for trouble with the cache, which is an OSError as well
        raise RuntimeError(f"cannot open {font_path(font)}, a font that matplotlib ships") from e
    ImageDraw.Draw(canvas).text((size, size), char, fill=255, font=face, stroke_width=stroke)
    mask = (np.asarray(canvas) >= 128).astype(np.uint8)
    if not mask.any():
        raise ValueError(f"font {font} draws nothing for {char!r}")
    ys, xs = np.nonzero(mask)
    centre = np.array([xs.min() + xs.max(), ys.min() + ys.max()]) / 2
    extent = float(max(np.ptp(xs), np.ptp(ys)))
    contours, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    outers: dict[int, np.ndarray] = {}
    holes: dict[int, list[np.ndarray]] = {}
    for i, contour in enumerate(contours):
        parent = int(np.reshape(hierarchy, (-1, 4))[i, 3])
        ring = cv2.approxPolyDP(contour, 0.7, True).reshape(-1, 2)
        if len(ring) < 3 or cv2.contourArea(contour) < 40:
            continue  # pinholes, which FreeType's stroker leaves where strokes meet
        ring = (ring - centre) / extent
        if parent < 0:
            outers[i] = ring
        else:
            holes.setdefault(parent, []).append(ring)
    rings = tuple(outers.values()) + tuple(h for part in holes.values() for h in part)
    polygons = tuple(keyhole(outer, holes.get(i, [])) for i, outer in outers.items())
    return Glyph(rings, polygons, (_edge_points(mask) - centre) / extent)


def coverage(rings: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """Fills rings by the even-odd rule.

    Args:
        rings: (N, 2) arrays of x, y in pixels, (0, 0) being the outer corner of the first pixel.
        height: of the result, in pixels.
        width: of the result, in pixels.

    Returns:
        (height, width) float32 array, the covered part of each pixel within [0, 1].
    """
    s = _SUPERSAMPLE
    big = np.zeros((height * s, width * s), np.uint8)
    # fillPoly takes pixel centres to be whole numbers, hence the half.
    fixed = [np.round((ring * s - 0.5) * (1 << _SHIFT)).astype(np.int32) for ring in rings]
    cv2.fillPoly(big, fixed, 255, shift=_SHIFT)
    return cv2.resize(big, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32) / 255.0


def _rng(split: str, index: int) -> np.random.Generator:
    # From the seed, the split and the index alone: neither order nor number of workers can matter.
    return np.random.default_rng([PARAMS["seed"], zlib.crc32(split.encode()), index])


def _background(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, float]:
    """A (height, width, 3) float32 picture of a gradient, lines and noise, and its mean grey level."""
    grey = float(rng.uniform(35, 220))
    tint = rng.uniform(-22, 22, 3)
    tint -= tint.mean()
    angle = rng.uniform(0, 2 * np.pi)
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
    ramp = np.cos(angle) * (xs / width - 0.5) + np.sin(angle) * (ys / height - 0.5)
    image = np.float32(grey + tint) + (ramp * rng.uniform(0, 40)).astype(np.float32)[..., None]
    image = np.ascontiguousarray(image, dtype=np.float32)
    for _ in range(int(rng.integers(0, 6))):
        # Far weaker than the letters, and thin.
        shade = grey + tint + rng.choice([-1, 1]) * rng.uniform(15, 35)
        ends = (rng.uniform(-0.1, 1.1, (2, 2)) * (width, height)).astype(int).tolist()
        thickness = int(rng.integers(1, 3))
        cv2.line(image, ends[0], ends[1], shade.tolist(), thickness, cv2.LINE_8)
    image += rng.normal(0, rng.uniform(1, 8), (height, width, 1)).astype(np.float32)
    return image, grey


def _ink(rng: np.random.Generator, grey: float) -> np.ndarray:
    """A colour whose grey level keeps away from ``grey`` by ``PARAMS["contrast"]``."""
    step = rng.uniform(*PARAMS["contrast"])
    signs = [sign for sign in (-1, 1) if 0 <= grey + sign * step <= 255]
    level = grey + float(rng.choice(signs)) * step if signs else (0.0 if grey > 127 else 255.0)
    tint = rng.uniform(-60, 60, 3)
    # No change to the grey level (by the weights of ITU-R BT.601), but for what is clipped.
    tint -= tint @ (0.299, 0.587, 0.114)
    room = min(level, 255 - level)
    return level + tint * min(1.0, room / max(float(np.abs(tint).max()), 1e-6))


def _place(shape: Glyph, size: float, degrees: float, centre: np.ndarray) -> tuple[list, list, np.ndarray]:
    turn = np.deg2rad(degrees)
    matrix = size * np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])

    def move(points: np.ndarray) -> np.ndarray:
        return points @ matrix + centre

    return [move(r) for r in shape.rings], [move(p) for p in shape.polygons], move(shape.keypoints)


def _pick(rng: np.random.Generator, char: str) -> tuple[Glyph, float]:
    font = str(rng.choice(list(PARAMS["fonts"])))
    return glyph(font, char), float(rng.uniform(-PARAMS["rotation"], PARAMS["rotation"]))


def _paint(image: np.ndarray, alpha: np.ndarray, ink: np.ndarray) -> None:
    image += alpha[..., None] * (ink.astype(np.float32) - image)


def render_scene(split: str, index: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Draws one picture of the detection set.

    Args:
        split: name that goes into the seed.
        index: number of the picture, from 0.

    Returns:
        The (height, width, 3) uint8 RGB picture, and a dict for each letter: ``label`` (index into
        ``DETECTION_CLASSES``), ``polygons`` (list of (N, 2) float arrays, pixels), ``keypoints`` ((4, 2)
        float array, pixels) and ``mask`` ((height, width) bool array, what was painted).
    """
    rng = _rng(split, index)
    low, high = PARAMS["side"]
    height, width = (int(v) for v in rng.integers(low, high + 1, 2))
    image, grey = _background(rng, height, width)
    small, large = PARAMS["letter_size"]
    # With half of the short side at most there is always room for a second letter.
    large = min(large, min(height, width) / 2)
    wanted = int(rng.integers(PARAMS["letters"][0], PARAMS["letters"][1] + 1))
    taken = np.zeros((height, width), np.uint8)
    letters: list[dict[str, Any]] = []
    tries = 0
    while len(letters) < wanted and (tries < 40 or len(letters) < PARAMS["letters"][0]):
        tries += 1
        label = int(rng.integers(len(DETECTION_CLASSES)))
        shape, degrees = _pick(rng, DETECTION_CLASSES[label])
        size = small if tries > 30 else float(np.exp(rng.uniform(np.log(small), np.log(large))))
        centre = rng.uniform(0, 1, 2) * (width, height)
        rings, polygons, keypoints = _place(shape, size, degrees, centre)
        points = np.concatenate(rings)
        x0, y0 = np.floor(points.min(0)).astype(int) - 1
        x1, y1 = np.ceil(points.max(0)).astype(int) + 1
        if x0 < 0 or y0 < 0 or x1 > width or y1 > height or taken[y0:y1, x0:x1].mean() > 0.12:
            continue
        alpha = coverage([ring - (x0, y0) for ring in rings], y1 - y0, x1 - x0)
        # Boxes may overlap a little; the letters themselves keep a pixel apart, so that masks stay true.
        if (taken[y0:y1, x0:x1] * (cv2.dilate(alpha, np.ones((5, 5))) > 0)).any():
            continue
        _paint(image[y0:y1, x0:x1], alpha, _ink(rng, grey))
        mask = np.zeros((height, width), bool)
        mask[y0:y1, x0:x1] = alpha >= 0.5
        taken[y0:y1, x0:x1] |= cv2.morphologyEx(
            (alpha > 0).astype(np.uint8), cv2.MORPH_CLOSE, np.ones((9, 9))
        )
        letters.append({"label": label, "polygons": polygons, "keypoints": keypoints, "mask": mask})
    return np.clip(np.round(image), 0, 255).astype(np.uint8), letters


def render_single(split: str, index: int) -> tuple[np.ndarray, int]:
    """Draws one picture of the classification set; the classes take turns.

    Args:
        split: name that goes into the seed.
        index: number of the picture, from 0.

    Returns:
        The (64, 64, 3) uint8 RGB picture and its index into ``CLASSIFICATION_CLASSES``.
    """
    rng = _rng(split, index)
    side = PARAMS["classify_side"]
    label = index % len(CLASSIFICATION_CLASSES)
    image, grey = _background(rng, side, side)
    shape, degrees = _pick(rng, list(CLASSIFICATION_CLASSES.values())[label])
    size = float(rng.uniform(*PARAMS["classify_letter_size"]))
    rings, _, _ = _place(shape, size, degrees, np.full(2, side / 2) + rng.uniform(-5, 5, 2))
    _paint(image, coverage(rings, side, side), _ink(rng, grey))
    return np.clip(np.round(image), 0, 255).astype(np.uint8), label
