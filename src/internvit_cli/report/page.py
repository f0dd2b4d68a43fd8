"""Build the page from a template, its style, its scripts and the data, as one HTML file that needs no network.

Text from outside (keys, messages, paths) reaches the page only as JSON that contains no `<`, and its scripts insert it
only as text. A content security policy contains the hashes of style and scripts, so nothing else can run.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib.resources import files
from string import Template
from typing import Any

SCRIPTS = ("elements.js", "facts.js", "pictures.js", "plane.js", "search.js", "main.js")
"""The scripts, which are concatenated in this order."""
ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def as_page(title: str, data: dict[str, Any]) -> bytes:
    """Return the page in UTF-8.

    Args:
        title: The title of the browser's tab.
        data: The data that the scripts show; numbers must be finite.
    """
    style = _part("style.css")
    script = "'use strict';\n" + "\n".join(map(_part, SCRIPTS))
    page = Template(_part("page.html")).substitute(
        title=html.escape(title.encode("utf-8", "backslashreplace").decode()),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        data=as_script_data(data),
    )
    return page.encode()


def as_script_data(data: Any) -> str:
    """Return JSON in ASCII that cannot end the script element around it."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character, escape in ESCAPES.items():
        text = text.replace(character, escape)
    return text


def _part(name: str) -> str:
    return (files(__package__) / "web" / name).read_text("utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
