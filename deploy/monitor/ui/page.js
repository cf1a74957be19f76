"use strict";
// Draws the messages of /events. Text from topics becomes text nodes, never markup. Every number comes with its display text
// (page_message.py); the page formats only the ticks of its time axis. Each message updates the state at once, and the page
// draws at most once per frame, so a burst of thousands of events causes one drawing.

const STATIONS = ["device", "link1", "edge", "link2", "cloud", "result"];
const NAMES = { link1: "link 1", link2: "link 2", result: "results" };
const SHOWN_TASKS = 100, KEPT_TASKS = 560, KEPT_LINES = 80;
const LEAST_SPAN_S = 0.01, TICK_PIXELS = 80;
const REST = 3; // pause after a drawing, as a multiple of its duration: a slow page stays usable
const ENDED = new Set(["COMPLETED", "REJECTED", "FAILED", "EXPIRED"]);
const BAD = new Set(["REJECTED", "FAILED", "EXPIRED", "lost", "failed"]);

const state = { tasks: new Map(), lines: [], learned: [], last: null, chosen: null, dirty: false, drawn: 0, restUntil: 0 };
const $ = (id) => document.getElementById(id);

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

// --- receiving --------------------------------------------------------------------------------------------------------

function take(message) {
  if (message.fresh) { state.tasks.clear(); state.lines = []; }
  if (message.learned !== null) state.learned = message.learned;
  state.last = message;
  for (const task of message.tasks) {
    state.tasks.delete(task.task_id);
    state.tasks.set(task.task_id, task);
  }
  for (const [id, task] of state.tasks) {
    if (state.tasks.size <= KEPT_TASKS) break;
    if (ENDED.has(task.state)) state.tasks.delete(id);
  }
  state.lines.push(...message.lines);
  state.lines.splice(0, state.lines.length - KEPT_LINES);
  if (!state.dirty) {
    state.dirty = true;
    setTimeout(() => requestAnimationFrame(drawMeasured), Math.max(0, state.restUntil - performance.now()));
  }
}

function connect() {
  const source = new EventSource("events");
  source.onmessage = (event) => take(JSON.parse(event.data));
  source.onerror = () => { // the browser reconnects automatically
    $("planner").textContent = "connection lost, reconnecting";
    $("planner").className = "lost";
  };
}

// --- drawing ----------------------------------------------------------------------------------------------------------

function drawMeasured() {
  const began = performance.now();
  draw();
  setTimeout(() => { // after the browser has laid out and painted
    const ended = performance.now();
    state.slowest = Math.max(state.slowest || 0, ended - began);
    state.restUntil = ended + REST * (ended - began);
  });
}

function draw() {
  state.dirty = false;
  const now = state.last;
  drawHeader(now);
  drawTopology(now);
  drawWaiting(now);
  drawTasks(now);
  drawLearned(now);
  drawLines();
  state.drawn += 1;
  document.body.dataset.version = String(now.version);
  document.body.dataset.drawn = String(state.drawn);
}

function drawHeader(now) {
  $("planner").textContent = now.texts.planner;
  $("planner").className = now.planner.standing === "led" && now.planner.silent_s === null ? "" : "lost";
  $("numbers").replaceChildren(...now.texts.numbers.map(([name, value]) => {
    const pair = make("div");
    pair.dataset.name = name;
    pair.append(make("dt", "", name), make("dd", "", value));
    return pair;
  }));
}

function filled(link, className, texts) {
  const box = make("div", `${className}-cell`);
  const bar = make("div", "bar");
  for (const [task, bps] of Object.entries(link.grants)) {
    const part = make("span", className);
    part.style.width = `${Math.min(100, 100 * bps / Math.max(1, link.capacity_bps))}%`;
    part.title = `${task}: ${texts[className + "_grants"][task]}`;
    bar.append(part);
  }
  box.append(bar, make("div", "amount", texts[className]));
  return box;
}

