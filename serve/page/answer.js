/** The result: the address as a street sign, the confidence, and the ranked candidates. */

import { element, percent } from "./words.js";

const SURENESS = [[0.95, "Almost certain"], [0.8, "Very likely"], [0.6, "Likely"], [0.4, "Perhaps"]]; // from this confidence on
const LIKELY = 0.4; // below it no address stands on the sign

export class Answer {
  constructor(parts, map) {
    Object.assign(this, { ...parts, map });
  }

  /** Show a response of `/v1/localize`, and if `framed` move the map to it; returns it as a sentence. */
  show({ reason, confidence, threshold, candidates }, framed) {
    const best = candidates[0], words = sureness(confidence), sure = confidence >= LIKELY;
    this.box.classList.toggle("unknown", !sure);
    this.street.textContent = sure ? best.street : "I don't know";
    this.district.textContent = sure ? best.district : "these are the likeliest";
    this.verdict.replaceChildren(element("strong", words), ` ${percent(confidence)}`);
    this.meaning.textContent = meaning(confidence, threshold);
    this.reason.textContent = reason ?? "";
    const shown = candidates.map((c) => ({ ...c, heat: heat(c.probability / (best.probability || 1)) }));
    this.list.replaceChildren(...shown.map((candidate, at) => this.row(candidate, at)));
    this.box.hidden = false;
    this.map.show(shown);
    if (framed) this.map.frameCandidates();
    const address = `${best.street}, ${best.district}`;
    return sure ? `${words}, ${percent(confidence)}: ${address}.` : `I don't know. The likeliest is ${address}, with ${percent(confidence)}.`;
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

function sureness(confidence) {
  return (SURENESS.find(([least]) => confidence >= least) ?? [0, "A guess"])[1];
}

function meaning(confidence, threshold) {
  const often = Math.round(100 * confidence);
  const right = often < 1 ? "By its own estimate, the first candidate is right less than once in 100 times." : `By its own estimate, answers like this are right about ${often} times in 100.`;
  return threshold === 0 ? `${right} This estimate was never checked on photos with known addresses.` : right;
}

/** Likely streets are hot, unlikely ones grey. */
function heat(share) {
  return `color-mix(in oklab, var(--hot) ${Math.round(100 * share)}%, var(--cold))`;
}
