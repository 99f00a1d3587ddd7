// A conversation over a session: its turns, what each cost, and the memory that is held from turn to turn.

import { get, remove, setKey, stream } from "./api.js";
import { draw } from "./chart.js";
import { bytes, count, seconds } from "./format.js";
import { grow } from "./grow.js";
import { RECOMMENDED, SAMPLES } from "./samples.js";
import * as theme from "./theme.js";
import { words } from "./words.js";

const $ = (id) => document.getElementById(id);
let messages = []; // as the API has them
let turns = []; // [{prompt, cached, ttft, held, whole, forgotten}]
let session = "";
let controller = null;

function anew() {
  if (turns.length && $("session").checked) remove(`/v1/kv/sessions/${session}`).catch(() => {}); // it expires by itself
  session = `page-${Math.random().toString(36).slice(2)}`;
  messages = [];
  turns = [];
  $("turns").replaceChildren();
  problem("");
  showCosts();
}

function headers() {
  const policy = $("policy").value;
  if (policy === "full") return { "X-KV-Policy": policy };
  return {
    "X-KV-Policy": policy,
    "X-KV-Budget": $("budget").value.trim(),
    ...($("session").checked && { "X-KV-Session": session }),
  };
}

function say(text) {
  $("say").value = text;
  grow($("say"));
}

// A turn's two entries: what was said, and where its answer goes.
function entry(kind, text) {
  const item = document.createElement("li");
  item.className = kind;
  item.textContent = text;
  $("turns").append(item);
  item.scrollIntoView({ block: "nearest" });
  return item;
}

async function send() {
  const said = $("say").value.trim();
  if (!said || controller) return;
  problem("");
  const text = messages.length ? "" : $("document").value.trim();
  const asked = [...messages, { role: "user", content: text ? `${text}\n\n${said}` : said }];
  controller = new AbortController();
  busy(true);
  const items = [entry("user", said), entry("assistant", "")];
  try {
    const answer = await listen(asked, items[1]);
    messages = [...asked, { role: "assistant", content: answer }];
    say("");
  } catch (error) {
    for (const item of items) item.remove();
    if (!controller.signal.aborted) problem(words(error));
  } finally {
    controller = null;
    busy(false);
    $("say").focus();
  }
}

// Streams the answer into its entry, notes what it cost, and returns its text.
async function listen(asked, item) {
  const body = {
    messages: asked,
    max_tokens: Number($("max-tokens").value),
    temperature: 0,
    stream: true,
    stream_options: { include_usage: true },
  };
  const started = performance.now();
  let answer = "", ttft = null;
  for await (const { choices, usage } of stream("/v1/chat/completions", body, headers(), controller.signal)) {
    const text = choices[0]?.delta?.content;
    if (text) {
      ttft ??= (performance.now() - started) / 1000;
      answer += text;
      item.textContent = answer;
      item.scrollIntoView({ block: "nearest" });
    }
    if (usage) note(usage, ttft);
  }
  return answer;
}

function note({ prompt_tokens: prompt, completion_tokens: answer, prompt_tokens_details: details, kv }, ttft) {
  const held = Math.max(prompt + answer - kv.evicted_tokens, 1);
  turns.push({
    tokens: prompt + answer,
    computed: prompt - details.cached_tokens,
    ttft,
    forgotten: kv.evicted_tokens,
    held: kv.bytes,
    whole: (kv.bytes * (prompt + answer)) / held,
  });
  showCosts();
}

function showCosts() {
  if (!turns.length) return $("costs").replaceChildren(row(["Nothing was said yet."]));
  $("costs").replaceChildren(...turns.map((turn, i) => row([
    i + 1, count(turn.tokens), count(turn.computed), turn.ttft === null ? "–" : seconds(turn.ttft), count(turn.forgotten), bytes(turn.held),
  ])).reverse());
  const numbers = turns.map((_, i) => i + 1), top = Math.max(...turns.map(({ whole }) => whole));
  const series = ["whole", "held"].map((name) => ({ name, values: turns.map((turn) => turn[name]) }));
  draw($("memory"), series, numbers, { from: 1, to: Math.max(numbers.length, 2), top, stacked: false });
  $("first").textContent = "turn 1";
  $("top").textContent = `top: ${bytes(top)}`;
  $("last").textContent = `turn ${Math.max(numbers.length, 2)}`;
}

function row(texts) {
  const tr = document.createElement("tr");
  for (const text of texts) tr.insertCell().textContent = text;
  if (texts.length === 1) {
    tr.cells[0].colSpan = 6;
    tr.cells[0].className = "muted";
  } else tr.cells[4].className = "wide";
  return tr;
}

function busy(on) {
  $("stop").disabled = !on;
  $("go").disabled = on;
  for (const id of ["document", "policy", "budget", "session"]) $(id).disabled = on || messages.length > 0;
}

function problem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

$("settings").addEventListener("submit", (event) => event.preventDefault());
$("send").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("anew").addEventListener("click", () => { controller?.abort(); anew(); busy(false); });
$("stop").addEventListener("click", () => controller?.abort());
$("say").addEventListener("input", () => grow($("say")));
$("key").addEventListener("input", () => setKey($("key").value));
addEventListener("keydown", (event) => {
  if (event.key === "Escape") controller?.abort();
  if (event.key !== "Enter" || event.target !== $("say") || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});

theme.start();
$("document").value = SAMPLES[0].text;
say(SAMPLES[0].question);
anew();
try {
  const { data } = await get("/v1/kv/policies");
  $("policy").append(...data.map(({ name }) => new Option(name)));
  $("policy").value = RECOMMENDED.policy;
} catch (error) {
  problem(words(error));
}
