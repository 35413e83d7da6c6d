// A chart: curves of one metric, as SVG. The pointer or the arrow keys move a cursor, and the values under it are shown.

import { make, makeSvg, shortNumber } from "./dom.js";
import { logTicks, nearest, thin, ticks } from "./series.js";

const MARGIN = { left: 50, right: 12, top: 10, bottom: 22 };

export class Chart {
  constructor({ title, unit, main }) {
    this.title = title;
    this.curves = [];
    this.cursor = null;
    this.readout = make("div", { class: "readout", "aria-live": "off" });
    this.svg = makeSvg("svg", { class: "plot", tabindex: "0", role: "img" });
    this.element = make(
      "figure",
      { class: main ? "chart main" : "chart" },
      make("div", { class: "chart-head" }, make("h2", {}, title), unit ? make("span", { class: "unit" }, unit) : null),
      this.readout,
      this.svg,
    );
    new ResizeObserver(() => this.draw()).observe(this.svg);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerdown", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.setCursor(null));
    this.svg.addEventListener("blur", () => this.setCursor(null));
    this.svg.addEventListener("keydown", (event) => this.key(event));
  }

  /** `curves`: `{name, color, kind: "line" | "pale" | "valid", points}`. */
  update(curves, { scale, axis }) {
    Object.assign(this, { curves: curves.filter(({ points }) => points.length > 0), scale, axis });
    this.element.hidden = this.curves.length === 0;
    this.draw();
  }

  /** The ranges of both axes, over all curves. */
  ranges() {
    let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
    const isLog = this.scale === "log";
    for (const { points } of this.curves) {
      x0 = Math.min(x0, points[0][0]);
      x1 = Math.max(x1, points.at(-1)[0]);
      for (const [, y] of points) {
        if (isLog && y <= 0) continue;
        if (y < y0) y0 = y;
        if (y > y1) y1 = y;
      }
    }
    if (!(x1 > x0)) [x0, x1] = [x0 - 0.5, x0 + 0.5];
    if (y0 > y1) [y0, y1] = isLog ? [0.1, 1] : [0, 1];
    if (isLog) {
      const room = Math.max((y1 / y0) ** 0.06, 1.02);
      return { x0, x1, y0: y0 / room, y1: y1 * room };
    }
    const room = (y1 - y0) * 0.06 || Math.abs(y1) * 0.1 || 1;
    // A metric that is never negative gets no axis below zero.
    return { x0, x1, y0: y0 >= 0 ? Math.max(0, y0 - room) : y0 - room, y1: y1 + room };
  }

  draw() {
    const { width, height } = this.svg.getBoundingClientRect();
    if (width < 80 || height < 60 || this.curves.length === 0) return;
    const { x0, x1, y0, y1 } = this.ranges();
    const [left, right, top, bottom] = [MARGIN.left, width - MARGIN.right, MARGIN.top, height - MARGIN.bottom];
    const isLog = this.scale === "log";
    const mapY = isLog ? Math.log : (y) => y;
    const placeX = (x) => left + ((x - x0) / (x1 - x0)) * (right - left);
    const placeY = (y) => bottom - ((mapY(y) - mapY(y0)) / (mapY(y1) - mapY(y0))) * (bottom - top);
    Object.assign(this, { placeX, placeY, box: { left, right, top, bottom, x0, x1 } });
    const parts = [];
    for (const tick of isLog ? logTicks(y0, y1) : ticks(y0, y1, (bottom - top) / 46)) {
      const y = placeY(tick);
      parts.push(makeSvg("line", { class: "grid", x1: left, x2: right, y1: y, y2: y }));
      parts.push(makeSvg("text", { x: left - 8, y: y + 3.5, "text-anchor": "end" }, tickText(tick, y1 - y0)));
    }
    const across = ticks(x0, x1, (right - left) / 90).filter((tick) => this.axis === "seconds" || Number.isInteger(tick));
    for (const tick of across) {
      parts.push(makeSvg("text", { x: placeX(tick), y: bottom + 16, "text-anchor": "middle" }, compact(tick)));
    }
    for (const { color, kind, points } of this.curves) {
      const shown = thin(isLog ? points.filter(([, y]) => y > 0) : points, placeX);
      const path = shown.map(([x, y], index) => `${index ? "L" : "M"}${placeX(x).toFixed(1)} ${placeY(y).toFixed(1)}`);
      parts.push(makeSvg("path", { class: `curve ${kind} s${color}`, d: path.join("") }));
      if (shown.length === 1 || (kind === "valid" && shown.length <= 40)) {
        for (const [x, y] of shown) parts.push(makeSvg("circle", { class: `dot s${color}`, cx: placeX(x), cy: placeY(y), r: 2.5 }));
      }
    }
    this.marks = makeSvg("g");
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.replaceChildren(...parts, this.marks);
    this.show();
  }

