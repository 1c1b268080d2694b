"""The folder that tokens are prepared in, and what it may hold before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any


def open_folder(out: Path, made_from: Mapping[str, Any]) -> Path:
    """The folder for units. What an earlier run left in ``out`` stays until all units exist.

    Raises FileExistsError when ``out`` holds something else, also tokens ``made_from`` other text
    or in another way.
    """
    parts = out / ".units"
    if (out / "manifest.json").is_file():
        _refuse_other_data(out, made_from)
    elif out.exists() and not parts.is_dir() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: exists and holds no prepared tokens; name a new folder")
    out.mkdir(parents=True, exist_ok=True)  # first, so that an error names this folder
    parts.mkdir(exist_ok=True)
    for leftover in parts.glob(".*.part"):
        leftover.unlink()
    return parts


def remove_units(parts: Path) -> None:
    """Remove the folder for units, and the one it is in where that holds nothing else."""
    shutil.rmtree(parts)
    if not any(parts.parent.iterdir()):
        parts.parent.rmdir()


def _refuse_other_data(out: Path, made_from: Mapping[str, Any]) -> None:
    before = _made_from(out)
    for name, now in made_from.items():
        if before.get(name, now) != now:
            raise FileExistsError(
                f"{out}: holds other data ({name} {_told(before[name])}, now {_told(now)}):"
                " name a new folder, or remove it"
            )


def _made_from(out: Path) -> dict[str, Any]:
    """What the tokens in ``out`` were made from, as far as the manifest tells."""
    try:
        manifest = json.loads((out / "manifest.json").read_bytes())
        if "made_from" in manifest:
            return dict(manifest["made_from"])
        sources = manifest["splits"]["train"]["sources"]
        return {
            "tokenizer": manifest["tokenizer"]["sha256"],
            "sources": sorted(source["name"] for source in sources),
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise FileExistsError(
            f"{out}: exists and holds no prepared tokens; name a new folder"
        ) from None


def _told(value: Any) -> str:
    if isinstance(value, list):
        return shorten(", ".join(value), 60, placeholder="…") or "none"
    return str(value)[:16]
