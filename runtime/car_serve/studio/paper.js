// A canvas that is drawn on: strokes with pressure, eraser, undo and redo. The control map and the mask are both one.

const KEPT = 40; // steps of undo; a step of 512×512 is 1 MB

export class Paper extends EventTarget {
  tool = "brush";
  size = 11; // of the brush, in pixels of the canvas at pressure 0.5
  #undo = [];
  #redo = [];
  #last = null;
  #cursor = null;

  // ink, ground: CSS colours; a ground of null is transparent.
  constructor(canvas, { ink, ground }) {
    super();
    this.canvas = canvas;
    this.ink = ink;
    this.ground = ground;
    this.context = canvas.getContext("2d", { willReadFrequently: true });
    this.#wipe();
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const type of ["pointerup", "pointercancel"]) canvas.addEventListener(type, (event) => this.#up(event));
    canvas.addEventListener("keydown", (event) => this.#key(event));
  }

  get canUndo() { return this.#undo.length > 0; }
  get canRedo() { return this.#redo.length > 0; }
  get blank() {
    const { data } = this.#read();
    const [r, g, b, a] = data;
    for (let i = 0; i < data.length; i += 4) if (data[i] !== r || data[i + 1] !== g || data[i + 2] !== b || data[i + 3] !== a) return false;
    return true;
  }

  // A stroke that began on something in front of the canvas, by its first two events; the others come to the canvas.
  begin(pressed, moved) {
    this.#down(pressed);
    this.#move(moved);
  }

  undo() { this.#swap(this.#undo, this.#redo); }
  redo() { this.#swap(this.#redo, this.#undo); }
  clear() { this.change(() => this.#wipe()); }

  // Another size in pixels, or ground; empties it.
  reset({ side, ink, ground }) {
    this.canvas.width = this.canvas.height = side;
    this.ink = ink;
    this.ground = ground;
    this.#undo = [];
    this.#redo = [];
    this.#wipe();
    this.#tell("change");
  }

  invert() {
    this.change(() => {
      const image = this.#read();
      for (let i = 0; i < image.data.length; i++) if (i % 4 !== 3) image.data[i] = 255 - image.data[i];
      this.context.putImageData(image, 0, 0);
    });
  }

  // An image over all of it; pixels stay pixels, so that `map` gives back what was put in.
  put(image) {
    this.change(() => {
      this.context.imageSmoothingEnabled = false;
      this.context.drawImage(image, 0, 0, this.canvas.width, this.canvas.height);
    });
  }

  // What is on it, made smaller: left, top, right, bottom as shares.
  place([left, top, right, bottom]) {
    this.change(() => {
      const side = this.canvas.width;
      const copy = new OffscreenCanvas(side, side);
      copy.getContext("2d").drawImage(this.canvas, 0, 0);
      this.#wipe();
      this.context.imageSmoothingEnabled = true;
      this.context.drawImage(copy, left * side, top * side, (right - left) * side, (bottom - top) * side);
    });
  }

  change(make) {
    this.#keep();
    make();
    this.#tell("change");
    this.#tell("stroke");
  }

  // side × side PNG in base64; each pixel is the mean of those it covers.
  map(side) {
    const { data, width } = this.#read();
    const f = width / side;
    const small = new ImageData(side, side);
    const sums = new Uint32Array(side * 4);
    for (let y = 0, at = 0; y < side; y++) {
      sums.fill(0);
      for (let v = 0; v < f; v++) {
        for (let x = 0; x < side * 4; x += 4) {
          let r = 0, g = 0, b = 0, a = 0;
          for (let u = 0; u < f; u++, at += 4) { r += data[at]; g += data[at + 1]; b += data[at + 2]; a += data[at + 3]; }
          sums[x] += r; sums[x + 1] += g; sums[x + 2] += b; sums[x + 3] += a;
        }
      }
      for (let i = 0; i < sums.length; i++) small.data[y * side * 4 + i] = Math.round(sums[i] / (f * f));
    }
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = side;
    canvas.getContext("2d").putImageData(small, 0, 0);
    return canvas.toDataURL("image/png").split(",")[1];
  }

  // side × side PNG in base64: white where it was painted over, black elsewhere.
  mask(side) {
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = side;
    const context = canvas.getContext("2d");
    context.drawImage(this.canvas, 0, 0, side, side);
    const image = context.getImageData(0, 0, side, side);
    for (let i = 0; i < image.data.length; i += 4) {
      image.data.fill(image.data[i + 3] >= 128 ? 255 : 0, i, i + 3);
      image.data[i + 3] = 255;
    }
    context.putImageData(image, 0, 0);
    return canvas.toDataURL("image/png").split(",")[1];
  }

  #read() { return this.context.getImageData(0, 0, this.canvas.width, this.canvas.height); }
  #tell(type) { this.dispatchEvent(new Event(type)); }

  #wipe() {
    this.context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    if (!this.ground) return;
    this.context.fillStyle = this.ground;
    this.context.fillRect(0, 0, this.canvas.width, this.canvas.height);
  }

  #keep() {
    this.#undo.push(this.#read());
    if (this.#undo.length > KEPT) this.#undo.shift();
    this.#redo = [];
  }

  #swap(from, to) {
    if (!from.length) return;
    to.push(this.#read());
    this.context.putImageData(from.pop(), 0, 0);
    this.#tell("change");
    this.#tell("stroke");
  }

  #at(event) {
    const box = this.canvas.getBoundingClientRect();
    const scale = this.canvas.width / box.width;
    const pressure = event.pointerType === "pen" ? event.pressure || 0.5 : 0.5;
    return { x: (event.clientX - box.left) * scale, y: (event.clientY - box.top) * scale, width: this.size * (0.4 + 1.2 * pressure) };
  }

  #down(event) {
    if (event.button > 0 && event.button !== 5) return;
    event.preventDefault();
    this.canvas.focus({ preventScroll: true });
    this.canvas.setPointerCapture(event.pointerId);
    this.#keep();
    this.#last = { ...this.#at(event), pointer: event.pointerId, erase: this.tool === "eraser" || event.button === 5 };
    this.#line(this.#last, this.#last);
    this.#tell("change");
  }

  #move(event) {
    if (this.#last?.pointer !== event.pointerId) return;
    const points = event.getCoalescedEvents?.() ?? [];
    for (const point of points.length ? points : [event]) this.#to(this.#at(point));
    this.#tell("change");
  }

  #up(event) {
    if (this.#last?.pointer !== event.pointerId) return;
    this.#last = null;
    this.#tell("change");
    this.#tell("stroke");
  }

  #to(next) {
    this.#line(this.#last, next);
    Object.assign(this.#last, next);
  }

  #line(from, to) {
    const c = this.context;
    const erase = this.#last.erase;
    c.globalCompositeOperation = erase && !this.ground ? "destination-out" : "source-over";
    c.strokeStyle = erase && this.ground ? this.ground : this.ink;
    c.lineWidth = to.width * (erase ? 2 : 1);
    c.lineCap = c.lineJoin = "round";
    c.beginPath();
    c.moveTo(from.x, from.y);
    c.lineTo(to.x === from.x && to.y === from.y ? to.x + 0.01 : to.x, to.y); // a tap is a dot; of no length, none
    c.stroke();
    c.globalCompositeOperation = "source-over";
  }

  // Arrow keys move a pen; with Shift it draws.
  #key(event) {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const side = this.canvas.width;
    const from = this.#cursor ?? { x: side / 2, y: side / 2, width: this.size };
    const by = side / 32;
    const to = { x: clamp(from.x + step[0] * by, side), y: clamp(from.y + step[1] * by, side), width: this.size };
    this.#cursor = to;
    if (!event.shiftKey) return;
    this.change(() => {
      this.#last = { ...from, erase: this.tool === "eraser" };
      this.#line(from, to);
      this.#last = null;
    });
  }
}

const clamp = (value, most) => Math.min(most, Math.max(0, value));
