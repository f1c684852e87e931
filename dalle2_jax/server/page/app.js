// The page: a form for each command, the denoising as it runs, a gallery.

import * as api from "./api.js";
import { Brush, Drop, dataUrl } from "./images.js";
import { forget, fromLink, keep, kept, toLink } from "./recipes.js";

const $ = (id) => document.getElementById(id);
const FRAMED = ["interpolate", "text_diff"];
const KNOBS = { steps: { min: 1, max: 250, step: 1 }, guidance: { min: 0, max: 20, step: 0.5 } };

const element = (name, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
};

const say = (text, wrong = false) => {
  $("message").textContent = text;
  $("message").classList.toggle("wrong", wrong);
};

const command = () => document.querySelector("input[name=command]:checked").value;

// --- the form --------------------------------------------------------------------------------

const brush = new Brush($("mask"), () => Number($("size").value), () => say(""));
const first = new Drop($("first"), (error) => (error ? say(error.message, true) : brush.load(first.value)));
const second = new Drop($("second"), (error) => error && say(error.message, true));

function showFields() {
  for (const field of document.querySelectorAll("[data-for]")) {
    field.hidden = !field.dataset.for.split(" ").includes(command());
  }
}

function showModel(about) {
  $("sizes").replaceChildren(...about.sizes.map((size) => element("option", { value: size, textContent: size })));
  $("sizes").value = about.sizes.at(-1);
  $("stages").replaceChildren(...Object.entries(about.sampling).map(([stage, config]) => {
    const fields = Object.entries(KNOBS).filter(([name]) => name in config).map(([name, range]) => {
      const input = element("input", { type: "number", ...range, placeholder: config[name] });
      input.dataset.stage = stage;
      input.dataset.setting = name;
      return element("label", {}, name, input);
    });
    const group = element("fieldset", { className: "pair" }, element("legend", { textContent: stage }), ...fields);
    if (stage === "prior") group.dataset.for = "text2image inpaint";
    return group;
  }));
  showFields();
}

async function chooseModel() {
  say("Loading the model …");
  try {
    showModel(await api.describe($("model").value));
    say("");
  } catch (error) {
    say(error.message, true);
  }
}

function settings(used) {
  const given = {};
  for (const input of $("stages").querySelectorAll("input")) {
    const { stage, setting } = input.dataset;
    if (input.value !== "" && used(stage)) (given[stage] ??= {})[setting] = Number(input.value);
  }
  return given;
}

// Returns the request that the form describes. An Error if something is missing.
function recipe() {
  const name = command();
  const prompt = $("prompt").value.trim();
  const needsImage = name !== "text2image";
  if (needsImage && !first.value) throw new Error("Choose an image first.");
  if (name === "text2image" && !prompt) throw new Error("Write a prompt first.");
  const seed = $("seed").value === "" ? crypto.getRandomValues(new Uint32Array(1))[0] : Number($("seed").value);
  const readsPrompt = name === "text2image" || (name === "inpaint" && prompt !== "");
  const common = {
    command: name, model: $("model").value, n: Number($("n").value), seed, size: $("sizes").value,
    ...settings((stage) => stage !== "prior" || readsPrompt),
  };
  if (name === "text2image") return { ...common, prompt };
  if (name === "variations") {
    return { ...common, image: first.value, ...($("own-noise").checked && { eta: Number($("eta").value) }) };
  }
  if (name === "inpaint") {
    if (brush.empty) throw new Error("Paint on the image what is to be regenerated.");
    return { ...common, image: first.value, mask: brush.mask(), ...(prompt && { prompt }) };
  }
  const frames = Number($("frames").value);
  if (name === "interpolate") {
    if (!second.value) throw new Error("Choose the second image.");
    return { ...common, frames, images: [first.value, second.value] };
  }
  const before = $("before").value.trim(), after = $("after").value.trim();
  if (!before || !after) throw new Error("Write both captions.");
  return { ...common, frames, image: first.value, before, after, theta: Number($("theta").value) };
}

// Shows a recipe in the form.
async function fill(given) {
  document.querySelector(`input[name=command][value=${CSS.escape(given.command)}]`)?.click();
  for (const name of ["prompt", "seed", "n", "frames", "before", "after", "theta"]) {
    if (name in given) $(name).value = given[name];
  }
  const [image, other] = given.images ?? [given.image];
  if (image) await first.set(image);
  if (other) await second.set(other);
}

// --- the result ------------------------------------------------------------------------------

let job = null;

function tile(number) {
  const image = element("img", { alt: `image ${number + 1}, not started` });
  const bar = element("progress", { max: 1, value: 0 });
  const state = element("p", { className: "state", textContent: "waiting" });
  return element("figure", { className: "tile" }, image, bar, state);
}

function showProgress(tiles, { index, stage, step, steps, preview }) {
  const shown = tiles[index];
  if (!shown) return;
  shown.querySelector(".state").textContent = steps ? `${stage} ${step}/${steps}` : stage;
  shown.querySelector("progress").value = steps ? step / steps : 0;
  if (preview) shown.querySelector("img").src = dataUrl(preview);
}

