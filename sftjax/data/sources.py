"""What a config may say under data.train and data.eval: a path, several (commas part them too), or dicts with a weight and a
layout of their own."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ml_collections import ConfigDict

from sftjax.check import CHOICES, refuse_rows
from sftjax.config import UserError, parts


@dataclass(frozen=True, slots=True)
class Source:
    """One place that rows come from. `format` and `columns` None: as the config has them for all sources."""

    path: str  # a file, glob, directory or hub id owner/name[:subset[:split]]
    weight: float = 1.0  # passes over its rows in one epoch, relative to the other sources
    format: str | None = None
    columns: Mapping[str, str] | None = None


def sources(value: Any) -> list[Source]:
    """The sources that a config value names. Raises UserError."""
    refuse_rows(value)
    if isinstance(value, (list, tuple)):
        return [source for item in value for source in sources(item)]
    if isinstance(value, Source):
        return [value]
    if isinstance(value, (dict, ConfigDict)):
        return [_source(dict(value))]
    if isinstance(value, (int, float)):
        raise UserError(f"data source {value}: needs a path, or a dict with a path")
    text = os.fspath(value or "")
    return [Source(path) for path in ([text] if os.path.exists(os.path.expanduser(text)) else parts(text))]


def _source(given: dict[str, Any]) -> Source:
    known = [f.name for f in fields(Source)]
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
            raise UserError(f"data source {given.get('path', given)}: no such key {key!r}{hint}")
    if not isinstance(given.get("path"), str):
        raise UserError(f"data source {given}: needs a path")
    weight, format = given.get("weight", 1.0), given.get("format")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise UserError(f"data source {given['path']}: weight {weight!r} needs to be a number above 0")
    if format is not None and format not in CHOICES["data.format"]:
        raise UserError(
            f"data source {given['path']}: format {format!r} needs to be one of {', '.join(map(str, CHOICES['data.format']))}"
        )
    columns: Any = given.get("columns")
    if columns is not None and not isinstance(columns, (dict, ConfigDict)):
        raise UserError(f"data source {given['path']}: columns {columns!r} needs to be a dict, canonical name to own name")
    return Source(
        given["path"], float(weight), format, None if columns is None else {str(name): str(own) for name, own in columns.items()}
    )
