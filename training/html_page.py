"""Owns how a document reads as one HTML file that needs no other: its style and its pictures are inside.

Knows not what it says. All texts are escaped by the template.
"""

import base64
from pathlib import Path
from typing import Final

from jinja2 import Environment, StrictUndefined

from training.document import Document

_TEMPLATE: Final = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ document.title }}</title>
<style>
:root { color-scheme: light dark; --text: #1c2024; --soft: #5b6570; --page: #fff; --band: #f4f6f8;
  --rule: #d5dbe1; --link: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e7eb; --soft: #9aa5b1; --page: #15191e; --band: #1e242b;
    --rule: #38424d; --link: #7db8f0; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 68rem; background: var(--page);
  color: var(--text); font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-bottom: .25rem;
  border-bottom: 1px solid var(--rule); }
p, ul { max-width: 50rem; }
li { margin: .3rem 0; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 0; padding: 0; list-style: none;
  max-width: none; font-size: .9rem; }
.table { overflow-x: auto; margin: 1rem 0; border: 1px solid var(--rule); border-radius: 6px; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { padding: .4rem .7rem; text-align: right; white-space: nowrap; }
th { background: var(--band); white-space: normal; vertical-align: bottom; }
.words { text-align: left; }
td.long { white-space: pre-line; min-width: 20rem; }
tbody tr:nth-child(even) td { background: var(--band); }
tbody tr td { border-top: 1px solid var(--rule); background: var(--page); }
tr > :first-child { position: sticky; left: 0; }
figure { margin: 1.25rem 0; }
img { display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--rule);
  border-radius: 6px; }
figcaption { color: var(--soft); font-size: .875rem; margin-top: .4rem; }
pre { overflow-x: auto; background: var(--band); padding: .8rem 1rem; border-radius: 6px; font-size: .85rem; }
@media print { body { max-width: none; padding: 0; } .table { overflow: visible; } nav { display: none; } }
</style>
</head>
<body>
<h1>{{ document.title }}</h1>
<nav aria-label="Contents"><ul>
{% for block in document.blocks if kind(block) == "Heading" %}
<li><a href="#section-{{ loop.index }}">{{ block.text }}</a></li>
{% endfor %}
</ul></nav>
{% set section = namespace(number=0) %}
{% for block in document.blocks %}
{% if kind(block) == "Heading" %}
{% set section.number = section.number + 1 %}
<h2 id="section-{{ section.number }}">{{ block.text }}</h2>
{% elif kind(block) == "Paragraph" %}
<p>{{ block.text }}</p>
{% elif kind(block) == "Items" %}
<ul>
{% for name, value in block.items %}
<li><strong>{{ name }}</strong>: {{ value }}</li>
{% endfor %}
</ul>
{% elif kind(block) == "Table" %}
<div class="table" tabindex="0"><table>
<thead><tr>
{% for text in block.header %}
<th scope="col"{% if loop.index0 < block.text_columns %} class="words"{% endif %}>{{ text }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in block.rows %}
<tr>
{% for text in row %}
<td{% if loop.index0 < block.text_columns %} class="words{{ " long" if text|length > long }}"{% endif %}>\
{{ text }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table></div>
{% elif kind(block) == "Picture" %}
<figure><img src="data:image/png;base64,{{ picture(block) }}" alt="{{ block.caption }}">\
<figcaption>{{ block.caption }}</figcaption></figure>
{% elif kind(block) == "Code" %}
<pre><code>{{ block.text }}</code></pre>
{% endif %}
{% endfor %}
</body>
</html>
"""

_LONG_CELL: Final = 40
"""Characters from which on a cell is broken into lines."""


def html_page(document: Document, folder: Path) -> str:
    """The document as HTML, its pictures read from `folder`."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string(_TEMPLATE).render(
        document=document,
        long=_LONG_CELL,
        kind=lambda block: type(block).__name__,
        picture=lambda block: base64.b64encode((folder / block.file).read_bytes()).decode(),
    )
