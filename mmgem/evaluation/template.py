"""The page of the report: one HTML file without scripts, fonts or links.

Receives what `report.page_parts` gives. Everything that comes from data or models is escaped.
"""

STYLE = """
:root{color-scheme:light dark;--ground:#fcfcfa;--card:#fff;--ink:#1d2125;--soft:#5b646e;
--line:#dfe2e5;--shade:#f1f3f4;--accent:#2563a8;--right:#1a7f45;--wrong:#b3382c}
@media (prefers-color-scheme:dark){:root{--ground:#15181b;--card:#1c2024;--ink:#e4e7ea;
--soft:#9aa4ae;--line:#30363c;--shade:#22272c;--accent:#7db3ee;--right:#5cc48a;--wrong:#ee8577}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 20px 64px}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 4px}
h2{font-size:1.25rem;margin:44px 0 6px;padding-top:14px;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:26px 0 8px}
p{margin:4px 0 12px;max-width:75ch}
.soft,p.note{color:var(--soft);font-size:.9rem}
dl.facts{display:grid;grid-template-columns:max-content 1fr;gap:3px 18px;margin:18px 0;
font-size:.93rem}
dl.facts dt{color:var(--soft)}dl.facts dd{margin:0;overflow-wrap:anywhere}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:8px;background:var(--card)}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:5px 14px;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}
thead th{border-bottom:1px solid var(--line);color:var(--soft);font-weight:600}
tr.task th{background:var(--shade);text-align:left;font-weight:600}
td small{color:var(--soft)}
td.name{font-family:ui-monospace,"SF Mono",Menlo,Consolas,monospace;font-size:.85em}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(420px,100%),1fr));gap:14px}
svg.chart{width:100%;height:auto;display:block;background:var(--card);
border:1px solid var(--line);border-radius:8px;padding:8px}
svg.chart text{font-size:13px;fill:var(--soft)}
svg.chart text.title{font-weight:600;fill:var(--ink);font-size:14px}
svg.chart text.last{text-anchor:end}
svg.chart text.y{text-anchor:end}svg.chart text.x{text-anchor:middle}
svg.chart .grid,svg.chart .tick{stroke:var(--line);fill:none}
svg.chart .stage0{fill:none}svg.chart rect.stage1{fill:var(--shade)}
svg.chart text.stage{font-size:12px}
svg.chart polyline{fill:none;stroke:var(--accent);stroke-linejoin:round}
svg.chart .raw{opacity:.28;stroke-width:1}svg.chart .smooth{stroke-width:2}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(300px,100%),1fr));gap:16px;
align-items:start}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;overflow:hidden}
.card .body{padding:10px 14px 12px;font-size:.92rem;overflow-wrap:anywhere}
svg.picture{width:100%;height:auto;max-height:290px;display:block;background:var(--shade)}
svg.picture rect.halo{fill:none;stroke:#000;stroke-opacity:.55;stroke-width:4.5;
vector-effect:non-scaling-stroke}
svg.picture rect.box{fill:none;stroke-width:2.5;vector-effect:non-scaling-stroke}
svg.picture text.badge{fill:#111;font-weight:700;text-anchor:middle;font-family:inherit}
.by{color:var(--soft);font-size:.82rem}
.wrote{margin:0 0 6px}
.refs{margin:6px 0 0;padding:6px 0 0 1.1em;border-top:1px solid var(--line);color:var(--soft);
font-size:.87rem}
ul.notes{list-style:none;margin:0;padding:0}
ul.notes li{display:grid;grid-template-columns:22px 1fr;gap:2px 9px;padding:5px 0}
ul.notes li+li{border-top:1px solid var(--line)}
.chip{width:20px;height:20px;border-radius:4px;color:#111;font-size:.78rem;font-weight:700;
text-align:center;line-height:20px}
.right{color:var(--right)}.wrong{color:var(--wrong)}
.search{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px;
margin:0 0 14px}
.search .query{font-weight:600;margin:0 0 6px;overflow-wrap:anywhere}
.row{display:grid;grid-template-columns:repeat(6,minmax(0,1fr));gap:8px;margin:2px 0 10px;
max-width:900px}
.tile{margin:0}
.tile svg.picture{aspect-ratio:1;max-height:none;border:3px solid transparent;border-radius:7px}
.tile.hit svg.picture{border-color:var(--right)}
.tile.wanted svg.picture{border:3px dashed var(--right)}
.tile figcaption{font-size:.76rem;color:var(--soft);line-height:1.25;margin-top:2px}
details{margin:10px 0}summary{cursor:pointer;color:var(--soft)}
pre{overflow-x:auto;background:var(--shade);border-radius:8px;padding:12px 14px;font-size:.8rem}
footer{margin-top:48px;color:var(--soft);font-size:.85rem}
@media (max-width:620px){main{padding:18px 14px 48px}.row{grid-template-columns:repeat(3,1fr)}
dl.facts{grid-template-columns:1fr;gap:0}dl.facts dd{margin-bottom:7px}th,td{padding:5px 7px}
td.name{white-space:normal;line-height:1.3}
td small{display:block}thead th{white-space:normal}}
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
