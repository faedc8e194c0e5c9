// What a person sees. The work is done by worker.js, so that the page never stands still.

const at = (id) => document.getElementById(id);
const percent = (score) => (score > 0 && score < 0.001 ? "under 0.1" : (100 * score).toFixed(1)) + " %";
const megabytes = (bytes) => (bytes / 1e6).toFixed(1);

at("unstarted").remove();

let worker = null, ready = false, errorRate = null;
let asked = 0;  // images so far; answers to former ones are not shown

function say(heading, note, labels) {
  at("heading").hidden = !heading;
  at("heading").textContent = heading;
  at("note").hidden = !note;
  at("note").textContent = note;
  at("labels").replaceChildren(...labels.map(row));
}

function row({ label, score }) {
  const found = document.createElement("li");
  for (const [name, text] of [["name", label], ["share", percent(score)], ["bar", ""]]) {
    const part = document.createElement("span");
    part.className = name;
    part.textContent = text;
    found.append(part);
  }
  const filled = document.createElement("span");
  filled.style.width = 100 * score + "%";
  found.lastChild.setAttribute("aria-hidden", "true");
  found.lastChild.append(filled);
  return found;
}

function fail(sentence) {
  say("", "", []);
  at("error").textContent = sentence;
}

function show({ labels, sure }) {
  if (sure === false) {
    say("I don\u2019t know", "No single label is certain enough. The candidates:", labels);
  } else {
    const rate = percent(errorRate);
    say(labels[0].label, sure ? `Sure: at most ${rate} of such images get a wrong label that is called sure.` : "", labels);
  }
}

function ask(file) {
  const image = at("preview");
  if (image.src) URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(file);
  image.hidden = false;
  if (!worker) return;  // what is missing stands there already
  at("error").textContent = "";
  say(ready ? "Looking\u2026" : "Waiting for the model\u2026", "", []);
  worker.postMessage({ id: ++asked, file });
}

const heard = {
  progress({ done, total }) {
    if (total) at("progress").value = done / total;
    at("amount").textContent = total ? `${megabytes(done)} of ${megabytes(total)} MB` : `${megabytes(done)} MB`;
  },
  ready(found) {
    ready = true;
    errorRate = found.errorRate;
    at("loading").hidden = true;
    at("about").textContent = `It tells ${found.labels} labels apart.`;
    if (asked) say("Looking\u2026", "", []);
  },
  answer(found) {
    if (found.id === asked) show(found);
  },
  failed({ id, sentence }) {
    if (id === asked) fail(sentence);
  },
  broken({ sentence }) {
    worker = null;
    at("loading").hidden = true;
    fail(sentence);
  },
};

function start() {
  if (typeof WebAssembly === "undefined" || typeof OffscreenCanvas === "undefined") {
    heard.broken({ sentence: "This browser can\u2019t run the model: it has no WebAssembly, or is too old. Update it, " +
      "or try another one." });
    return;
  }
  // A worker of a blob is under this page's policy; one of an address would be under its own, which a page can't set.
  const code = `import ${JSON.stringify(new URL("worker.js", import.meta.url))};`;
  worker = new Worker(URL.createObjectURL(new Blob([code], { type: "text/javascript" })), { type: "module" });
  worker.onmessage = ({ data }) => heard[data.kind](data);
  worker.onerror = () => heard.broken({ sentence: "The model can\u2019t be started: a file of this page is missing " +
    "or damaged, or the browser is too old." });
  at("loading").hidden = false;
}

function given(transfer) {
  const [file] = transfer.files;
  if (file) ask(file);
  else fail("That was no image file. Choose one from this device.");
}

for (const id of ["file", "camera"]) {
  at(id).addEventListener("change", (event) => {
    const [file] = event.target.files;
    if (file) ask(file);
    event.target.value = "";  // so that the same file can be chosen again
  });
}
document.addEventListener("paste", (event) => given(event.clipboardData));
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

start();
