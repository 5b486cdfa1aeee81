/** The map's viewport: pan and zoom by mouse, touch and keyboard. Map units are metres. */

const LEAST_SPAN = 150; // metres across when fully zoomed in
const KEY_STEP = 0.2; // of the window, an arrow key
const STILL = 6; // pixels a finger may move and still have tapped
const FLIGHT = 280; // ms
const calm = window.matchMedia("(prefers-reduced-motion: reduce)");

export class View {
  /** `changed()` is called when the viewport moved, `tapped([x, y])` on a click or tap. */
  constructor(frame, svg, { changed, tapped }) {
    Object.assign(this, { frame, svg, changed, tapped, middle: [0, 0], scale: 1, extent: [-1, -1, 1, 1], pointers: new Map() });
    new ResizeObserver(() => frame.clientWidth && frame.clientHeight && this.set(this.middle, this.scale)).observe(frame); // not while hidden
    frame.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoom(Math.exp(Math.sign(event.deltaY) * Math.min(Math.abs(event.deltaY), 120) / 500), this.place(event));
    }, { passive: false });
    frame.addEventListener("pointerdown", (event) => this.down(event));
    frame.addEventListener("pointermove", (event) => this.move(event));
    for (const end of ["pointerup", "pointercancel"]) frame.addEventListener(end, (event) => this.up(event));
    frame.addEventListener("keydown", (event) => this.key(event));
  }

  get size() {
    return [this.frame.clientWidth || 1, this.frame.clientHeight || 1];
  }

  /** Show `middle` in the middle, `scale` metres a pixel, within reason. */
  set(middle, scale) {
    const [w, h] = this.size, [x0, y0, x1, y1] = this.extent;
    const most = 1.6 * Math.max((x1 - x0) / w, (y1 - y0) / h, LEAST_SPAN / w);
    this.scale = Math.min(Math.max(scale, LEAST_SPAN / w), most);
    this.middle = [Math.min(Math.max(middle[0], x0), x1), Math.min(Math.max(middle[1], y0), y1)];
    const [wide, high] = [w * this.scale, h * this.scale];
    this.svg.setAttribute("viewBox", [this.middle[0] - wide / 2, this.middle[1] - high / 2, wide, high].map((v) => v.toFixed(2)).join(" "));
    this.changed();
  }

  /** Make the box [x0, y0, x1, y1] fill the window, at once or in a short flight. */
  fit([x0, y0, x1, y1], { margin = 1.15, atOnce = calm.matches } = {}) {
    const [w, h] = this.size;
    this.fly([(x0 + x1) / 2, (y0 + y1) / 2], margin * Math.max((x1 - x0) / w, (y1 - y0) / h, LEAST_SPAN / w), atOnce);
  }

  fly(middle, scale, atOnce) {
    cancelAnimationFrame(this.flight);
    if (atOnce) return this.set(middle, scale);
    const from = { middle: this.middle, scale: this.scale }, began = performance.now();
    const step = (now) => {
      const t = Math.min(Math.max((now - began) / FLIGHT, 0), 1), ease = t * (2 - t);
      this.set(from.middle.map((v, i) => v + (middle[i] - v) * ease), from.scale * (scale / from.scale) ** ease);
      if (t < 1) this.flight = requestAnimationFrame(step);
    };
    this.flight = requestAnimationFrame(step);
  }

  /** Zoom by a factor (below 1: closer) around a place that stays where it is. */
  zoom(factor, [x, y] = this.middle) {
    cancelAnimationFrame(this.flight);
    const before = this.scale;
    this.set(this.middle, before * factor);
    const kept = this.scale / before;
    this.set([x + (this.middle[0] - x) * kept, y + (this.middle[1] - y) * kept], this.scale);
  }

  pan(dx, dy) {
    cancelAnimationFrame(this.flight);
    this.set([this.middle[0] - dx * this.scale, this.middle[1] - dy * this.scale], this.scale);
  }

  /** Metres of an event's position. */
  place({ clientX, clientY }) {
    const { left, top } = this.frame.getBoundingClientRect(), [w, h] = this.size;
    return [this.middle[0] + (clientX - left - w / 2) * this.scale, this.middle[1] + (clientY - top - h / 2) * this.scale];
  }

  /** Pixels in the window of a place in metres. */
  pixels([x, y]) {
    const [w, h] = this.size;
    return [w / 2 + (x - this.middle[0]) / this.scale, h / 2 + (y - this.middle[1]) / this.scale];
  }

  down(event) {
    if (event.target.closest("button") || (event.pointerType === "mouse" && event.button)) return;
    this.frame.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, [event.clientX, event.clientY]);
    this.moved = this.pointers.size > 1 ? Infinity : 0;
  }

  move(event) {
    const before = this.pointers.get(event.pointerId);
    if (!before) return;
    const now = [event.clientX, event.clientY], [dx, dy] = [now[0] - before[0], now[1] - before[1]];
    const other = [...this.pointers].find(([id]) => id !== event.pointerId)?.[1];
    this.moved = Math.max(this.moved, Math.hypot(dx, dy));
    if (!other && this.moved < STILL) return;
    this.pointers.set(event.pointerId, now);
    if (!other) return this.pan(dx, dy);
    const distance = (p) => Math.max(Math.hypot(p[0] - other[0], p[1] - other[1]), 1);
    this.zoom(distance(before) / distance(now), this.place({ clientX: (now[0] + other[0]) / 2, clientY: (now[1] + other[1]) / 2 }));
    this.pan(dx / 2, dy / 2);
  }

  up(event) {
    if (!this.pointers.delete(event.pointerId) || event.type === "pointercancel") return;
    if (!this.pointers.size && this.moved < STILL) this.tapped(this.place(event));
  }

  key(event) {
    if (event.target !== this.frame || event.ctrlKey || event.metaKey || event.altKey) return;
    const [w, h] = this.size;
    const acts = {
      ArrowLeft: () => this.pan(w * KEY_STEP, 0), ArrowRight: () => this.pan(-w * KEY_STEP, 0),
      ArrowUp: () => this.pan(0, h * KEY_STEP), ArrowDown: () => this.pan(0, -h * KEY_STEP),
      "+": () => this.zoom(1 / 1.4), "=": () => this.zoom(1 / 1.4), "-": () => this.zoom(1.4), 0: () => this.fit(this.extent),
      Enter: () => this.tapped(this.middle),
    };
    if (!acts[event.key]) return;
    event.preventDefault();
    acts[event.key]();
  }
}
