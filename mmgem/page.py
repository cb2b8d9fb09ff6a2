"""What the HTML pages share: their look, small pictures with boxes, the frame of a chart and the ticks of its axes.

Receives PIL pictures and boxes in their pixels, numbers, and a template with its values. Gives markup that needs no
script, no other file and no network. Refuses nothing. Texts that are not Markup are escaped.
"""

import base64
import io
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import Environment
from markupsafe import Markup, escape
from PIL import Image

from mmgem.data.samples import Box

STYLE = """
:root{color-scheme:light dark;--ground:#fcfcfa;--card:#fff;--ink:#1d2125;--soft:#5b646e;
--line:#dfe2e5;--shade:#f1f3f4;--accent:#2563a8;--right:#1a7f45;--wrong:#b3382c;
--violet:#7a4fb0;--ochre:#8a6400}
@media (prefers-color-scheme:dark){:root{--ground:#15181b;--card:#1c2024;--ink:#e4e7ea;
--soft:#9aa4ae;--line:#30363c;--shade:#22272c;--accent:#7db3ee;--right:#5cc48a;--wrong:#ee8577;
--violet:#bd9cf0;--ochre:#d9ae45}}
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
tr.other td{color:var(--soft);font-size:.85em;padding-top:0}tr.other td:first-child{padding-left:28px}
table.confusion th:first-child{position:sticky;left:0;background:var(--card);z-index:1}
table.confusion{width:auto}table.confusion td{text-align:center;min-width:40px;padding:5px 6px}
table.confusion thead th{text-align:center;padding:5px 6px;vertical-align:bottom}
table.confusion tbody th{text-align:left;font-weight:400}
td.yes{background:color-mix(in srgb,var(--right) calc(var(--s)*.55),transparent)}
td.no{background:color-mix(in srgb,var(--wrong) calc(var(--s)*.55),transparent)}
table.pairs td:nth-child(2),table.pairs th:nth-child(2){text-align:left}
table.pairs td{white-space:normal;overflow-wrap:anywhere}
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
svg.chart polyline{fill:none;stroke-linejoin:round}
svg.chart .raw,svg.chart .smooth{stroke:var(--accent)}
svg .line0{stroke:var(--accent)}svg .line1{stroke:var(--wrong)}svg .line2{stroke:var(--right)}
svg .line3{stroke:var(--violet)}svg .line4{stroke:var(--ochre)}svg .line5{stroke:var(--soft)}
svg.chart polyline[class^=line]{stroke-width:2}svg path[class^=line]{fill:none;stroke-width:2.5}
.charts figure{margin:0}.charts{align-items:start}.charts+.scroll{margin-top:14px}
svg.forest text{paint-order:stroke;stroke:var(--card);stroke-width:4px}
svg.forest .zero{stroke:var(--soft);stroke-dasharray:4 3}
svg.forest path.better{stroke:var(--right)}svg.forest circle.better{fill:var(--right)}
svg.forest path.worse{stroke:var(--wrong)}svg.forest circle.worse{fill:var(--wrong)}
svg.forest path.even{stroke:var(--soft)}svg.forest circle.even{fill:var(--soft)}
svg.forest path{stroke-width:2;fill:none}svg.forest .grid,svg.forest .zero{stroke-width:1}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:.85rem;color:var(--soft);padding:6px 4px}
.legend svg{width:34px;height:8px;vertical-align:middle}
svg.chart .raw{opacity:.28;stroke-width:1}svg.chart .smooth{stroke-width:2}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(300px,100%),1fr));gap:16px;
align-items:start}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;overflow:hidden}
.card .body{padding:10px 14px 12px;font-size:.92rem;overflow-wrap:anywhere}
svg.picture{width:100%;height:auto;max-height:290px;display:block;background:var(--shade)}
svg.picture .halo{fill:none;stroke:#000;stroke-opacity:.55;stroke-width:4.5;
vector-effect:non-scaling-stroke}
svg.picture .box{fill:none;stroke-width:2.5;vector-effect:non-scaling-stroke}
svg.picture circle.box{stroke:#fff}
svg.picture text.badge{fill:#111;font-weight:700;text-anchor:middle;font-family:inherit}
svg.shared{position:absolute;width:0;height:0}
.by{color:var(--soft);font-size:.82rem}
.wrote{margin:0 0 6px}
.refs{margin:6px 0 0;padding:6px 0 0 1.1em;border-top:1px solid var(--line);color:var(--soft);
font-size:.87rem}
ul.notes{list-style:none;margin:0;padding:0}
ul.notes li{display:grid;grid-template-columns:22px 1fr;gap:2px 9px;padding:5px 0}
ul.notes li+li{border-top:1px solid var(--line)}
.body .query{font-weight:600;margin:0 0 6px}
ol.choices{list-style:none;margin:2px 0 8px;padding:0}
ol.choices li{display:grid;grid-template-columns:1fr auto;gap:10px;padding:2px 0}
ol.choices .score{font-variant-numeric:tabular-nums;color:var(--soft)}
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
details.more{margin:14px 0}details.more>summary{padding:6px 0}details.more[open]>summary{margin-bottom:8px}
details{margin:10px 0}summary{cursor:pointer;color:var(--soft)}
pre{overflow-x:auto;background:var(--shade);border-radius:8px;padding:12px 14px;font-size:.8rem}
footer{margin-top:48px;color:var(--soft);font-size:.85rem}
@media (max-width:620px){svg.chart text,svg.chart text.title{font-size:16px}
main{padding:18px 14px 48px}.row{grid-template-columns:repeat(3,1fr)}
dl.facts{grid-template-columns:1fr;gap:0}dl.facts dd{margin-bottom:7px}th,td{padding:5px 7px}
td.name{white-space:normal;line-height:1.3}
td small{display:block}thead th{white-space:normal}}
"""

