// Loads the model, and answers images one after the other.

import { answer } from "./answer.js";
import * as ort from "./ort.wasm.bundle.min.js";
import { decoded } from "./picture.js";
import { pixelValues } from "./pixels.js";
import { said } from "./words.js";

let latest = 0;  // number of the latest image; older ones that still wait are skipped
let working = load().catch((error) => {
  const sentence = "The model can\u2019t be loaded ({reason}). Reload the page to try again.";
  postMessage({ kind: "broken", sentence: said(sentence, { reason: error.message }) });
});
let session, record, options, names, calibration;

onmessage = ({ data: { id, file } }) => {
  latest = id;
  working = working.then(() => look(id, file));
};

async function load() {
  const sizes = new Map(), done = new Map();
  const report = (name, count, size) => {
    sizes.set(name, size);
    done.set(name, count);
    const known = sizes.size === 2 && [...sizes.values()].every(Boolean);
    postMessage({ kind: "progress", done: sum(done), total: known ? sum(sizes) : 0 });
  };
  [record, options, names, calibration] = await Promise.all([json("export.json"), json("preprocessor_config.json"),
    json("config.json").then((config) => config.id2label), json("calibration.json", true)]);
  const large = ["ort-wasm-simd-threaded.wasm", "model.onnx"];
  const [runtime, model] = await Promise.all(large.map((name) => bytes(name, report)));
  // Threads need shared memory, which browsers allow only if the server isolates the page.
  ort.env.wasm.numThreads = crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  ort.env.wasm.wasmBinary = runtime;
  session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"] });
  postMessage({ kind: "ready", labels: Object.values(names), scoring: record.scoring ?? "softmax",
    errorRate: calibration?.error_rate ?? null });
}

const sum = (counts) => [...counts.values()].reduce((a, b) => a + b, 0);

async function fetched(name) {
  try {
    return await fetch(new URL(name, import.meta.url));
  } catch {
    throw new Error(said("{name} can\u2019t be reached", { name }));
  }
}

async function json(name, optional = false) {
  const response = await fetched(name);
  if (optional && response.status === 404) return null;
  if (!response.ok) throw new Error(`${name}: ${response.status}`);
  return response.json();
}

async function bytes(name, report) {
  const response = await fetched(name);
  if (!response.ok) throw new Error(`${name}: ${response.status}`);
  // Content-Length gives the compressed size, so it is of no use for a compressed answer.
  const size = response.headers.get("Content-Encoding") ? 0 : Number(response.headers.get("Content-Length"));
  const parts = [];
  let count = 0;
  for (const reader = response.body.getReader();;) {
    const { done, value } = await reader.read();
    if (done) return new Blob(parts).arrayBuffer();
    parts.push(value);
    report(name, count += value.length, size);
  }
}

async function look(id, file) {
  if (!session || id !== latest) return;
  let sentence = (error) => error.message;
  try {
    const picture = await decoded(file);
    sentence = ({ message }) => said("The model can\u2019t answer ({reason}). Try a smaller image, or reload the page.",
      { reason: message });
    const { data, dims } = pixelValues(picture, options);
    const outputs = await session.run({ [record.input.name]: new ort.Tensor("float32", data, [1, ...dims]) });
    postMessage({ kind: "answer", id, ...answer(outputs.logits.data, names, calibration, record.scoring) });
  } catch (error) {
    postMessage({ kind: "failed", id, sentence: sentence(error) });
  }
}
