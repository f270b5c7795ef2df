// The controls of the page; worker.js does the work.

const element = (id) => document.getElementById(id);
let plan, worker;
let job = null;

function startWorker() {
  worker = new Worker("worker.js", { type: "module" });
  worker.onmessage = ({ data }) => handlers[data.type](data);
  worker.onerror = (event) => fail(event.message || "The page could not start: this browser lacks WebAssembly.");
}

// `job` is what the worker does now: where its messages are shown, and what has the focus when it is done.
function begin(status, message) {
  job = { status, focused: document.activeElement };
  for (const button of document.querySelectorAll("button:not(#stop), #file")) button.disabled = true;
  element("stop").hidden = element("progress").hidden = false;
  element("progress").value = 0;
  element("stop").focus(); // a disabled button loses the focus
  status.textContent = "";
  worker.postMessage(message);
}

function end(text) {
  // Pictures that a cancelled or failed job has not drawn are not kept.
  for (const canvas of job?.canvases ?? []) if (!canvas.dataset.drawn) canvas.closest("figure").remove();
  for (const button of document.querySelectorAll("button, #file")) button.disabled = plan === undefined;
  element("stop").hidden = element("progress").hidden = true;
  (job?.status ?? element("status")).textContent = text;
  job?.focused?.focus();
  job = null;
}

const fail = (message) => end(`This did not work: ${message}`);

const handlers = {
  ready(message) {
    plan = message.plan;
    element("start").disabled = job !== null;
    if (element("classes").querySelector("input")) return; // after a cancelled job
    for (const [index, name] of plan.classes.entries()) {
      const label = document.createElement("label");
      const input = Object.assign(document.createElement("input"), {
        type: "radio", name: "label", value: index, checked: index === 0,
      });
      label.append(input, ` ${name}`);
      element("classes").append(label);
    }
    element("classification").hidden = !("classifier.onnx" in plan.files);
  },
  download({ name, loaded, total }) {
    const megabytes = (total / 1e6).toFixed(0);
    job.status.textContent = `Loading ${name} (${megabytes} MB) …`;
    element("progress").value = loaded / total;
  },
  step({ index, total, pixels }) {
    job.status.textContent = `Step ${index} of ${total} …`;
    element("progress").value = index / total;
    show(pixels);
  },
  images({ pixels, seconds, threads }) {
    show(pixels);
    for (const canvas of job.canvases) canvas.dataset.drawn = true;
    const count = job.canvases.length;
    end(`${count} image${count > 1 ? "s" : ""} in ${seconds.toFixed(1)} s, ${(seconds / count).toFixed(1)} s ` +
      `an image, with ${threads} thread${threads > 1 ? "s" : ""}.`);
  },
  class({ probabilities, seconds }) {
    const best = probabilities.indexOf(Math.max(...probabilities));
    element("probabilities").replaceChildren(...probabilities.map((probability, index) => {
      const row = document.createElement("tr");
      const name = Object.assign(document.createElement("th"), { scope: "row", textContent: plan.classes[index] });
      const value = document.createElement("td");
      const meter = Object.assign(document.createElement("meter"), { value: probability });
      meter.setAttribute("aria-hidden", "true");
      value.append(meter, ` ${(100 * probability).toFixed(1)} %`);
      row.append(name, value);
      return row;
    }));
    element("result").hidden = false;
    element("result").scrollIntoView({ block: "nearest" });
    end(`This is a ${plan.classes[best]}, says the model, after ${seconds.toFixed(1)} s.`);
  },
  error: ({ message }) => fail(message),
};

function show(pixels) {
  const length = pixels.length / job.canvases.length;
  job.canvases.forEach((canvas, index) => paint(canvas, pixels.subarray(index * length, (index + 1) * length)));
}

// Paints an image of shape (channels, height, width) in [-1, 1]; one channel is grey, and a fourth is the opacity.
function paint(canvas, pixels) {
  const [channels, height, width] = plan.shape;
  Object.assign(canvas, { width, height });
  const image = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    for (let channel = 0; channel < 4; channel++) {
      const source = channels === 1 && channel < 3 ? 0 : channel;
      image.data[4 * i + channel] = source < channels ? 127.5 * (pixels[source * width * height + i] + 1) : 255;
    }
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

element("request").onsubmit = (event) => {
  event.preventDefault();
  const count = element("count").valueAsNumber;
  const seed = element("seed").valueAsNumber;
  const label = Number(new FormData(event.target).get("label"));
  const name = plan.classes[label];
  begin(element("status"), { type: "generate", label, count, seed });
  job.canvases = Array.from({ length: count }, (_, index) => {
    const canvas = document.createElement("canvas");
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${name}, seed ${seed + index}`);
    return canvas;
  });
  element("images").replaceChildren(...job.canvases.map((canvas, index) => {
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    const save = Object.assign(document.createElement("button"), { textContent: "Save", disabled: true });
    save.onclick = () => canvas.toBlob((blob) => {
      const link = Object.assign(document.createElement("a"), {
        href: URL.createObjectURL(blob), download: `${name}-${seed + index}.png`,
      });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href));
    });
    caption.append(save);
    if (!element("classification").hidden) {
      const ask = Object.assign(document.createElement("button"), { textContent: "What is it?", disabled: true });
      ask.onclick = () => classify(canvas);
      caption.append(ask);
    }
    figure.append(canvas, caption);
    return figure;
  }));
};

// Classifies what `source`, an image or a canvas, shows, cropped to a square and brought to the size of the model.
function classify(source) {
  const [channels, height, width] = plan.shape;
  element("result").hidden = true; // of the image before
  const canvas = Object.assign(element("classified"), { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  if (channels !== 4) { // transparent images are on white, as in training
    context.fillStyle = "white";
    context.fillRect(0, 0, width, height);
  }
  const side = Math.min(source.width, source.height);
  context.drawImage(source, (source.width - side) / 2, (source.height - side) / 2, side, side, 0, 0, width, height);
  const { data } = context.getImageData(0, 0, width, height);
  const pixels = new Float32Array(channels * width * height);
  for (let i = 0; i < width * height; i++) {
    const grey = 0.299 * data[4 * i] + 0.587 * data[4 * i + 1] + 0.114 * data[4 * i + 2];
    for (let channel = 0; channel < channels; channel++) {
      pixels[channel * width * height + i] = (channels === 1 ? grey : data[4 * i + channel]) / 127.5 - 1;
    }
  }
  begin(element("answer"), { type: "classify", pixels });
}

async function take(file) {
  if (!file || job) return;
  try {
    const image = await createImageBitmap(file);
    if (!job) classify(image);
  } catch {
    element("answer").textContent = `${file.name} is not an image that this browser can read.`;
  }
}

element("file").onchange = ({ target }) => take(target.files[0]);
element("drop").ondragover = (event) => { event.preventDefault(); element("drop").classList.add("over"); };
element("drop").ondragleave = () => element("drop").classList.remove("over");
element("drop").ondrop = (event) => {
  event.preventDefault();
  element("drop").classList.remove("over");
  take(event.dataTransfer.files[0]);
};
element("stop").onclick = () => {
  worker.terminate();
  end("Cancelled.");
  startWorker();
};
startWorker();
