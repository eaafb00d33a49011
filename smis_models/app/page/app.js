"use strict";

const $ = (id) => document.getElementById(id);
const session = Array.from(crypto.getRandomValues(new Uint8Array(16)),
  (b) => b.toString(16).padStart(2, "0")).join("");
const UNDO = 100;

let model, height, width, colours;
let labels, base; // the map, a class a pixel, and as it was loaded: what the eraser brings back
let looks = []; // of each class: {start, end, t}
let selected = 0, tool = "brush", size = 12;
let undone = [], done = []; // states before and after, for redo and undo
let step = 0, caption = "start";
let pictures = [], chosen = null; // whose looks can be taken

// Messages

function say(text, note = false) {
  $("message").textContent = text || "";
  $("message").className = note ? "note" : "";
  $("message").hidden = !text;
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw Object.assign(new Error("The server does not answer; is smis paint still running?"), { status: 0 });
  }
  if (response.ok) return response;
  let text = `${response.status} ${response.statusText}`;
  try { text = (await response.json()).error; } catch { /* no JSON: the status says it */ }
  throw Object.assign(new Error(text), { status: response.status });
}

const guarded = (action) => async (...values) => {
  try { await action(...values); } catch (error) { say(error.message); }
};

function packed(head, ...parts) {
  const text = new TextEncoder().encode(JSON.stringify(head));
  const out = new Uint8Array(parts.reduce((sum, p) => sum + p.length, 4 + text.length));
  new DataView(out.buffer).setUint32(0, text.length, true);
  out.set(text, 4);
  let at = 4 + text.length;
  for (const part of parts) { out.set(part, at); at += part.length; }
  return out;
}

function unpacked(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const text = new TextDecoder().decode(new Uint8Array(buffer, 4, length));
  return [JSON.parse(text), new Uint8Array(buffer, 4 + length)];
}

// The picture: one request under way at a time, the next one takes what has changed since

let version = 0, known = null, shown = 0; // known: the version of the map that the server has
let dirty = null; // [top, left, bottom, right] changed since it was sent
let wanted = false, changedAt = 0, running = null;

function touch(top, left, bottom, right) {
  dirty = dirty ? [Math.min(dirty[0], top), Math.min(dirty[1], left),
    Math.max(dirty[2], bottom), Math.max(dirty[3], right)] : [top, left, bottom, right];
}

function repaint() {
  if (!wanted) changedAt = performance.now();
  wanted = true;
  running ??= loop().finally(() => { running = null; });
  return running;
}

async function loop() {
  let tries = 0;
  while (wanted) {
    wanted = false;
    const since = changedAt;
    try {
      await send(since);
      tries = 0;
    } catch (error) {
      known = null; // the whole map next time
      if (error.status === 409 && tries++ < 2) { wanted = true; continue; }
      say(error.message);
      return;
    }
  }
}

async function send(since) {
  const mine = ++version;
  let box = dirty;
  if (known === null) box = [0, 0, height, width];
  dirty = null;
  const rectangles = [], parts = [];
  if (box) {
    const [top, left, bottom, right] = box;
    const part = new Uint8Array((bottom - top) * (right - left));
    for (let y = top; y < bottom; y++) {
      part.set(labels.subarray(y * width + left, y * width + right), (y - top) * (right - left));
    }
    rectangles.push([top, left, bottom - top, right - left]);
    parts.push(part);
  }
  const response = await ask("api/paint", {
    method: "POST",
    body: packed({ session, version: mine, base: known, rectangles, step, caption,
      looks: looks.map((look) => [look.start, look.end, look.t]) }, ...parts),
  });
  const [head, pixels] = unpacked(await response.arrayBuffer());
  known = head.version;
  if (head.version <= shown) return; // late
  shown = head.version;
  show(pixels);
  const [fresh, kept] = head.windows;
  const spent = performance.now() - since;
  $("status").textContent = `Picture in ${spent.toFixed(0)} ms, of these the model ` +
    `${head.milliseconds.toFixed(0)} ms` + (fresh + kept
      ? ` · windows: ${fresh.toLocaleString("en")} new, ${kept.toLocaleString("en")} kept` : "");
  document.body.dataset.shown = String(shown);
  if ($("message").className !== "note") say("");
}

