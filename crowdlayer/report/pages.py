"""Pages in one file, of templates/. Whatever comes from data is text: it can neither run nor load anything."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from .drawing import shortened

LONGEST_NAME = 80
"""Characters of a name on a page; the tables hold all of it."""


def name(text: str) -> str:
    """A name from the data as a page shows it."""
    return shortened(text, LONGEST_NAME)


def environment() -> Environment:
    """jinja2, that escapes whatever it is given."""
    made = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters |= {"percent": percent, "figure": figure}
    return made


def percent(value: float | None, digits: int = 1) -> str:
    """A percentage, or a dash."""
    return "–" if value is None else f"{value:.{digits}f}\N{NO-BREAK SPACE}%"


def figure(value: float | None, digits: int = 3) -> str:
    """A number, or a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def resource(file: str) -> str:
    """A file of templates/."""
    return (files(__package__) / "templates" / file).read_text(encoding="utf-8")


def rendered(template: str, script: str, **values: Any) -> str:
    """A page in one file: style sheet and script inside, and a policy that allows these two and no other."""
    style, code = resource("page.css"), resource(script) + resource("tip.js")
    allowed = f"style-src '{_digest(style)}'; script-src '{_digest(code)}'; img-src data:"
    policy = f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
    page = environment().from_string(resource(template))
    return page.render(policy=policy, style=Markup(style), script=Markup(code), **values)  # ours  # noqa: S704  # nosec B704


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def embedded(data: Any) -> Markup:
    """JSON for a block in a page: no `<` in it, so that nothing ends the block but its end."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))  # noqa: S704  # nosec B704


def markdown(text: object) -> Markup:
    """Text for Markdown, in a line: none of its marks, and no HTML."""
    escaped = re.sub(r"([\\`*_{}\[\]<>()#+!|~&-])", r"\\\1", " ".join(str(text).split()))
    return Markup(escaped)  # noqa: S704  # nosec B704


def rendered_markdown(template: str, **values: Any) -> str:
    """A Markdown file, of templates/; what comes from data goes through the filter `markdown`, in YAML `embedded`."""
    made = environment()
    made.filters |= {"markdown": markdown, "embedded": embedded}
    return made.from_string(resource(template)).render(**values)
