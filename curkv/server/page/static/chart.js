// Small charts in SVG; colours come from the style sheet's classes.

const NS = "http://www.w3.org/2000/svg";

// Draws stacked areas, or lines, over time.
//   svg: with a viewBox; series: [{name, values}], all as long as `times`; from, to: the time axis; top: the value axis.
export function draw(svg, series, times, { from, to, top, stacked }) {
  const { width, height } = svg.viewBox.baseVal;
  const x = (t) => (((t - from) / (to - from)) * width).toFixed(1);
  const y = (v) => (height - (v / (top || 1)) * (height - 2)).toFixed(1);
  const base = times.map(() => 0);
  svg.replaceChildren(...series.map(({ name, values }) => {
    const path = document.createElementNS(NS, "path");
    path.setAttribute("class", stacked ? "area" : "line");
    path.dataset.name = name;
    if (!times.length) return path;
    const low = [...base];
    const high = values.map((v, i) => (stacked ? (base[i] += v) : v));
    const upper = times.map((t, i) => `${x(t)},${y(high[i])}`);
    const lower = stacked ? times.map((t, i) => `${x(t)},${y(low[i])}`).reverse() : [];
    path.setAttribute("d", `M${[...upper, ...lower].join("L")}${stacked ? "Z" : ""}`);
    return path;
  }));
}
