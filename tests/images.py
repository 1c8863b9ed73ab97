"""Folders of random images, laid out as CIFAR-10."""

import numpy as np
from PIL import Image

from spp_lightning.data.reading import CLASS_NAMES as CLASSES

PER_CLASS = {"train": 6, "test": 2}


def random_pixels(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)


def make_tree(root, seed=0):
    """Write 60 training and 20 test images; return their pixels, in file order."""
    pixels = {}
    for part, count in PER_CLASS.items():
        pixels[part] = random_pixels(10 * count, seed)
        for i, image in enumerate(pixels[part]):
            folder = root / part / CLASSES[i // count]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{i % count:04d}.png")
    return pixels
