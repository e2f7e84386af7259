"""A model that trains in milliseconds, on genuine image files."""

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import BoxMode
from PIL import Image
from torch import nn

from rethink_d2 import recipe


@META_ARCH_REGISTRY.register()
class ToyModel(nn.Module):
    """Fits one number per channel to the mean pixel of an image, with a random part as RoI sampling is."""

    def __init__(self, cfg):
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.noise = 1.0

    def forward(self, samples):
        pixels = torch.stack([s["image"].float().mean((1, 2)) / 255 for s in samples])
        return {"loss_toy": ((self.linear(pixels) - self.noise * torch.rand(1)).square()).mean()}


def register_images(name, folder, count=8):
    """A data set of small images with one box each, of both orientations."""
    records = []
    for i in range(count):
        path = str(folder / f"{i}.png")
        height, width = (24, 16) if i % 3 == 0 else (16, 24)
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(path)
        box = {"bbox": [1, 1, 9, 9], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
        size = {"width": width, "height": height}
        records.append({"file_name": path, "image_id": i, **size, "annotations": [box]})
    DatasetCatalog.register(name, lambda: records)
    return records


def config(data, folder, *options):
    """The resolved recipe of a short run of the toy model."""
    size = ["INPUT.MIN_SIZE_TRAIN", (16, 20), "DATALOADER.NUM_WORKERS", 0, "MODEL.WEIGHTS", "", "SEED", 1]
    solver = [
        "SOLVER.IMS_PER_BATCH",
        4,
        "SOLVER.BASE_LR",
        0.1,
        "SOLVER.SCHEDULE",
        "6",
        "SOLVER.WARMUP_ITERS",
        2,
    ]
    model = ["MODEL.META_ARCHITECTURE", "ToyModel", "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(folder)]
    sets = ["DATASETS.TRAIN", (data,), "DATASETS.TEST", ()]
    return recipe.resolve(recipe.load("", [*size, *solver, *model, *sets, *options]), 1)
