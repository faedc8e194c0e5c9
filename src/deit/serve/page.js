"use strict";

const at = (id) => document.getElementById(id);
const percent = (score) => (score > 0 && score < 0.001 ? "under 0.1" : (100 * score).toFixed(1)) + " %";
const asSentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + ".";
let asking = new AbortController();
let calibration = null;
let explains = false;
let sent = null;  // the image that labels are shown for
let looking = false;  // whether its explanation is on the way
let found = null;  // its explanation

function say(heading, note, labels) {
  at("heading").hidden = !heading;
  at("heading").textContent = heading;
  at("note").hidden = !note;
  at("note").textContent = note;
  at("labels").replaceChildren(...labels.map(({ label, score }) => {
    const row = document.createElement("li");
    const part = (name, text) => {
      const span = document.createElement("span");
      span.className = name;
      span.textContent = text;
      row.append(span);
      return span;
    };
    part("name", label);
    part("share", percent(score));
    const bar = part("bar", "");
    bar.setAttribute("aria-hidden", "true");
    const filled = document.createElement("span");
    filled.style.width = 100 * score + "%";
    bar.append(filled);
    return row;
  }));
}

function fail(sentence) {
  say("", "", []);
  at("error").textContent = asSentence(sentence);
}

function preview(file) {
  const image = at("preview");
  if (image.src) URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(file);
  image.hidden = false;
}

function show({ labels, sure }) {
  if (sure === false) {
    say("I don\u2019t know", "No single label is certain enough. The candidates:", labels);
  } else {
    const note = sure ? `Sure: at most ${percent(calibration?.error_rate ?? 0)} of such images get a wrong label that ` +
      "is called sure." : "";
    say(labels[0].label, note, labels);
  }
}

// What the server answers; on failure {error: a sentence}, and null to a question that is out of date.
async function post(path, file, mine) {
  const headers = { "Content-Type": "application/octet-stream" };
  if (at("key").value) headers.Authorization = "Bearer " + at("key").value.trim();
  try {
    const answer = await (await fetch(path, { method: "POST", headers, body: file, signal: mine.signal })).json();
    return mine.signal.aborted ? null : answer;
  } catch (error) {
    return mine.signal.aborted ? null : { error: "the server can\u2019t be reached, try again later" };
  }
}

async function ask(file) {
  asking.abort();
  const mine = asking = new AbortController();
  at("error").textContent = "";
  forget();
  preview(file);
  say("Looking\u2026", "", []);
  const answer = await post("/v1/classify", file, mine);
  if (answer?.error) fail(answer.error);
  else if (answer) {
    show(answer.results[0]);
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
  at("why").textContent = (hidden ? "Show" : "Hide") + " what it looked at";
}

function draw(token) {
  const map = found.maps.find((each) => each.token === token);
  const { label } = found.answers.find((each) => each.token === token);
  at("map").src = map.overlay;
  at("map").alt = `Map over the image, strongest ${map.strongest}`;
  at("said").textContent = `The ${token} token answers \u201c${label}\u201d. Its map is strongest ${map.strongest}.`;
}

async function explain() {
  if (looking) return;
  if (found) {
    fold(!at("looked").hidden);
    return;
  }
  looking = true;
  at("map-error").textContent = "";
  at("why").textContent = "Looking closer\u2026";
  const answer = await post("/v1/explain", sent, asking);
  if (!answer) return;
  looking = false;
  fold(Boolean(answer.error));
  if (answer.error) {
    at("map-error").textContent = asSentence(answer.error);
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

// ---- ways to give an image

for (const id of ["file", "camera"]) {
  at(id).addEventListener("change", (event) => {
    const [file] = event.target.files;
    if (file) ask(file);
    event.target.value = "";  // so that the same file can be chosen again
  });
}

at("key-row").addEventListener("submit", (event) => event.preventDefault());

function given(transfer) {
  const [file] = transfer.files;
  if (file) ask(file);
  else {
    asking.abort();
    forget();
    fail("that was no image file, choose one from this device");
  }
}

document.addEventListener("paste", (event) => {
  if (event.target.id !== "key") given(event.clipboardData);
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  at("drop").classList.add("over");
});
document.addEventListener("dragleave", () => at("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  at("drop").classList.remove("over");
  given(event.dataTransfer);
});
at("preview").addEventListener("error", () => { at("preview").hidden = true; });

fetch("/model").then((answer) => answer.json()).then((model) => {
  calibration = model.calibration;
  explains = model.explain;
  at("about").textContent = `This model tells ${model.labels.length} labels apart. ` +
    `It takes ${model.formats.join(", ")}, up to ${Math.floor(model.limits.bytes / 2 ** 20 * 10) / 10} MiB.`;
  at("key-row").hidden = !model.key;
}).catch(() => fail("the server can\u2019t be reached, try again later"));