  point(event) {
    if (!this.box) return;
    const at = event.clientX - this.svg.getBoundingClientRect().left;
    const { left, right, x0, x1 } = this.box;
    this.setCursor(x0 + Math.min(Math.max((at - left) / (right - left), 0), 1) * (x1 - x0));
  }

  key(event) {
    if (!this.box || !["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key)) return;
    event.preventDefault();
    const { x0, x1 } = this.box;
    const step = (x1 - x0) / (event.shiftKey ? 10 : 50);
    const from = this.cursor ?? x1;
    const to = { ArrowLeft: from - step, ArrowRight: from + step, Home: x0, End: x1 }[event.key];
    this.readout.setAttribute("aria-live", "polite");
    this.setCursor(Math.min(Math.max(to, x0), x1));
  }

  setCursor(x) {
    this.cursor = x;
    if (x === null) this.readout.setAttribute("aria-live", "off");
    this.show();
  }

  /** Shows the values at the cursor, or the last ones. */
  show() {
    if (!this.marks) return;
    const strong = this.curves.filter(({ kind }) => kind !== "pale");
    const marks = [];
    const values = strong.map((curve) => {
      const point = this.cursor === null ? curve.points.at(-1) : nearest(curve.points, this.cursor);
      if (this.cursor !== null && point && !(this.scale === "log" && point[1] <= 0)) {
        marks.push(makeSvg("circle", { class: `dot s${curve.color}`, cx: this.placeX(point[0]), cy: this.placeY(point[1]), r: 3.5 }));
      }
      return { curve, point };
    });
    if (this.cursor !== null) {
      const x = this.placeX(this.cursor);
      marks.unshift(makeSvg("line", { class: "cursor", x1: x, x2: x, y1: this.box.top, y2: this.box.bottom }));
    }
    this.marks.replaceChildren(...marks);
    const place = this.cursor === null ? null : values.find(({ point }) => point)?.point[0];
    const name = ({ curve }) => (curve.kind === "valid" ? `${curve.name}, validation` : curve.name);
    this.readout.replaceChildren(
      ...(place === null || place === undefined ? [] : [make("span", {}, `${this.axis} ${shortNumber(place)}`)]),
      ...values.map((value) =>
        make("span", {}, make("i", { class: `dot s${value.curve.color}${value.curve.kind === "valid" ? " ring" : ""}` }), name(value), make("b", {}, shortNumber(value.point[1])))),
    );
    const last = strong.map((curve) => `${name({ curve })}: ${shortNumber(curve.points.at(-1)[1])} at ${this.axis} ${shortNumber(curve.points.at(-1)[0])}`);
    this.svg.setAttribute("aria-label", `${this.title}. ${last.join("; ")}. The arrow keys move through the curve`);
  }
}

/** A label of the vertical axis: as many digits as tell neighbors apart. */
function tickText(value, range) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e4) return compact(value);
  if (size < 1e-3) return value.toExponential(1).replace(".0e", "e");
  const digits = Math.min(Math.max(1 - Math.floor(Math.log10(range || 1)), 0), 5);
  return String(Number(value.toFixed(digits)));
}

/** `12k`, `3.5M`. */
function compact(value) {
  for (const [size, unit] of [[1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= size) return `${Number((value / size).toPrecision(4))}${unit}`;
  }
  return String(Number(value.toPrecision(6)));
}
