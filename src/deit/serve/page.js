"use strict";

const at = (id) => document.getElementById(id);
const percent = (score) => (score > 0 && score < 0.001 ? "under 0.1" : (100 * score).toFixed(1)) + " %";
let asking = new AbortController();
let calibration = null;

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
  at("error").textContent = sentence.charAt(0).toUpperCase() + sentence.slice(1) + ".";
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

async function ask(file) {
  asking.abort();
  const mine = asking = new AbortController();
  at("error").textContent = "";
  preview(file);
  say("Looking\u2026", "", []);
  const headers = { "Content-Type": "application/octet-stream" };
  if (at("key").value) headers.Authorization = "Bearer " + at("key").value.trim();
  try {
    const answer = await fetch("/v1/classify", { method: "POST", headers, body: file, signal: mine.signal });
    const found = await answer.json();
    if (mine.signal.aborted) return;
    if (answer.ok) show(found.results[0]);
    else fail(found.error);
  } catch (error) {
    if (!mine.signal.aborted) fail("the server can\u2019t be reached, try again later");
  }
}

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
  else fail("that was no image file, choose one from this device");
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
  at("about").textContent = `This model tells ${model.labels.length} labels apart. ` +
    `It takes ${model.formats.join(", ")}, up to ${Math.floor(model.limits.bytes / 2 ** 20 * 10) / 10} MiB.`;
  at("key-row").hidden = !model.key;
}).catch(() => fail("the server can\u2019t be reached, try again later"));
