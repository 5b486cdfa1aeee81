/** The chat about the photo: its first turn carries the photo, answers are streamed. */

import { chat } from "./api.js";
import { dataUrl } from "./photo.js";
import { element } from "./words.js";

const MAX_TOKENS = 160;
const LAST = 60; // latest turns that are sent, besides the first two; the service accepts 64

export class Talk {
  /** `model()`: the model's name. */
  constructor(parts, model) {
    Object.assign(this, { ...parts, model, photo: null, turns: [] });
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      const question = this.question.value.trim();
      if (!question || this.busy) return;
      this.question.value = "";
      this.ask(question);
    });
  }

  /** Start again with another photo, or with none. */
  about(photo) {
    this.abort?.abort();
    Object.assign(this, { photo, turns: [], busy: false });
    this.log.replaceChildren();
    this.box.hidden = !photo;
    this.send.disabled = false;
  }

  suggest(questions) {
    this.ideas.replaceChildren(...questions.map((question) => {
      const button = element("button", question);
      button.type = "button";
      button.addEventListener("click", () => this.ask(question));
      return button;
    }));
  }

  async ask(question) {
    if (!this.photo || this.busy) return;
    const abort = this.abort = new AbortController();
    const answer = element("p", "…", "it");
    this.wait(true);
    this.log.append(element("p", question, "me"), answer);
    this.follow();
    try {
      const image = this.turns.length ? [] : [{ type: "image_url", image_url: { url: await dataUrl(this.photo) } }];
      const before = this.turns.length > LAST + 2 ? [...this.turns.slice(0, 2), ...this.turns.slice(-LAST)] : this.turns;
      const messages = [...before, { role: "user", content: [...image, { type: "text", text: question }] }];
      let said = "";
      for await (const piece of chat({ model: this.model(), messages, max_tokens: MAX_TOKENS, temperature: 0 }, abort.signal)) {
        answer.textContent = said += piece;
        this.follow();
      }
      if (!said.trim()) answer.textContent = "(no answer)";
      this.turns = [...messages, { role: "assistant", content: said }];
    } catch (error) {
      if (abort.signal.aborted) return;
      answer.textContent = error.message;
      answer.classList.add("bad");
    }
    if (this.abort === abort) this.wait(false);
    this.follow();
  }

  wait(busy) {
    this.busy = this.send.disabled = busy;
    this.log.setAttribute("aria-busy", busy); // screen readers wait until it is complete
  }

  follow() {
    this.log.scrollTop = this.log.scrollHeight;
  }
}
