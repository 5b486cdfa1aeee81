/** The page: sends a photo to `/v1/localize` and shows the result. */

import { Answer } from "./answer.js";
import { Refused, download, rememberKey, request } from "./api.js";
import { CityMap } from "./map.js";
import { collectPhotos, prepared } from "./photo.js";
import { Prior } from "./prior.js";
import { Talk } from "./talk.js";
import { element } from "./words.js";

const $ = (id) => document.getElementById(id);
const parts = (names) => Object.fromEntries(Object.entries(names).map(([part, id]) => [part, $(id)]));

const GIVEN = new URLSearchParams(location.search); // ?city=…&threshold=0.8&top_k=10, for links

let photo = null; // a Blob, ready to send
let cities = []; // {id, name, model} each
let looking = null; // aborts the current request when the photo or the prior changes
let again = start; // what "Try again" does

const map = new CityMap($("map"), (place) => prior.set(place));
const answer = new Answer(parts({ box: "result", street: "street", district: "district", verdict: "verdict", meaning: "meaning", reason: "reason", list: "candidates" }), map);
const talk = new Talk(parts({ box: "ask", ideas: "ideas", log: "talk", form: "form", question: "question", send: "send" }), () => city().model);
const prior = new Prior(
  parts({ panel: "where", district: "in", radius: "radius", metres: "metres", put: "put", clear: "clear", summary: "only" }), map, () => photo && locate(),
);

function say(text, trouble = null, unseen = false) {
  $("status").textContent = text;
  $("status").className = trouble ? "bad" : unseen ? "unseen" : "";
  $("again").hidden = !(trouble instanceof Refused && (trouble.status === 0 || trouble.status >= 500));
  $("keyform").hidden = trouble?.status !== 401;
}

function failed(error, retry) {
  again = retry;
  say(error.status === 401 ? "This service asks for a key." : error.message, error);
  $("status").scrollIntoView({ block: "nearest" });
}

/* ---- the photo ---- */

async function take(file) {
  looking?.abort();
  const mine = looking = new AbortController(), picture = $("picture");
  photo = null;
  talk.about(null);
  answer.hide();
  showPicture(false);
  say("Looking at it …");
  try {
    const fresh = await prepared(file);
    if (mine !== looking) return; // the user chose another photo meanwhile
    photo = fresh;
  } catch (error) {
    return failed(error);
  }
  URL.revokeObjectURL(picture.src);
  picture.src = URL.createObjectURL(photo);
  await picture.decode().then(() => showPicture(true), () => {});
  if (mine === looking) await locate();
}

function showPicture(visible) {
  $("picture").hidden = !visible;
  $("invite").hidden = visible;
  document.querySelector("main").classList.toggle("given", visible);
}

async function locate() {
  if (!cities.length) return start();
  looking?.abort();
  const abort = looking = new AbortController(), asked = photo, first = $("result").hidden;
  const form = new FormData(), hint = prior.value();
  form.append("file", asked, "photo.jpg");
  form.append("city", city().id);
  for (const key of ["threshold", "top_k"]) if (GIVEN.has(key)) form.append(key, GIVEN.get(key));
  if (hint) form.append("prior", JSON.stringify(hint));
  document.body.classList.add("busy");
  say("Looking at it …");
  try {
    const found = await request("v1/localize", form, abort.signal);
    if (abort.signal.aborted) return;
    say(answer.show(found, first), null, true); // for screen readers; the street sign shows it
    if (talk.photo !== asked) talk.about(asked);
    const other = found.candidates.find((c) => c.street !== found.candidates[0].street) ?? found.candidates[0];
    talk.suggest(["Which street is this? Name it.", "Which district is this? Name it.", `Which street is this? Is it on ${other.street}? Answer Yes or No.`]);
    if (first && window.innerWidth < 820) $("result").scrollIntoView({ block: "nearest" });
  } catch (error) {
    if (abort.signal.aborted) return;
    answer.hide();
    failed(error, locate);
  } finally {
    if (looking === abort) document.body.classList.remove("busy");
  }
}

/* ---- the city ---- */

async function start() {
  say("");
  try {
    cities = (await request("v1/cities")).data;
  } catch (error) {
    return failed(error, start);
  }
  $("city").replaceChildren(...cities.map(({ id, name }) => new Option(name || id, id)));
  $("cities").hidden = cities.length < 2;
  if (cities.some(({ id }) => id === GIVEN.get("city"))) $("city").value = GIVEN.get("city");
  await showCity();
}

function city() {
  return cities[$("city").selectedIndex];
}

async function showCity() {
  const { id, name, model } = city();
  looking?.abort();
  talk.about(null);
  answer.hide();
  say("");
  $("model").textContent = model;
  $("intro").textContent = `Give a street photo${name && ` of ${name}`}, get its address.`;
  try {
    const geojson = await request(`v1/map?city=${encodeURIComponent(id)}`);
    if (id !== city().id) return; // another one was chosen meanwhile
    $("attribution").textContent = [geojson.attribution ?? []].flat().join(" · ");
    $("mapbox").hidden = false;
    map.load(geojson);
    prior.reset(geojson.features.filter((f) => f.properties.kind === "district").map((f) => f.properties.name));
  } catch (error) {
    $("mapbox").hidden = true;
    if (error.status !== 404) return failed(error, showCity); // a model without a gazetteer has no map
  }
  await Promise.all([offerSamples(id), photo && locate()]);
}

/** Thumbnails of photos to try, if the service has some. */
async function offerSamples(id) {
  const samples = await request(`v1/samples?city=${encodeURIComponent(id)}`).then(({ data }) => data, () => []);
  const photos = await Promise.all(samples.map(({ url }) => download(url).catch(() => null)));
  if (id !== city().id) return;
  for (const image of $("tries").querySelectorAll("img")) URL.revokeObjectURL(image.src);
  $("tries").replaceChildren(...photos.filter(Boolean).map((blob, at) => {
    const button = element("button"), image = element("img");
    button.type = "button";
    image.alt = `Photo ${at + 1}`;
    image.src = URL.createObjectURL(blob);
    button.append(image);
    button.addEventListener("click", () => take(blob));
    return button;
  }));
  $("samples").hidden = !$("tries").children.length;
}

/* ---- wiring ---- */

$("camera").hidden = !navigator.maxTouchPoints;
if (navigator.maxTouchPoints) $("invite").querySelector("p").textContent = "Take a photo of the street, or choose one";
collectPhotos([$("choose"), $("shoot")], $("drop"), take);
$("city").addEventListener("change", showCity);
$("again").addEventListener("click", () => again());
$("closer").addEventListener("click", () => map.view.zoom(1 / 1.6));
$("further").addEventListener("click", () => map.view.zoom(1.6));
$("all").addEventListener("click", () => map.frameCandidates());
$("keyform").addEventListener("submit", (event) => {
  event.preventDefault();
  rememberKey($("key").value.trim());
  say("");
  again();
});
start();
