"""An embedded data set: streets and landscapes drawn with NumPy, no files needed.

`render(split, index, size)` is a pure function. What a scene holds and where (the label map) is drawn from one random
stream, `plan`; how it looks (time of day, weather, season, colors, textures) from another, `look`, so that one label
map has many plausible pictures. Lengths are in units of the picture's height; x runs from 0 to width / height.
Shapes are signed distances, positive inside, which gives soft edges in the image and exact ones in the label map.
"""

from functools import lru_cache

import numpy as np

CLASSES = [("sky", (70, 130, 180)), ("mountain", (120, 110, 150)), ("grass", (120, 200, 80)),
           ("water", (40, 70, 220)), ("road", (128, 64, 128)), ("pavement", (244, 35, 232)),
           ("building", (200, 90, 60)), ("window", (250, 220, 120)), ("tree", (20, 110, 30)),
           ("pole", (180, 180, 180)), ("car", (0, 220, 220)), ("person", (230, 20, 60))]
SKY, MOUNTAIN, GRASS, WATER, ROAD, PAVEMENT, BUILDING, WINDOW, TREE, POLE, CAR, PERSON = range(len(CLASSES))
VOID = len(CLASSES)
LENGTHS = {"train": 4000, "val": 500}

# Zenith, horizon, light on things, strength of shadows, haze, probability.
SKIES = {"day": ((.20, .42, .78), (.72, .84, .95), (1.04, 1.0, .94), .5, .5, .36),
         "dusk": ((.32, .30, .52), (.98, .62, .38), (1.08, .78, .60), .4, .55, .2),
         "overcast": ((.62, .65, .69), (.82, .83, .84), (.78, .80, .83), .12, .6, .22),
         "fog": ((.76, .78, .80), (.86, .87, .87), (.82, .83, .84), .05, 1.0, .1),
         "night": ((.05, .08, .20), (.20, .22, .38), (.42, .46, .66), .1, .6, .12)}
FOLIAGE = [(.20, .42, .12), (.30, .50, .14), (.12, .34, .16), (.62, .38, .10), (.52, .20, .10), (.40, .44, .18)]
GRASSES = [(.32, .52, .16), (.42, .56, .20), (.56, .54, .26), (.26, .44, .18), (.86, .88, .92)]  # the last is snow
WALLS = [(.62, .34, .26), (.78, .70, .56), (.66, .66, .68), (.88, .86, .82), (.46, .50, .58), (.80, .58, .36)]
LACQUERS = [(.75, .1, .1), (.12, .22, .6), (.9, .9, .9), (.12, .12, .13), (.6, .62, .65), (.85, .7, .15), (.15, .42, .25)]
SIGNS = [(.8, .1, .1), (.1, .25, .7), (.9, .75, .1)]
LAMPS = [(1, .95, .75), (.85, .1, .08)]  # head lamps, tail lamps


@lru_cache(maxsize=256)
def _interpolation(samples: int, cells: int) -> np.ndarray:
    """(samples, cells + 1): smooth interpolation from grid points to pixel centers."""
    position = (np.arange(samples) + 0.5) / samples * cells
    low = position.astype(int)
    t = (position - low) ** 2 * (3 - 2 * (position - low))
    weights = np.zeros((samples, cells + 1), np.float32)
    weights[np.arange(samples), low] = 1 - t
    weights[np.arange(samples), low + 1] += t
    return weights


