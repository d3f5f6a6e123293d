"""The Jinja environment of the report pages: autoescaped, and undefined variables are errors."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import jinja2

from ci.nightly import metrics
from ci.nightly.report import heat

FOLDER = Path(__file__).parent


def environment() -> jinja2.Environment:
    """The environment for the templates of this folder."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.globals |= {"number": metrics.number, "headings": heat.HEADINGS, "steps": heat.STEPS, "href": href}
    return made


def href(path: str) -> str:
    """A relative path as a URL; the @ of tiny-qwen2@s4 must be quoted."""
    return quote(path, safe="/.-_~")
