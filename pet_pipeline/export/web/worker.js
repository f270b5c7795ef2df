// Runs the networks, so that the page stays responsive. See `sampling_plan` in pet_pipeline/export/plan.py.

import * as ort from "./ort.wasm.bundle.min.mjs";

// Threads need the headers that README.md sets for a Space; without them, there is one thread.
ort.env.wasm.numThreads = self.crossOriginIsolated ? navigator.hardwareConcurrency : 1;

const sessions = {};
let plan, imageLength;

async function load(name) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name} could not be downloaded: ${response.status} ${response.statusText}.`);
  return response;
}

const starting = (async () => {
  plan = await (await load("sampling.json")).json();
  imageLength = plan.shape.reduce((product, size) => product * size);
  postMessage({ type: "ready", plan });
})();
starting.catch((error) => postMessage({ type: "error", message: error.message }));

async function download(name) {
  const response = await load(name);
  const parts = [];
  let loaded = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) return new Blob(parts).arrayBuffer();
    parts.push(value);
    loaded += value.length;
    postMessage({ type: "download", name, loaded, total: plan.files[name] });
  }
}

async function session(name) {
  sessions[name] ??= await ort.InferenceSession.create(await download(name), { executionProviders: ["wasm"] });
  return sessions[name];
}

// Random numbers of the normal distribution: mulberry32 and the Box-Muller transform.
function* normal(seed) {
  let state = seed >>> 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let bits = Math.imul(state ^ (state >>> 15), state | 1);
    bits ^= bits + Math.imul(bits ^ (bits >>> 7), bits | 61);
    return (((bits ^ (bits >>> 14)) >>> 0) + 0.5) / 4294967296;
  };
  for (;;) {
    const radius = Math.sqrt(-2 * Math.log(uniform()));
    const angle = 2 * Math.PI * uniform();
    yield radius * Math.cos(angle);
    yield radius * Math.sin(angle);
  }
}

function noiseOf(generators) {
  const noise = new Float32Array(generators.length * imageLength);
  for (let i = 0; i < noise.length; i++) noise[i] = generators[Math.floor(i / imageLength)].next().value;
  return noise;
}

async function evaluate(name, sample, step, label) {
  const count = sample.length / imageLength;
  const network = await session(name);
  const { sample: output } = await network.run({
    hidden_states: new ort.Tensor("float32", sample.map((value) => step.c_in * value), [count, ...plan.shape]),
    timestep: new ort.Tensor("float32", new Float32Array(count).fill(step.timestep), [count]),
    class_labels: new ort.Tensor("int64", new BigInt64Array(count).fill(BigInt(label)), [count]),
  });
  return output.data;
}

async function generate({ label, count, seed }) {
  const guide = "guide.onnx" in plan.files ? "guide.onnx" : "transformer.onnx";
  for (const name of new Set(["transformer.onnx", guide])) await session(name);
  const start = performance.now();
  const generators = Array.from({ length: count }, (_, index) => normal(seed + index));
  let sample = noiseOf(generators).map((value) => plan.init_noise_sigma * value);
  let previous = new Float32Array(sample.length);
  for (const [index, step] of plan.steps.entries()) {
    const output = await evaluate("transformer.onnx", sample, step, label);
    const guided = output.slice();
    const [w, a] = [step.guidance_scale - 1, step.autoguidance_scale - 1];
    if (w || a) {
      const own = guide === "transformer.onnx" ? output : await evaluate(guide, sample, step, label);
      const negative = w ? await evaluate(guide, sample, step, plan.negative_class) : own;
      for (let i = 0; i < guided.length; i++) guided[i] += w * (own[i] - negative[i]) + a * (output[i] - own[i]);
    }
    const denoised = sample.map((value, i) => step.c_skip * value + step.c_out * guided[i]);
    const fresh = step.noise ? noiseOf(generators) : previous;
    sample = sample.map((value, i) =>
      step.sample * value + step.denoised * denoised[i] + step.previous * previous[i] + step.noise * fresh[i]);
    previous = denoised;
    postMessage({ type: "step", index: index + 1, total: plan.steps.length, pixels: denoised });
  }
  const seconds = (performance.now() - start) / 1000;
  postMessage({ type: "images", pixels: sample, seconds, threads: ort.env.wasm.numThreads });
}

async function classify({ pixels }) {
  const network = await session("classifier.onnx");
  const start = performance.now();
  const { log_odds: { data } } = await network.run({ images: new ort.Tensor("float32", pixels, [1, ...plan.shape]) });
  const largest = Math.max(...data);
  const weights = Array.from(data, (value) => Math.exp(value - largest));
  const sum = weights.reduce((total, weight) => total + weight);
  const seconds = (performance.now() - start) / 1000;
  postMessage({ type: "class", probabilities: weights.map((weight) => weight / sum), seconds });
}

onmessage = async ({ data }) => {
  try {
    await starting; // a message may come before the plan
    await { generate, classify }[data.type](data);
  } catch (error) {
    postMessage({ type: "error", message: error.message || String(error) });
  }
};