function show(pixels) {
  const image = new ImageData(width, height), out = image.data;
  for (let i = 0, j = 0; i < pixels.length; j += 4) {
    out[j] = pixels[i++]; out[j + 1] = pixels[i++]; out[j + 2] = pixels[i++]; out[j + 3] = 255;
  }
  $("picture").getContext("2d").putImageData(image, 0, 0);
}

// The map: each pixel is of one class, so nothing is blended

function draw(top = 0, left = 0, bottom = height, right = width) {
  const image = new ImageData(right - left, bottom - top);
  const out = new Uint32Array(image.data.buffer);
  for (let y = top, k = 0; y < bottom; y++) {
    for (let x = left; x < right; x++) out[k++] = colours[labels[y * width + x]];
  }
  $("map").getContext("2d").putImageData(image, left, top);
}

function disc(cx, cy) {
  // Pixels whose centres lie within the brush.
  const r = size / 2;
  const top = Math.max(0, Math.ceil(cy - r - .5)), bottom = Math.min(height - 1, Math.floor(cy + r - .5));
  let changed = null;
  for (let y = top; y <= bottom; y++) {
    const half = Math.sqrt(Math.max(0, r * r - (y + .5 - cy) ** 2));
    const left = Math.max(0, Math.ceil(cx - half - .5)), right = Math.min(width - 1, Math.floor(cx + half - .5));
    for (let x = left; x <= right; x++) {
      const at = y * width + x, value = tool === "eraser" ? base[at] : selected;
      if (labels[at] === value) continue;
      labels[at] = value;
      changed = changed ? [Math.min(changed[0], y), Math.min(changed[1], x),
        Math.max(changed[2], y + 1), Math.max(changed[3], x + 1)] : [y, x, y + 1, x + 1];
    }
  }
  return changed;
}

function line(from, to) {
  const length = Math.hypot(to[0] - from[0], to[1] - from[1]);
  const count = Math.max(1, Math.ceil(length / Math.max(.5, size / 8)));
  for (let k = 1; k <= count; k++) {
    const t = k / count;
    apply(disc(from[0] + t * (to[0] - from[0]), from[1] + t * (to[1] - from[1])));
  }
}

function apply(box) {
  if (!box) return;
  touch(...box);
  draw(...box);
  repaint();
}

function fill(x, y) {
  const from = labels[y * width + x];
  if (from === selected) return;
  let box = [y, x, y + 1, x + 1];
  const stack = [y * width + x];
  labels[stack[0]] = selected;
  const visit = (at) => { if (labels[at] === from) { labels[at] = selected; stack.push(at); } };
  while (stack.length) {
    const at = stack.pop(), py = Math.floor(at / width), px = at % width;
    box = [Math.min(box[0], py), Math.min(box[1], px), Math.max(box[2], py + 1), Math.max(box[3], px + 1)];
    if (px > 0) visit(at - 1);
    if (px < width - 1) visit(at + 1);
    if (py > 0) visit(at - width);
    if (py < height - 1) visit(at + width);
  }
  apply(box);
}

// Undo: the map, what the eraser brings back, and the looks together

const snapshot = () => ({ labels: labels.slice(), base, looks: structuredClone(looks) });

function begin(what) {
  done.push(snapshot());
  if (done.length > UNDO) done.shift();
  undone = [];
  step += 1;
  caption = what.slice(0, 100);
  say("");
  buttons();
}

function restore(from, to, what) {
  if (!from.length) return;
  to.push(snapshot());
  const state = from.pop();
  let box = null;
  for (let at = 0; at < labels.length; at++) {
    if (labels[at] === state.labels[at]) continue;
    const y = Math.floor(at / width), x = at % width;
    box = box ? [Math.min(box[0], y), Math.min(box[1], x), Math.max(box[2], y + 1), Math.max(box[3], x + 1)]
      : [y, x, y + 1, x + 1];
  }
  labels = state.labels;
  base = state.base;
  looks = state.looks;
  step += 1;
  caption = what;
  if (box) { touch(...box); draw(...box); }
  repaint();
  refresh();
}