function actions(source, number, given) {
  const use = (name) => async () => {
    document.querySelector(`input[name=command][value=${name}]`).click();
    await first.set(source);
    if (name === "variations") $("form").requestSubmit();
    else $("first").scrollIntoView({ block: "nearest" });
  };
  const file = `${given.command}_${given.seed}_${number}.png`;
  return element("figcaption", { className: "row" },
    element("button", { type: "button", textContent: "Vary this", onclick: use("variations") }),
    element("button", { type: "button", textContent: "Use as input", onclick: use("inpaint") }),
    element("a", { href: source, download: file, textContent: "Save" }));
}

function showImages(given, images) {
  $("result").hidden = false;
  const sources = images.map(dataUrl);
  const figures = sources.map((source, number) => {
    const alt = `image ${number + 1}: ${given.prompt ?? given.after ?? given.command}`;
    return element("figure", { className: "tile" }, element("img", { src: source, alt, draggable: true }),
      actions(source, number, given));
  });
  const framed = FRAMED.includes(given.command);
  $("tiles").replaceChildren(...figures);
  $("tiles").classList.toggle("framed", framed);
  $("slider").hidden = !framed;
  if (framed) {
    $("frame").max = figures.length - 1;
    $("frame").value = 0;
    $("frame").oninput = () => figures.forEach((figure, at) => (figure.hidden = at !== Number($("frame").value)));
    $("frame").oninput();
  }
  const link = toLink(given);
  $("permalink").hidden = !link;
  if (link) $("permalink").href = link;
}

async function generate(given) {
  const count = given.n * (given.frames ?? 1);
  const tiles = Array.from({ length: count }, (_, number) => tile(number));
  $("result").hidden = false;
  $("slider").hidden = $("permalink").hidden = $("about").hidden = true;
  $("tiles").classList.remove("framed");
  $("tiles").replaceChildren(...tiles);
  $("generate").disabled = true;
  say("Generating …");
  try {
    const answer = await api.run(given, (id) => { job = id; $("cancel").hidden = false; },
      (event) => showProgress(tiles, event));
    const images = answer.data.map((item) => item.b64_json);
    showImages(given, images);
    $("provenance").textContent = JSON.stringify(answer.dalle2, null, 2);
    $("about").hidden = false;
    say(`Done: ${images.length} of ${answer.size}, seed ${given.seed}.`);
    await keep({ recipe: given, images });
    await showGallery();
  } catch (error) {
    say(error.message, true);
  } finally {
    job = null;
    $("cancel").hidden = true;
    $("generate").disabled = false;
  }
}

async function showGallery() {
  const results = await kept();
  $("gallery-section").hidden = !results.length;
  $("gallery").replaceChildren(...results.map(({ recipe: given, images }) => {
    const caption = given.prompt ?? (given.before ? `${given.before} → ${given.after}` : given.command);
    const open = element("button", { type: "button", className: "card", onclick: () => {
      fill(given);
      showImages(given, images);
      $("about").hidden = true;
      $("result").scrollIntoView({ block: "start" });
    } }, element("img", { src: dataUrl(images.at(-1)), alt: "" }), element("span", {}, `${caption}, seed ${given.seed}`));
    return open;
  }));
}

// --- events ----------------------------------------------------------------------------------

const SCHEMES = { Auto: "light dark", Light: "light", Dark: "dark" };

function setScheme(name) {
  document.documentElement.style.colorScheme = SCHEMES[name];
  $("scheme").textContent = name;
  $("scheme").ariaLabel = `Colour scheme: ${name.toLowerCase()}`;
  localStorage.setItem("dalle2-scheme", name);
}

$("scheme").onclick = () => {
  const names = Object.keys(SCHEMES);
  setScheme(names[(names.indexOf($("scheme").textContent) + 1) % names.length]);
};
$("form").onsubmit = (event) => {
  event.preventDefault();
  if ($("generate").disabled) return;
  try {
    generate(recipe());
  } catch (error) {
    say(error.message, true);
  }
};
$("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    $("form").requestSubmit();
  }
};
$("commands").onchange = () => {
  showFields();
  $("n").value = FRAMED.includes(command()) ? 1 : 4;
};
$("model").onchange = chooseModel;
$("size").oninput = () => brush.show();
$("clear").onclick = () => brush.clear();
$("cancel").onclick = () => job && api.cancel(job);
$("forget").onclick = () => forget().then(showGallery);
$("key").onchange = () => { api.setKey($("key").value.trim()); start(); };

async function openLink() {
  const given = fromLink(location.hash);
  if (!given) return;
  await fill(given);
  await generate(given);
}
addEventListener("hashchange", openLink);

async function start() {
  setScheme(localStorage.getItem("dalle2-scheme") ?? "Auto");
  showFields();
  await showGallery();
  try {
    const names = await api.models();
    $("model").replaceChildren(...names.map((name) => element("option", { textContent: name })));
  } catch (error) {
    $("settings").open = true;
    return say(error.message, true);
  }
  const given = fromLink(location.hash);
  if (given?.model) $("model").value = given.model;
  await chooseModel();
  await openLink();
}

start();
