/** "I know roughly where": a district, and a circle on the map. */

const RADII = [50, 100, 200, 500, 1000, 2000]; // metres

export class Prior {
  /** `changed()` is called when the prior changed; `parts` are the controls, by name. */
  constructor(parts, map, changed) {
    Object.assign(this, { ...parts, map, changed, place: null });
    this.panel.addEventListener("toggle", () => this.panel.parentElement.classList.toggle("placing", this.panel.open));
    this.district.addEventListener("change", () => changed());
    this.radius.addEventListener("input", () => this.draw());
    this.radius.addEventListener("change", () => this.place && changed());
    this.put.addEventListener("click", () => this.set(map.middle));
    this.clear.addEventListener("click", () => {
      const had = this.value();
      this.reset();
      if (had) changed();
    });
    this.draw();
  }

  /** Clear the prior; `districts`: those of another city, if the city changed. */
  reset(districts) {
    if (districts) this.district.replaceChildren(new Option("anywhere", ""), ...districts.map((name) => new Option(name, name)));
    this.district.value = "";
    this.place = null;
    this.draw();
  }

  /** Set the circle's centre to {lat, lon}, if the panel is open. */
  set(place) {
    if (!this.panel.open) return;
    this.place = place;
    this.draw();
    this.changed();
  }

  /** The prior for the request, or null. */
  value() {
    const districts = this.district.value ? [this.district.value] : [];
    const circle = this.place && { ...this.place, radius_m: RADII[this.radius.value] };
    return districts.length || circle ? { ...(districts.length && { districts }), ...(circle && { circle }) } : null;
  }

  draw() {
    const metres = RADII[this.radius.value], words = metres < 1000 ? `${metres} m` : `${metres / 1000} km`;
    this.map.circle(this.place && { ...this.place, radius_m: metres });
    this.radius.setAttribute("aria-valuetext", words);
    const known = [this.place && `in the circle of ${words}`, this.district.value && `in ${this.district.value}`].filter(Boolean);
    this.metres.textContent = words;
    this.summary.textContent = known.length ? `only ${known.join(", ")}` : "";
    this.clear.hidden = !known.length;
  }
}