class Canvas:
    """The picture, painted back to front: image float (H, W, 3) in 0..1, label uint8 (H, W); and its light."""

    def __init__(self, size: tuple[int, int], look: np.random.Generator):
        self.height, self.width = size
        self.aspect = self.width / self.height
        self.y = ((np.arange(self.height, dtype=np.float32) + 0.5) / self.height)[:, None]
        self.x = ((np.arange(self.width, dtype=np.float32) + 0.5) / self.height)[None, :]
        self.image, self.label = np.zeros((*size, 3), np.float32), np.zeros(size, np.uint8)
        self.look, self.pixel = look, 1 / self.height
        self.coarse = self.noise(look, 11, 13)
        self.fine = 0.7 * self.noise(look, 37, 41) + 0.5 * self.noise(look, 83, 97)
        self.weather = look.choice(list(SKIES), p=[sky[5] for sky in SKIES.values()])
        zenith, horizon, light, self.shade, haze, _ = SKIES[self.weather]
        tint = look.normal(0, 0.03, 3)
        self.zenith, self.horizon = np.clip([zenith + tint, horizon + tint], 0, 1).astype(np.float32)
        self.light = (np.array(light) * look.uniform(0.85, 1.1) + tint).astype(np.float32)
        self.haze, self.sun_side = haze * look.uniform(0.6, 1), float(look.choice([-1, 1]))
        self.foliage, self.grass = np.array(look.choice(FOLIAGE)), np.array(look.choice(GRASSES))

    def noise(self, rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
        """(H, W) smooth noise in -1..1 from a grid of so many cells a unit of height."""
        columns = max(1, round(columns * self.aspect))
        grid = rng.uniform(-1, 1, (rows + 1, columns + 1)).astype(np.float32)
        return _interpolation(self.height, rows) @ grid @ _interpolation(self.width, columns).T

    def part(self, x0: float, y0: float, x1: float, y1: float):
        """The pixels that a box touches (two slices, perhaps empty), and their x (1, w) and y (h, 1)."""
        span = [slice(min(max(int(a * self.height) - 1, 0), end), min(max(int(b * self.height) + 2, 0), end))
                for a, b, end in ((y0, y1, self.height), (x0, x1, self.width))]
        return tuple(span), self.x[:, span[1]], self.y[span[0]]

    def lit(self, albedo, factor=1.0) -> np.ndarray:
        """Color of a surface in this light, times a factor that may be a map (h, w)."""
        return (np.asarray(albedo, np.float32) * self.light) * np.asarray(factor, np.float32)[..., None]

    def paint(self, area, distance, color, class_id: int | None, depth=0.0):
        """Paints where `distance` (h, w) is positive; depth (0 near, 1 far) hazes. No class: the label stays."""
        alpha = np.minimum(np.maximum(distance * self.height + 0.5, 0), 1)[..., None]
        region = self.image[area]
        region += alpha * (color + (self.horizon - color) * np.float32(self.haze * depth) - region)
        if class_id is not None:
            np.copyto(self.label[area], class_id, where=distance > 0, casting="unsafe")

    def stand(self, painter, plan: np.random.Generator, x: float, base: float, height: float, half: float, depth: float, *more):
        """Paints a thing that stands at (x, base), in units of its height.

        The painter gets the pixels that the thing may fill, their u (1, w) from its middle to the right, `up` (h, 1)
        from its base, and a pixel's size; it yields layers (distance, color, class).
        """
        area, u, v = self.part(x - half * height, base - height, x + half * height, base)
        layers = painter(self, plan, area, (u - x) / height, (base - v) / height, self.pixel / height, *more)
        for distance, color, class_id in layers:
            self.paint(area, distance * height, color, class_id, depth)

    def shadow(self, x: float, y: float, width: float, height: float):
        """Darkens an ellipse on the ground, away from the sun."""
        x += self.sun_side * width * 0.4
        area, u, v = self.part(x - width, y - height, x + width, y + height)
        self.image[area] *= 1 - self.shade * np.maximum(1 - ((u - x) / width) ** 2 - ((v - y) / height) ** 2, 0)[..., None]


def render(split: str, index: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Draws scene `index` of a split ("train" or "val") at size (height, width).

    Returns the image, uint8 (H, W, 3), and the label map, uint8 (H, W) in 0..12, 12 = void.
    """
    seed = [list(LENGTHS).index(split), index]
    plan, canvas = np.random.default_rng([*seed, 0]), Canvas(size, np.random.default_rng([*seed, 1, 0]))
    horizon = plan.uniform(0.36, 0.52)
    _sky(canvas, horizon)
    (_street if plan.random() < 0.55 else _landscape)(canvas, plan, horizon)
    for _ in range(plan.integers(0, 4)):  # unlabelled pixels, as annotators leave them: blobs, a strip at the edge
        x, y, r = plan.uniform(0, canvas.aspect), plan.uniform(0.2, 1), plan.uniform(0.015, 0.04)
        canvas.label[(canvas.x - x) ** 2 + (canvas.y - y) ** 2 < r * r] = VOID
    canvas.label[canvas.y[:, 0] > 1 - plan.uniform(0.02, 0.05) * (plan.random() < 0.15)] = VOID
    grain = canvas.look.normal(0, 0.012, (*size, 1)).astype(np.float32)
    image = (canvas.image - 0.5) * canvas.look.uniform(0.92, 1.08) + 0.5 + grain
    return (image.clip(0, 1) * 255 + 0.5).astype(np.uint8), canvas.label


def _sky(canvas: Canvas, horizon: float):
    look = canvas.look
    canvas.image[:] = canvas.zenith + (canvas.horizon - canvas.zenith) * np.clip(canvas.y / horizon, 0, 1)[..., None] ** 1.5
    cover = canvas.noise(look, 5, 3) + 0.5 * canvas.noise(look, 12, 7) + look.uniform(-0.9, 0.3)
    cloud = np.clip(cover * 1.5, 0, 0.85)[..., None] * (canvas.weather not in ("fog", "night"))
    canvas.image += cloud * (canvas.horizon * 0.4 + canvas.light * 0.55 - canvas.image)
    if canvas.weather in ("day", "dusk", "night") and look.random() < 0.6:  # sun or moon
        x, y, radius = look.uniform(0, canvas.aspect), look.uniform(0.05, horizon), look.uniform(0.025, 0.05)
        distance = np.sqrt((canvas.x - x) ** 2 + (canvas.y - y) ** 2)
        glow = 0.35 * np.exp(-distance / 0.12) * (canvas.weather != "night")
        glow = (glow + np.clip((radius - distance) * canvas.height + 0.5, 0, 1))[..., None].clip(0, 1)
        canvas.image += glow * (np.float32([1, .97, .85]) - canvas.image)


def _mountains(canvas: Canvas, plan: np.random.Generator, horizon: float, layers: int):
    for layer in range(layers):
        far = 1 - layer / layers
        ridge = horizon - plan.uniform(0.05, 0.2) * far - 0.02
        ridge = ridge + canvas.noise(plan, 1, 4)[:1] * 0.07 + canvas.noise(plan, 1, 13)[:1] * 0.02
        rock = np.array([.38, .36, .38]) if canvas.look.random() < 0.5 else canvas.foliage * 0.7
        rock = canvas.lit(rock, 1 + 0.35 * canvas.coarse + 0.2 * canvas.fine)
        canvas.paint(..., np.minimum(canvas.y - ridge, horizon + 0.03 - canvas.y), rock, MOUNTAIN, 0.25 + 0.5 * far)


def _ground(canvas: Canvas, horizon: float):
    far = np.clip(1 - (canvas.y - horizon) / (1 - horizon) * 2.5, 0, 1)[..., None]
    rough = canvas.look.uniform(0.1, 0.22)
    texture = 1 + rough * (canvas.fine + canvas.noise(canvas.look, 30, 6))
    canvas.paint(..., canvas.y - horizon + 0 * canvas.x, canvas.lit(canvas.grass, texture), GRASS, 0.6 * far)


def _road(canvas: Canvas, horizon: float, vanish: float, half: float, bend: float, edge: float):
    """A road to the vanishing point, 2 x `half` wide at the bottom; `edge` > 0 adds pavements of that share."""
    look, below = canvas.look, canvas.y - horizon
    near = np.clip(below / (1 - horizon), 0, 1)
    across = np.abs(canvas.x - vanish - bend * np.sin(near * np.pi) - (canvas.aspect / 2 - vanish) * near * 0.3)
    haze = 0.6 * (1 - near)[..., None] ** 2
    if edge:
        stone = canvas.lit(np.full(3, look.uniform(0.45, 0.7)), 1 + 0.12 * canvas.fine)
        canvas.paint(..., np.minimum(half * (1 + edge) * near - across, below), stone, PAVEMENT, haze)
    gray = look.uniform(0.2, 0.38) * np.array([1, 1, 1.04])
    surface = gray if edge or look.random() < 0.6 else (.5, .4, .28)
    surface = canvas.lit(surface, 1 + 0.18 * canvas.coarse + 0.12 * canvas.fine)
    canvas.paint(..., np.minimum(half * near - across, below), surface, ROAD, haze)
    if edge and look.random() < 0.75:  # lane marks, dashed or solid
        dashes = np.sin(9 / (near + 0.06) + look.uniform(0, 6)) * 0.03 + (look.random() < 0.3)
        mark = np.minimum(np.minimum(0.03 * half * near + 0.002 - across, dashes), below)
        canvas.paint(..., mark, canvas.lit((.95, .95, .9) if look.random() < 0.7 else (.9, .75, .2)), None, haze)


def _building(canvas: Canvas, plan: np.random.Generator, area, u, up, pixel: float, half: float, floors: int):
    """Floors of windows below a flat roof or a gable; `half` is half the width, in heights. See `Canvas.stand`."""
    look = canvas.look
    wall = np.array(look.choice(WALLS)) * look.uniform(0.75, 1.1) + look.normal(0, 0.03, 3)
    texture = 1 + 0.1 * canvas.fine[area] + 0.08 * canvas.coarse[area]
    eaves = 0.82 if plan.random() < 0.3 else 1.0
    walls = np.minimum(half - np.abs(u), np.minimum(eaves - up, up))
    gable = np.minimum(1 - up - np.abs(u) * (1 - eaves) / half, up - eaves + 0.02)
    columns = max(1, round(2 * half * floors))
    column, row = (u / half + 1) * columns / 2, (eaves - up) * floors - 0.1
    pane = np.minimum((0.27 - np.abs(column % 1 - 0.5)) / floors, (0.32 - np.abs(row % 1 - 0.5)) / floors)
    pane = np.minimum(np.minimum(pane, walls), np.minimum(up - 0.5 / floors, eaves - up - 0.02))
    draw = look.random((floors, columns, 1), np.float32)  # a pane mirrors the sky, is dark, or is lit
    glass = np.where(draw > 0.7, canvas.horizon * 0.8, canvas.lit((.22, .26, .32)) * (0.6 + draw))
    glass = np.where(draw < (0.5 if canvas.weather == "night" else 0.06), np.float32([1.0, .82, .45]) * (0.7 + 2 * draw), glass)
    glass = glass[np.clip(row.astype(int), 0, floors - 1), np.clip(column.astype(int), 0, columns - 1)]
    yield walls, canvas.lit(wall, (1 - 0.18 * canvas.sun_side * u / half) * texture), BUILDING
    yield gable, canvas.lit(look.uniform(0.2, 0.6) * np.array([1, .6, .5]), texture), BUILDING
    yield pane, glass, WINDOW


def _tree(canvas: Canvas, plan: np.random.Generator, area, u, up, pixel: float):
    look, half = canvas.look, plan.uniform(0.25, 0.42)
    rough, conifer = half * canvas.noise(plan, 24, 24)[area], plan.random() < 0.3
    if conifer:
        crown = np.minimum(0.75 * half * (1 - up) - np.abs(u), up - 0.12) + 0.15 * rough
    else:
        crown = (1 - np.sqrt((u / half) ** 2 + ((up - 0.64) / 0.36) ** 2)) * half + 0.2 * rough
    bark = canvas.lit(np.array([.34, .24, .16]) * look.uniform(0.7, 1.3))
    leaf = canvas.foliage * look.uniform(0.7, 1.25) + look.normal(0, 0.035, 3)
    shading = (0.75 + 0.5 * up) * (1 - 0.25 * canvas.sun_side * u / half) + 0.45 * canvas.fine[area]
    yield np.minimum(max(0.03, 0.5 * pixel) - np.abs(u), np.minimum(up, 0.5 - up)), bark, TREE
    yield crown, canvas.lit(leaf, shading), TREE


def _car(canvas: Canvas, plan: np.random.Generator, area, u, up, pixel: float):
    look, frontal = canvas.look, plan.random() < 0.5
    half, cabin = (0.62, 0.8) if frontal else (1.25, plan.uniform(0.55, 0.72))
    across = np.abs(u)
    body = np.minimum(np.minimum(half - across, (0.62 - up) * half), up - 0.1)
    top = np.minimum((cabin + 0.25 - 0.4 * up) * half - across, np.minimum(1 - up, up - 0.5))
    lacquer = np.array(look.choice(LACQUERS)) * look.uniform(0.8, 1.1)
    yield 0.24 - np.sqrt((across - 0.62 * half) ** 2 + (up - 0.2) ** 2), canvas.lit((.06, .06, .06)), CAR  # wheels
    yield np.maximum(body, top), canvas.lit(lacquer, 0.6 + 0.6 * up), CAR
    yield np.minimum(top - 0.09, up - 0.58), canvas.lit((.2, .25, .3), 0.5 + up), WINDOW
    if frontal:
        yield 0.11 - np.sqrt((across - 0.75 * half) ** 2 + (up - 0.42) ** 2), np.float32(look.choice(LAMPS)), None


def _person(canvas: Canvas, plan: np.random.Generator, area, u, up, pixel: float):
    look, half, stride = canvas.look, plan.uniform(0.13, 0.18), plan.uniform(-0.3, 0.0)
    across, shading = np.abs(u), 0.85 + 0.3 * up
    legs = np.minimum(np.minimum(0.8 * half - across, across - stride * half), np.minimum(up, 0.5 - up))
    body = np.minimum(half * (1.15 - 0.35 * up) - across, np.minimum(up - 0.42, 0.84 - up))
    yield legs, canvas.lit(look.uniform(0.05, 0.5) * np.array([.9, .95, 1.1]), shading), PERSON
    yield body, canvas.lit(look.uniform(0.05, 0.9, 3), shading), PERSON
    yield 0.085 - np.sqrt(u ** 2 + (up - 0.91) ** 2), canvas.lit(np.array([.9, .7, .56]) * look.uniform(0.45, 1.05)), PERSON


def _pole(canvas: Canvas, plan: np.random.Generator, area, u, up, pixel: float):
    """A street lamp, a round sign, or a bare pole; about a pixel wide at least."""
    half, kind, side = max(0.012, 0.55 * pixel), int(plan.integers(3)), int(plan.choice([-1, 1]))
    shape = np.minimum(half - np.abs(u), np.minimum(up, 1 - up))
    if kind == 0:
        arm = np.minimum(np.minimum(u * side, 0.16 - u * side), np.minimum(1 - up, up - 1 + 2.2 * half))
        shape = np.maximum(shape, arm)
    yield shape, canvas.lit(np.full(3, canvas.look.uniform(0.15, 0.6))), POLE
    if kind == 1:
        yield max(0.07, 1.3 * pixel) - np.sqrt(u ** 2 + (up - 0.9) ** 2), canvas.lit(canvas.look.choice(SIGNS)), POLE


# Painter, half width and depth of its shadow, half width it may fill (in its heights), height in meters.
TREES, POLES = (_tree, 0.35, 0.06, 0.45, (3, 6.5)), (_pole, 0, 0, 0.2, (3.5, 6))
CARS, PERSONS = (_car, 1.2, 0.16, 1.5, (1.4, 1.9)), (_person, 0.22, 0.05, 0.2, (1.5, 1.9))


def _stand(canvas: Canvas, plan: np.random.Generator, horizon: float, things: list[tuple[tuple, float, float]]):
    """Paints (kind, x, nearness 0..1) far to near, in perspective: the eye is 1.7 m above the ground."""
    for (painter, shadow, flat, half, meters), x, near in sorted(things, key=lambda thing: thing[2]):
        base = horizon + (1 - horizon) * near
        height = plan.uniform(*meters) / 1.7 * (base - horizon)
        if shadow:
            canvas.shadow(x, base, shadow * height, flat * height)
        canvas.stand(painter, plan, x, base, height, half, 0.7 * (1 - near) ** 2)


def _street(canvas: Canvas, plan: np.random.Generator, horizon: float):
    aspect = canvas.aspect
    vanish, road = plan.uniform(0.35, 0.65) * aspect, plan.uniform(0.35, 0.6) * max(1, aspect * 0.75)
    _mountains(canvas, plan, horizon, int(plan.integers(0, 2)))
    _ground(canvas, horizon)
    _road(canvas, horizon, vanish, road, plan.uniform(-0.06, 0.06), plan.uniform(0.3, 0.8))
    for side in (-1, 1):  # a row of houses from the vanishing point to the viewer, with gaps
        reach = plan.uniform(0.02, 0.1)
        while reach < (vanish if side < 0 else aspect - vanish) and plan.random() < 0.93:
            half, base = plan.uniform(0.04, 0.07) + 0.17 * reach, horizon + min(0.02 + 0.25 * reach, 0.3)
            height = base - max(-0.1, horizon - plan.uniform(0.08, 0.22) - plan.uniform(0.2, 0.8) * reach)
            canvas.stand(_building, plan, vanish + side * (reach + half), base, height, half / height,
                         0.6 * max(0, 1 - 2.5 * reach), half / height, int(plan.integers(3, 8)))
            reach += 2 * half * plan.uniform(0.85, 1.25)
    things = []  # in pairs with `most` and with the distance from the road's middle over its half width
    for kind, most, low, high in ((TREES, 4, 1.2, 1.8), (POLES, 4, 1.02, 1.15), (CARS, 4, 0.2, 0.8), (PERSONS, 5, 1.1, 1.5)):
        for _ in range(plan.integers(0, most + 1)):
            near, side = plan.uniform(0.12, 0.75), int(plan.choice([-1, 1]))
            middle = vanish + (aspect / 2 - vanish) * near * 0.3
            things.append((kind, middle + side * road * near * plan.uniform(low, high), near))
    _stand(canvas, plan, horizon, things)


def _landscape(canvas: Canvas, plan: np.random.Generator, horizon: float):
    aspect = canvas.aspect
    _mountains(canvas, plan, horizon, int(plan.integers(0, 4)))
    _ground(canvas, horizon)
    if plan.random() < 0.55:  # a lake; the sea where it is wide
        x, y, wide = plan.uniform(0, aspect), horizon + plan.uniform(0.02, 0.3), plan.uniform(0.3, 1.4)
        high, shore = plan.uniform(0.04, 0.16), canvas.noise(plan, 10, 10) * 0.15
        lake = (1 - np.sqrt(((canvas.x - x) / wide) ** 2 + ((canvas.y - y) / high) ** 2) + shore) * high
        mirror = canvas.zenith * 0.55 + canvas.horizon * 0.15 + canvas.light * np.float32([.02, .08, .14])
        mirror = mirror * (1 + 0.3 * canvas.noise(canvas.look, 45, 5))[..., None]
        canvas.paint(..., np.minimum(lake, canvas.y - horizon), mirror, WATER, 0.1)
    if plan.random() < 0.6:
        _road(canvas, horizon, plan.uniform(0.2, 0.8) * aspect, plan.uniform(0.12, 0.3), plan.uniform(-0.25, 0.25), 0)
    for _ in range(plan.integers(0, 4)):  # farm houses
        height, half, base = plan.uniform(0.06, 0.14), plan.uniform(0.6, 1.2), horizon + plan.uniform(0.02, 0.2)
        canvas.stand(_building, plan, plan.uniform(0, aspect), base, height, half, 0.3, half, int(plan.integers(1, 3)))
    things = []
    for kind, most in ((TREES, int(9 * aspect)), (POLES, 3), (CARS, 1), (PERSONS, 3)):
        for _ in range(plan.integers(0, most + 1)):
            things.append((kind, plan.uniform(0, aspect), plan.uniform(0.08, 0.7) ** 1.3))
    _stand(canvas, plan, horizon, things)
