"use strict";
// Draws what /events sends. Whatever comes from topics becomes text nodes only, never markup. Messages are folded as they
// come and drawn at most once a frame, so a burst of thousands of events costs one drawing.

const STATIONS = ["device", "link1", "edge", "link2", "cloud", "result"];
const NAMES = { link1: "link 1", link2: "link 2", result: "results" };
const SHOWN_TASKS = 100, KEPT_TASKS = 560, KEPT_LINES = 80;
const REST = 3; // a page that takes long to draw rests so many times as long before it draws again, so that it stays usable
const ENDED = new Set(["COMPLETED", "REJECTED", "FAILED", "EXPIRED"]);
const BAD = new Set(["REJECTED", "FAILED", "EXPIRED", "lost", "failed", "planned again"]);

const state = { tasks: new Map(), lines: [], last: null, chosen: null, dirty: false, drawn: 0, restUntil: 0 };
const $ = (id) => document.getElementById(id);

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function seconds(value) {
  if (value === null || value === undefined) return "-";
  if (value === 0) return "0";
  if (value < 1) return (value * 1000).toPrecision(3).replace(/\.?0+$/, "") + " ms";
  return value < 100 ? value.toPrecision(3) + " s" : value.toFixed(0) + " s";
}

function rate(bps) {
  for (const [scale, unit] of [[1e9, "Gbps"], [1e6, "Mbps"], [1e3, "kbps"]])
    if (bps >= scale) return Number((bps / scale).toPrecision(3)) + " " + unit;
  return bps + " bps";
}

// --- receiving --------------------------------------------------------------------------------------------------------

function take(message) {
  if (message.fresh) { state.tasks.clear(); state.lines = []; }
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
  source.onerror = () => { // the browser connects again by itself
    $("planner").textContent = "connection lost, trying again";
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
  drawLines();
  state.drawn += 1;
  document.body.dataset.version = String(now.version);
  document.body.dataset.drawn = String(state.drawn);
}

function drawHeader(now) {
  const planner = now.planner;
  $("planner").textContent = planner.standing === "led"
    ? `region ${now.region}, led by ${planner.name}, epoch ${planner.epoch}` : `region ${now.region}: planner ${planner.standing}`;
  $("planner").className = planner.standing === "led" ? "" : "lost";
  const entries = [["time", now.now_s.toFixed(1) + " s"], ["decisions", planner.decisions]];
  for (const [name, count] of Object.entries(now.counts)) if (count) entries.push([name.toLowerCase(), count]);
  for (const name of ["mean", "p50", "p90", "p99"]) if (now.delay_s[name] !== null) entries.push([name + " delay", seconds(now.delay_s[name])]);
  $("numbers").replaceChildren(...entries.map(([name, value]) => {
    const pair = make("div");
    pair.dataset.name = name;
    pair.append(make("dt", "", name), make("dd", "", String(value)));
    return pair;
  }));
}

function filled(link, className) {
  const box = make("div");
  const bar = make("div", "bar");
  for (const [task, bps] of Object.entries(link.grants)) {
    const part = make("span", className);
    part.style.width = `${Math.min(100, 100 * bps / Math.max(1, link.capacity_bps))}%`;
    part.title = `${task}: ${rate(bps)}`;
    bar.append(part);
  }
  box.append(bar, make("div", "amount", `${link.granted_bps ? rate(link.granted_bps) : "0"} of ${rate(link.capacity_bps)}`));
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
    row.append(make("div", "amount", index ? "" : `${devices.length} in the region`));
    row.append(filled(edge.link1, "link1"));
    const node = make("div", edge.standing === "joined" ? "node" : "node away", edge.name);
    const slots = make("span", "slots");
    for (let slot = 0; slot < Math.min(edge.slots, 12); slot++) slots.append(make("i", slot < edge.slot_holders.length ? "held" : ""));
    slots.title = edge.slot_holders.join(", ");
    node.append(slots, make("div", "amount", `${edge.slot_holders.length} of ${edge.slots} slots`));
    row.append(node, filled(edge.link2, "link2"));
    const cloud = make("div");
    if (!index) for (const each of clouds) {
      cloud.append(make("div", each.standing === "joined" ? "node" : "node away", each.name));
      cloud.append(make("div", "amount", `${each.tasks.length} tasks`));
    }
    row.append(cloud);
    rows.push(row);
  });
  const chips = make("div", "chips");
  for (const device of devices) {
    const kind = device.standing !== "joined" ? "chip away" : device.tasks.length ? "chip busy" : "chip";
    const chip = make("span", kind, device.tasks.length ? `${device.name} ${device.tasks.length}` : device.name);
    chip.title = device.tasks.join(", ");
    chips.append(chip);
  }
  rows.push(chips);
  if (!now.nodes.length) rows.push(make("p", "amount", "No node has announced itself yet."));
  $("topology").replaceChildren(...rows);
}

