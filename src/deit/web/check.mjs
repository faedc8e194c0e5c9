// `deit export` runs this in Node. It runs an exported folder's model in the folder's onnxruntime-web, and the folder's
// preprocessing.
//
//   node check.mjs FOLDER CODE      CODE holds copies of the folder's scripts, with a package.json that says "module"
//
// Requests come on standard input, and answers go to standard output. Each is a line of JSON, followed by the bytes
// that it announces:
//
// - {"pixels": [B, C, H, W]} with floats is answered by {"outputs": [dims, ...]} with floats, in the order of
//   export.json.
// - {"picture": [H, W]} with bytes, four to a pixel, is answered by {"outputs": [dims]} with floats.
// - A failure is answered by {"error": sentence}.
//
// The program ends when its input does.

import { readFileSync, readSync, writeSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [folder, code] = process.argv.slice(2);
const json = (name) => JSON.parse(readFileSync(`${folder}/${name}`, "utf8"));
const script = (name) => import(pathToFileURL(`${code}/${name}`));

const record = json("export.json"), options = json("preprocessor_config.json");
let session, ort;

async function load() {
  ort = await script("ort.wasm.bundle.min.js");
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = readFileSync(`${folder}/ort-wasm-simd-threaded.wasm`);
  session = await ort.InferenceSession.create(readFileSync(`${folder}/model.onnx`), { executionProviders: ["wasm"] });
}

async function answered(request, bytes) {
  if (request.picture) {
    const { pixelValues } = await script("pixels.js");
    const [height, width] = request.picture;
    return [pixelValues({ data: bytes, height, width }, options)];
  }
  if (!session) await load();
  const pixels = new ort.Tensor("float32", new Float32Array(bytes.buffer), request.pixels);
  const found = await session.run({ [record.input.name]: pixels });
  return record.outputs.map((name) => found[name]);
}

// Returns the next `count` bytes of standard input, or null at its end.
function read(count) {
  const bytes = new Uint8Array(count);
  for (let done = 0; done < count;) {
    const found = readSync(0, bytes, done, count - done, null);
    if (!found) return null;
    done += found;
  }
  return bytes;
}

function readLine() {
  let line = "";
  for (let byte = read(1); byte; byte = read(1)) {
    if (byte[0] === 10) return JSON.parse(line);
    line += String.fromCharCode(byte[0]);
  }
  return null;
}

function write(bytes) {
  for (let done = 0; done < bytes.length;) done += writeSync(1, bytes, done);
}

const writeLine = (value) => write(new TextEncoder().encode(JSON.stringify(value) + "\n"));

for (let request = readLine(); request; request = readLine()) {
  const bytes = read(4 * (request.pixels ?? request.picture).reduce((a, b) => a * b));
  try {
    const outputs = await answered(request, bytes);
    writeLine({ outputs: outputs.map(({ dims }) => dims) });
    for (const { data } of outputs) write(new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
  } catch (error) {
    writeLine({ error: String(error?.message ?? error) });
  }
}
