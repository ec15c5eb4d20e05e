// The page: what is drawn or written is explained by the service, taught, forgotten, and explained again.

import { Board, show } from "./draw.js";

const $ = (id) => document.getElementById(id);
const MOST = 12; // classes that are shown, where there are more: the likeliest
const percent = (share) => (share < 0.0005 ? "0%" : share > 0.9995 ? "100%" : `${(100 * share).toFixed(1)}%`);
const state = {
  token: sessionStorage.getItem("token"), model: null, board: null, input: null, asked: 0, undo: null,
  lesson: null, // the class to be taught, as long as it is the story, and which step is next
  isBusy: false, // with a write
  unanswered: null, // the write that was sent last, until it is answered
};

class Refused extends Error {
  constructor(status, error) {
    super(error ? `${error.got}. Needed: ${error.need}. ${error.do}` : `The service answered ${status}.`);
    this.status = status;
  }
}

async function ask(method, path, content, headers = {}) {
  if (state.token) headers.Authorization = `Bearer ${state.token}`;
  if (content) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { method, headers, body: content && JSON.stringify(content) });
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Refused(answer.status, body.error);
  return body;
}

/** Runs something that talks to the service; says what went wrong. */
async function attempt(job) {
  try {
    await job();
  } catch (error) {
    if (error.status === 401) return knock();
    const text = error instanceof Refused ? error.message : "The service cannot be reached.";
    tell(text.charAt(0).toUpperCase() + text.slice(1), { wrong: true });
  }
}

function tell(text, { wrong = false, undo = null } = {}) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
  state.undo = undo;
  $("undo").hidden = !undo;
}

function knock() {
  $("door").hidden = false;
  $("token").focus();
  tell(state.token ? "This is not the right token." : "A token is needed.", { wrong: Boolean(state.token) });
}

function make(tag, { text, ...rest } = {}, ...children) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(rest)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

async function refresh() {
  const model = await ask("GET", "/v1/model");
  state.model = model;
  $("size").textContent = `${model.entries.toLocaleString("en")} of ${model.capacity.toLocaleString("en")} memories`;
  const names = model.classes.filter((name) => name !== null);
  const strange = [...new Set(model.samples.map((sample) => sample.label))].filter((name) => !names.includes(name));
  if (strange.length && model.is_picture) state.lesson ??= { label: strange[0], step: 0, taught: null };
  showLabels(names.slice(0, 30), model.room ? strange.slice(0, 3) : []);
  $("room").textContent = model.room
    ? `There is room for ${model.room} more ${model.room === 1 ? "class" : "classes"}.`
    : "There is no room for more classes.";
  $("name").disabled = $("naming").querySelector("button").disabled = model.room === 0 && names.length <= 30;
  tellStory();
}

function showLabels(names, strange) {
  const focused = document.activeElement?.dataset.label;
  $("labels").replaceChildren(...[...names, ...strange].map((name) => {
    const isNew = strange.includes(name);
    const button = make("button", {
      type: "button", text: name, class: isNew ? "new" : "known", "data-label": name,
      "aria-label": `Remember this as ${name}${isNew ? ", a new class" : ""}`,
    });
    if (isNew) button.append(make("small", { text: "new" }));
    button.addEventListener("click", () => attempt(() => alone(() => teach(name))));
    if (name === focused) queueMicrotask(() => button.focus());
    return button;
  }));
}

/** Says what to do next, as long as there is a class that the network has never seen. */
function tellStory() {
  const { lesson, model } = state;
  $("steps").hidden = !lesson;
  if (!lesson) {
    $("story").textContent = model.is_picture ? "Draw, see what it thinks, and teach it better." : "See what it thinks, and teach it better.";
    return;
  }
  const { label, step } = lesson;
  $("story").textContent = step < 2 ? `This network has never seen a ${label}. Teach it one.`
    : step === 2 ? `It has seen one ${label} now. Is one enough?` : `It knows a ${label} now, and its weights have not changed.`;
  const steps = [`Draw a ${label}`, `Teach it: this is a ${label}`, `Draw another ${label}`, "Forget a memory"];
  $("steps").replaceChildren(...steps.map((text, at) => make("li", {
    text, class: at < step ? "done" : "", ...(at === step ? { "aria-current": "step" } : {}),
  }, ...(at < step ? [make("span", { class: "unseen", text: " (done)" })] : []))));
}