# Told apart on photos and by colour-blind readers (Okabe and Ito 2008, less its black).
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#d55e00", "#cc79a7")

_QUALITY = 80

_EMBEDDED = re.compile(r'<image href="(data:image/jpeg;base64,[^"]+)"')

# From dark to bright, evenly to the eye, also without colours: five points of magma (van der Walt and Smith 2015).
_HEAT = ((0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191))


@dataclass(frozen=True, slots=True)
class Mark:
    """A box to be drawn, and the text of its badge ("" for none)."""

    box: Box
    colour: str
    badge: str = ""


def jpeg_uri(image: Image.Image) -> str:
    """The picture as a data URI."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def thumbnail(image: Image.Image, side: int) -> Image.Image:
    """At most `side` pixels on the longer edge; never enlarged."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return small


def picture(
    image: Image.Image, side: int, alt: str, marks: Sequence[Mark] = (), points: Sequence[tuple[float, float]] = ()
) -> Markup:
    """The picture, with boxes and rings round points drawn over it in pixels of the original."""
    return _svg(image, side, alt, marks, (0.0, 0.0, float(image.width), float(image.height)), points)


def heated(image: Image.Image, scores: Sequence[Sequence[float]], window: Box) -> Image.Image:
    """The picture with H rows of W scores laid over a window of it as colours, half through, dark to bright."""
    values_HW = np.asarray(scores, dtype=np.float64)
    low, high = values_HW.min(), values_HW.max()
    share_HW = (values_HW - low) / (high - low) if high > low else np.zeros_like(values_HW)
    anchors = np.linspace(0, 1, len(_HEAT))
    heat_HW3 = np.stack([np.interp(share_HW, anchors, channel) for channel in zip(*_HEAT, strict=True)], axis=-1)
    left, top, right, bottom = (round(edge) for edge in window)
    size = max(right - left, 1), max(bottom - top, 1)
    cells = Image.fromarray(heat_HW3.round().astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    out = image.convert("RGB")
    under = out.crop((left, top, left + size[0], top + size[1]))
    out.paste(Image.blend(under, cells, 0.55), (left, top))
    return out


def cutout(image: Image.Image, box: Box, side: int, alt: str, colour: str) -> Markup:
    """The square round a box, with as much of the picture about it as lets one see what it is."""
    reach = max(1.6 * max(box[2] - box[0], box[3] - box[1]), 32.0)
    reach = min(reach, float(max(image.size)))
    window = []
    for low, high, size in ((box[0], box[2], image.width), (box[1], box[3], image.height)):
        length = min(reach, float(size))
        start = min(max((low + high - length) / 2, 0.0), size - length)
        window.append((start, start + length))
    (x1, x2), (y1, y2) = window
    return _svg(image, side, alt, [Mark(box, colour)], (x1, y1, x2, y2))


def _svg(
    image: Image.Image,
    side: int,
    alt: str,
    marks: Sequence[Mark],
    window: Box,
    points: Sequence[tuple[float, float]] = (),
) -> Markup:
    """The window of the picture; boxes keep their line width at any size."""
    cut = tuple(round(edge) for edge in window)
    x1, y1, x2, y2 = cut[0], cut[1], max(cut[2], cut[0] + 1), max(cut[3], cut[1] + 1)
    width, height = x2 - x1, y2 - y1
    uri = jpeg_uri(thumbnail(image.crop((x1, y1, x2, y2)), side))
    parts = [f'<image href="{uri}" x="{x1}" y="{y1}" width="{width}" height="{height}"/>']
    font = max(width, height) / 17
    for mark in marks:
        left, top, right, bottom = mark.box
        shape = f'x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}"'
        parts.append(f'<rect class="halo" {shape}/>')
        parts.append(f'<rect class="box" stroke="{mark.colour}" {shape}/>')
        if mark.badge:
            x = min(max(left, x1), x2 - 1.3 * font)
            y = min(max(top, y1), y2 - 1.3 * font)
            parts.append(
                f'<rect class="badge" fill="{mark.colour}" x="{x:.1f}" y="{y:.1f}" '
                f'width="{1.3 * font:.1f}" height="{1.3 * font:.1f}"/>'
                f'<text class="badge" font-size="{font:.1f}" x="{x + 0.65 * font:.1f}" '
                f'y="{y + font:.1f}">{escape(mark.badge)}</text>'
            )
    for x, y in points:
        for css in ("halo", "box"):
            parts.append(f'<circle class="{css}" cx="{x:.1f}" cy="{y:.1f}" r="{0.4 * font:.1f}"/>')
    return Markup(
        f'<svg class="picture" viewBox="{x1} {y1} {width} {height}" role="img" '
        f'aria-label="{escape(alt)}">{"".join(parts)}</svg>'
    )


def shared(page: str) -> str:
    """The page with each embedded picture once: where it stands more than once, the others refer to it."""
    counts = Counter(_EMBEDDED.findall(page))
    named = {uri: f"p{n}" for n, uri in enumerate(uri for uri, count in counts.items() if count > 1)}
    if not named:
        return page
    symbols = "".join(
        f'<symbol id="{name}" viewBox="0 0 1 1" preserveAspectRatio="none">'
        f'<image href="{uri}" width="1" height="1" preserveAspectRatio="none"/></symbol>'
        for uri, name in named.items()
    )

    def replaced(found: re.Match[str]) -> str:
        name = named.get(found[1])
        return f'<use href="#{name}"' if name else found[0]

    body = _EMBEDDED.sub(replaced, page)
    return body.replace("<body>", f'<body>\n<svg class="shared" aria-hidden="true">{symbols}</svg>', 1)


# --- charts -----------------------------------------------------------------------------------------------------------

Axis = Callable[[float], float]
"""A value -> its place in the chart, in units of the SVG."""

WIDTH, HEIGHT = 520, 290
"""Of a chart; what is drawn lies between the margins."""
LEFT, RIGHT, TOP, BOTTOM = 62, 20, 42, 40


def chart(title: str, corner: str, alt: str, parts: Iterable[str]) -> Markup:
    """One chart with its title on the left and `corner` on the right; `parts` are SVG."""
    heading = (
        f'<text class="title" x="{LEFT}" y="14">{escape(title)}</text>'
        f'<text class="last" x="{WIDTH - RIGHT}" y="14">{escape(corner)}</text>'
    )
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(alt)}">{heading}{"".join(parts)}</svg>'
    )


