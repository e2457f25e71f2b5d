// Draws the charts of a page with plotly.js, in its light or dark colors.
"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = !matchMedia("(hover: hover)").matches;

  function template() {
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    const axis = {
      gridcolor: color("--grid"),
      zerolinecolor: color("--grid"),
      linecolor: color("--grid"),
      title: { standoff: 8 },
    };
    return {
      layout: {
        paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: "rgba(0,0,0,0)",
        font: { color: color("--text"), family: "system-ui, sans-serif" },
        modebar: {
          bgcolor: "rgba(0,0,0,0)",
          color: color("--quiet"),
          activecolor: color("--text"),
        },
        hoverlabel: {
          bgcolor: color("--paper"),
          bordercolor: color("--grid"),
          font: { color: color("--text") },
          align: "left",
        },
        // Its entry in use is light in both modes.
        updatemenudefaults: {
          bgcolor: "#e4e8ee",
          bordercolor: "#aab2bd",
          font: { color: "#1d2430" },
        },
        xaxis: axis,
        yaxis: axis,
        // A swipe over a chart scrolls the page.
        dragmode: touch ? false : "zoom",
      },
    };
  }

  function draw() {
    const shared = template();
    for (const { name, figure } of charts) {
      Plotly.react(
        name,
        figure.data,
        { ...figure.layout, template: shared },
        {
          responsive: true,
          displaylogo: false,
          displayModeBar: touch ? false : "hover",
          // None that sends data anywhere.
          modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
          toImageButtonOptions: { format: "svg", filename: name },
        },
      );
    }
  }

  function showPicked({ name }) {
    const picked = document.getElementById(`${name}-picked`);
    if (!picked) return;
    document.getElementById(name).on("plotly_click", ({ points }) => {
      const about = points[0].customdata;
      if (about) picked.textContent = about[about.length - 1];
    });
  }

  draw();
  charts.forEach(showPicked);
  dark.addEventListener("change", draw);
})();