function load(map, what) {
  if (labels) begin(what); // where undo ends there is nothing yet
  labels = map;
  base = map.slice();
  touch(0, 0, height, width);
  draw();
  repaint();
  refresh();
}

// Tools

function place(event) {
  const box = $("map").getBoundingClientRect();
  return [(event.clientX - box.left) / box.width * width, (event.clientY - box.top) / box.height * height];
}

let last = null;

function press(event) {
  if (event.button !== 0 || !labels) return;
  const [x, y] = place(event);
  const px = Math.min(width - 1, Math.max(0, Math.floor(x))), py = Math.min(height - 1, Math.max(0, Math.floor(y)));
  if (tool === "pick" || event.altKey) return choose(labels[py * width + px]);
  const name = model.classes[selected].name;
  if (tool === "fill") {
    begin(`fill: ${name}`);
    fill(px, py);
    return refresh();
  }
  begin(tool === "eraser" ? "eraser" : `brush: ${name}`);
  $("map").setPointerCapture(event.pointerId);
  last = [x, y];
  apply(disc(x, y));
}

function move(event) {
  hover(event);
  if (!last) return;
  const events = event.getCoalescedEvents?.() ?? [];
  for (const each of events.length ? events : [event]) {
    const next = place(each);
    line(last, next);
    last = next;
  }
}

function release() {
  if (!last) return;
  last = null;
  refresh();
}

function hover(event) {
  const frame = $("map").getBoundingClientRect(), cursor = $("cursor");
  const wide = tool === "brush" || tool === "eraser";
  cursor.style.visibility = wide ? "visible" : "hidden";
  cursor.style.left = `${event.clientX - frame.left}px`;
  cursor.style.top = `${event.clientY - frame.top}px`;
  cursor.style.width = cursor.style.height = `${size / width * frame.width}px`;
}

function use(name) {
  tool = name;
  for (const button of document.querySelectorAll("[data-tool]")) {
    button.setAttribute("aria-checked", String(button.dataset.tool === name));
  }
}

function resize(value) {
  size = Math.min(64, Math.max(1, value));
  $("size").value = size;
  $("size-text").textContent = size;
}

// Classes and their looks

const css = (index) => `rgb(${model.classes[index].colour.join(" ")})`;
const fresh = () => `seed:${crypto.getRandomValues(new Uint32Array(1))[0] % 1000000}`;
const part = () => (model.parts === 1 ? 0 : selected);

function choose(index) {
  selected = index;
  if (tool === "pick") use("brush");
  refresh();
}

function named(source) {
  const [kind, number] = source.split(":");
  if (kind === "seed") return `code ${number}`;
  return pictures.find((p) => p.number === Number(number))?.name ?? source;
}

function buttons() {
  $("undo").disabled = !done.length;
  $("redo").disabled = !undone.length;
}

function refresh() {
  buttons();
  const counts = new Uint32Array(256);
  for (const c of labels ?? []) counts[c] += 1;
  for (const button of $("classes").children) {
    const index = Number(button.dataset.class), share = counts[index] / (height * width);
    button.setAttribute("aria-checked", String(index === selected));
    button.lastChild.textContent = share ? (share < .01 ? "<1%" : `${Math.round(share * 100)}%`) : "";
  }
  if (!model.parts) return;
  const look = looks[part()], whole = model.parts === 1;
  $("look-class").textContent = whole ? "the picture" : model.classes[selected].name;
  $("look-swatch").hidden = whole;
  $("look-swatch").style.background = css(selected);
  $("look-start").textContent = named(look.start);
  $("look-end").textContent = named(look.end);
  $("morph").value = look.t;
  const picture = pictures.find((p) => p.number === chosen);
  for (const button of $("pictures").children) {
    button.setAttribute("aria-checked", String(Number(button.dataset.number) === chosen));
  }
  const there = picture && (whole || picture.present.includes(selected));
  $("take").disabled = !there;
  $("take").textContent = picture && !there ? `It shows no ${model.classes[selected].name}` : "Take";
  $("take-all").disabled = !picture;
}