/** Goes on in the story, if this is its next step. */
function advance(step) {
  if (state.lesson?.step !== step) return;
  state.lesson.step += 1;
  tellStory();
}

/** Runs a write, unless another one is under way: a double click teaches once. */
async function alone(job) {
  if (state.isBusy) return;
  state.isBusy = true;
  try {
    await job();
  } finally {
    state.isBusy = false;
  }
}

function begin() {
  const { model } = state;
  if (!model.is_picture) {
    $("input-title").textContent = "Input";
    $("text-label").textContent = model.input_shape ? `JSON: a list of shape ${model.input_shape.join(" x ")}` : "Text";
    $("writing").hidden = false;
    return;
  }
  $("drawing").hidden = false;
  state.board ??= new Board($("board"), {
    shape: model.input_shape,
    changed: () => attempt(() => look(state.board.picture())),
    say: (text) => { $("spoken").textContent = text; },
    hint: () => (state.lesson?.step < 3 ? `Draw a${state.lesson.step < 2 ? "" : "nother"} ${state.lesson.label} here` : "Draw here"),
  });
  clear();
  $("seen").width = $("seen").height = 1;
  $("samples-box").hidden = model.samples.length === 0;
  $("samples").replaceChildren(...model.samples.map(({ label, input }) => {
    const canvas = make("canvas", { "aria-hidden": "true" });
    const button = make("button", { type: "button", class: "tile", "aria-label": `Take a picture of ${label}` }, canvas);
    show(canvas, input);
    button.addEventListener("click", () => attempt(async () => { state.board.take(input, label); await look(input); }));
    return button;
  }));
}

/** Explains an input, and shows the answer unless another was asked for meanwhile. */
async function look(input, done = (said) => `It says ${said.join(", ")}.`) {
  state.input = input;
  const number = ++state.asked;
  if (input === null) return clear();
  if (state.model.is_picture) show($("seen"), input);
  const answer = await ask("POST", "/v1/explain", { input });
  if (number !== state.asked) return;
  showAnswer(answer);
  tell(done([answer.after.label, percent(best(answer.after, answer.classes))]));
  const { lesson } = state;
  advance(0);
  if (lesson?.step === 2 && input !== lesson.taught && answer.after.label === lesson.label) advance(2);
}

function verdict(id, label, share) {
  $(id).textContent = label;
  $(`${id}-share`).textContent = share;
}

const best = ({ label, probabilities }, classes) => probabilities[classes.indexOf(label)];

function clear() {
  for (const id of ["before", "after"]) verdict(id, "\u2013", "");
  const rows = state.model.classes.map((name, place) => ({ name, place })).filter(({ name }) => name !== null);
  if (rows.length <= MOST) showChances(rows, null, null);
  else $("chances").tBodies[0].replaceChildren();
  $("memories").replaceChildren(make("li", { class: "empty", text: "They are shown once there is something to predict." }));
  $("seen").width = $("seen").height = 1;
  tell("");
}

function showAnswer({ before, after, classes, neighbors }) {
  verdict("before", before.label, percent(best(before, classes)));
  verdict("after", after.label, percent(best(after, classes)));
  const rows = classes.map((name, place) => ({ name, place, share: Math.max(before.probabilities[place], after.probabilities[place]) }))
    .filter(({ name }) => name !== null);
  const shown = rows.length > MOST ? rows.sort((one, other) => other.share - one.share).slice(0, MOST) : rows;
  showChances(shown, before, after);
  const place = classes.indexOf(after.label);
  $("memories").replaceChildren(...neighbors.map((neighbor) => tile(neighbor, after.label, neighbor.contributions[place])));
  if (!neighbors.length) $("memories").append(make("li", { class: "empty", text: "The memory is empty." }));
}

/** Rows that stay are changed, not replaced: their bars move. */
function showChances(shown, before, after) {
  const body = $("chances").tBodies[0];
  const same = body.rows.length === shown.length && shown.every(({ name }, at) => body.rows[at].cells[0].textContent === name);
  if (!same) {
    body.replaceChildren(...shown.map(({ name }) => make("tr", {}, make("th", { scope: "row", text: name }),
      ...["before", "after"].map((kind) => make("td", { class: kind },
        make("div", { class: "chance" }, make("div", { class: "bar", "aria-hidden": "true" }), make("span")))))));
  }
  shown.forEach(({ name, place }, at) => {
    const row = body.rows[at];
    row.className = name === after?.label ? "best" : "";
    [before, after].forEach((prediction, side) => {
      const share = prediction?.probabilities[place] ?? 0;
      const cell = row.cells[side + 1];
      cell.querySelector("span").textContent = prediction ? percent(share) : "";
      requestAnimationFrame(() => cell.querySelector(".bar").style.setProperty("--share", percent(share)));
    });
  });
}

