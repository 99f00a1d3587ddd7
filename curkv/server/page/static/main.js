// The playground: what is asked, twice, and what the page shows of it.

import { get, post, setKey } from "./api.js";
import { grow } from "./grow.js";
import * as heatmap from "./heatmap.js";
import * as live from "./live.js";
import { Pane } from "./pane.js";
import { NEXT, RECOMMENDED, SAMPLES } from "./samples.js";
import { measure, measureSoon } from "./size.js";
import * as theme from "./theme.js";
import { controlOf, words } from "./words.js";

const $ = (id) => document.getElementById(id);
const sides = [...document.querySelectorAll(".side")];
const panes = ["a", "b"].map((side) => new Pane(side));
let policies = new Map(); // name -> description
let controller = null;
let known = new Set(); // sequences that ran before the panes' own

$("panes").prepend(...panes.map((pane) => pane.element));

// Text and question

function fill(sample) {
  $("document").value = sample.text;
  $("question").value = sample.question;
  changed();
}

// What follows from a text, a question or a format that is not the one before.
function changed() {
  problem("");
  grow($("question"));
  measureSoon(countable, answerTokens);
}

$("sample").append(...SAMPLES.map(({ name }, i) => new Option(name, i)));
$("sample").addEventListener("change", () => fill(SAMPLES[$("sample").value]));
$("document").addEventListener("input", () => { $("sample").value = SAMPLES.length - 1; changed(); });
for (const id of ["question", "max-tokens", "format"]) $(id).addEventListener("input", changed);

// Controls of a side

const field = (side, name) => side.querySelector(`.${name}`);
const answerTokens = () => Number($("max-tokens").value);

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

const compressedFirst = () => $("boundary").checked && $("format").value === "chat";

function prompt() {
  const text = $("document").value, question = $("question").value.trim();
  if ($("format").value === "plain") return { prompt: question ? `${text}\n\nQuestion: ${question}\nAnswer:` : text };
  if (!question || !text.trim()) return { messages: [{ role: "user", content: text.trim() ? text : question }] };
  if (!compressedFirst()) return { messages: [{ role: "user", content: `${text}\n\n${question}` }] };
  const content = [{ type: "text", text: `${text}\n\n`, cache_control: { type: "ephemeral" } }, { type: "text", text: question }];
  return { messages: [{ role: "user", content }] };
}

const countable = () => ($("document").value.trim() || $("question").value.trim() ? prompt() : null);

function prepare() {
  const plain = $("format").value === "plain";
  panes.forEach((pane, i) => {
    const kv = controls(sides[i]);
    pane.prepare({
      path: plain ? "/v1/completions" : "/v1/chat/completions",
      body: {
        ...prompt(),
        max_tokens: answerTokens(),
        temperature: Number($("temperature").value),
        stream: true,
        stream_options: { include_usage: true },
      },
      headers: Object.fromEntries(Object.entries(kv).map(([name, value]) => [HEADERS[name], value])),
      title: `${"AB"[i]}  ${title(kv)}`,
      policy: kv.policy,
    });
  });
}

function showControls() {
  for (const side of sides)
    for (const name of ["budget", "decode"]) field(side, name).disabled = field(side, "policy").value === "full";
  $("boundary").disabled = $("format").value === "plain";
  const named = [...new Set(sides.map((side) => field(side, "policy").value))];
  $("policy-hint").textContent = named.map((name) => `${name}: ${policies.get(name) ?? ""}.`).join(" ");
  if (!panes.some((pane) => pane.ran)) prepare();
}

// Running

async function run() {
  controller?.abort();
  const mine = (controller = new AbortController());
  const { signal } = mine;
  forget();
  busy(true);
  try {
    const refused = await measure(countable(), answerTokens(), signal);
    if (refused) return problem(refused);
    heatmap.clear("The map follows when both answers are there.");
    showAnswers();
    known = new Set((await get("/v1/kv/state")).sequences.map((s) => s.request_id));
    const answered = [];
    if ($("order").value === "together") answered.push(...(await Promise.all(panes.map((_, i) => ask(i, mine)))));
    else for (const i of panes.keys()) answered.push(!signal.aborted && (await ask(i, mine)));
    if (answered.every(Boolean)) {
      offerNext();
      await explain(signal);
    } else heatmap.clear("The map is drawn when both have answered.");
  } catch (error) {
    if (!signal.aborted) problem(words(error));
  } finally {
    if (controller === mine) busy(false);
  }
}

