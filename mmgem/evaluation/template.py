"""The page of the report: one HTML file without scripts, fonts or links.

Receives what `report.page_parts` gives. Everything that comes from data or models is escaped.
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<header>
<h1>{{ title }}</h1>
<p class="soft">{{ subtitle }}</p>
<dl class="facts">
{%- for name, value in facts %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor -%}
</dl>
{% if settings %}<details><summary>All settings of the run</summary>
<pre>{{ settings }}</pre></details>{% endif %}
</header>

<h2>Figures</h2>
{% macro head() %}<thead><tr><th>metric</th>{% for model in models %}<th>{{ model }}</th>{% endfor %}
<th>chance</th><th>{{ ratio_name }}</th></tr></thead>{% endmacro %}
{% macro lines(rows) %}{% for row in rows %}<tr><td class="name">{{ row.name }}</td>
{% for cell in row.cells %}<td>{{ cell.value }}
{%- if cell.error %} <small>± {{ cell.error }}</small>{% endif %}</td>{% endfor %}
<td>{{ row.chance }}</td><td>{{ row.ratio }}</td></tr>
{% for other in row.published %}<tr class="other"><td>published: {{ other.model }}</td>
<td colspan="{{ models|length }}">{{ other.value }}</td><td></td><td></td></tr>
{% endfor %}{% endfor %}{% endmacro %}
<div class="scroll"><table>
{{ head() }}
<tbody>
{% for task in tables %}
<tr class="task"><th colspan="{{ models|length + 3 }}">{{ task.name }}</th></tr>
{{ lines(task.rows) }}
{% endfor %}
</tbody></table></div>
{% for task in tables if task.folded %}<details>
<summary>{{ task.folded|length }} more figures of {{ task.name }}</summary>
<div class="scroll"><table>{{ head() }}<tbody>{{ lines(task.folded) }}</tbody></table></div></details>{% endfor %}
<p class="note">Recalls, BLEU, ROUGE_L and shares run from 0 to 1, CIDEr as coco-caption prints it
(0.5 is its "50"), median ranks start at 1 and are better when small. ± is one standard error.</p>
{% if sources %}<p class="note">Published figures stand where data, split, images and captions are
those of the source: {{ sources|join("; ") }}.</p>{% endif %}
{% for task in tables %}<details><summary>How {{ task.name }} was measured</summary>
<pre>{{ task.protocol }}</pre></details>{% endfor %}

{% if charts %}
<h2>Training</h2>
<p class="note">Faint: every logged step. Strong: running mean over a fiftieth of the curve.</p>
<div class="charts">{% for chart in charts %}{{ chart }}{% endfor %}</div>
{% endif %}

{% if curves or confusions %}
<h2>Curves and confusions</h2>
{% if curves %}<div class="charts">{% for curve in curves %}<figure>{{ curve.svg }}
<figcaption class="legend">{% for css, dashes, name in curve.legend %}<span>
<svg viewBox="0 0 34 8" aria-hidden="true"><path class="{{ css }}" stroke-dasharray="{{ dashes }}"
d="M0 4H34"/></svg> {{ name }}</span>{% endfor %}</figcaption></figure>{% endfor %}</div>{% endif %}
{% for one in confusions %}
<h3>What {{ one.model or "the model" }} takes for what: {{ one.task }}</h3>
{% if one.rows %}<p class="note">A row is what it is, a column what it was taken for.</p>
<div class="scroll"><table class="confusion">
<thead><tr><th></th>{% for name in one.classes %}<th><span>{{ name }}</span></th>{% endfor %}</tr></thead>
<tbody>{% for row in one.rows %}<tr><th>{{ row.name }}</th>{% for cell in row.cells %}
<td class="{{ 'yes' if cell.right else 'no' }}" style="--s:{{ cell.share }}%">{{ cell.count }}</td>
{%- endfor %}</tr>{% endfor %}</tbody></table></div>
{% elif one.pairs %}<p class="note">The {{ one.pairs|length }} pairs most often taken for each other, of
{{ one.classes|length }} classes; the share is of all that are of the class.</p>
<div class="scroll"><table class="pairs"><thead><tr><th>is</th><th>taken for</th><th>times</th>
<th>share</th></tr></thead><tbody>{% for pair in one.pairs %}<tr><td>{{ pair.true }}</td>
<td>{{ pair.taken }}</td><td>{{ pair.count }}</td><td>{{ pair.share }}</td></tr>{% endfor %}</tbody></table></div>
{% else %}<p class="note">Nothing was taken for anything else.</p>{% endif %}
{% endfor %}
{% endif %}

{% macro captions(cards) %}<div class="cards">{% for card in cards %}
<article class="card">{{ card.picture }}<div class="body">
{% for line in card.written %}<p class="wrote"><span class="by">{{ line.model }} ·
CIDEr {{ line.score }}</span><br>{{ line.text }}</p>{% endfor %}
<ul class="refs">{% for ref in card.references %}<li>{{ ref }}</li>{% endfor %}</ul>
</div></article>{% endfor %}</div>{% endmacro %}

{% macro regions(cards) %}<div class="cards">{% for card in cards %}
<article class="card">{{ card.picture }}<div class="body"><ul class="notes">
{% for note in card.notes %}<li><span class="chip" style="background:{{ note.colour }}">
{{- note.badge }}</span><div>{{ note.given }}
{% for line in note.written %}<br><span class="by">{{ line.model }}:</span>
{% if line.right is none %}{{ line.text }}{% elif line.right %}
<span class="right">✓ {{ line.text }}</span>{% else %}
<span class="wrong">✗ {{ line.text }}</span>{% endif %}{% endfor %}
</div></li>{% endfor %}</ul></div></article>{% endfor %}</div>{% endmacro %}

{% macro searches(cards) %}{% for card in cards %}<div class="search">
<p class="query">“{{ card.query }}”</p>
{% for answer in card.answers %}<div class="by">{{ answer.model }} · right answer at place
{{ answer.place }}{% if answer.gallery %} of {{ answer.gallery }}{% endif %}</div>
<div class="row">{% for tile in answer.tiles %}<figure class="tile {{ tile.kind }}">
{{ tile.picture }}<figcaption>{{ tile.text }}</figcaption></figure>{% endfor %}</div>
{% endfor %}</div>{% endfor %}{% endmacro %}

{% macro choices(cards) %}<div class="cards">{% for card in cards %}
<article class="card">{{ card.picture }}<div class="body">
{% if card.question %}<p class="query">{{ card.question }}</p>{% endif %}
{% for answer in card.answers %}<div class="by">{{ answer.model }}
<span class="{{ 'right' if answer.taken else 'wrong' }}">{{ "✓" if answer.taken else "✗" }}</span></div>
<ol class="choices">{% for choice in answer.choices %}<li{% if choice.right %} class="right"{% endif %}>
<span>{{ choice.text }}{% if choice.right %} ✓{% elif loop.first %} <b class="wrong">✗</b>{% endif %}</span>
<span class="score">{{ choice.score }}</span></li>{% endfor %}</ol>
{% endfor %}</div></article>{% endfor %}</div>{% endmacro %}

{% macro maps(cards) %}<div class="cards">{% for card in cards %}{% for one in card.maps %}
<article class="card map">{{ one.picture }}<div class="body">
<span class="{{ 'right' if one.hit else 'wrong' }}">{{ "✓" if one.hit else "✗" }}</span> “{{ card.text }}”<br>
<span class="by">{{ one.model }} · cosines {{ one.span }}</span></div></article>
{% endfor %}{% endfor %}</div>{% endmacro %}

{% set shapes = {"captions": captions, "regions": regions, "searches": searches, "choices": choices,
"maps": maps} %}
{% macro blocks(found) %}{% for block in found %}{{ shapes[block.shape](block.shown) }}
{% if block.folded %}<details class="more"><summary>{{ block.folded|length }} more</summary>
{{ shapes[block.shape](block.folded) }}</details>{% endif %}{% endfor %}{% endmacro %}

{% for section in sections %}
<h2>{{ section.title }}</h2>
<p class="note">{{ section.note }}</p>
{{ blocks(section.drawn) }}
{% if section.worst %}<h3>{{ section.fails }}</h3>
{{ blocks(section.worst) }}{% endif %}
{% endfor %}

<footer>{{ footer }}</footer>
</main>
</body>
</html>
"""
