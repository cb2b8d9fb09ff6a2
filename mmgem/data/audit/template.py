"""The template of the page of a check. Receives what `page.render_page` gives."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style }}
svg.chart polygon.bins{fill-opacity:.16;stroke-width:1.5;stroke-linejoin:round}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:2px}
.pair svg.picture{height:190px}
td.text{white-space:normal;text-align:left;min-width:14rem;overflow-wrap:anywhere}
th.left,td.left{text-align:left}
td details{margin:0}
ul.names{margin:4px 0;padding-left:1.1em;font-size:.85rem}
</style>
</head>
<body>
<main>
<header>
<h1>{{ title }}</h1>
<dl class="facts">
{%- for name, value in facts %}<dt>{{ name }}</dt>
<dd{% if name == "Result" %} class="{{ 'right' if passed else 'wrong' }}"{% endif %}>{{ value }}</dd>{% endfor -%}
</dl>
</header>

<h2>Counts</h2>
<div class="scroll"><table>
<thead><tr><th>split</th>{% for name in count_names %}<th>{{ name }}</th>{% endfor %}
<th>broken</th><th>unread</th><th>shards</th><th>tars</th></tr></thead>
<tbody>{% for row in counts %}<tr><td class="name">{{ row.split }}</td>
{% for cell in row.cells %}<td>{{ cell.value }}{% if cell.told %} <small>{{ cell.told }}</small>{% endif %}</td>
{% endfor %}</tr>{% endfor %}</tbody>
</table></div>
<p class="note">Samples are those that are whole; unread ones lie in shards that cannot be read.</p>

<h2>What was found</h2>
{% if findings %}
<div class="scroll"><table>
<thead><tr><th>split</th><th class="left">what</th><th>count</th><th class="left">which</th></tr></thead>
<tbody>{% for row in findings %}<tr><td class="name">{{ row.split }}</td>
<td class="left{% if row.fails %} wrong{% endif %}">{{ "✗ " if row.fails }}{{ row.reason }}</td>
<td>{{ "{:,}".format(row.count) }}</td>
<td class="text"><details><summary>{{ row.named[0].name }}{% if row.count > 1 %} …{% endif %}</summary>
<ul class="names">{% for one in row.named %}<li>{{ one.name }}{% if one.detail %}: {{ one.detail }}{% endif %}</li>
{% endfor %}{% if row.more %}<li>{{ "{:,}".format(row.more) }} more in check.json</li>{% endif %}</ul></details></td>
</tr>{% endfor %}</tbody>
</table></div>
<p class="note">✗ makes the check fail. The others are dropped or clipped in training, or do no harm.</p>
{% else %}<p>Nothing.</p>{% endif %}

{% macro pairs(cards) %}<div class="cards">{% for card in cards %}
<article class="card"><div class="pair">{% for side in card.sides %}{{ side.picture }}{% endfor %}</div>
<div class="body">{% for side in card.sides %}{{ side.text }}<br>{% endfor %}
<span class="by">{{ card.how }}</span></div></article>{% endfor %}</div>{% endmacro %}

<h2>Pictures in two splits</h2>
{% for leak in leaks %}
<h3>{{ leak.splits[0] }} and {{ leak.splits[1] }}</h3>
<p><span class="wrong">✗</span> Shared pictures: {{ "{:,}".format(leak.pictures[0]) }} of {{ leak.splits[0] }},
{{ "{:,}".format(leak.pictures[1]) }} of {{ leak.splits[1] }}; pairs of the same bytes:
{{ "{:,}".format(leak.identical) }}, near ones: {{ "{:,}".format(leak.near) }}.
{% if leak.pairs|length > leak.shown|length %} The first are
shown, check.json names all.{% endif %}</p>
{{ pairs(leak.shown) }}
{% else %}<p>None{% if not decoded %} of the same bytes; near ones are found only where pictures are decoded
{%- endif %}.</p>{% endfor %}
<p class="note">Near: the grey levels of 16 x 16 cells correlate by {{ near.grey_correlation }} or more, and so do their
edges by {{ near.edge_correlation }}. Mirrored pictures and small cutouts are not found. Plain pictures are compared by
their bytes only.</p>

{% if again %}
<h2>Pictures twice in a split</h2>
{% for split in again %}
<h3>{{ split.split }}</h3>
<p>Copies of the same bytes: {{ "{:,}".format(split.identical) }}; near pairs: {{ "{:,}".format(split.near) }}.</p>
{{ pairs(split.shown) }}
{% endfor %}{% endif %}

{% if charts %}
<h2>Distributions</h2>
<p class="note">Per cent of the values of a split; the last bin holds what is larger, too.</p>
<div class="charts">{% for chart in charts %}{{ chart }}{% endfor %}</div>
<h3>Quantiles</h3>
<div class="scroll"><table>
<thead><tr><th>split</th><th>count</th><th>mean</th>
{% for name in quantiles %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for spread in spreads if spread.rows %}
<tr class="task"><th colspan="{{ quantiles|length + 3 }}">{{ spread.title }}</th></tr>
{% for row in spread.rows %}<tr><td class="name">{{ row.split }}</td>{% for cell in row.cells %}<td>{{ cell }}</td>
{%- endfor %}</tr>{% endfor %}{% endfor %}</tbody>
</table></div>
{% endif %}

<h2>Samples</h2>
<p class="note">Drawn by lot, not chosen.</p>
{% for split in drawn if split.cards %}
<h3>{{ split.split }}</h3>
<div class="cards">{% for card in split.cards %}
<article class="card">{{ card.picture }}<div class="body">
<span class="by">{{ card.key }}, {{ card.size }}</span>
{% if card.notes %}<ul class="notes">{% for note in card.notes %}<li>
<span class="chip" style="background:{{ note.colour }}">{{ note.badge }}</span><div>{{ note.text }}</div></li>
{% endfor %}
{% if card.more %}<li><span></span><div class="by">{{ card.more }} boxes more</div></li>{% endif %}</ul>{% endif %}
{% if card.captions %}<ul class="refs">{% for caption in card.captions %}<li>{{ caption }}</li>{% endfor %}</ul>
{% endif %}</div></article>{% endfor %}</div>
{% endfor %}

<footer>{{ footer }}</footer>
</main>
</body>
</html>
"""
