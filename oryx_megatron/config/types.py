"""Types of config fields: numbers within bounds, and paths that are expanded when a config is read."""

from __future__ import annotations

from typing import Annotated

from oryx_megatron.config.bounds import Range

PATH, NAME, URL = "path", "name", "url"
LocalPath = Annotated[str, PATH]
"""File or folder of this machine; `~` and `$NAME` are expanded when a config is read (config/loading.py)."""
PathOrName = Annotated[str, PATH, NAME]
"""The same, or a name or URL that another program understands."""
PathOrUrl = Annotated[str, PATH, URL]
"""The same, or `scheme://…` on object storage (storage.py)."""
Count = Annotated[int, Range(ge=1)]
Size = Annotated[int, Range(ge=1, le=1 << 16)]
"""Sizes have limits that a slip of the keyboard passes and no model comes near."""
Index = Annotated[int, Range(ge=0)]
Positive = Annotated[float, Range(gt=0)]
NotNegative = Annotated[float, Range(ge=0)]
Probability = Annotated[float, Range(ge=0, le=1, what="a probability")]
Beta = Annotated[float, Range(ge=0, lt=1)]
