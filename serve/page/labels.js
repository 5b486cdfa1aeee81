/** Labels on the map: numbers of the candidates first, then names of districts and streets where they fit without overlap. */

const GAP = 4; // pixels between two labels
const LIFT = { street: 9, strong: 12, district: 0 }; // pixels between a street's line and the middle of its name
const FONT = { street: "11px system-ui, sans-serif", strong: "600 12px system-ui, sans-serif", district: "600 12px system-ui, sans-serif" };
const HEIGHT = 13; // pixels, of a line of text
const BADGE = 24; // pixels
const TOOLS = [60, 160]; // pixels in the upper right corner that the buttons cover
const SHARES = { street: [0.5, 0.3, 0.7], strong: [0.75, 0.25, 0.62, 0.38], district: [0.5] }; // where along a street its name may be; the middle of a candidate has its number
const pen = document.createElement("canvas").getContext("2d");
const widths = new Map();

/** Elements at their places in the view. Candidates {street, rank or null, heat, parts}, labels {text, kind, parts}. */
export function placed(candidates, labels, view) {
  const taken = [[view.size[0] - TOOLS[0], 0, view.size[0], TOOLS[1]]], made = [];
  for (const { rank, heat, parts } of candidates.filter((c) => c.rank)) {
    const spot = view.pixels(along(parts, 0.5).point);
    taken.push(around(spot, BADGE, BADGE));
    made.push(label("badge", rank, spot));
    made.at(-1).style.setProperty("--heat", heat);
  }
  const named = new Set(candidates.map((c) => c.street));
  const order = [...labels].sort((a, b) => turn(a, named) - turn(b, named));
  for (const { text, kind, parts } of order) {
    const style = kind === "street" && named.has(text) ? "strong" : kind;
    for (const share of SHARES[style]) {
      const { point, angle, length } = kind === "district" ? centre(parts) : along(parts, share);
      const width = measured(text, style), [sin, cos] = [Math.sin(angle), Math.cos(angle)], [x, y] = view.pixels(point);
      const spot = [x + LIFT[style] * sin, y - LIFT[style] * cos];
      if (!inside(spot, view.size) || length / view.scale < width) continue;
      const room = around(spot, width * Math.abs(cos) + HEIGHT * Math.abs(sin), width * Math.abs(sin) + HEIGHT * Math.abs(cos));
      if (taken.some((other) => meet(room, other))) continue;
      taken.push(room);
      made.push(label(style, text, spot, angle));
      break;
    }
  }
  return made;
}

function turn({ text, kind }, named) {
  return kind === "district" ? 1 : named.has(text) ? 0 : 2;
}

function label(className, text, [x, y], angle = 0) {
  const made = document.createElement("span");
  made.className = className;
  made.textContent = text;
  made.style.transform = `translate(${x.toFixed(1)}px, ${y.toFixed(1)}px) translate(-50%, -50%) rotate(${angle.toFixed(3)}rad)`;
  return made;
}

function measured(text, style) {
  const key = `${style} ${text}`;
  if (!widths.has(key)) {
    pen.font = FONT[style];
    widths.set(key, pen.measureText(text).width + 6);
  }
  return widths.get(key);
}

function around([x, y], w, h) {
  return [x - w / 2 - GAP, y - h / 2 - GAP, x + w / 2 + GAP, y + h / 2 + GAP];
}

function meet(a, b) {
  return a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
}

function inside([x, y], [w, h]) {
  return x > 0 && y > 0 && x < w && y < h;
}

const longest = new WeakMap(); // parts -> their longest one, with its length

function main(parts) {
  if (!longest.has(parts)) {
    const length = ({ line }) => line.slice(1).reduce((sum, p, i) => sum + Math.hypot(p[0] - line[i][0], p[1] - line[i][1]), 0);
    longest.set(parts, parts.map((part) => ({ line: part.line, length: length(part) })).reduce((a, b) => (b.length > a.length ? b : a)));
  }
  return longest.get(parts);
}

/** The point at a share of a street's longest part, and the direction there, so that text reads from left to right. */
function along(parts, share) {
  const { line, length } = main(parts);
  let left = length * share;
  for (let i = 1; i < line.length; i++) {
    const [a, b] = [line[i - 1], line[i]], step = Math.hypot(b[0] - a[0], b[1] - a[1]);
    if (step >= left && step > 0) {
      const angle = Math.atan2(b[1] - a[1], b[0] - a[0]), turned = Math.abs(angle) > Math.PI / 2;
      return { point: [a[0] + ((b[0] - a[0]) * left) / step, a[1] + ((b[1] - a[1]) * left) / step], angle: turned ? angle - Math.sign(angle) * Math.PI : angle, length };
    }
    left -= step;
  }
  return { point: line[0], angle: 0, length };
}

/** The middle of an area's box, and how wide it is. */
function centre(parts) {
  const xs = parts.flatMap(({ line }) => line.map(([x]) => x)), ys = parts.flatMap(({ line }) => line.map(([, y]) => y));
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)], [y0, y1] = [Math.min(...ys), Math.max(...ys)];
  return { point: [(x0 + x1) / 2, (y0 + y1) / 2], angle: 0, length: x1 - x0 };
}
