"""Figure 2 of the paper: how much each arm has seen, counted in images, instances and pixels.

Two readings: the paper's own arithmetic, in rounded epochs, and that of the configs, which counts iterations.
In both the arm with pre-training has seen ImageNet for 100 epochs and COCO for 2x, the other one COCO for 6x.
"""

import dataclasses

from detectron2.data.transforms import ResizeShortestEdge

from ..data.loader import training_records
from .lines import resolved
from .manifest import find

__all__ = [
    "COCO",
    "IMAGENET",
    "Samples",
    "Statistics",
    "configs_reading",
    "count",
    "paper_reading",
    "seen",
    "table",
]


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What an image of a training set holds on average.

    Attributes:
        instances: number of objects.
        pixels: area that the network sees; None for the largest that the config lets it see.
    """

    instances: float
    pixels: float | None = None


# By the caption of Figure 2.
IMAGENET = Statistics(instances=1)
COCO = Statistics(instances=7)


@dataclasses.dataclass(frozen=True)
class Samples:
    """Totals over a training."""

    images: float
    instances: float
    pixels: float

    def __add__(self, other):
        return Samples(*map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __truediv__(self, other):
        mine, there = dataclasses.astuple(self), dataclasses.astuple(other)
        return Samples(*(a / b for a, b in zip(mine, there, strict=True)))


def _samples(images, instances, pixels):
    return Samples(images, images * instances, images * pixels)


def seen(cfg, statistics):
    """What one run sees.

    Args:
        cfg (CfgNode): its resolved config.
        statistics (Statistics): of its training set.

    Returns:
        Samples: over all SOLVER.MAX_ITER iterations.
    """
    pixels = statistics.pixels
    if pixels is None and cfg.MODEL.META_ARCHITECTURE == "Classifier":
        pixels = cfg.INPUT.CLASSIFICATION.CROP_SIZE**2
    elif pixels is None:
        pixels = max(cfg.INPUT.MIN_SIZE_TRAIN) * cfg.INPUT.MAX_SIZE_TRAIN
    return _samples(cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH, statistics.instances, pixels)


def count(cfg):
    """Count a detector's training set, as it is trained on: without empty images and crowds, resized.

    Args:
        cfg (CfgNode): a resolved config.

    Returns:
        Statistics

    Raises:
        ValueError: INPUT.MIN_SIZE_TRAIN_SAMPLING is "range", for which there is no list of sizes.
    """
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING != "choice":
        raise ValueError('INPUT.MIN_SIZE_TRAIN_SAMPLING: counting needs "choice", a list of sizes')
    instances = pixels = 0
    records = training_records(cfg)
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    for record in records:
        instances += sum(not a.get("iscrowd", 0) for a in record["annotations"])
        for size in sizes:
            height, width = ResizeShortestEdge.get_output_shape(
                record["height"], record["width"], size, cfg.INPUT.MAX_SIZE_TRAIN
            )
            pixels += height * width
    return Statistics(instances / len(records), pixels / len(records) / len(sizes))


def paper_reading(imagenet=IMAGENET, coco=COCO):
    """Figure 2's arithmetic.

    Args:
        imagenet (Statistics), coco (Statistics): per image; the areas are the figure's.

    Returns:
        dict[str, Samples]: of ImageNet for 100 epochs, COCO for 24 and for 72.
    """
    large = 800 * 1333
    return {
        "ImageNet, 1.28M x 100 epochs": _samples(1.28e6 * 100, imagenet.instances, 224 * 224),
        "COCO, 115k x 24 epochs": _samples(115e3 * 24, coco.instances, large),
        "COCO, 115k x 72 epochs": _samples(115e3 * 72, coco.instances, large),
    }


def configs_reading(imagenet=IMAGENET, coco=COCO, load=resolved):
    """The same from this project's runs.

    Args:
        imagenet (Statistics), coco (Statistics): of the training sets.
        load (Callable): gives the resolved config of a run of the manifest.

    Returns:
        dict[str, Samples]: by id of the run, in the order of :func:`paper_reading`.
    """
    statistics = {
        "imagenet-r50-gn-pretrained-100ep": imagenet,
        "base-r50-gn-pretrained-2x": coco,
        "base-r50-gn-scratch-6x": coco,
    }
    return {id: seen(load(find(id)), of) for id, of in statistics.items()}


def table(readings):
    """Lay readings out as Figure 2 does.

    Args:
        readings (dict[str, dict[str, Samples]]): by title.

    Returns:
        str: Markdown; millions of images and instances, 10^12 pixels.
    """
    lines = ["| seen | images, 10^6 | instances, 10^6 | pixels, 10^12 |", "|---|---|---|---|"]
    for title, phases in readings.items():
        imagenet, fine_tuning, scratch = phases.values()
        pretrained = imagenet + fine_tuning
        lines.append(f"| **{title}** | | | |")
        lines += [_row(name, samples) for name, samples in phases.items()]
        lines += [_row("with pre-training, together", pretrained)]
        of = scratch / pretrained
        lines.append(
            f"| random init / pre-training | {of.images:.2f} | {of.instances:.2f} | {of.pixels:.2f} |"
        )
    return "\n".join(lines)


def _row(name, samples):
    numbers = samples.images / 1e6, samples.instances / 1e6, samples.pixels / 1e12
    return f"| {name} | {' | '.join(f'{n:.2f}' for n in numbers)} |"