function drawTopology(now) {
  const rows = [];
  const head = make("div", "tier head");
  for (const text of ["devices", "link 1", "edge", "link 2", "cloud"]) head.append(make("div", "", text));
  rows.push(head);
  const of = (role) => now.nodes.filter((node) => node.role === role);
  const clouds = of("cloud"), devices = of("device");
  const edges = of("edge");
  edges.forEach((edge, index) => {
    const row = make("div", "tier");
    row.dataset.edge = edge.name;
    row.append(make("div", "devices-cell amount", index ? "" : now.texts.devices));
    row.append(filled(edge.link1, "link1", edge.texts));
    const node = make("div", edge.standing === "joined" ? "node-cell node" : "node-cell node away", edge.name);
    const slots = make("span", "slots");
    for (let slot = 0; slot < Math.min(edge.slots, 12); slot++) slots.append(make("i", slot < edge.slot_holders.length ? "held" : ""));
    slots.title = edge.slot_holders.join(", ");
    node.append(slots, make("div", "amount", edge.texts.slots));
    row.append(node, filled(edge.link2, "link2", edge.texts));
    const cloud = make("div", "cloud-cell");
    if (!index) for (const each of clouds) {
      cloud.append(make("div", each.standing === "joined" ? "node" : "node away", each.name));
      cloud.append(make("div", "amount", each.texts.tasks));
    }
    row.append(cloud);
    rows.push(row);
  });
  const chips = make("div", "chips");
  for (const device of devices) {
    const kind = device.standing !== "joined" ? "chip away" : device.tasks.length ? "chip busy" : "chip";
    const chip = make("span", kind, device.tasks.length ? `${device.name}: ${device.texts.tasks}` : device.name);
    chip.title = device.tasks.join(", ");
    chips.append(chip);
  }
  rows.push(chips);
  if (!now.nodes.length) rows.push(make("p", "amount", "No node has announced itself yet."));
  $("topology").replaceChildren(...rows);
}

function drawWaiting(now) {
  $("waiting-count").textContent = now.texts.waiting;
  $("waiting").replaceChildren(...now.waiting.map((task) => {
    const item = make("li");
    item.dataset.task = task.task_id;
    item.append(make("b", "", task.task_id), ` ${task.text}`);
    return item;
  }));
}

function shares(parts, className, texts) {
  const box = make("div", className);
  let total = 0;
  for (const station of STATIONS) total += parts[station + "_s"];
  for (const station of STATIONS) {
    const part = parts[station + "_s"];
    if (part <= 0 || total <= 0) continue;
    const span = make("span", station);
    span.style.width = `${100 * part / total}%`;
    span.title = `${NAMES[station] || station} ${texts[station]}`;
    box.append(span);
  }
  return box;
}

// Tasks of the chosen time window, which ends at the latest end or start; newest first.
function shownTasks(now) {
  const window_s = Number($("window").value) || Infinity;
  const all = [...state.tasks.values()];
  const until = all.reduce((latest, task) => Math.max(latest, ENDED.has(task.state) ? task.end_s : now.now_s), 0);
  return all.filter((task) => !ENDED.has(task.state) || task.end_s > until - window_s)
    .sort((a, b) => b.admitted_s - a.admitted_s).slice(0, SHOWN_TASKS);
}

// Start and length of the time axis: from the first admission to the latest planned or measured end, or to now if a task runs.
function timeSpan(shown, now) {
  let from = Infinity, to = -Infinity;
  for (const task of shown) {
    const start = task.start_s ?? task.admitted_s;
    from = Math.min(from, task.admitted_s);
    to = Math.max(to, start + (task.predicted_delay_s ?? 0), start + (task.delay_s ?? 0), task.end_s ?? now.now_s);
    if (!ENDED.has(task.state)) to = Math.max(to, now.now_s);
  }
  return [from, Math.max(to - from, LEAST_SPAN_S)];
}

// Ticks at multiples of 1, 2 or 5 times a power of ten, with as many decimals as needed to distinguish them.
function ticks(from, span, most) {
  const power = 10 ** Math.floor(Math.log10(span / most));
  const step = [1, 2, 5, 10].map((times) => times * power).find((each) => span / each <= most);
  const decimals = Math.max(0, -Math.floor(Math.log10(step * 1.0000001)));
  const found = [];
  for (let number = Math.ceil(from / step); number * step <= from + span; number++)
    found.push([number * step, (number * step).toFixed(decimals) + " s"]);
  return found;
}