// Takes away what the last run has left: nothing of it belongs to this one.
function forget() {
  problem("");
  prepare();
  $("next").hidden = true;
  heatmap.clear("");
  for (const pane of panes) pane.clear();
}

function showAnswers() {
  const { top, bottom } = $("panes").getBoundingClientRect();
  if (top < 0 || bottom > innerHeight) $("panes").scrollIntoView();
}

// One answer; whether it came. What is wrong with a side is told in its pane, anything else once for both.
async function ask(i, mine) {
  const pane = panes[i];
  try {
    await pane.run(mine.signal);
    showMemories();
    return true;
  } catch (error) {
    if (mine.signal.aborted) pane.stopped();
    else if (controlOf(error) || pane.tokens) {
      pane.fail(words(error));
      if (controlOf(error)) field(sides[i], controlOf(error)).ariaInvalid = "true";
    } else {
      problem(words(error));
      mine.abort();
    }
    return false;
  }
}

async function explain(signal) {
  heatmap.clear("Asking what each head keeps …");
  const chosen = sides.map(controls);
  try {
    const answer = await post("/v1/kv/explain", { ...prompt(), policies: chosen }, signal);
    heatmap.show(answer, chosen.map((kv, i) => `${"AB"[i]}  ${title(kv)}`));
  } catch (error) {
    heatmap.clear(signal.aborted ? "Stopped." : `No map. ${words(error)}`);
  }
}

function busy(on) {
  live.hurry(on);
  $("stop").disabled = !on;
  $("run").disabled = on;
}

function problem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
  if (text) $("problem").scrollIntoView({ block: "nearest" });
  else for (const input of document.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
}

// What to try with a sample once its question is answered, and why it comes out as it does.
function offerNext() {
  const sample = SAMPLES[$("sample").value];
  if (!sample.text || $("question").value !== sample.question || $("format").value !== "chat") return;
  const steps = NEXT.filter((step) => title(controls(sides[1])) !== title(step) || compressedFirst() !== step.boundary);
  $("steps").replaceChildren(...steps.map((step) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = step.name;
    button.addEventListener("click", () => take(step));
    const item = document.createElement("li");
    item.append(button, ` ${step.reason}`);
    return item;
  }));
  $("next").hidden = false;
}

function take({ policy, budget, boundary }) {
  field(sides[1], "policy").value = policy;
  field(sides[1], "budget").value = budget;
  $("boundary").checked = boundary;
  showControls();
  run();
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
  showMemories();
});

// Both bars on one scale: the most that either has held.
function showMemories() {
  const scale = Math.max(...panes.map((pane) => pane.peak));
  for (const pane of panes) pane.showMemory(scale);
}

$("setup").addEventListener("submit", (event) => { event.preventDefault(); run(); });
$("setup").addEventListener("input", ({ target }) => { target.removeAttribute("aria-invalid"); showControls(); });
$("stop").addEventListener("click", () => controller?.abort());
addEventListener("keydown", (event) => {
  const sends = event.ctrlKey || event.metaKey || (event.target === $("question") && !event.shiftKey);
  if (event.key === "Enter" && sends && !event.isComposing) {
    event.preventDefault();
    run();
  }
  if (event.key === "Escape") controller?.abort();
});

// Start

async function start() {
  theme.start(heatmap.paintMaps);
  heatmap.start();
  live.start();
  fill(SAMPLES[0]);
  await loadPolicies();
}

async function loadPolicies() {
  const { data } = await get("/v1/kv/policies");
  policies = new Map(data.map(({ name, description }) => [name, description]));
  sides.forEach((side, i) => {
    field(side, "policy").replaceChildren(...[...policies.keys()].map((name) => new Option(name)));
    field(side, "policy").value = ["full", RECOMMENDED.policy][i];
    field(side, "budget").value = RECOMMENDED.budget;
  });
  showControls();
}

$("key").addEventListener("change", () => {
  setKey($("key").value);
  problem("");
  changed();
  if (!policies.size) loadPolicies().catch((error) => problem(words(error)));
});

start().catch((error) => problem(words(error)));
