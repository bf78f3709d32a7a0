"""What all datasets share: the error for bad files, reading images, counting bad annotations, a base for your own."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from PIL import ExifTags, Image, ImageOps
from torch.utils.data import Dataset

logger = logging.getLogger(__name__)
# what reading a broken image file raises: Pillow has a SyntaxError for PNGs
IMAGE_ERRORS = (OSError, EOFError, SyntaxError, Image.DecompressionBombError)


class DataError(ValueError):
    """A dataset that cannot be used: the message names the file, the image and what is wrong."""


class SampleError(DataError):
    """A bad item: of several processes only the one that reads it meets this error."""


@contextmanager
def _opened(path: str | Path, image_id: Any, absent: str) -> Iterator[Image.Image]:
    what = f"image file {path}" + ("" if image_id is None else f" (image id {image_id})")
    try:
        with Image.open(path) as file:
            yield file
    except FileNotFoundError:
        raise DataError(f"{what} {absent}") from None
    except (*IMAGE_ERRORS, ValueError) as error:  # a ValueError is Pillow's for too much text in a PNG
        raise DataError(f"{what} cannot be read: {error}") from None


def read_image(path: str | Path, image_id: Any = None, size: tuple[int, int] | None = None) -> Image.Image:
    """The decoded RGB image, upright: turned as its EXIF orientation says. DataError, which names the file and the
    image id, if it is missing or broken, or has another size (width, height) than its annotations say."""
    with _opened(path, image_id, "does not exist") as file:
        image = ImageOps.exif_transpose(file).convert("RGB")
    if size is not None and image.size != tuple(size):
        raise DataError(
            f"image file {path} (image id {image_id}) is {image.width}x{image.height}; "
            f"its annotations are for {size[0]}x{size[1]}"
        )
    return image


def read_image_size(path: str | Path, image_id: Any) -> tuple[int, int]:
    """(width, height) of the upright image, from the header of its file; DataError as of `read_image`."""
    with _opened(path, image_id, "does not exist, and the annotations do not give its size") as file:
        turned = file.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # the four that lay it on its side
        return file.size[::-1] if turned else file.size


class BadAnnotations:
    """Counts the annotations that a dataset skips, by reason, and says so once."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, reason: str, where: str) -> None:
        self.counts[reason] += 1
        self.examples.setdefault(reason, where)

    def warn(self, source: Path) -> None:
        if self.counts:
            reasons = "; ".join(f"{n} with {why} (first: {self.examples[why]})" for why, n in self.counts.most_common())
            logger.warning("%s: %d bad annotations skipped: %s", source, self.counts.total(), reasons)


class AbstractDataset(Dataset):
    """A base for your own dataset: name the classes, give `__getitem__`, `__len__` and `get_img_info`.

    `__getitem__(i)` returns (image, BoxList, i), after `self.transforms(image, boxlist)`; the BoxList has the field
    labels, int64, 1..K; `get_img_info(i)` returns {"height": …, "width": …} without decoding the image.

    The loader leaves out boxes with NaN, without area or outside the image, with a warning. It makes a DataError, with
    the dataset's name and the item, of an OSError of yours and of an answer of another form.
    """

    CLASSES: ClassVar[tuple[str, ...]] = ("__background__",)

    def __init__(self) -> None:
        self.initMaps()

    def initMaps(self) -> None:
        """name_to_id and id_to_name from CLASSES, whose first entry is the background."""
        if not self.CLASSES or self.CLASSES[0] != "__background__":
            raise DataError(f"{type(self).__name__}.CLASSES must begin with '__background__'; got {self.CLASSES}")
        self.name_to_id = {name: index for index, name in enumerate(self.CLASSES)}
        self.id_to_name = dict(enumerate(self.CLASSES))

    @property
    def categories(self) -> dict[int, str]:
        """Contiguous id (1..K) → name."""
        return {index: name for index, name in enumerate(self.CLASSES) if index > 0}
