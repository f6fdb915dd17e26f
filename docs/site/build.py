"""Build the docs site from the repository's Markdown, strictly: `python docs/site/build.py -o out/site`.

Pages keep their places, so that links mean the same on the site and in the repository. The API reference is made of
the docstrings of what `car_runtime` exports.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIG = Path(__file__).parent / "mkdocs.yml"
COPIED = (
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE", "NOTICE"),
    *("docs", "examples", "tests/data/reference/README.md"),
)
NOT_PAGES = ("site", "__pycache__")
API = """# Python API

What `import car_runtime` offers, from the docstrings. [Use](../usage.md#python) has examples.
"""
SECTIONS = {
    "Open and draw": ("plan.open_plan", "plan.default_plan", "plan.Plan", "plan.Result", "plan.ScaleResult"),
    "Settings": ("config.GenerationConfig", "config.Blend", "editing.edit.Edit"),
    "In diffusers' manner": ("pipeline.CARPipeline", "pipeline.CARPipelineOutput"),
    "Controls": ("controls.derive", "photo.control_of_photo"),
    "Hub": ("hub.pull", "hub.push", "hub.HubName"),
    "Errors": ("errors",),
}
"""Heading → names in `car_runtime`."""


def reference() -> str:
    """The page of the API reference."""
    parts = [API]
    for heading, names in SECTIONS.items():
        parts += [f"## {heading}\n", *(f"::: car_runtime.{name}\n" for name in names)]
    return "\n".join(parts)


def gather(folder: Path) -> None:
    """Copy what the site is made of."""
    for name in COPIED:
        source, place = ROOT / name, folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, place, ignore=shutil.ignore_patterns(*NOT_PAGES))
        else:
            shutil.copy(source, place)
    (folder / "docs/reference/api.md").write_text(reference(), encoding="utf-8")


def build(output: Path) -> None:
    """Build the site; a dead link, a page that nothing lists or a name that isn't there ends it."""
    from mkdocs.commands.build import build as build_site
    from mkdocs.config import load_config

    with tempfile.TemporaryDirectory() as folder:
        gather(Path(folder))
        config = load_config(str(CONFIG), docs_dir=folder, site_dir=str(output.resolve()))
        config.plugins["mkdocstrings"].config["handlers"]["python"]["paths"] = [str(ROOT / "runtime")]
        config.plugins.on_startup(command="build", dirty=False)
        build_site(config)


def main() -> int:
    """The command. Exit code 1: the site has an error, which stderr names."""
    from mkdocs.exceptions import Abort

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-o", "--output", type=Path, default=Path("out/site"), help="folder (default: out/site)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="docs: %(message)s")
    try:
        build(args.output)
    except Abort as error:
        print(f"docs: {error}", file=sys.stderr)
        return 1
    print(args.output / "index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