def axes(xticks: Sequence[float], yticks: Sequence[float], px: Axis, py: Axis, unit: str) -> list[str]:
    """The grid, the ticks and their labels, and the unit of x, as SVG."""
    bottom = HEIGHT - BOTTOM
    parts = []
    for y in yticks:
        parts.append(f'<path class="grid" d="M{LEFT} {py(y):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{py(y) + 4:.1f}">{label(y)}</text>')
    for x in xticks:
        parts.append(f'<path class="tick" d="M{px(x):.1f} {bottom}v5"/>')
        parts.append(f'<text class="x" x="{px(x):.1f}" y="{bottom + 18}">{label(x)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="x unit" x="{middle}" y="{HEIGHT - 4}">{escape(unit)}</text>')
    return parts


def ticks(low: float, high: float, wanted: int, *, outwards: bool = False) -> list[float]:
    """Round numbers from `low` to `high`, about as many as wanted; the step is 1, 2 or 5 · 10^n.

    outwards: one more at either end where the range does not end on a round number.
    """
    if not high > low:
        return [low, low + 1.0] if outwards else [low]
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    down, up = (math.floor, math.ceil) if outwards else (math.ceil, math.floor)
    shift = 1e-9 if outwards else -1e-9
    first, last = down(low / step + shift), up(high / step - shift)
    return [n * step for n in range(first, last + 1)] or [low, high]


def label(value: float) -> str:
    """Four digits, thousands as k and M, small numbers with an exponent."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    if 0 < size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def render(template: str, parts: dict[str, Any]) -> str:
    """The page: `parts` are the values that the template names."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render({"style": Markup(STYLE), **parts})
