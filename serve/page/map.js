/** The city's streets as SVG, drawn from the gazetteer without map tiles: candidates in colours, names, a circle. */

import { placed } from "./labels.js";
import { View } from "./view.js";

const SVG = "http://www.w3.org/2000/svg";
const METRES_PER_DEGREE = 111320;

export class CityMap {
  /** `tapped({lat, lon})` is called on a click or tap on the map. */
  constructor(frame, tapped) {
    this.layers = Object.fromEntries(["districts", "streets", "circle", "candidates"].map((name) => [name, shape("g", { class: name })]));
    this.svg = frame.querySelector("svg");
    this.svg.append(...Object.values(this.layers));
    this.names = frame.querySelector(".names");
    this.drawn = [];
    this.labels = [];
    this.view = new View(frame, this.svg, { changed: () => this.annotate(), tapped: (point) => tapped(this.degrees(point)) });
  }

  /** Draw a city from its gazetteer, without candidates. */
  load(geojson) {
    const shapes = geojson.features.filter((f) => f.geometry);
    const [west, south, east, north] = box(shapes.flatMap((f) => points(f.geometry)));
    this.origin = [(west + east) / 2, (south + north) / 2];
    this.squeeze = Math.cos((this.origin[1] * Math.PI) / 180);
    this.shapes = new Map();
    const drawn = { district: [], street: [] };
    this.labels = [];
    for (const { geometry, properties: { kind, name } } of shapes) {
      const parts = this.parts(geometry);
      drawn[kind].push(outline(parts, name));
      this.labels.push({ text: name, kind, parts });
      if (kind === "street") this.shapes.set(name, parts);
    }
    this.layers.districts.replaceChildren(...drawn.district);
    this.layers.streets.replaceChildren(...drawn.street);
    this.view.extent = box(this.labels.filter((l) => l.kind === "street" || !drawn.street.length).flatMap((l) => l.parts.flatMap((p) => p.line)));
    this.forget();
    this.circle(null);
    this.view.fit(this.view.extent, { atOnce: true });
  }

  /** Draw candidates {street, geometry, heat}, the likeliest first. */
  show(candidates) {
    const ranks = new Map(); // a street can be a candidate in several districts: it is numbered once
    this.drawn = [];
    candidates.forEach(({ street, geometry, heat }, at) => {
      const parts = geometry ? this.parts(geometry) : this.shapes.get(street);
      if (!parts?.length) return;
      const key = geometry ? JSON.stringify(geometry) : street, again = ranks.has(key);
      if (!again) ranks.set(key, at + 1);
      const path = outline(parts, `${ranks.get(key)}. ${street}`);
      path.style.setProperty("--heat", heat);
      this.drawn.push({ at, path, parts, heat, street, rank: again ? null : ranks.get(key) });
    });
    this.layers.candidates.replaceChildren(...this.drawn.map((d) => d.path).reverse()); // the likeliest on top
    this.annotate();
  }

  forget() {
    this.drawn = [];
    this.layers.candidates.replaceChildren();
    this.annotate();
  }

  /** Make the candidates fill the map. */
  frameCandidates() {
    const all = this.drawn.flatMap((d) => d.parts.flatMap((p) => p.line));
    this.view.fit(all.length ? box(all) : this.view.extent);
  }

  /** Highlight one candidate, or no longer. */
  light(at, lit) {
    const d = this.drawn.find((one) => one.at === at);
    d?.path.classList.toggle("lit", lit);
    if (lit && d) this.layers.candidates.append(d.path);
  }

  /** Move to one candidate. */
  go(at) {
    const d = this.drawn.find((one) => one.at === at);
    if (d) this.view.fit(box(d.parts.flatMap((p) => p.line)), { margin: 1.6 });
  }

  /** Draw the circle {lat, lon, radius_m}, or none. */
  circle(circle) {
    const [cx, cy] = circle ? this.plane([circle.lon, circle.lat]) : [];
    this.layers.circle.replaceChildren(...(circle ? [shape("circle", { cx, cy, r: circle.radius_m }), shape("circle", { cx, cy, r: 0, class: "middle" })] : []));
  }

  /** {lat, lon} of the map's centre. */
  get middle() {
    return this.degrees(this.view.middle);
  }

  annotate() {
    if (!this.origin) return;
    this.names.replaceChildren(...placed(this.drawn, this.labels, this.view));
  }

  plane([lon, lat]) {
    return [(lon - this.origin[0]) * this.squeeze * METRES_PER_DEGREE, (this.origin[1] - lat) * METRES_PER_DEGREE];
  }

  degrees([x, y]) {
    return { lat: this.origin[1] - y / METRES_PER_DEGREE, lon: this.origin[0] + x / METRES_PER_DEGREE / this.squeeze };
  }

  /** Lines in metres; the outlines of areas are closed. */
  parts(geometry) {
    return pieces(geometry).map(({ line, closed }) => ({ line: line.map((p) => this.plane(p)), closed }));
  }
}

function pieces({ type, coordinates, geometries }) {
  const open = (line) => ({ line, closed: false }), shut = (line) => ({ line, closed: true });
  if (type === "Point") return [open([coordinates, coordinates])];
  if (type === "LineString") return [open(coordinates)];
  if (type === "MultiLineString") return coordinates.map(open);
  if (type === "Polygon") return coordinates.map(shut);
  if (type === "MultiPolygon") return coordinates.flat().map(shut);
  return type === "GeometryCollection" ? geometries.flatMap(pieces) : [];
}

function points(geometry) {
  return pieces(geometry).flatMap(({ line }) => line);
}

function outline(parts, name) {
  const d = parts.map(({ line, closed }) => "M" + line.map((p) => p.map((v) => v.toFixed(1)).join(" ")).join("L") + (closed ? "Z" : "")).join("");
  const path = shape("path", { d });
  path.append(shape("title"));
  path.firstChild.textContent = name;
  if (parts.some((p) => p.closed)) path.classList.add("area");
  return path;
}

function shape(name, attributes = {}) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function box(all) {
  if (!all.length) return [-1, -1, 1, 1];
  let [x0, y0, x1, y1] = [Infinity, Infinity, -Infinity, -Infinity];
  for (const [x, y] of all) [x0, y0, x1, y1] = [Math.min(x0, x), Math.min(y0, y), Math.max(x1, x), Math.max(y1, y)];
  return [x0, y0, x1, y1];
}
