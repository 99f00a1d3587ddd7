// The state of the server: polled, shown, and passed on to whoever listens.

import { get } from "./api.js";
import { draw } from "./chart.js";
import { bytes, count, percent } from "./format.js";

const WINDOW = 120; // seconds of history
const SLOW = 1000, FAST = 250; // milliseconds between polls
const PHASES = { ready: "ok", loading: "wait", draining: "wait", stopped: "bad", dead: "bad" };

const $ = (id) => document.getElementById(id);
const history = []; // [{time, used, held: Map policy -> bytes}]
const listeners = [];
const hues = new Map([["full", 262]]); // policy -> degrees
let fast = false, timer = 0;

export const onState = (listener) => listeners.push(listener);

// Polls faster while something of this page runs.
export function hurry(on) {
  fast = on;
  if (on) poll();
}

export function start() {
  document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(); });
  poll();
}

async function poll() {
  clearTimeout(timer);
  if (document.hidden) return;
  try {
    const state = await get("/v1/kv/state");
    state.time = performance.now() / 1000;
    remember(state);
    show(state);
    listeners.forEach((listener) => listener(state));
  } catch (error) {
    phase("bad", error.status ? `refused (${error.status})` : "no answer");
  }
  clearTimeout(timer);
  timer = setTimeout(poll, fast ? FAST : SLOW);
}

function phase(kind, text) {
  $("phase-dot").className = `dot ${kind}`;
  $("phase").textContent = text;
}

function remember({ time, used_bytes, sequences }) {
  const held = new Map();
  for (const s of sequences) held.set(s.policy, (held.get(s.policy) ?? 0) + s.held_bytes);
  history.push({ time, used: used_bytes, held });
  while (history[0].time < time - WINDOW) history.shift();
}

function show(state) {
  phase(PHASES[state.phase], state.phase);
  $("model").textContent = state.model;
  $("used").textContent = bytes(state.used_bytes);
  $("capacity").textContent = bytes(state.capacity_bytes);
  $("running").textContent = count(state.running);
  $("waiting").textContent = count(state.waiting);
  $("stranded").textContent = percent(state.stranded_slots_ratio);
  showPool(state);
  showHistory(state.time);
  $("sequences").replaceChildren(...(state.sequences.length ? state.sequences.map(row) : [idle(state)]));
}

function showPool({ sequences, used_bytes, capacity_bytes }) {
  const pool = $("pool");
  pool.setAttribute("aria-label", `${percent(used_bytes / (capacity_bytes || 1))} of the page pool in use`);
  pool.replaceChildren(...sequences.map((s) => {
    const part = document.createElement("i");
    part.style.width = `${(s.held_bytes / (capacity_bytes || 1)) * 100}%`;
    part.dataset.name = s.policy;
    colour(part, s.policy);
    return part;
  }));
}

function showHistory(now) {
  const policies = [...new Set(history.flatMap(({ held }) => [...held.keys()]))].sort();
  const top = Math.max(...history.map(({ used }) => used), 1);
  const series = policies.map((name) => ({ name, values: history.map(({ held }) => held.get(name) ?? 0) }));
  draw($("history"), series, history.map(({ time }) => time), { from: now - WINDOW, to: now, top, stacked: true });
  for (const path of $("history").children) colour(path, path.dataset.name);
  $("history-top").textContent = top > 1 ? `top: ${bytes(top)}` : "";
}

// A hue for each policy, far from those before it.
function colour(element, policy) {
  if (!hues.has(policy)) hues.set(policy, (262 + hues.size * 150) % 360);
  element.style.setProperty("--hue", hues.get(policy));
}

function idle({ phase, waiting }) {
  const text = phase !== "ready" ? `The server is ${phase}.` : waiting ? "Sequences wait for memory." : "Nothing runs: every page is free.";
  const tr = document.createElement("tr");
  const td = tr.insertCell();
  td.colSpan = 5;
  td.className = "muted";
  td.textContent = text;
  return tr;
}

function row(s) {
  const tr = document.createElement("tr");
  const prefilling = s.computed_tokens < s.prompt_tokens;
  const progress = prefilling
    ? `prompt ${percent(s.computed_tokens / s.prompt_tokens)} of ${count(s.prompt_tokens)}`
    : `${count(s.generation_tokens)} generated`;
  const id = s.request_id.replace(/^[a-z]+-/, "").slice(0, 8);
  for (const text of [id, s.policy, progress, count(s.held_tokens), bytes(s.held_bytes)]) tr.insertCell().textContent = text;
  tr.cells[3].className = "wide";
  const swatch = document.createElement("i");
  swatch.className = "swatch";
  colour(swatch, s.policy);
  tr.cells[1].prepend(swatch);
  return tr;
}
