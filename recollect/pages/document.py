"""The document around what a page shows: head, policy, style, header, data and scripts.

What is called text is escaped here. What is called HTML is taken as it is: its texts are escaped by the functions of `parts`, or
by whoever writes it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib import resources

SCRIPTS = ("page.js", "heat.js")  # before the scripts of every page that has any


def page(
    *,
    title: str,
    eyebrow: str,
    headline: str,
    main: Sequence[str],
    header: str = "",
    css: str = "",
    data: object = None,
    scripts: Sequence[str] = (),
) -> str:
    """A whole page. Its policy lets it load nothing, and run scripts only if it has any.

    Args:
        title: text of the window's title.
        eyebrow: text above the headline: what made the page.
        headline: text; a per cent sign stays on the line of its number.
        main: HTML below the header, piece by piece; see `section`.
        header: HTML below the headline.
        css: style beside `assets/page.css`.
        data: what the scripts find in `DATA`: anything that `script_json` takes.
        scripts: texts of the page's own scripts; `assets/page.js` and `assets/heat.js` run before them.
    Returns:
        An HTML document. Without scripts it has no <script>, and no data.
    Raises:
        ValueError, TypeError: see `script_json`.
    """
    script_policy = " script-src 'unsafe-inline';" if scripts else ""
    policy = f"default-src 'none'; style-src 'unsafe-inline';{script_policy} img-src data:"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{asset(__package__, "page.css")}{css}</style>
</head>
<body>
<header>
<p class="eyebrow">{escape(eyebrow)}</p>
<h1>{escape(headline).replace(" %", "&nbsp;%")}</h1>
{header}
</header>
<main>
{"".join(main)}</main>
{_scripts(data, scripts) if scripts else ""}</body>
</html>
"""


def section(name: str, heading: str, *parts: str, lead: str = "", hidden: bool = False) -> str:
    """A section of a page as HTML.

    Args:
        name: its id, unique on the page; its heading's is h-NAME.
        heading: text.
        parts: HTML, one below the other.
        lead: HTML of the sentences below the heading.
        hidden: until a script shows it.
    """
    lines = [f'<h2 id="h-{name}">{escape(heading)}</h2>', f'<p class="lead">{lead}</p>' if lead else "", *parts]
    inside = "\n".join(line for line in lines if line)
    return f'<section id="{name}" aria-labelledby="h-{name}"{" hidden" if hidden else ""}>\n{inside}\n</section>\n'


def asset(package: str, name: str) -> str:
    """The text of the file assets/NAME of a package, which gives its own `__package__`."""
    return resources.files(package).joinpath("assets").joinpath(name).read_text(encoding="utf-8")


def script_json(value: object) -> str:
    """JSON for a script element: `<`, `>` and `&` are written so that no text can end it.

    Raises:
        ValueError: a number in it is not finite: JSON has none.
        TypeError: something in it has no form in JSON.
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _scripts(data: object, scripts: Sequence[str]) -> str:
    """The tip that scripts show beside the pointer, their data, and themselves."""
    texts = "\n".join([*(asset(__package__, name) for name in SCRIPTS), *scripts])
    return f"""<div id="tip" role="status" aria-live="polite" hidden></div>
<script type="application/json" id="data">{script_json(data)}</script>
<script>
"use strict";
{texts}
</script>
"""