function drawWaiting(now) {
  const total = now.waiting.length + now.waiting_more;
  $("waiting-count").textContent = total ? `${total} tasks, and what they wait for` : "nobody";
  $("waiting").replaceChildren(...now.waiting.map((task) => {
    const item = make("li");
    item.dataset.task = task.task_id;
    item.append(make("b", "", task.task_id), ` for ${task.for}`);
    if (task.start_s !== null) item.append(make("span", "amount", `, starts at ${task.start_s.toFixed(1)} s`));
    return item;
  }));
}

function shares(parts, className) {
  const box = make("div", className);
  let total = 0;
  for (const station of STATIONS) total += parts[station + "_s"];
  for (const station of STATIONS) {
    const part = parts[station + "_s"];
    if (part <= 0 || total <= 0) continue;
    const span = make("span", station);
    span.style.width = `${100 * part / total}%`;
    span.title = `${NAMES[station] || station} ${seconds(part)}`;
    box.append(span);
  }
  return box;
}

// The tasks of the last so many seconds before the latest end or start; the newest first.
function shownTasks(now) {
  const window_s = Number($("window").value) || Infinity;
  const all = [...state.tasks.values()];
  const until = all.reduce((latest, task) => Math.max(latest, ENDED.has(task.state) ? task.end_s : now.now_s), 0);
  return all.filter((task) => !ENDED.has(task.state) || task.end_s > until - window_s)
    .sort((a, b) => b.admitted_s - a.admitted_s).slice(0, SHOWN_TASKS);
}

function drawTasks(now) {
  const shown = shownTasks(now);
  let from = Infinity, to = -Infinity;
  for (const task of shown) {
    from = Math.min(from, task.admitted_s);
    const start = task.start_s ?? task.admitted_s;
    to = Math.max(to, start + (task.predicted_delay_s ?? 0), start + (task.delay_s ?? 0), task.end_s ?? start);
  }
  const span = Math.max(to - from, 0.001);
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
    name.append(label, make("em", BAD.has(task.state) ? "bad" : "", task.delay_s !== null ? seconds(task.delay_s) : task.state.toLowerCase()));
    const lane = make("div", "lane");
    const start = task.start_s ?? Math.max(now.now_s, task.admitted_s);
    if (start > task.admitted_s) lane.append(place(make("div", "wait"), task.admitted_s, start - task.admitted_s));
    if (task.predicted) lane.append(place(shares(task.predicted, "plan"), start, task.predicted_delay_s));
    if (task.measured && task.delay_s !== null) lane.append(place(shares(task.measured, "real"), start, task.delay_s));
    row.title = `${task.samples} x ${task.model} from ${task.device}: ${task.kind || task.cause || "not placed"}${task.edge ? " via " + task.edge : ""}`;
    row.append(name, lane);
    row.addEventListener("click", () => { state.chosen = state.chosen === task.task_id ? null : task.task_id; draw(); });
    return row;
  }));
  const ticks = [];
  for (let tick = 0; shown.length && tick <= 6; tick++) ticks.push(make("span", "", (from + span * tick / 6).toFixed(span < 10 ? 2 : 0) + " s"));
  $("axis").replaceChildren(...ticks);
  drawDetail(state.tasks.get(state.chosen));
}

function drawDetail(task) {
  const table = $("detail");
  table.hidden = !task;
  if (!task) return;
  const cut = task.edge ? `, cut after ${task.cut1} and ${task.cut2}, ${rate(task.link1_bps)} and ${rate(task.link2_bps)}` : "";
  table.caption.textContent = `${task.task_id}: ${task.kind || task.cause || "not placed"}${task.edge ? " via " + task.edge : ""}${cut}`;
  const row = (tag, cells) => {
    const line = make("tr");
    cells.forEach((cell, index) => line.append(make(index ? tag : "th", "", cell)));
    return line;
  };
  const names = STATIONS.map((station) => NAMES[station] || station);
  const of = (parts) => STATIONS.map((station) => parts ? seconds(parts[station + "_s"]) : "-");
  table.tHead.replaceChildren(row("th", ["busy", ...names, "delay"]));
  table.tBodies[0].replaceChildren(
    row("td", ["predicted", ...of(task.predicted), seconds(task.predicted_delay_s)]),
    row("td", ["measured", ...of(task.measured), seconds(task.delay_s)]));
}

function drawLines() {
  $("lines").replaceChildren(...state.lines.slice().reverse().map((line) => {
    const item = make("li", BAD.has(line.what) ? "bad" : "");
    item.append(make("time", "", line.at_s.toFixed(2) + " s"), make("b", "", line.who), ` ${line.what} ${line.details}`);
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
