import { CityMap } from "./map.js";

const $ = (id) => document.getElementById(id);
const LONGEST_SIDE = 2048; // larger photos are shrunk here: less to upload, and the model looks at less anyway
const SENT_AS_IS = ["image/jpeg", "image/png", "image/webp"];

let photo = null; // the blob that is asked about
let turns = []; // the conversation so far
let modelName = "addressvlm";
let round = 0; // answers to an earlier photo are dropped

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The server can't be reached.");
  }
  const body = await response.json().catch(() => null);
  if (!response.ok) throw new Error(body?.error?.message ?? `The server answered ${response.status}.`);
  return body;
}

/* ---- the photo ---- */

async function prepared(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    return file; // the server says what is wrong with it
  }
  const scale = LONGEST_SIDE / Math.max(bitmap.width, bitmap.height);
  if (scale >= 1 && SENT_AS_IS.includes(file.type)) return file;
  const canvas = element("canvas");
  canvas.width = Math.round(bitmap.width * Math.min(scale, 1));
  canvas.height = Math.round(bitmap.height * Math.min(scale, 1));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const shrunk = await new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.92));
  return shrunk ?? file;
}

async function take(file) {
  if (!file) return;
  const mine = ++round;
  forget();
  document.body.classList.add("busy");
  say("Looking at it …");
  try {
    photo = await prepared(file);
    URL.revokeObjectURL($("picture").src);
    $("picture").src = URL.createObjectURL(photo);
    await $("picture").decode().then(() => showPicture(true), () => showPicture(false));
    const form = new FormData();
    form.append("file", photo, "photo");
    const found = await request("v1/localize", { method: "POST", body: form });
    if (mine !== round) return;
    say("");
    await showResult(found);
  } catch (error) {
    if (mine === round) say(error.message, true);
  } finally {
    if (mine === round) document.body.classList.remove("busy");
  }
}

function showPicture(visible) {
  $("picture").hidden = !visible;
  $("invite").hidden = visible;
  $("ask").hidden = !visible;
  if (visible) showIdeas(["Which street is this?", "Which district is this?"]);
}

function forget() {
  photo = null;
  turns = [];
  $("talk").replaceChildren();
  document.querySelector("main").classList.remove("found");
  for (const id of ["result", "ask", "mapbox"]) $(id).hidden = true;
  showPicture(false);
}

/* ---- the answer ---- */

function heat(share) {
  return `color-mix(in oklab, var(--hot) ${Math.round(25 + 75 * share)}%, var(--soft))`;
}

function percent(p) {
  return p >= 0.995 ? "> 99 %" : p < 0.001 ? "< 0.1 %" : `${(100 * p).toFixed(p < 0.1 ? 1 : 0)} %`;
}

async function showResult({ address, candidates }) {
  const cityMap = await mapLoaded;
  $("street").textContent = address.street;
  $("district").textContent = address.district;
  const best = candidates[0].probability || 1;
  const rows = candidates.map((candidate, at) => {
    const button = element("button");
    button.type = "button";
    button.style.setProperty("--heat", heat(candidate.probability / best));
    const name = element("span", `${candidate.street} `, "name");
    name.append(element("small", candidate.district));
    const bar = element("span", undefined, "bar");
    bar.append(element("i"));
    bar.firstChild.style.width = `${100 * candidate.probability}%`;
    button.append(name, element("span", percent(candidate.probability), "share"), bar);
    for (const [event, lit] of [["mouseenter", true], ["focus", true], ["mouseleave", false], ["blur", false]]) {
      button.addEventListener(event, () => cityMap?.light(at, lit));
    }
    const row = element("li");
    row.append(button);
    return row;
  });
  $("candidates").replaceChildren(...rows);
  $("result").hidden = false;
  document.querySelector("main").classList.add("found");
  if (window.innerWidth < 820) $("result").scrollIntoView();
  if (cityMap) {
    $("mapbox").hidden = false;
    cityMap.show(candidates.map((c) => ({ street: c.street, heat: heat(c.probability / best) })), zoomed());
  }
  const other = candidates.find((c) => c.street !== address.street);
  showIdeas(["Which street is this?", "Which district is this?", `Was this taken on ${(other ?? address).street}?`]);
}

function zoomed() {
  return $("zoom").getAttribute("aria-pressed") === "true";
}

/* ---- questions ---- */

function showIdeas(questions) {
  $("ideas").replaceChildren(...questions.map((question) => {
    const button = element("button", question);
    button.type = "button";
    button.addEventListener("click", () => ask(question));
    return button;
  }));
}

function dataUrl(blob) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(new Error("The photo can't be read."));
    reader.readAsDataURL(blob);
  });
}

async function ask(question) {
  if (!photo || $("send").disabled) return;
  const mine = round;
  $("send").disabled = true;
  const answer = element("li", "…", "it");
  $("talk").append(element("li", question, "me"), answer);
  $("talk").scrollTop = $("talk").scrollHeight;
  try {
    const text = { type: "text", text: question };
    const image = turns.length ? [] : [{ type: "image_url", image_url: { url: await dataUrl(photo) } }];
    const messages = [...turns, { role: "user", content: [...image, text] }];
    const got = await request("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ model: modelName, messages, max_tokens: 128 }),
    });
    if (mine !== round) return;
    answer.textContent = got.choices[0].message.content || "(no answer)";
    turns = [...messages, { role: "assistant", content: got.choices[0].message.content }];
  } catch (error) {
    answer.textContent = error.message;
    answer.classList.add("bad");
  } finally {
    $("send").disabled = false;
    $("talk").scrollTop = $("talk").scrollHeight;
  }
}

/* ---- wiring ---- */

$("camera").hidden = !navigator.maxTouchPoints;

for (const input of [$("choose"), $("shoot")]) {
  input.addEventListener("change", () => {
    take(input.files[0]);
    input.value = "";
  });
}
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((f) => f.type.startsWith("image/"));
  if (file) take(file);
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  $("drop").classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("drop").classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  take(event.dataTransfer.files[0]);
});
$("zoom").addEventListener("click", async () => {
  $("zoom").setAttribute("aria-pressed", !zoomed());
  (await mapLoaded).view(zoomed());
});
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || $("send").disabled) return;
  $("question").value = "";
  ask(question);
});

request("v1/models").then(({ data }) => {
  modelName = data[0].id;
  $("model").textContent = modelName;
}, (error) => say(error.message, true));
const mapLoaded = request("v1/map").then((geojson) => {
  if (geojson.city) $("intro").textContent = `Give a street photo of ${geojson.city}, get its address.`;
  $("attribution").textContent = [geojson.attribution ?? []].flat().join(" · ");
  return new CityMap($("streets"), $("badges"), geojson);
}, () => null); // a model without a gazetteer has no map
