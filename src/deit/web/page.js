// The part of the page that people see. worker.js does the work, so the page never freezes.

import { at, describe, fail, listen, preview, say, show } from "./shown.js";
import { said, translate } from "./words.js";

const megabytes = (bytes) => (bytes / 1e6).toFixed(1);

at("unstarted").remove();
translate();

let worker = null, ready = false, scoring = "softmax", errorRate = null;
let asked = 0;  // number of images so far; only the answer to the latest one is shown

function ask(file) {
  preview(file);
  if (!worker) return;  // the page says already what is missing
  at("error").textContent = "";
  say(ready ? said("Looking\u2026") : said("Waiting for the model\u2026"));
  worker.postMessage({ id: ++asked, file });
}

const heard = {
  progress({ done, total }) {
    if (total) at("progress").value = done / total;
    const amounts = { done: megabytes(done), total: megabytes(total) };
    at("amount").textContent = total ? said("{done} of {total} MB", amounts) : `${amounts.done} MB`;
  },
  ready(found) {
    ready = true;
    ({ scoring, errorRate } = found);
    at("loading").hidden = true;
    describe(found.labels, scoring);
    if (asked) say(said("Looking\u2026"));
  },
  answer(found) {
    if (found.id === asked) show(found, scoring, errorRate);
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
    heard.broken({ sentence: said("This browser can\u2019t run the model: it has no WebAssembly, or is too old. " +
      "Update it, or try another one.") });
    return;
  }
  // A worker made from a blob obeys this page's policy. A worker with an address would obey the headers of its server.
  const code = `import ${JSON.stringify(new URL("worker.js", import.meta.url))};`;
  worker = new Worker(URL.createObjectURL(new Blob([code], { type: "text/javascript" })), { type: "module" });
  worker.onmessage = ({ data }) => heard[data.kind](data);
  worker.onerror = () => heard.broken({ sentence: said("The model can\u2019t be started: a file of this page is " +
    "missing or damaged, or the browser is too old.") });
  at("loading").hidden = false;
}

listen(ask, fail);
start();
