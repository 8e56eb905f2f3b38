// Curves: a small one in a row, as plain SVG that the style sheet colours, and a large one by uPlot.

import { svg, mark, el, say } from "./dom.js";
import { isNumber, loss, count } from "./format.js";

const WIDTH = 240;
const HEIGHT = 40;
const PAD = 3;

/** The loss of a job so far. Its whole width is the whole job, so that the curve also tells how far it is. */
export function sparkline() {
  const area = svg("path", { class: "area" });
  const line = svg("path", { class: "line" });
  const held = svg("path", { class: "held" });
  const element = svg(
    "svg",
    { class: "spark", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" },
    area,
    line,
    held,
  );
  return {
    element,
    update(curve, totalSteps) {
      const points = (curve?.points ?? []).filter(([, value]) => isNumber(value));
      const validation = (curve?.validation ?? []).filter(([, value]) => isNumber(value));
      mark(element, "aria-label", describe(points, validation));
      if (!points.length) {
        for (const path of [area, line, held]) mark(path, "d", "");
        return;
      }
      const first = Math.min(points[0][0], validation[0]?.[0] ?? Infinity, 1);
      const last = Math.max(points.at(-1)[0], isNumber(totalSteps) ? totalSteps : 0, first + 1);
      const values = [...points, ...validation].map(([, value]) => value);
      const low = Math.min(...values);
      const range = Math.max(...values) - low || 1;
      const x = (step) => (((step - first) / (last - first)) * WIDTH).toFixed(1);
      const y = (value) => (HEIGHT - PAD - ((value - low) / range) * (HEIGHT - 2 * PAD)).toFixed(1);
      const path = (pairs) => pairs.map(([step, value], i) => `${i ? "L" : "M"}${x(step)} ${y(value)}`).join("");
      const drawn = path(points);
      mark(line, "d", drawn);
      mark(area, "d", `${drawn}L${x(points.at(-1)[0])} ${HEIGHT}L${x(points[0][0])} ${HEIGHT}Z`);
      mark(held, "d", path(validation));
    },
  };
}

function describe(points, validation) {
  if (!points.length) return "No loss measured yet";
  const held = validation.length ? `, on held-out conversations ${loss(validation.at(-1)[1])}` : "";
  return `Loss from ${loss(points[0][1])} to ${loss(points.at(-1)[1])} at step ${count(points.at(-1)[0])}${held}`;
}

/** The large chart of a job's page: training loss and validation loss by step, values under the pointer. */
export function lossChart() {
  const training = el("b");
  const validation = el("b");
  const where = el("span", { class: "muted" });
  const legend = el(
    "p",
    { class: "legend" },
    el("span", {}, el("i", { class: "key line" }), "training ", training),
    el("span", {}, el("i", { class: "key held" }), "held out ", validation),
    where,
  );
  const box = el("div", { class: "plot", role: "img" });
  const element = el("div", {}, legend, box);
  let plot = null;
  let data = [[], [], []];
  let last = null;

  const readout = (place) => {
    const at = place ?? data[0].length - 1;
    const back = (values) => {
      for (let i = at; i >= 0; i--) if (isNumber(values[i])) return values[i];
      return null;
    };
    say(training, loss(back(data[1])));
    say(validation, loss(back(data[2])));
    say(where, data[0].length ? `at step ${count(data[0][at])}` : "no step yet");
  };

  const draw = () => {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    plot?.destroy();
    const axis = {
      stroke: colour("--muted"),
      font: `12px ${colour("--font")}`,
      grid: { stroke: colour("--line"), width: 1 },
      ticks: { show: false },
    };
    plot = new window.uPlot(
      {
        width: Math.max(box.clientWidth, 200),
        height: 280,
        legend: { show: false },
        cursor: { y: false, points: { size: 7 }, drag: { x: false, y: false } },
        // The width is the whole job, so that the curve also tells how far it is.
        scales: { x: { time: false, range: (_, low, high) => [low ?? 0, Math.max(high ?? 1, last ?? 0, 1)] } },
        axes: [
          { ...axis, grid: { show: false }, size: 32, values: (_, steps) => steps.map((step) => (Number.isInteger(step) ? count(step) : "")) },
          { ...axis, size: 48, values: (_, values) => values.map((value) => value.toFixed(2)) },
        ],
        series: [
          {},
          { stroke: colour("--accent"), width: 1.5, points: { show: data[0].length < 2 } },
          {
            stroke: colour("--text"),
            width: 1.5,
            dash: [1, 4],
            spanGaps: true,
            points: { show: true, size: 6, fill: colour("--surface"), stroke: colour("--text") },
          },
        ],
        hooks: { setCursor: [(self) => readout(self.cursor.idx ?? null)] },
      },
      data,
      box,
    );
  };

  const resized = new ResizeObserver(() => plot?.setSize({ width: Math.max(box.clientWidth, 200), height: 280 }));
  resized.observe(box);
  const themed = new MutationObserver(() => plot && draw());
  themed.observe(document.documentElement, { attributeFilter: ["data-theme"] });

  return {
    element,
    isEmpty: () => data[0].length === 0,
    update(curve, totalSteps) {
      last = isNumber(totalSteps) ? totalSteps : null;
      const points = curve.points.filter(([, value]) => isNumber(value));
      const held = new Map(curve.validation.filter(([, value]) => isNumber(value)));
      const trained = new Map(points);
      const steps = [...new Set([...trained.keys(), ...held.keys()])].sort((a, b) => a - b);
      data = [steps, steps.map((step) => trained.get(step) ?? null), steps.map((step) => held.get(step) ?? null)];
      mark(box, "aria-label", describe(points, [...held]));
      mark(box, "data-points", points.length);
      if (!steps.length) return readout(null);
      if (plot) plot.setData(data);
      else draw();
      readout(plot.cursor.idx ?? null);
    },
    end() {
      resized.disconnect();
      themed.disconnect();
      plot?.destroy();
    },
  };
}
