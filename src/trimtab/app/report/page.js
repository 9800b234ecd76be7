// Unpacks Plotly, draws every figure, and draws again when theme, width or medium change.
(async () => {
  "use strict";
  const root = document.documentElement;
  const PAPER_WIDTH = 680; // CSS pixels between the margins of A4 and US letter, less the card's border
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const chosen = {}; // option of each control, by chart

  try {
    const packed = document.getElementById("plotly").textContent.trim();
    const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
    const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const code = document.createElement("script");
    code.textContent = await new Response(unpacked).text();
    document.head.append(code);
  } catch (error) {
    document.getElementById("no-charts").hidden = false;
    document.querySelectorAll(".plot").forEach((plot) => plot.remove());
    document.querySelectorAll("details").forEach((details) => (details.open = true));
    root.dataset.charts = "failed";
    return;
  }

  // "--name" is a colour of the theme; everything else stands as it is.
  const themed = (value, style) => {
    if (typeof value === "string") return value.startsWith("--") ? style.getPropertyValue(value).trim() : value;
    if (Array.isArray(value)) return value.map((item) => themed(item, style));
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, themed(item, style)]));
    return value;
  };

  const traces = ({ id, data, control }, onPaper) => {
    if (!control || (onPaper && control.kind === "select")) return data; // paper shows no list to tell what was chosen
    const option = control.traces[chosen[id] ?? control.start];
    return control.kind === "select" ? option : option.map((trace, i) => ({ ...data[i], ...trace }));
  };

  // Zooming is for a mouse; under a finger a chart must let the page scroll.
  const isMouse = matchMedia("(pointer: fine)").matches;

  const draw = (figure) => {
    const onPaper = "paper" in root.dataset;
    const plot = document.getElementById(figure.id);
    const width = onPaper || figure.media === "print" ? PAPER_WIDTH : plot.clientWidth;
    if (!width) return;
    const style = getComputedStyle(root);
    const layout = structuredClone(figure.layout);
    for (const key of Object.keys(layout)) if (/^[xy]axis/.test(key)) layout[key].fixedrange = !isMouse;
    if (width < 500 && layout.meta?.layers > 8) layout.xaxis.dtick *= 2; // every layer's number would not fit
    if (width < 500 && layout.xaxis.nticks) layout.xaxis.nticks = 5;
    const isGrid = figure.data[0].type === "heatmap";
    const data = themed(traces(figure, onPaper), style);
    // A text that would shrink below reading size is left to the pointer and the table.
    const { layers, characters } = layout.meta ?? {};
    const cell = (width - 150) / layers;
    if (isGrid && cell < 6 * characters + 2) data[0].texttemplate = "";
    if (isGrid && cell < 6) data[0].xgap = 0;
    const height = onPaper && !isGrid && !layout.annotations ? 0.8 * figure.height : figure.height;
    plot.style.height = `${height}px`;
    Object.assign(layout, { width, height, dragmode: isMouse ? "zoom" : false });
    Plotly.react(plot, data, themed(layout, style), {
      displayModeBar: false, showTips: false, scrollZoom: false, doubleClick: "reset",
    });
  };
  const drawAll = () => figures.forEach(draw);

  const choose = (input, option) => {
    const figure = figures.find((each) => each.id === input.dataset.control);
    chosen[figure.id] = Number(option);
    input.value = option;
    const output = input.parentElement.querySelector("output");
    if (output) output.textContent = figure.control.options[option];
    input.setAttribute("aria-valuetext", figure.control.options[option]);
    // Only the first entry of a list has a legend: one module's lines are named under the pointer.
    const legend = document.querySelector(`[data-legend="${figure.id}"]`);
    if (legend) legend.hidden = figure.control.kind === "select" && Number(option) !== 0;
    draw(figure);
  };
  for (const input of document.querySelectorAll("[data-control]")) {
    input.value = input.getAttribute("value") ?? "0"; // browsers keep a control's place over a reload
    input.addEventListener("input", () => {
      // The stacks of an encoder-decoder share their events: their sliders move together.
      const together = input.type === "range" ? input.closest("section").querySelectorAll("input[type=range]") : [input];
      together.forEach((each) => choose(each, input.value));
    });
  }

  for (const figure of figures) {
    draw(figure);
    await new Promise((next) => setTimeout(next)); // the page stays usable while a slow phone draws
  }
  root.dataset.charts = "drawn";

  let width = root.clientWidth;
  let waiting;
  addEventListener("resize", () => {
    if (root.clientWidth === width || "paper" in root.dataset) return; // a phone's address bar only changes the height
    width = root.clientWidth;
    clearTimeout(waiting);
    waiting = setTimeout(drawAll, 100);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

  let opened = [];
  addEventListener("beforeprint", () => {
    root.dataset.paper = "";
    opened = [...document.querySelectorAll("details[data-print]:not([open])")];
    opened.forEach((details) => (details.open = true));
    drawAll();
  });
  addEventListener("afterprint", () => {
    delete root.dataset.paper;
    opened.forEach((details) => (details.open = false));
    drawAll();
  });
})();
