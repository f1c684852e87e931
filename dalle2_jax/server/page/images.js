// Images that are dropped, chosen or painted on.

const MAX_SIDE = 512;

export const dataUrl = (encoded) => `data:image/png;base64,${encoded}`;

export const loaded = (source) =>
  new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error("this file is no image that the browser can read"));
    image.src = source;
  });

// Returns the central square of an image as a data URL of a PNG file, at most MAX_SIDE pixels wide.
export async function squared(source) {
  const image = await loaded(source);
  const side = Math.min(image.naturalWidth, image.naturalHeight);
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = Math.min(side, MAX_SIDE);
  const corner = [(image.naturalWidth - side) / 2, (image.naturalHeight - side) / 2];
  canvas.getContext("2d").drawImage(image, ...corner, side, side, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/png");
}

// A place for an image: drop a file or an image of the page on it, or choose a file.
export class Drop {
  constructor(element, changed) {
    this.element = element;
    this.changed = changed;
    this.value = null;
    const input = element.querySelector("input");
    input.addEventListener("change", () => input.files[0] && this.read(input.files[0]));
    element.addEventListener("dragover", (event) => event.preventDefault());
    element.addEventListener("drop", (event) => {
      event.preventDefault();
      const [file] = event.dataTransfer.files;
      const source = event.dataTransfer.getData("text/uri-list");
      if (file) this.read(file);
      else if (source.startsWith("data:image/")) this.set(source);
    });
  }

  async read(file) {
    const source = URL.createObjectURL(file);
    try {
      await this.set(source);
    } finally {
      URL.revokeObjectURL(source);
    }
  }

  async set(source) {
    try {
      this.value = await squared(source);
    } catch (error) {
      return this.changed(error);
    }
    const image = this.element.querySelector("img");
    image.src = this.value;
    image.hidden = false;
    this.changed(null);
  }
}

// Returns a checkerboard, which is seen on any image.
function checkerboard(pen, cell) {
  const tile = document.createElement("canvas");
  tile.width = tile.height = 2 * cell;
  const ink = tile.getContext("2d");
  ink.fillStyle = "#fff";
  ink.fillRect(0, 0, 2 * cell, 2 * cell);
  ink.fillStyle = "#888";
  for (const corner of [0, cell]) ink.fillRect(corner, corner, cell, cell);
  return pen.createPattern(tile, "repeat");
}

// The mask of an image, painted with a pointer or with keys.
export class Brush {
  constructor(canvas, size, painted) {
    this.canvas = canvas;
    this.size = size;
    this.onpaint = painted;
    this.image = null;
    this.at = { x: 0.5, y: 0.5 };
    this.painted = document.createElement("canvas");
    this.painting = false;
    canvas.addEventListener("pointerdown", (event) => {
      this.painting = true;
      canvas.setPointerCapture(event.pointerId);
      this.follow(event);
    });
    canvas.addEventListener("pointermove", (event) => this.painting && this.follow(event));
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => (this.painting = false));
    canvas.addEventListener("keydown", (event) => this.press(event));
  }

  async load(source) {
    this.image = await loaded(source);
    for (const canvas of [this.canvas, this.painted]) canvas.width = canvas.height = this.image.naturalWidth;
    this.clear();
  }

  clear() {
    this.empty = true;
    this.painted.getContext("2d").clearRect(0, 0, this.painted.width, this.painted.height);
    this.show();
  }

  follow(event) {
    const box = this.canvas.getBoundingClientRect();
    this.at = { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height };
    this.paint();
  }

  press(event) {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step && event.key !== " ") return;
    event.preventDefault();
    if (!step) return this.paint();
    const clamp = (value) => Math.min(1, Math.max(0, value));
    this.at = { x: clamp(this.at.x + 0.04 * step[0]), y: clamp(this.at.y + 0.04 * step[1]) };
    this.show();
  }

  paint() {
    if (!this.image) return;
    const pen = this.painted.getContext("2d"), side = this.painted.width;
    pen.fillStyle = checkerboard(pen, Math.ceil(side / 32));
    pen.beginPath();
    pen.arc(this.at.x * side, this.at.y * side, (this.size() / 100) * side, 0, 2 * Math.PI);
    pen.fill();
    this.empty = false;
    this.onpaint();
    this.show();
  }

  show() {
    if (!this.image) return;
    const pen = this.canvas.getContext("2d"), side = this.canvas.width;
    pen.drawImage(this.image, 0, 0, side, side);
    pen.save();
    pen.globalAlpha = 0.85;
    pen.drawImage(this.painted, 0, 0);
    pen.restore();
    pen.strokeStyle = "#e91e63";
    pen.lineWidth = Math.max(1, side / 128);
    pen.beginPath();
    pen.arc(this.at.x * side, this.at.y * side, (this.size() / 100) * side, 0, 2 * Math.PI);
    pen.stroke();
  }

  // The mask as OpenAI's API has it: transparent where the image is regenerated.
  mask() {
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = this.painted.width;
    const pen = canvas.getContext("2d");
    pen.fillRect(0, 0, canvas.width, canvas.height);
    pen.globalCompositeOperation = "destination-out";
    pen.drawImage(this.painted, 0, 0);
    return canvas.toDataURL("image/png");
  }
}
