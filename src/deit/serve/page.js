import { at, describe, fail, listen, preview, say, show } from "./shown.js";
import { said, translate } from "./words.js";

translate();

const asSentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + ".";
const UNREACHABLE = said("The server can\u2019t be reached; try again later.");
let asking = new AbortController();
let calibration = null;
let scoring = "softmax";
let explains = false;
let sent = null;  // the image that labels are shown for
let looking = false;  // whether its explanation is on its way
let found = null;  // its explanation

function authorization() {
  return at("key").value ? { Authorization: "Bearer " + at("key").value.trim() } : {};
}

// Returns the server's answer, {error: a sentence} on failure, or null if the question is out of date.
async function post(path, file, mine) {
  const headers = { "Content-Type": "application/octet-stream", ...authorization() };
  try {
    const answer = await (await fetch(path, { method: "POST", headers, body: file, signal: mine.signal })).json();
    if (answer.error) answer.error = asSentence(answer.error);
    return mine.signal.aborted ? null : answer;
  } catch (error) {
    return mine.signal.aborted ? null : { error: UNREACHABLE };
  }
}

async function ask(file) {
  asking.abort();
  const mine = asking = new AbortController();
  at("error").textContent = "";
  forget();
  preview(file);
  say(said("Looking\u2026"));
  const answer = await post("/v1/classify", file, mine);
  if (answer?.error) fail(answer.error);
  else if (answer) {
    show(answer.results[0], scoring, calibration?.error_rate);
    sent = file;
    at("why").hidden = !explains;
  }
}

// ---- what it looked at

function forget() {
  sent = found = null;
  looking = false;
  at("why").hidden = true;
  at("map-error").textContent = "";
  fold(true);
}

function fold(hidden) {
  at("looked").hidden = hidden;
  at("why").textContent = hidden ? said("Show what it looked at") : said("Hide what it looked at");
}

function draw(token) {
  const map = found.maps.find((each) => each.token === token);
  const { label } = found.answers.find((each) => each.token === token);
  const place = said(map.strongest);
  at("map").src = map.overlay;
  at("map").alt = said("Map over the image, strongest {place}", { place });
  at("said").textContent = token === "class" ?
    said("The class token answers \u201c{label}\u201d. Its map is strongest {place}.", { label, place }) :
    said("The distillation token answers \u201c{label}\u201d. Its map is strongest {place}.", { label, place });
}

async function explain() {
  if (looking) return;
  if (found) {
    fold(!at("looked").hidden);
    return;
  }
  looking = true;
  at("map-error").textContent = "";
  at("why").textContent = said("Looking closer\u2026");
  const answer = await post("/v1/explain", sent, asking);
  if (!answer) return;
  looking = false;
  fold(Boolean(answer.error));
  if (answer.error) {
    at("map-error").textContent = answer.error;
    return;
  }
  found = answer;
  at("seen").src = found.seen;
  at("tokens").hidden = found.maps.length < 2;
  at("class").checked = true;
  draw("class");
}

at("why").addEventListener("click", explain);
for (const radio of document.getElementsByName("token")) {
  radio.addEventListener("change", () => draw(radio.value));
}

// ---- the rest

listen(ask, (sentence) => {
  asking.abort();
  forget();
  fail(sentence);
});
at("key-row").addEventListener("submit", (event) => event.preventDefault());
at("key").addEventListener("change", introduce);

// A private server tells about its model only with a key.
async function introduce() {
  try {
    const model = await (await fetch("/model", { headers: authorization() })).json();
    at("key-row").hidden = !(model.key || model.error);
    if (model.error) return;
    calibration = model.calibration;
    scoring = model.scoring;
    explains = model.explain;
    describe(model.labels, scoring);
    const size = Math.floor(model.limits.bytes / 2 ** 20 * 10) / 10;
    at("takes").textContent = said("It takes {formats}, up to {size} MiB.", { formats: model.formats.join(", "), size });
  } catch (error) {
    fail(UNREACHABLE);
  }
}

introduce();