function change(what, edit) {
  begin(what);
  edit();
  repaint();
  refresh();
}

const lookName = () => (model.parts === 1 ? "the picture" : model.classes[selected].name);
const from = (source) => { looks[part()] = { ...looks[part()], start: source, t: 0 }; };

function takeAll() {
  const picture = pictures.find((p) => p.number === chosen);
  looks.forEach((look, k) => {
    if (model.parts === 1 || picture.present.includes(k)) Object.assign(look, { start: `picture:${chosen}`, t: 0 });
  });
}

async function addPicture(head, ...parts) {
  const response = await ask("api/picture", { method: "POST", body: packed({ session, ...head }, ...parts) });
  const picture = await response.json();
  pictures.push(picture);
  chosen = picture.number;
  const button = document.createElement("button"), image = document.createElement("img");
  image.src = picture.picture;
  image.alt = button.title = picture.name;
  button.dataset.number = picture.number;
  button.append(image);
  button.addEventListener("click", () => { chosen = picture.number; refresh(); });
  $("pictures").append(button);
  say("");
  refresh();
}

const bytes = async (file) => new Uint8Array(await file.arrayBuffer());

async function openPicture(files) {
  const maps = files.filter((f) => /label/i.test(f.name)), rest = files.filter((f) => !maps.includes(f));
  if (rest.length !== 1 || maps.length > 1) {
    throw new Error("picture: expected one picture and at most its label map (a name with 'label'), got " +
      `${rest.length} and ${maps.length} files`);
  }
  await running; // the canvas's map serves where there is no other
  const content = await bytes(rest[0]);
  await addPicture({ name: rest[0].name.slice(0, 100), bytes: content.length }, content,
    ...(await Promise.all(maps.map(bytes))));
}

// Files

async function save(kind) {
  await (known === null ? repaint() : running);
  if (known === null) return; // why was said there
  const path = `api/save/${kind}?session=${session}`;
  let response;
  try {
    response = await ask(path);
  } catch (error) {
    if (error.status !== 404) throw error;
    known = null; // the server knows this page no more: it gets the whole map
    await repaint();
    if (known === null) return;
    response = await ask(path);
  }
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await response.blob());
  link.download = kind;
  link.click();
  URL.revokeObjectURL(link.href);
}

async function scene(name) {
  const response = await ask(`api/scene?name=${encodeURIComponent(name)}`);
  load(new Uint8Array(await response.arrayBuffer()), `scene: ${name}`);
}

async function openMap(file) {
  const response = await ask("api/map", { method: "POST", body: await bytes(file) });
  const [{ size: [h, w] }, map] = unpacked(await response.arrayBuffer());
  load(map.slice(), `map: ${file.name}`);
  if (h !== height || w !== width) {
    say(`${file.name}, ${w}x${h}, was resized to ${width}x${height} by nearest`
      + (h * width === w * height ? "" : "; its shape is stretched"), true);
  }
}

// Keys and buttons

function key(event) {
  if (event.target.matches("input[type=search], select")) return;
  const command = event.ctrlKey || event.metaKey, pressed = event.key.toLowerCase();
  if (command && pressed === "z") {
    if (event.shiftKey) restore(undone, done, "redo"); else restore(done, undone, "undo");
  } else if (command && pressed === "y") restore(undone, done, "redo");
  else if (command || event.altKey) return;
  else if ("bfei".includes(pressed) && pressed.length === 1) {
    use({ b: "brush", f: "fill", e: "eraser", i: "pick" }[pressed]);
  } else if (pressed === "[" || pressed === "]") resize(size + (pressed === "]" ? 2 : -2));
  else return;
  event.preventDefault();
}

