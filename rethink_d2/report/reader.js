"use strict";
// What the reader has opened, hidden, zoomed and scrolled to outlasts a reload; a page opened anew is as made.
const reader = (() => {
  const store = `report ${location.pathname}`;
  const anew = performance.getEntriesByType("navigation")[0]?.type === "navigate";
  let kept = {};
  try {
    if (!anew) kept = JSON.parse(sessionStorage.getItem(store)) ?? {};
  } catch { /* no storage, no memory */ }
  const charts = new Map();

  const named = (selector) => [...document.querySelectorAll(selector)];
  const nameOf = (spot) => spot.dataset.key ?? spot.id;
  const traceName = (trace) => [trace.legendgroup, trace.name].join(" ");
  const top = (spot) => spot.getBoundingClientRect().top;
  const spots = () => named("section, figure, [data-key]");
  const zoomed = (axis) => (axis.autorange === false ? axis.range : null);

  function keep() {
    const state = { open: {}, charts: { ...kept.charts }, y: scrollY };
    for (const details of named("details")) state.open[details.dataset.key] = details.open;
    for (const [name, place] of charts) {
      const hidden = place.data.filter((trace) => trace.visible === "legendonly").map(traceName);
      state.charts[name] = { hidden, x: zoomed(place.layout.xaxis), y: zoomed(place.layout.yaxis) };
    }
    // What is at the window's top: other runs may come to stand above it.
    const spot = spots().findLast((one) => top(one) <= 0);
    if (spot) state.spot = [nameOf(spot), top(spot)];
    try {
      sessionStorage.setItem(store, JSON.stringify(state));
    } catch { /* as above */ }
  }

  // A chart that has been drawn gets its reader's curves and zoom back.
  async function follow(name, place) {
    charts.set(name, place);
    const { hidden = [], x, y } = kept.charts?.[name] ?? {};
    const indexes = place.data.flatMap((trace, i) => (hidden.includes(traceName(trace)) ? [i] : []));
    if (indexes.length) await Plotly.restyle(place, { visible: "legendonly" }, indexes);
    if (x || y) await Plotly.relayout(place, { ...(x && { "xaxis.range": x }), ...(y && { "yaxis.range": y }) });
  }

  for (const details of named("details")) details.open = kept.open?.[details.dataset.key] ?? details.open;
  history.scrollRestoration = "manual";
  function scroll() {
    if (kept.y === undefined) return;
    const [name, offset] = kept.spot ?? [];
    const spot = spots().find((one) => nameOf(one) === name);
    scrollTo({ top: spot ? scrollY + top(spot) - offset : kept.y, behavior: "instant" });
  }
  addEventListener("pagehide", keep);
  return { follow, scroll };
})();
