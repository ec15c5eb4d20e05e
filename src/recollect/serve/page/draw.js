// The drawing board: strokes by mouse, finger, pen or keys, and the picture that they make for the network.

const SIZE = 280;
const STEP = 14; // of the keyboard's pen
const LINE = 22;

/** Draws a picture of numbers from 0 (paper) to 1 (ink) onto a canvas, one pixel each. */
export function show(canvas, picture) {
  canvas.height = picture.length;
  canvas.width = picture[0].length;
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(canvas.width, canvas.height);
  picture.flat().forEach((ink, place) => {
    const shade = 255 * (1 - Math.min(1, Math.max(0, ink)));
    pixels.data.set([shade, shade, shade, 255], 4 * place);
  });
  context.putImageData(pixels, 0, 0);
}

export class Board {
  /** `changed` is called when a stroke ends, `say` with what a screen reader should say; `hint` is on the empty board. */
  constructor(canvas, { shape, changed, say, hint }) {
    Object.assign(this, { canvas, shape, changed, say, hint });
    this.paper = new OffscreenCanvas(SIZE, SIZE); // the strokes alone, without the pen's mark
    this.ink = this.paper.getContext("2d", { willReadFrequently: true });
    this.ink.lineCap = this.ink.lineJoin = "round";
    this.ink.lineWidth = LINE;
    this.pen = { x: SIZE / 2, y: SIZE / 2, down: false };
    this.sample = null;
    this.isEmpty = true;
    canvas.addEventListener("pointerdown", (event) => this.begin(event));
    canvas.addEventListener("pointermove", (event) => this.go(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => this.end());
    canvas.addEventListener("keydown", (event) => this.press(event));
    canvas.addEventListener("focus", () => this.paint());
    canvas.addEventListener("blur", () => { this.lift(); this.paint(); });
    this.paint();
  }

  wipe() {
    this.ink.clearRect(0, 0, SIZE, SIZE);
    this.sample = null;
    this.isEmpty = true;
    this.pen.down = false;
    this.canvas.setAttribute("aria-label", "Drawing board, empty");
    this.paint();
  }

  /** Puts a ready picture on the board. */
  take(picture, label) {
    this.wipe();
    this.sample = picture;
    this.isEmpty = false;
    this.canvas.setAttribute("aria-label", `Drawing board with a picture of ${label}`);
    this.paint();
  }

  /** The picture for the network, or null: the strokes, moved to the middle and made as large as it knows them. */
  picture() {
    if (this.isEmpty) return null;
    if (this.sample) return this.sample;
    const box = inked(this.ink.getImageData(0, 0, SIZE, SIZE).data);
    return box && shrink(this.paper, box, this.shape);
  }

  begin(event) {
    if (event.button > 0) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.dragging = this.place(event);
    this.line(this.dragging, this.dragging);
  }

  go(event) {
    if (!this.dragging) return;
    const to = this.place(event);
    this.line(this.dragging, to);
    this.dragging = to;
  }

  end() {
    if (!this.dragging) return;
    this.dragging = null;
    this.changed();
  }

  press(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key in moves) this.move(...moves[event.key]);
    else if (event.key === " ") this.pen.down ? this.lift() : this.lower();
    else if (event.key === "Delete" || event.key === "Backspace") { this.wipe(); this.say("Wiped."); this.changed(); }
    else return;
    event.preventDefault();
  }

  move(right, down) {
    const from = { ...this.pen };
    const inside = (place) => Math.min(SIZE - STEP, Math.max(STEP, place));
    this.pen.x = inside(from.x + right * STEP);
    this.pen.y = inside(from.y + down * STEP);
    if (this.pen.down) this.line(from, this.pen);
    else this.paint();
    this.say(`Row ${Math.round(this.pen.y / STEP)}, column ${Math.round(this.pen.x / STEP)}`);
  }

  lower() {
    this.pen.down = true;
    this.line(this.pen, this.pen);
    this.say("Pen down.");
  }

