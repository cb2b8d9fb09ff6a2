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
<div class="scroll"><table>
<thead><tr><th>metric</th>{% for model in models %}<th>{{ model }}</th>{% endfor %}
<th>chance</th><th>{{ ratio_name }}</th></tr></thead>
<tbody>
{% for task in tables %}
<tr class="task"><th colspan="{{ models|length + 3 }}">{{ task.name }}</th></tr>
{% for row in task.rows %}<tr><td class="name">{{ row.name }}</td>
{% for cell in row.cells %}<td>{{ cell.value }}
{%- if cell.error %} <small>± {{ cell.error }}</small>{% endif %}</td>{% endfor %}
<td>{{ row.chance }}</td><td>{{ row.ratio }}</td></tr>
{% endfor %}{% endfor %}
</tbody></table></div>
<p class="note">Recalls, BLEU, ROUGE_L and shares run from 0 to 1, CIDEr as coco-caption prints it
(0.5 is its "50"), median ranks start at 1 and are better when small. ± is one standard error.</p>
{% for task in tables %}<details><summary>How {{ task.name }} was measured</summary>
<pre>{{ task.protocol }}</pre></details>{% endfor %}

{% if charts %}
<h2>Training</h2>
<p class="note">Faint: every logged step. Strong: running mean over a fiftieth of the curve.</p>
<div class="charts">{% for chart in charts %}{{ chart }}{% endfor %}</div>
{% endif %}

{% macro caption_cards(cards) %}<div class="cards">{% for card in cards %}
<article class="card">{{ card.picture }}<div class="body">
{% for line in card.written %}<p class="wrote"><span class="by">{{ line.model }} ·
CIDEr {{ line.score }}</span><br>{{ line.text }}</p>{% endfor %}
<ul class="refs">{% for ref in card.references %}<li>{{ ref }}</li>{% endfor %}</ul>
</div></article>{% endfor %}</div>{% endmacro %}

{% macro region_cards(cards) %}<div class="cards">{% for card in cards %}
<article class="card">{{ card.picture }}<div class="body"><ul class="notes">
{% for note in card.notes %}<li><span class="chip" style="background:{{ note.colour }}">
{{- note.badge }}</span><div>{{ note.given }}
{% for line in note.written %}<br><span class="by">{{ line.model }}:</span>
{% if line.right is none %}{{ line.text }}{% elif line.right %}
<span class="right">✓ {{ line.text }}</span>{% else %}
<span class="wrong">✗ {{ line.text }}</span>{% endif %}{% endfor %}
</div></li>{% endfor %}</ul></div></article>{% endfor %}</div>{% endmacro %}

{% macro searches(items) %}{% for item in items %}<div class="search">
<p class="query">“{{ item.query }}”</p>
{% for answer in item.answers %}<div class="by">{{ answer.model }} · right answer at place
{{ answer.place }} of {{ answer.gallery }}</div>
<div class="row">{% for tile in answer.tiles %}<figure class="tile {{ tile.kind }}">
{{ tile.picture }}<figcaption>{{ tile.text }}</figcaption></figure>{% endfor %}</div>
{% endfor %}</div>{% endfor %}{% endmacro %}

{% if captions.drawn %}
<h2>Captions</h2>
<p class="note">Images drawn by lot, not chosen. Below the line: the captions of the data.</p>
{{ caption_cards(captions.drawn) }}
<h3>Where it fails: the lowest CIDEr of {{ last_model }}</h3>
{{ caption_cards(captions.worst) }}
{% endif %}

{% if regions.drawn %}
<h2>Phrases for boxes</h2>
<p class="note">Images drawn by lot. Beside each number the phrase of the data, then what the model
wrote.{% if regions.judged %} ✓ and ✗: colour and shape right or wrong.{% endif %}</p>
{{ region_cards(regions.drawn) }}
<h3>Where it fails: the images that went worst for {{ last_model }}</h3>
{{ region_cards(regions.worst) }}
{% endif %}

{% if images.drawn %}
<h2>From a text to an image</h2>
<p class="note">Captions drawn by lot, with the five best of all images of the split. Green: right.
Dashed: the right one, where it is not among them.</p>
{{ searches(images.drawn) }}
<h3>Where it fails: the worst ranks of {{ last_model }}</h3>
{{ searches(images.worst) }}
{% endif %}

{% if boxes.drawn %}
<h2>From a phrase to a box</h2>
<p class="note">Phrases drawn by lot, with the five best of all boxes of the split and what stands
about them. Green: the box carries the phrase. Dashed: the best right one, where it is not among
the five.</p>
{{ searches(boxes.drawn) }}
<h3>Where it fails: the worst ranks of {{ last_model }}</h3>
{{ searches(boxes.worst) }}
{% endif %}

<footer>{{ footer }}</footer>
</main>
</body>
</html>
"""
