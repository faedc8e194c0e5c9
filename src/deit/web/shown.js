// Shared by the server's page and the exported page: the ways to give an image, and the display of an answer.

export const at = (id) => document.getElementById(id);
const percent = (score) => (score > 0 && score < 0.001 ? "under 0.1" : (100 * score).toFixed(1)) + " %";

const plain = (score) => String(Number(score.toPrecision(4)));

// What a model of `count` labels does with an image, by its scoring (see answer.js).
export function work(count, scoring) {
  const labels = count === 1 ? "its label" : `each of ${count} labels`;
  return { sigmoid: `says how likely ${labels} is, by itself`, none: `measures ${count === 1 ? "1 quantity" :
    `${count} quantities`}` }[scoring] ?? `tells ${count} labels apart`;
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
    say("Measured", "", labels, scoring);
  } else if (scoring === "sigmoid") {
    say("How likely each label is", "", labels);
  } else if (sure === false) {
    say("I don\u2019t know", "No single label is certain enough. The candidates:", labels);
  } else {
    const note = sure && errorRate ? `Sure: at most ${percent(errorRate)} of images like this get a label that is ` +
      "sure and wrong." : "";
    say(labels[0].label, note, labels);
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
  const given = ([file]) => (file ? ask(file) : refuse("That was not an image file. Choose one from this device."));
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