  lift() {
    if (!this.pen.down) return;
    this.pen.down = false;
    this.say("Pen up.");
    this.paint();
    this.changed();
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    return { x: ((event.clientX - box.left) / box.width) * SIZE, y: ((event.clientY - box.top) / box.height) * SIZE };
  }

  line(from, to) {
    if (this.sample) { const pen = { ...this.pen }; this.wipe(); this.pen = pen; }
    this.isEmpty = false;
    this.canvas.setAttribute("aria-label", "Drawing board with your drawing");
    this.ink.beginPath();
    this.ink.moveTo(from.x, from.y);
    this.ink.lineTo(to.x + 0.01, to.y);
    this.ink.stroke();
    this.paint();
  }

  paint() {
    const context = this.canvas.getContext("2d");
    context.fillStyle = "#fff";
    context.fillRect(0, 0, SIZE, SIZE);
    if (this.sample) {
      const small = document.createElement("canvas");
      show(small, this.sample);
      context.imageSmoothingEnabled = false;
      context.drawImage(small, 0, 0, SIZE, SIZE);
    }
    context.drawImage(this.paper, 0, 0);
    if (this.isEmpty) {
      context.fillStyle = "#6d6d6d";
      context.font = "16px system-ui, sans-serif";
      context.textAlign = "center";
      context.fillText(this.hint(), SIZE / 2, SIZE / 2 + 5);
    }
    if (this.canvas.matches(":focus-visible")) {
      context.strokeStyle = matchMedia("(prefers-color-scheme: dark)").matches ? "#004198" : "#b4631a"; // is inverted
      context.lineWidth = 3;
      context.beginPath();
      context.arc(this.pen.x, this.pen.y, this.pen.down ? 5 : 10, 0, 2 * Math.PI);
      context.stroke();
    }
  }
}

/** The box around what is inked, in pixels of the board, and the middle of the ink's mass; null where there is none. */
function inked(data) {
  let [left, top, right, bottom, mass, x, y] = [SIZE, SIZE, -1, -1, 0, 0, 0];
  for (let place = 0; place < SIZE * SIZE; place += 1) {
    const ink = data[4 * place + 3];
    if (ink < 32) continue;
    const [column, row] = [place % SIZE, Math.floor(place / SIZE)];
    left = Math.min(left, column); right = Math.max(right, column);
    top = Math.min(top, row); bottom = Math.max(bottom, row);
    mass += ink; x += ink * column; y += ink * row;
  }
  return mass ? { left, top, width: right - left + 1, height: bottom - top + 1, x: x / mass, y: y / mass } : null;
}

/** MNIST's pictures are 28 x 28, with the digit in 20 x 20 and its mass in the middle; smaller ones are filled. */
function shrink(paper, box, [height, width]) {
  const isLarge = height > 16;
  const room = (isLarge ? 20 / 28 : 1) * Math.min(height, width);
  const scale = room / Math.max(box.width, box.height);
  const middle = isLarge ? box : { x: box.left + box.width / 2, y: box.top + box.height / 2 };
  const fine = 8; // drawn this much larger, then averaged: a browser's own shrinking loses thin lines
  const large = new OffscreenCanvas(width * fine, height * fine);
  const context = large.getContext("2d");
  context.setTransform(scale * fine, 0, 0, scale * fine, (width / 2 - middle.x * scale) * fine, (height / 2 - middle.y * scale) * fine);
  context.drawImage(paper, 0, 0);
  const data = context.getImageData(0, 0, large.width, large.height).data;
  return Array.from({ length: height }, (_, row) => Array.from({ length: width }, (_, column) => {
    let sum = 0;
    for (let y = row * fine; y < (row + 1) * fine; y += 1) {
      for (let x = column * fine; x < (column + 1) * fine; x += 1) sum += data[4 * (y * large.width + x) + 3];
    }
    return Number((sum / (255 * fine * fine)).toFixed(4));
  }));
}
