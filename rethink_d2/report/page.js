(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const buttons = [["toImage", "zoom2d", "pan2d", "resetScale2d"]];
  const config = { displaylogo: false, responsive: true, modeBarButtons: buttons };

  // Charts take text and grid from the page's own style, which follows the light or dark of the system.
  function themed(layout) {
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    const axis = { gridcolor: color("--line"), linecolor: color("--line"), tickcolor: color("--line") };
    return {
      ...layout,
      // A finger is to scroll the page.
      dragmode: layout.dragmode ?? (matchMedia("(pointer: coarse)").matches ? false : "zoom"),
      font: { color: color("--text"), family: getComputedStyle(document.body).fontFamily, size: 12 },
      hoverlabel: { bgcolor: color("--raised"), bordercolor: color("--line"), font: { color: color("--text") } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: color("--muted"), activecolor: color("--text") },
      legend: { ...layout.legend, bgcolor: "rgba(0,0,0,0)" },
      xaxis: { ...layout.xaxis, ...axis },
      yaxis: { ...layout.yaxis, ...axis },
    };
  }

  // A band is no name of its own to click on: it goes with the line that comes after it.
  function hideBands(place) {
    place.data.forEach((trace, i) => {
      const shown = place.data[i + 1]?.visible ?? true;
      if (trace.meta === "band" && (trace.visible ?? true) !== shown) {
        Plotly.restyle(place, { visible: shown }, [i]);
      }
    });
  }

  const drawn = JSON.parse(document.getElementById("charts").textContent).map(async ({ id, figure, chart }) => {
    const place = document.getElementById(id);
    await Plotly.newPlot(place, chart.data, themed(chart.layout), config);
    place.on("plotly_restyle", () => hideBands(place));
    await reader.follow(`${figure} ${chart.layout.title.text}`, place);
    return place;
  });
  const loaded = new Promise((done) => addEventListener("load", done));
  Promise.all([loaded, ...drawn]).then(reader.scroll);
  dark.addEventListener("change", async () => {
    for (const place of await Promise.all(drawn)) Plotly.react(place, place.data, themed(place.layout), config);
  });
})();