function tile(neighbor, label, added) {
  const { slot, weight, input } = neighbor;
  const sign = Math.abs(added) < 0.005 ? "" : added < 0 ? "\u2212" : "+";
  const amount = sign ? `${sign}${Math.abs(added).toFixed(2)} to ${label}` : "nothing";
  const button = make("button", {
    type: "button",
    class: "tile",
    "aria-label": `Forget this memory of ${neighbor.label}: weight ${percent(weight)}, added ${amount}`,
  });
  if (Array.isArray(input)) {
    const canvas = make("canvas", { "aria-hidden": "true" });
    show(canvas, input);
    button.append(canvas);
  } else {
    button.append(make("span", { class: "text", text: input ?? `slot ${slot}` }));
  }
  const meter = make("span", { class: "meter", "aria-hidden": "true" });
  meter.style.setProperty("--share", percent(weight));
  button.append(
    make("strong", {}, make("span", { text: neighbor.label }), make("span", { class: "forget", text: "forget" })),
    meter,
    make("span", { class: "quiet", text: `weight ${percent(weight)}` }),
    make("span", { class: `quiet ${{ "+": "for", "\u2212": "against" }[sign] ?? ""}`, text: sign ? amount : "added nothing" }),
  );
  button.addEventListener("click", () => attempt(() => alone(() => forget(neighbor))));
  return make("li", {}, button);
}

/** Teaches. If the answer is lost, the same again carries the same key, and counts once. */
async function observe(input, label) {
  const content = { inputs: [input], labels: [label] };
  const same = JSON.stringify(content);
  if (state.unanswered?.same !== same) {
    const key = Array.from(crypto.getRandomValues(new Uint32Array(4)), (part) => part.toString(16)).join("-");
    state.unanswered = { same, key };
  }
  const answer = await ask("POST", "/v1/observe", content, { "Idempotency-Key": state.unanswered.key });
  state.unanswered = null;
  return answer;
}

async function teach(label) {
  const { input } = state;
  if (input === null) {
    tell("Draw something first.", { wrong: true });
    return;
  }
  const said = `${$("after").textContent} ${$("after-share").textContent}`;
  const { new_classes: created } = await observe(input, label);
  if (label === state.lesson?.label && state.lesson.step === 1) {
    state.lesson.taught = input;
    advance(1);
  }
  await refresh();
  await look(input, (now) => `Remembered as ${label}${created.length ? ", a new class" : ""}. ` +
    `It said ${said}, and now says ${now.join(" ")}.`);
}

async function forget({ slot, written, label, input }) {
  const guard = written === null ? "" : `?written=${written}`;
  await ask("DELETE", `/v1/memories/${slot}${guard}`);
  await refresh();
  await look(state.input, (now) => `Forgotten. Now it says ${now.join(", ")}.`);
  advance(3);
  const undo = input === null ? null : async () => { await observe(input, label); await refresh(); await look(state.input, () => "Remembered again."); };
  tell($("status").textContent, { undo });
  ($("memories").querySelector("button") ?? $("board")).focus();
}

async function open() {
  await refresh();
  $("door").hidden = true;
  begin();
}

$("door").addEventListener("submit", (event) => {
  event.preventDefault();
  state.token = $("token").value;
  sessionStorage.setItem("token", state.token);
  attempt(open);
});
$("wipe").addEventListener("click", () => { state.board.wipe(); attempt(() => look(null)); $("board").focus(); });
$("undo").addEventListener("click", () => attempt(() => alone(state.undo)));
$("naming").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = $("name").value.trim();
  if (!name) return;
  attempt(() => alone(async () => { await teach(name); $("name").value = ""; }));
});
$("writing").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(async () => {
    let input = $("text").value;
    if (state.model.input_shape) {
      try {
        input = JSON.parse(input);
      } catch {
        tell("This is no JSON.", { wrong: true });
        return;
      }
    }
    await look(input);
  });
});
attempt(open);
