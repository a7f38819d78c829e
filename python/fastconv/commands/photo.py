"""A photograph as a network's input."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastconv.commands import CommandError, require

if TYPE_CHECKING:
    from PIL.Image import Image

# Per-channel statistics of ImageNet's training photographs, the ones torchvision's checkpoints were trained with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# The usual evaluation crop: the short side is scaled to 256 for a crop of 224.
RESIZE_OVER_CROP = 256 / 224

BUNDLED_PHOTO = "china.jpg"


def open_photo(path: str | None) -> Image:
    """The photograph at ``path``, or scikit-learn's bundled china.jpg (640×427) for None, as an RGB image."""
    require("PIL", "sklearn")
    from PIL import Image, UnidentifiedImageError

    if path is None:
        from sklearn.datasets import load_sample_image

        return Image.fromarray(load_sample_image(BUNDLED_PHOTO))
    if not Path(path).is_file():
        raise CommandError(f"no image file {path}")
    try:
        return Image.open(path).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise CommandError(f"{path} is not an image that pillow can read: {error}") from error


def photo_batch(photo: Image, batch: int, channels: int, size: tuple[int, int]) -> Tensor:
    """ImageNet-normalised crops of a photograph, shape (batch, channels, *size), float32.

    The first is the centre crop that classifiers are evaluated on; the others are spread evenly over the resized
    photograph's diagonal, so that no two samples of a batch are the same. One channel means the grey photograph.
    """
    height, width = size
    scale = max(height / photo.height, width / photo.width) * RESIZE_OVER_CROP
    resized = photo.resize((round(photo.width * scale), round(photo.height * scale)))
    pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
    image = pixels.view(resized.height, resized.width, 3).permute(2, 0, 1).float() / 255
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    image = (image - mean) / std
    if channels == 1:
        image = image.mean(0, keepdim=True)
    elif channels != 3:
        raise CommandError(f"a photograph has 3 channels or, in grey, 1, but the model expects {channels}")
    places = [0.5, *(i / max(batch - 2, 1) for i in range(batch - 1))]
    spare_h, spare_w = resized.height - height, resized.width - width
    corners = [(round(place * spare_h), round(place * spare_w)) for place in places]
    return torch.stack([image[:, top : top + height, left : left + width] for top, left in corners])