function drawAxis(from, span) {
  const axis = $("axis");
  const most = Math.max(2, Math.floor(axis.clientWidth / TICK_PIXELS));
  axis.replaceChildren(...ticks(from, span, most).map(([at, text]) => {
    const tick = make("span", "", text);
    const share = (at - from) / span;
    tick.style.left = `${100 * share}%`;
    tick.style.transform = `translateX(${-100 * share}%)`; // keeps the first and last label inside the axis
    return tick;
  }));
}

function drawTasks(now) {
  const shown = shownTasks(now);
  const [from, span] = timeSpan(shown, now);
  const place = (element, begin, length) => {
    element.style.left = `${100 * (begin - from) / span}%`;
    element.style.width = `max(2px, ${100 * length / span}%)`;
    return element;
  };
  $("timeline").replaceChildren(...shown.map((task) => {
    const row = make("button", task.task_id === state.chosen ? "task chosen" : "task");
    row.type = "button";
    row.dataset.task = task.task_id;
    row.dataset.state = task.state;
    const name = make("div", "name");
    const label = make("span");
    label.append(make("bdi", "", task.task_id));
    const end = make("em", BAD.has(task.state) ? "bad" : "", task.texts.end);
    name.append(label, make("small", "", task.texts.error), end);
    const lane = make("div", "lane");
    const start = task.start_s ?? Math.max(now.now_s, task.admitted_s);
    if (start > task.admitted_s) lane.append(place(make("div", "wait"), task.admitted_s, start - task.admitted_s));
    if (task.predicted) lane.append(place(shares(task.predicted, "plan", task.texts.predicted), start, task.predicted_delay_s));
    if (task.measured && task.delay_s !== null) lane.append(place(shares(task.measured, "real", task.texts.measured), start, task.delay_s));
    row.title = task.texts.title;
    row.append(name, lane);
    row.addEventListener("click", () => { state.chosen = state.chosen === task.task_id ? null : task.task_id; draw(); });
    return row;
  }));
  if (shown.length) drawAxis(from, span);
  else $("axis").replaceChildren();
  drawDetail(state.tasks.get(state.chosen));
}

function drawDetail(task) {
  const table = $("detail");
  table.hidden = !task;
  if (!task) return;
  table.caption.textContent = `${task.task_id}: ${task.texts.title}`;
  const row = (tag, cells) => {
    const line = make("tr");
    cells.forEach((cell, index) => line.append(make(index ? tag : "th", "", cell)));
    return line;
  };
  const names = STATIONS.map((station) => NAMES[station] || station);
  const of = (texts) => [...STATIONS, "rest", "delay"].map((name) => texts[name]);
  table.tHead.replaceChildren(row("th", ["busy", ...names, "latency and overheads", "delay"]));
  table.tBodies[0].replaceChildren(
    row("td", ["predicted", ...of(task.texts.predicted)]),
    row("td", ["measured", ...of(task.texts.measured)]));
}

function drawLearned(now) {
  $("learned-section").hidden = !state.learned.length;
  $("learned-count").textContent = now.texts.learned;
  $("learned").replaceChildren(...state.learned.map((lesson) => {
    const item = make("li");
    item.append(make("b", "", lesson.what), ` ${lesson.text} `, make("span", "details", lesson.source));
    return item;
  }));
}

function drawLines() {
  $("lines").replaceChildren(...state.lines.slice().reverse().map((line) => {
    const item = make("li", BAD.has(line.what) ? "bad" : "");
    item.append(make("time", "", line.at), make("b", "", line.who), ` ${line.what}`);
    if (line.details) item.append(make("span", "details", line.details));
    return item;
  }));
}

$("legend").replaceChildren(...["wait", ...STATIONS].map((station) => {
  const entry = make("span");
  entry.append(make("i", station === "wait" ? "i-wait" : station), station === "wait" ? "waits" : NAMES[station] || station);
  return entry;
}));
$("window").addEventListener("change", () => { if (state.last) draw(); });
connect();
