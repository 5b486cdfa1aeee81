/** The result: the address as a street sign, the confidence, and the ranked candidates. */

import { element, percent } from "./words.js";

export class Answer {
  constructor(parts, map) {
    Object.assign(this, { ...parts, map });
  }

  /** Show a response of `/v1/localize`, and if `framed` move the map to it; returns it as a sentence. */
  show({ known, confidence, threshold, address, candidates }, framed) {
    const best = candidates[0], told = address ?? best;
    this.box.classList.toggle("unknown", !known);
    this.street.textContent = known ? told.street : "I don't know";
    this.district.textContent = known ? told.district : "these are the likeliest";
    const words = sureness(known, confidence);
    this.verdict.replaceChildren(element("strong", words), ` ${percent(confidence)}`);
    this.meaning.textContent = meaning(known, confidence, threshold);
    const shown = candidates.map((c) => ({ ...c, heat: heat(c.probability / (best.probability || 1)) }));
    this.list.replaceChildren(...shown.map((candidate, at) => this.row(candidate, at)));
    this.box.hidden = false;
    this.map.show(shown);
    if (framed) this.map.frameCandidates();
    return known
      ? `${words}, ${percent(confidence)}: ${told.street}, ${told.district}.`
      : `I don't know. The likeliest is ${best.street}, ${best.district}, with ${percent(best.probability)}.`;
  }

  hide() {
    this.box.hidden = true;
    this.map.forget();
  }

  row({ street, district, probability, heat: colour }, at) {
    const button = element("button");
    button.type = "button";
    button.style.setProperty("--heat", colour);
    const name = element("span", `${street} `, "name"), bar = element("span", undefined, "bar");
    name.append(element("small", district));
    bar.append(element("i"));
    bar.firstChild.style.width = `${100 * probability}%`;
    button.append(name, element("span", percent(probability), "share"), bar);
    for (const [event, lit] of [["mouseenter", true], ["focus", true], ["mouseleave", false], ["blur", false]]) {
      button.addEventListener(event, () => this.map.light(at, lit));
    }
    button.addEventListener("click", () => this.map.go(at));
    const row = element("li");
    row.append(button);
    return row;
  }
}

function sureness(known, confidence) {
  if (!known) return "Not sure enough";
  return confidence >= 0.9 ? "Quite sure" : confidence >= 0.7 ? "Fairly sure" : confidence >= 0.5 ? "Rather likely" : "A guess";
}

function meaning(known, confidence, threshold) {
  const often = Math.round(100 * confidence);
  const right = often < 1 ? "By its own estimate, the first candidate is right less than once in 100 times." : `By its own estimate, answers like this are right about ${often} times in 100.`;
  if (threshold === 0) return `${right} This estimate was never checked on photos with known addresses.`;
  if (known || threshold === undefined) return right;
  return `${right} ${threshold < 1 ? `Below ${percent(threshold)} no address is named.` : "It is never sure enough to name an address."}`;
}

/** Likely streets are hot, unlikely ones grey. */
function heat(share) {
  return `color-mix(in oklab, var(--hot) ${Math.round(100 * share)}%, var(--cold))`;
}
