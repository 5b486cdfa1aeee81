/** The city's streets as SVG, with numbered candidates. Drawn from the gazetteer, without tiles from anywhere. */

const SVG = "http://www.w3.org/2000/svg";

export class CityMap {
  constructor(svg, badges, geojson) {
    this.svg = svg;
    this.badges = badges;
    this.drawn = [];
    const [, south, , north] = box(geojson.features.flatMap((f) => lines(f.geometry).flat()));
    const squeeze = Math.cos(((south + north) / 2) * Math.PI / 180);
    this.plane = ([lon, lat]) => [lon * squeeze * 1e5, -lat * 1e5];
    this.streets = new Map();
    const districts = [], streets = [];
    for (const { geometry, properties } of geojson.features) {
      if (!geometry) continue;
      const parts = lines(geometry).map((line) => line.map(this.plane));
      const path = document.createElementNS(SVG, "path");
      const area = properties.kind === "district";
      path.setAttribute("d", parts.map((part) => "M" + part.map((p) => p.map((v) => v.toFixed(1)).join(" ")).join("L") + (area ? "Z" : "")).join(""));
      path.append(document.createElementNS(SVG, "title"));
      path.firstChild.textContent = properties.name;
      if (area) path.setAttribute("class", "district");
      else this.streets.set(properties.name, { path, parts });
      (area ? districts : streets).push(path);
    }
    svg.replaceChildren(...districts, ...streets);
    this.everything = box([...this.streets.values()].flatMap((s) => s.parts.flat()));
  }

  /** Draw candidates {street, heat}, the likeliest first. */
  show(candidates, zoomed) {
    for (const { path } of this.streets.values()) path.removeAttribute("class");
    this.drawn = [];
    candidates.forEach(({ street, heat: colour }, at) => {
      const known = this.streets.get(street);
      if (!known) return;
      if (!known.path.classList.contains("candidate")) known.path.style.setProperty("--heat", colour);
      known.path.classList.add("candidate");
      const badge = document.createElement("span");
      badge.textContent = at + 1;
      badge.style.setProperty("--heat", colour);
      this.drawn.push({ at, badge, path: known.path, parts: known.parts, middle: middle(known.parts) });
    });
    for (const { path } of [...this.drawn].reverse()) path.parentNode.append(path); // the likeliest on top
    this.badges.replaceChildren(...this.drawn.map((d) => d.badge).reverse());
    this.view(zoomed);
  }

  /** Make one candidate stand out, or no longer. */
  light(at, lit) {
    for (const d of this.drawn) {
      if (d.at !== at) continue;
      d.path.classList.toggle("lit", lit);
      d.badge.classList.toggle("lit", lit);
    }
  }

  /** Fit the candidates, or the whole city. */
  view(zoomed) {
    const points = zoomed ? this.drawn.flatMap((d) => d.parts.flat()) : [];
    const [x, y, w, h] = framed(points.length ? box(points) : this.everything);
    this.svg.setAttribute("viewBox", [x, y, w, h].join(" "));
    for (const { badge, middle: [mx, my] } of this.drawn) {
      badge.style.left = `${(100 * (mx - x)) / w}%`;
      badge.style.top = `${(100 * (my - y)) / h}%`;
    }
  }
}

function lines(geometry) {
  if (!geometry) return [];
  const { type, coordinates } = geometry;
  if (type === "LineString") return [coordinates];
  if (type === "MultiLineString" || type === "Polygon") return coordinates;
  if (type === "MultiPolygon") return coordinates.flat();
  return type === "GeometryCollection" ? geometry.geometries.flatMap(lines) : [];
}

function box(points) {
  let [x0, y0, x1, y1] = [Infinity, Infinity, -Infinity, -Infinity];
  for (const [x, y] of points) [x0, y0, x1, y1] = [Math.min(x0, x), Math.min(y0, y), Math.max(x1, x), Math.max(y1, y)];
  return [x0, y0, x1, y1];
}

/** The box grown to the map's proportions, with a margin. */
function framed([x0, y0, x1, y1]) {
  const margin = 1.1, ratio = 4 / 3, least = 250;
  const w = margin * Math.max(x1 - x0, (y1 - y0) * ratio, least), h = w / ratio;
  return [(x0 + x1 - w) / 2, (y0 + y1 - h) / 2, w, h];
}

/** The middle of a street's longest part, on the line. */
function middle(parts) {
  const length = (part) => part.slice(1).reduce((sum, p, i) => sum + Math.hypot(p[0] - part[i][0], p[1] - part[i][1]), 0);
  const part = parts.reduce((a, b) => (length(b) > length(a) ? b : a));
  let left = length(part) / 2;
  for (let i = 1; i < part.length; i++) {
    const [a, b] = [part[i - 1], part[i]], step = Math.hypot(b[0] - a[0], b[1] - a[1]);
    if (step >= left && step > 0) return [a[0] + ((b[0] - a[0]) * left) / step, a[1] + ((b[1] - a[1]) * left) / step];
    left -= step;
  }
  return part[0];
}
