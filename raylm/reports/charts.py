"""Curves as inline SVG that also work without JavaScript; with it they show the raw values under the pointer.

Each chart carries its points as JSON beside it. The script at the page's end smooths them anew when the slider moves,
and finds the points nearest to the pointer. Smoothing is an exponential moving average without bias at the start, as
TensorBoard's: https://github.com/tensorflow/tensorboard (vz_line_chart2).
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from raylm.reports.figures import Figure, short

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 220, 52, 16, 10, 26
# Half the width of a digit of the axes' text.
HALF_DIGIT = 3.5
COLOURS = 8
# Points of a curve that are drawn; of more the lowest and highest of each group are.
MOST_POINTS = 1200
DEFAULT_SMOOTHING = 0.6
# A curve of fewer points is drawn as it is.
LEAST_SMOOTHED = 20
MARKS = {
    "failure": "bad",
    "anomaly": "bad",
    "restart": "warn",
    "interrupted": "warn",
    "resume": "note",
    "takeover": "note",
}

STYLE = """
:root{--c0:#3b6fb6;--c1:#d9772b;--c2:#3a9b6d;--c3:#b3446c;--c4:#7a5fc0;--c5:#8a6d3b;--c6:#2f9fb3;--c7:#6b7280;
--bad:#c0362c;--warn:#c98a12;--note:#98a2b3;--good:#2f7d55}
@media(prefers-color-scheme:dark){:root{--c0:#6fa3e8;--c1:#f0a05e;--c2:#63c795;--c3:#e07aa0;--c4:#a992ee;--c5:#c9a970;
--c6:#63cbdd;--c7:#a1a8b5;--bad:#f0776c;--warn:#e8b64c;--note:#667085;--good:#63c795}}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24em),1fr));gap:1.4em 2em;margin:1em 0}
figure{margin:0;position:relative}figcaption{display:flex;flex-wrap:wrap;gap:0 .6em;align-items:baseline}
figcaption span{color:var(--dim);font-size:.88em}
figure svg{margin:.3em 0;touch-action:pan-y}
.key{white-space:nowrap}.key::before{content:"";display:inline-block;width:1.1em;height:.25em;border-radius:2px;
background:var(--k);margin-right:.4em;vertical-align:middle}
.line{fill:none;stroke-width:2;stroke-linejoin:round;vector-effect:non-scaling-stroke}
.raw{fill:none;stroke-width:1;opacity:.3;vector-effect:non-scaling-stroke}
.legend{display:flex;flex-wrap:wrap;gap:.2em 1.4em;position:sticky;top:0;
background:var(--page);padding:.4em 0;z-index:2}
.tip{position:absolute;z-index:1;pointer-events:none;background:var(--page);border:1px solid var(--line);
border-radius:6px;padding:.35em .7em;font-size:.85em;box-shadow:0 2px 8px #0002;font-variant-numeric:tabular-nums;
max-width:90%}
.badge{border-radius:1em;padding:.1em .8em;font-size:.85em;font-weight:600;color:var(--page);background:var(--note)}
.badge.done{background:var(--good)}.badge.failed{background:var(--bad)}
.badge.running{background:var(--c0)}.badge.interrupted{background:var(--warn)}
.smoothing{display:flex;gap:.6em;align-items:center;color:var(--dim);font-size:.9em}
td.best{font-weight:600}.wide td,.wide th{padding-right:1.6em}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.3em 1.4em;margin:.6em 0}dt{font-weight:600}dd{margin:0}
@media(max-width:40em){dl{grid-template-columns:1fr}dd{margin-bottom:.4em}}
"""

SCRIPT = """
const number=y=>Math.abs(y)>=1000?y.toLocaleString('en',{maximumFractionDigits:0}):String(+y.toPrecision(5));
const smooth=(ys,w)=>{let m=0,c=0;return ys.map(y=>{m=m*w+(1-w)*y;c=c*w+1-w;return m/c})};
const charts=[...document.querySelectorAll('figure[data-chart]')].map(figure=>{
 const d=JSON.parse(figure.querySelector('script').textContent),svg=figure.querySelector('svg');
 const tip=figure.querySelector('.tip'),rule=svg.querySelector('.rule'),dots=[...svg.querySelectorAll('circle')];
 const X=x=>d.left+(x-d.x[0])/(d.x[1]-d.x[0])*d.width,Y=y=>d.top+(d.y[1]-y)/(d.y[1]-d.y[0])*d.height;
 const draw=w=>{if(d.smooth)svg.querySelectorAll('.line').forEach((path,i)=>{const s=d.series[i];
  const ys=smooth(s.y,s.y.length<d.least?0:w);
  path.setAttribute('d','M'+s.x.map((x,j)=>X(x).toFixed(1)+','+Y(ys[j]).toFixed(1)).join('L'))})};
 const hide=()=>{rule.style.display='none';tip.hidden=true;dots.forEach(c=>c.style.display='none')};
 const show=(x,own)=>{const lines=[];let at=null;
  d.series.forEach((s,i)=>{let j=0;s.x.forEach((v,k)=>{if(Math.abs(v-x)<Math.abs(s.x[j]-x))j=k});
   if(x<s.x[0]-d.near||x>s.x[s.x.length-1]+d.near){dots[i].style.display='none';return}
   if(at===null)at=s.x[j];dots[i].style.display='';
   dots[i].setAttribute('cx',X(s.x[j]));dots[i].setAttribute('cy',Y(s.y[j]));
   lines.push([i,(d.series.length>1?s.name+': ':'')+number(s.y[j])+(d.unit?' '+d.unit:'')+
    (s.x[j]===at?'':' (step '+number(s.x[j])+')')])});
  if(at===null){hide();return}
  rule.style.display='';rule.setAttribute('x1',X(at));rule.setAttribute('x2',X(at));tip.hidden=!own;if(!own)return;
  tip.replaceChildren();const add=(text,i)=>{const div=document.createElement('div');div.textContent=text;
   if(i!==null&&d.series.length>1){div.className='key';div.style.setProperty('--k','var(--c'+d.series[i].colour+')')}
   tip.append(div)};
  add('step '+number(at),null);lines.forEach(([i,text])=>add(text,i));
  d.marks.filter(m=>Math.abs(m[0]-x)<d.near).forEach(m=>add(m[1],null));
  const share=(X(at))/d.viewWidth,box=svg.getBoundingClientRect(),frame=figure.getBoundingClientRect();
  tip.style.top=(box.top-frame.top+8)+'px';
  tip.style.left=share<.5?(share*box.width+12)+'px':'auto';
  tip.style.right=share<.5?'auto':((1-share)*box.width+12)+'px'};
 svg.addEventListener('pointermove',e=>{const box=svg.getBoundingClientRect();
  const x=d.x[0]+((e.clientX-box.left)/box.width*d.viewWidth-d.left)/d.width*(d.x[1]-d.x[0]);
  charts.forEach(chart=>chart.show(x,chart.svg===svg))});
 svg.addEventListener('pointerleave',()=>charts.forEach(chart=>chart.hide()));
 return{svg,draw,show,hide}});
const slider=document.querySelector('#smoothing');
if(slider)slider.addEventListener('input',()=>{document.querySelector('#smoothing-value').textContent=slider.value;
 charts.forEach(chart=>chart.draw(+slider.value))});
"""


@dataclass
class Series:
    """One curve.

    Attributes:
        points: (step, value), steps rising.
        colour: number of its colour, below :data:`COLOURS`.
    """

    name: str
    points: list[tuple[float, float]]
    colour: int


@dataclass
class Mark:
    """An event on the step axis; ``kind`` is one of :data:`MARKS`."""

    step: float
    kind: str
    text: str


@dataclass
class _Scale:
    """From values to places in the picture."""

    x: tuple[float, float]
    y: tuple[float, float]
    ticks: list[float] = field(default_factory=list)

    def place(self, x: float, y: float) -> str:
        return f"{self.left(x):.1f},{self.top(y):.1f}"

    def left(self, x: float) -> float:
        return LEFT + (x - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - LEFT - RIGHT)

    def top(self, y: float) -> float:
        return TOP + (self.y[1] - y) / (self.y[1] - self.y[0]) * (HEIGHT - TOP - BOTTOM)


def chart(
    figure: Figure,
    series: Sequence[Series],
    marks: Sequence[Mark] = (),
    title: str | None = None,
    *,
    named: bool = False,
) -> str:
    """One chart of ``series``, each of one point or more, over the steps, with ``marks`` at the events.

    Args:
        title: the figure's own by default.
        named: say beside the title which curve is which; else the page's legend does.
    """
    drawn = [Series(one.name, thinned(one.points), one.colour) for one in series]
    scale = _scale(drawn)
    shown = [mark for mark in marks if scale.x[0] <= mark.step <= scale.x[1]]
    better = f"{figure.better} is better" if figure.better else ""
    caption = ", ".join(text for text in (figure.unit, better) if text)
    keys = "".join(_key(one) for one in drawn) if named and len(drawn) > 1 else ""
    data = {
        "unit": figure.symbol,
        "smooth": figure.smooth,
        "least": LEAST_SMOOTHED,
        "x": scale.x,
        "y": scale.y,
        "left": LEFT,
        "top": TOP,
        "width": WIDTH - LEFT - RIGHT,
        "height": HEIGHT - TOP - BOTTOM,
        "viewWidth": WIDTH,
        "near": (scale.x[1] - scale.x[0]) / 60,
        "marks": [[mark.step, f"{mark.kind} at step {mark.step:,}"] for mark in shown],
        "series": [
            {"name": one.name, "colour": one.colour, "x": [x for x, _ in one.points],
             "y": [float(f"{y:.7g}") for _, y in one.points]}
            for one in drawn
        ],
    }  # fmt: skip
    # Within a script element only "</" could end it.
    packed = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    return (
        f"<figure data-chart><figcaption><b>{html.escape(title or figure.title)}</b>"
        f"<span>{html.escape(caption)}</span>{keys}</figcaption>{_picture(figure, drawn, shown, scale)}"
        f'<div class=tip hidden></div><script type="application/json">{packed}</script></figure>'
    )


def _key(one: Series) -> str:
    return f'<span class=key style="--k:var(--c{one.colour})">{html.escape(one.name)}</span>'


def legend(names: Sequence[str]) -> str:
    """The runs and their colours, in order."""
    keys = "".join(_key(Series(name, [], colour % COLOURS)) for colour, name in enumerate(names))
    return f"<p class=legend>{keys}</p>"


def slider() -> str:
    """The control of the smoothing of all charts on the page."""
    return (
        "<label class=smoothing>smoothing <input id=smoothing type=range min=0 max=0.98 step=0.02 "
        f"value={DEFAULT_SMOOTHING}> <output id=smoothing-value>{DEFAULT_SMOOTHING}</output></label>"
    )


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average of ``values``, each old one counting ``weight`` times the next, without bias."""
    found, mean, count = [], 0.0, 0.0
    for value in values:
        mean, count = mean * weight + (1 - weight) * value, count * weight + 1 - weight
        found.append(mean / count)
    return found


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about :data:`MOST_POINTS` of the ``points``, with every peak: of each group its lowest and highest."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(2 * len(points) / MOST_POINTS)
    kept = [points[0]]
    for start in range(1, len(points) - 1, size):
        group = points[start : min(start + size, len(points) - 1)]
        kept += sorted({min(group, key=lambda p: p[1]), max(group, key=lambda p: p[1])})
    return [*kept, points[-1]]


def _scale(series: Sequence[Series]) -> _Scale:
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    low, high = min(ys), max(ys)
    if high - low < 1e-9 * max(abs(high), abs(low), 1e-9):
        low, high = low - (abs(low) or 1.0) * 0.1, high + (abs(high) or 1.0) * 0.1
    ticks = _ticks(low, high, 4)
    room = 0.04 * (high - low)
    floor = 0.0 if 0 <= low < 0.25 * high else low - room
    x = (min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1)
    return _Scale(x, (min(floor, low), high + room), [tick for tick in ticks if floor <= tick <= high + room])


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers between ``low`` and ``high``, and the one below."""
    raw = (high - low) / count
    step = 10 ** math.floor(math.log10(raw))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if factor * step >= raw)
    first = math.floor(low / step)
    return [round(step * (first + i), 12) for i in range(count + 3) if step * (first + i) <= high + step / 2]


def _picture(figure: Figure, series: Sequence[Series], marks: Sequence[Mark], scale: _Scale) -> str:
    axis = HEIGHT - BOTTOM
    parts = []
    for tick in scale.ticks:
        y = scale.top(tick)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in _ticks(*scale.x, 5):
        if scale.x[0] <= tick <= scale.x[1] and tick == int(tick):
            x = min(scale.left(tick), WIDTH - HALF_DIGIT * len(short(tick)))
            parts.append(f'<text x="{x:.1f}" y="{axis + 15}" text-anchor="middle">{short(tick)}</text>')
    for mark in marks:
        x = scale.left(mark.step)
        parts.append(
            f'<g><title>{html.escape(f"step {mark.step:,}: {mark.text}")}</title><line x1="{x:.1f}" x2="{x:.1f}" '
            f'y1="{TOP}" y2="{axis}" stroke="var(--{MARKS[mark.kind]})" stroke-dasharray="3 3"/>'
            f'<path d="M{x - 4:.1f},{TOP - 6}h8l-4,7z" fill="var(--{MARKS[mark.kind]})"/></g>'
        )
    for one in series:
        colour, ys = f"var(--c{one.colour})", [y for _, y in one.points]
        strong = figure.smooth and len(ys) >= LEAST_SMOOTHED
        if strong:
            parts.append(f'<path class=raw stroke="{colour}" d="{_path(scale, one.points)}"/>')
            ys = smoothed(ys, DEFAULT_SMOOTHING)
        path = _path(scale, [(x, y) for (x, _), y in zip(one.points, ys, strict=True)])
        parts.append(f'<path class=line stroke="{colour}" d="{path}"/>')
        if len(ys) == 1:
            x, y = one.points[0]
            parts.append(f'<rect x="{scale.left(x) - 3:.1f}" y="{scale.top(y) - 3:.1f}" width="6" height="6" '
                         f'rx="3" fill="{colour}"/>')  # fmt: skip
    parts.append(f'<line class=rule y1="{TOP}" y2="{axis}" stroke="var(--dim)" style="display:none"/>')
    parts += [f'<circle r="3.5" fill="var(--c{one.colour})" style="display:none"/>' for one in series]
    name = html.escape(figure.title)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name} by step">{"".join(parts)}</svg>'


def _path(scale: _Scale, points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(scale.place(x, y) for x, y in points)
