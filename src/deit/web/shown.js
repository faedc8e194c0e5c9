// Shared by the server's page and the exported page: what the model does, the ways to give an image, and the display of
// an answer.

import { said } from "./words.js";

const FEW = 12;  // number of labels that are shown unfolded
export const at = (id) => document.getElementById(id);
const percent = (score) => (score > 0 && score < 0.001 ? said("under 0.1 %") : (100 * score).toFixed(1) + " %");

const plain = (score) => String(Number(score.toPrecision(4)));

// What a model of `count` labels does with an image, by its scoring (see answer.js).
function work(count, scoring) {
  if (scoring === "sigmoid" && count === 1) return said("This model says how likely its label is.");
  if (scoring === "sigmoid") return said("This model says how likely each of {count} labels is, by itself.", { count });
  if (scoring === "none" && count === 1) return said("This model measures 1 quantity.");
  if (scoring === "none") return said("This model measures {count} quantities.", { count });
  return said("This model tells {count} labels apart.", { count });
}

// Shows what the model does, and its labels.
export function describe(labels, scoring) {
  at("about").textContent = work(labels.length, scoring);
  at("names").hidden = false;
  at("names").open = labels.length <= FEW;
  at("names").lastElementChild.replaceChildren(...labels.map((label) => {
    const found = document.createElement("li");
    found.textContent = label;
    return found;
  }));
}

export function say(heading, note = "", labels = [], scoring = "softmax") {
  for (const [id, text] of [["heading", heading], ["note", note]]) {
    at(id).hidden = !text;
    at(id).textContent = text;
  }
  at("labels").replaceChildren(...labels.map((each) => row(each, scoring)));
}

function row({ label, score }, scoring) {
  const found = document.createElement("li");
  const measured = scoring === "none";
  for (const [name, text] of [["name", label], ["share", (measured ? plain : percent)(score)], ["bar", ""]]) {
    const part = document.createElement("span");
    part.className = name;
    part.textContent = text;
    found.append(part);
  }
  if (measured) {  // no part of a whole that a bar could show
    found.lastChild.remove();
    return found;
  }
  const filled = document.createElement("span");
  filled.style.width = 100 * score + "%";
  found.lastChild.setAttribute("aria-hidden", "true");
  found.lastChild.append(filled);
  return found;
}

// `scoring` says what the scores are. `sure` is true or false if the model is calibrated; `errorRate` then bounds its
// errors.
export function show({ labels, sure }, scoring, errorRate) {
  if (scoring === "none") {
    say(said("Measured"), "", labels, scoring);
  } else if (scoring === "sigmoid") {
    say(said("How likely each label is"), "", labels);
  } else if (sure === false) {
    say(said("I don\u2019t know"), said("No single label is certain enough. The candidates:"), labels);
  } else {
    const note = "Sure: at most {share} of images like this get a label that is sure and wrong.";
    say(labels[0].label, sure && errorRate ? said(note, { share: percent(errorRate) }) : "", labels);
  }
}

export function fail(sentence) {
  say("");
  at("error").textContent = sentence;
}

export function preview(file) {
  const image = at("preview");
  if (image.src) URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(file);
  image.hidden = false;
}

// Calls `ask` with each file that is chosen, photographed, pasted or dropped. If it was no file, calls `refuse` with a
// sentence.
export function listen(ask, refuse) {
  const given = ([file]) =>
    (file ? ask(file) : refuse(said("That was not an image file. Choose one from this device.")));
  for (const id of ["file", "camera"]) {
    at(id).addEventListener("change", (event) => {
      const [file] = event.target.files;
      if (file) ask(file);
      event.target.value = "";  // so that the same file can be chosen again
    });
  }
  document.addEventListener("paste", (event) => {
    if (event.target.type !== "password") given(event.clipboardData.files);
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    at("drop").classList.add("over");
  });
  document.addEventListener("dragleave", () => at("drop").classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    at("drop").classList.remove("over");
    given(event.dataTransfer.files);
  });
  at("preview").addEventListener("error", () => { at("preview").hidden = true; });
}
