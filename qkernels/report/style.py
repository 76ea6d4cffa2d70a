"""The style of the report: light and dark, wide and narrow."""

CSS = """
:root { color-scheme: light dark; --back:#fff; --text:#1b1f24; --soft:#5c6570; --line:#d8dde3; --panel:#f5f7f9;
  --good:#d3efdb; --bad:#fbdcd7;
  --c0:#0b62b8; --c1:#d35400; --c2:#128a5e; --c3:#a03aa8; --c4:#8a6d00; --c5:#c2255c; --c6:#1098a8; --c7:#5f6670; }
@media (prefers-color-scheme: dark) { :root { --back:#14171b; --text:#e4e8ec; --soft:#9aa4af; --line:#333a42;
  --panel:#1c2026; --good:#17402a; --bad:#4d2320;
  --c0:#63b0ff; --c1:#ff9a52; --c2:#4fd1a0; --c3:#dd92e6; --c4:#e0c04a; --c5:#ff7da6; --c6:#55d3e3; --c7:#aab2bc; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 75rem; padding: 1rem 1.25rem 3rem; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; -webkit-text-size-adjust: 100%; }
h1 { font-size: 1.6rem; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { color: var(--soft); margin: .3rem 0 .7rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; }
th:first-child, td.text, th.text { text-align: left; }
td small { color: var(--soft); } td.text { white-space: normal; } tbody th { color: var(--text); font-weight: 500; }
.matrix tbody th, .matrix thead tr:first-child th:first-child { position: sticky; left: 0; background: var(--back); }
.matrix tbody th { white-space: normal; min-width: 7rem; max-width: 15rem; }
.matrix th[colspan] { text-align: left; padding-left: 1.4rem; }
.best { font-weight: 700; } .good { background: var(--good); } .bad { background: var(--bad); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1rem; }
.pictures { grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
figure { margin: 0; padding: .6rem; background: var(--panel); border-radius: .5rem; max-width: 40rem; }
figure svg, figure img { display: block; width: 100%; height: auto; } figure img { background: #fff; }
figcaption { margin: 0 0 .3rem; font-weight: 600; color: var(--text); }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); } svg .name { fill: var(--text); }
svg .grid { stroke: var(--line); stroke-width: 1; } svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .6rem 0; padding: 0; list-style: none; }
.legend i { display: inline-block; width: 1.4rem; height: .25rem; margin-right: .4rem; vertical-align: middle; }
summary { cursor: pointer; margin: 1rem 0; color: var(--soft); }
@media (max-width: 40rem) {
  body { padding: .5rem .75rem 2rem; }
  .cards thead { display: none; }
  .cards tr { display: block; margin: 0 0 .8rem; padding: .4rem .7rem; background: var(--panel); border-radius: .5rem; }
  .cards th, .cards td { display: flex; justify-content: space-between; gap: 1rem; padding: .2rem 0; border: 0;
    white-space: normal; text-align: right; overflow-wrap: anywhere; }
  .cards tbody th { font-weight: 700; font-size: 1.05rem; text-align: left; }
  .cards td::before { content: attr(data-label); color: var(--soft); text-align: left; white-space: nowrap; }
  .cards td:empty { display: none; }
  .matrix tbody th { min-width: 6.5rem; max-width: 8rem; } th, td { padding: .3rem .45rem; }
}
@media print { :root { color-scheme: light; } figure, tr { break-inside: avoid; } }
"""
