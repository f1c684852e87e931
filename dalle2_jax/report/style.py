"""The style sheet of a report: light and dark, for a phone and for a desktop."""

STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1c1e21;--soft:#5b626b;--rule:#dfe2e6;--card:#f7f8fa;--warn:#8a4b00;
--c0:#3157c8;--c1:#c4501b;--c2:#1b8452;--c3:#9a3fb5;--c4:#a07400;--c5:#0e7f95;--c6:#c02d63;--c7:#6b6f76}
@media (prefers-color-scheme:dark){:root{--page:#14161a;--ink:#e7e9ec;--soft:#a2a9b3;--rule:#343941;--card:#1c1f25;
--warn:#f0b35e;--c0:#88a7ff;--c1:#ff9a66;--c2:#5fcf98;--c3:#d992f0;--c4:#e0bb4a;--c5:#5fc9df;--c6:#ff86ad;--c7:#a9aeb6}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.2rem clamp(.8rem,3vw,2.5rem) 3rem;max-width:1500px;background:var(--page);
color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.7rem;margin:.2rem 0}h2{font-size:1.35rem;margin:2.6rem 0 .4rem;padding-top:.8rem;
border-top:2px solid var(--rule)}h3{font-size:1.12rem;margin:2rem 0 .4rem}h4{font-size:1rem;margin:1.3rem 0 .3rem}
p{margin:.3rem 0}.soft,small{color:var(--soft)}a{color:var(--c0)}nav{display:flex;flex-wrap:wrap;gap:.2rem 1rem}
.note{color:var(--warn);margin:.3rem 0;padding-left:.7rem;border-left:3px solid var(--warn)}
.scroll{overflow-x:auto;margin:.5rem 0}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums;overflow-wrap:normal}
th,td{text-align:left;padding:.28rem .9rem .28rem 0;border-bottom:1px solid var(--rule);vertical-align:top}
th,td{white-space:nowrap}thead th{color:var(--soft);font-weight:500;vertical-align:bottom}tbody th{font-weight:500}
tbody th,thead th:first-child{position:sticky;left:0;background:var(--page);white-space:normal;
overflow-wrap:anywhere;min-width:6.5rem;max-width:42vw}
.values th,.values td{white-space:normal;overflow-wrap:anywhere;min-width:9rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:.9rem;margin:.7rem 0}
figure{margin:0}.chart{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:.6rem .7rem}
.chart svg{display:block;width:100%;height:auto}figcaption{font-size:.9rem}
.legend{display:flex;flex-wrap:wrap;gap:0 .9rem;font-size:.82rem;color:var(--soft)}
.legend i{display:inline-block;width:14px;margin-right:.3rem;vertical-align:middle;border-top:3px solid}
.legend i.dashed{border-top-style:dashed}
.axes line{stroke:var(--rule);stroke-width:1}.axes text{fill:var(--soft);font-size:11.5px}
.curve{fill:none;stroke:currentColor;stroke-width:1.8;stroke-linejoin:round}.curve.dashed{stroke-dasharray:5 3}
.dot{fill:currentColor}.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}
.c4{color:var(--c4)}.c5{color:var(--c5)}.c6{color:var(--c6)}.c7{color:var(--c7)}
.grids{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:.9rem;margin:.7rem 0}
.grids img{width:100%;height:auto;display:block;border-radius:6px;border:1px solid var(--rule)}
.bar{width:130px;height:14px;vertical-align:middle}.bar line{stroke:var(--rule);stroke-width:2}
.bar .reach{stroke:var(--c0);stroke-width:4}.bar .point{fill:var(--c0)}.bar .base{stroke:var(--c1);stroke-width:3}
details{margin:.5rem 0}summary{cursor:pointer;color:var(--c0)}
footer{margin-top:3rem;color:var(--soft);font-size:.85rem}
"""
