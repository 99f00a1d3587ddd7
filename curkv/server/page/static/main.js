// The playground: what is asked, twice, and what the page shows of it.

import { get, post, setKey } from "./api.js";
import * as heatmap from "./heatmap.js";
import * as live from "./live.js";
import { Pane } from "./pane.js";
import { SAMPLES } from "./samples.js";

const $ = (id) => document.getElementById(id);
const sides = [...document.querySelectorAll(".side")];
const panes = ["a", "b"].map((side) => new Pane(side));
let policies = new Map(); // name -> description
let controller = null;
let known = new Set(); // sequences that ran before the panes' own

$("panes").append(...panes.map((pane) => pane.element));

// Text and question

function fill(sample) {
  $("document").value = sample.text;
  $("question").value = sample.question;
  measure();
}

function measure() {
  const words = $("document").value.split(/\s+/).filter(Boolean).length;
  $("words").textContent = `${words.toLocaleString("en")} words, about ${(Math.round(words * 0.132) * 10).toLocaleString("en")} tokens`;
}

$("sample").append(...SAMPLES.map(({ name }, i) => new Option(name, i)));
$("sample").addEventListener("change", () => fill(SAMPLES[$("sample").value]));
$("document").addEventListener("input", () => { $("sample").value = SAMPLES.length - 1; measure(); });

// Controls of a side

const field = (side, name) => side.querySelector(`.${name}`);

function controls(side) {
  const kv = { policy: field(side, "policy").value };
  if (kv.policy !== "full") {
    kv.budget = field(side, "budget").value.trim() || "25%";
    if (field(side, "decode").value.trim()) kv.decode_budget = field(side, "decode").value.trim();
    if ($("protect").value.trim()) kv.protect = $("protect").value.trim();
  }
  return kv;
}

const HEADERS = { policy: "X-KV-Policy", budget: "X-KV-Budget", decode_budget: "X-KV-Decode-Budget", protect: "X-KV-Protect" };

function title(kv) {
  return kv.budget ? `${kv.policy} ${kv.budget.replace("%", " %")}` : kv.policy;
}

function prompt() {
  const text = $("document").value, question = $("question").value.trim();
  if ($("format").value === "plain") return { prompt: question ? `${text}\n\nQuestion: ${question}\nAnswer:` : text };
  if (!question) return { messages: [{ role: "user", content: text }] };
  if (!$("boundary").checked) return { messages: [{ role: "user", content: `${text}\n\n${question}` }] };
  const content = [{ type: "text", text: `${text}\n\n`, cache_control: { type: "ephemeral" } }, { type: "text", text: question }];
  return { messages: [{ role: "user", content }] };
}

function prepare() {
  const plain = $("format").value === "plain";
  panes.forEach((pane, i) => {
    const kv = controls(sides[i]);
    pane.prepare({
      path: plain ? "/v1/completions" : "/v1/chat/completions",
      body: {
        ...prompt(),
        max_tokens: Number($("max-tokens").value),
        temperature: Number($("temperature").value),
        stream: true,
        stream_options: { include_usage: true },
      },
      headers: Object.fromEntries(Object.entries(kv).map(([name, value]) => [HEADERS[name], value])),
      title: `${"AB"[i]}  ${title(kv)}`,
      policy: kv.policy,
    });
  });
  for (const side of sides)
    for (const name of ["budget", "decode"]) field(side, name).disabled = field(side, "policy").value === "full";
  $("boundary").disabled = plain;
  const named = [...new Set(sides.map((side) => field(side, "policy").value))];
  $("policy-hint").textContent = named.map((name) => `${name}: ${policies.get(name) ?? ""}.`).join(" ");
}

// Running

async function run() {
  controller?.abort();
  const mine = (controller = new AbortController());
  problem("");
  prepare();
  busy(true);
  try {
    const state = await get("/v1/kv/state");
    known = new Set(state.sequences.map((s) => s.request_id));
    heatmap.waiting("The map follows when both answers are there.");
    if ($("order").value === "together") await Promise.all(panes.map((pane) => pane.run(mine.signal)));
    else for (const pane of panes) if (!mine.signal.aborted) await pane.run(mine.signal);
    if (mine.signal.aborted) heatmap.waiting("Stopped.");
    else await explain(mine.signal);
  } catch (error) {
    if (!mine.signal.aborted) problem(error.message);
  } finally {
    if (controller === mine) busy(false);
  }
}

async function explain(signal) {
  heatmap.waiting("Asking what each head keeps …");
  const chosen = sides.map(controls);
  const answer = await post("/v1/kv/explain", { ...prompt(), policies: chosen }, signal);
  heatmap.show(answer, chosen.map((kv, i) => `${"AB"[i]}  ${title(kv)}`));
}

function busy(on) {
  live.hurry(on);
  $("stop").disabled = !on;
  $("run").disabled = on;
}

function problem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

live.onState((state) => {
  const mine = new Set();
  for (const pane of panes) {
    if (!pane.active) continue;
    const sequence = state.sequences.find((s) => !mine.has(s.request_id) && pane.owns(s, known));
    if (!sequence) continue;
    mine.add(sequence.request_id);
    pane.hold(sequence);
  }
  const scale = Math.max(...panes.map((pane) => pane.peak));
  for (const pane of panes) pane.showMemory(scale);
});

$("setup").addEventListener("submit", (event) => { event.preventDefault(); run(); });
$("setup").addEventListener("input", prepare);
$("key").addEventListener("input", () => setKey($("key").value));
$("stop").addEventListener("click", () => controller?.abort());
addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run();
  if (event.key === "Escape") controller?.abort();
});

// Colours

const THEMES = { auto: ["◐ Auto", "as the system"], light: ["○ Light", "light"], dark: ["● Dark", "dark"] };

function theme(name) {
  const [label, words] = THEMES[name];
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  $("theme").textContent = label;
  $("theme").setAttribute("aria-label", `Colours: ${words}`);
  localStorage.setItem("theme", name);
  heatmap.paintMaps();
}

$("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  theme(names[(names.indexOf(localStorage.getItem("theme") ?? "auto") + 1) % names.length]);
});

// Start

async function start() {
  theme(localStorage.getItem("theme") ?? "auto");
  heatmap.start();
  live.start();
  fill(SAMPLES[0]);
  const { data } = await get("/v1/kv/policies");
  policies = new Map(data.map(({ name, description }) => [name, description]));
  sides.forEach((side, i) => {
    field(side, "policy").append(...[...policies.keys()].map((name) => new Option(name)));
    field(side, "policy").value = ["full", "snapcur"][i];
    field(side, "budget").value = "25%";
  });
  prepare();
}

start().catch((error) => problem(error.message));