function wire() {
  const map = $("map"), on = (id, type, action) => $(id).addEventListener(type, guarded(action));
  map.addEventListener("pointerdown", press);
  map.addEventListener("pointermove", move);
  map.addEventListener("pointerup", release);
  map.addEventListener("pointercancel", release);
  map.addEventListener("pointerleave", () => { $("cursor").style.visibility = "hidden"; });
  document.addEventListener("keydown", key);
  for (const button of document.querySelectorAll("[data-tool]")) {
    button.addEventListener("click", () => use(button.dataset.tool));
  }
  for (const button of document.querySelectorAll("[data-save]")) {
    button.addEventListener("click", guarded(() => save(button.dataset.save)));
  }
  on("size", "input", () => resize(Number($("size").value)));
  on("undo", "click", () => restore(done, undone, "undo"));
  on("redo", "click", () => restore(undone, done, "redo"));
  on("scene", "change", () => scene($("scene").value));
  on("map-file", "change", async () => {
    const [file] = $("map-file").files;
    $("map-file").value = "";
    if (file) await openMap(file);
  });
  on("filter", "input", () => {
    const text = $("filter").value.toLowerCase();
    for (const button of $("classes").children) {
      button.hidden = !model.classes[button.dataset.class].name.toLowerCase().includes(text);
    }
  });
  on("anew", "click", () => change(`${lookName()}, drawn anew`, () => from(fresh())));
  on("new-end", "click", () => change(`${lookName()}, another end`, () => { looks[part()].end = fresh(); }));
  on("all-anew", "click", () => change("all drawn anew", () => {
    looks = looks.map(() => ({ start: fresh(), end: fresh(), t: 0 }));
  }));
  let sliding = false;
  on("morph", "input", () => {
    if (!sliding) begin(`${lookName()}, morphed`);
    sliding = true;
    looks[part()].t = Number($("morph").value);
    repaint();
  });
  on("morph", "change", () => { sliding = false; });
  on("sample", "click", () => addPicture({ sample: pictures.length }));
  on("picture-files", "change", async () => {
    const files = [...$("picture-files").files];
    $("picture-files").value = "";
    if (files.length) await openPicture(files);
  });
  on("take", "click", () => change(`${lookName()} from ${named(`picture:${chosen}`)}`,
    () => from(`picture:${chosen}`)));
  on("take-all", "click", () => change(`all from ${named(`picture:${chosen}`)}`, takeAll));
}

async function start() {
  model = await (await ask("api/model")).json();
  [height, width] = model.size;
  for (const id of ["map", "picture"]) Object.assign($(id), { width, height });
  colours = Uint32Array.from(model.classes, ({ colour: [r, g, b] }) => (255 << 24 | b << 16 | g << 8 | r) >>> 0);
  $("model").textContent = `${model.name}, ${height} × ${width}, ${model.classes.length} classes; ` +
    `weights: ${model.weights}` + (model.edges ? "; edges are those between classes" : "");
  model.classes.forEach(({ name }, index) => {
    const button = document.createElement("button"), swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.background = css(index);
    const text = document.createElement("span"), share = document.createElement("span");
    text.textContent = name;
    share.className = "share";
    button.setAttribute("role", "radio");
    button.dataset.class = index;
    button.append(swatch, text, share);
    button.addEventListener("click", () => choose(index));
    $("classes").append(button);
  });
  $("filter").hidden = model.classes.length < 20;
  for (const name of model.scenes) $("scene").append(new Option(name.replace("_", " "), name));
  looks = Array.from({ length: model.parts }, (_, k) => (
    { start: `seed:${model.seed}`, end: `seed:${model.seed + k + 1}`, t: 0 }));
  $("looks").hidden = !model.parts;
  $("pictures-row").hidden = $("pictures-hint").hidden = !model.encodes;
  $("sample").hidden = !model.samples;
  wire();
  use("brush");
  resize(Math.max(2, Math.round(width / 10)));
  await scene(model.scenes[0]);
}

guarded(start)();
