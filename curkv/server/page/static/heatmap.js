// Which tokens of a prompt each head keeps: a map (layers x tokens) and the text itself.

import { bytes, count, percent } from "./format.js";

const $ = (id) => document.getElementById(id);
const SIDES = ["a", "b"];

let answer = null; // of POST /v1/kv/explain
let maps = [];
let cursor = -1;

export function start() {
  $("layer").addEventListener("input", paint);
  $("head").addEventListener("input", paint);
  addEventListener("resize", paintMaps);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paintMaps);
}

// Takes the maps away and says why there are none.
export function clear(text) {
  answer = null;
  maps = [];
  $("maps").replaceChildren();
  $("inspect").textContent = text;
}

// Shows an answer of /v1/kv/explain, one map per policy.
export function show(explanation, titles) {
  answer = explanation;
  cursor = -1;
  maps = answer.policies.map((policy, i) => new TokenMap(policy, SIDES[i], titles[i]));
  $("maps").replaceChildren(...maps.map((map) => map.element));
  $("layer").max = answer.num_layers;
  $("head").replaceChildren(new Option("all", -1), ...Array.from({ length: answer.num_kv_heads }, (_, h) => new Option(h + 1, h)));
  $("inspect").textContent = "Point at a token, or use the arrow keys in the text.";
  paint();
}

function selection() {
  return { layer: $("layer").value - 1, head: Number($("head").value) };
}

function paint() {
  const { layer } = selection();
  $("layer-out").textContent = layer < 0 ? "all" : `${layer + 1} of ${answer?.num_layers ?? "…"}`;
  maps.forEach((map) => map.paint());
  paintMaps();
}

export function paintMaps() {
  maps.forEach((map) => map.paintMap());
}

function inspect(token, scroll) {
  if (!answer || token < 0 || token >= answer.tokens.length) return;
  cursor = token;
  const heads = answer.num_layers * answer.num_kv_heads;
  const parts = maps.map((map) => `${map.side.toUpperCase()} ${count(map.policy.mean[token] * heads)} of ${heads} heads`);
  $("inspect").textContent = `Token ${token} ${JSON.stringify(answer.tokens[token])} is kept by: ${parts.join(" · ")}`;
  for (const map of maps) map.mark(token, scroll);
}

class TokenMap {
  constructor(policy, side, title) {
    this.policy = policy;
    this.side = side;
    this.kept = policy.kept.map((heads) => heads.map((spans) => flags(spans, answer.tokens.length)));
    this.element = $("map-template").content.firstElementChild.cloneNode(true);
    this.element.classList.add(side);
    this.element.querySelector("b").textContent = title;
    this.element.querySelector(".muted").textContent = [
      `${percent(policy.kept_ratio)} kept`,
      `${bytes(policy.bytes_kept)} of ${bytes(policy.bytes_full)}`,
      `attention changes by ${percent(policy.error)}`,
    ].join(" · ");
    this.canvas = this.element.querySelector("canvas");
    this.canvas.setAttribute("aria-label", `Kept tokens of ${title}: layers from top to bottom, tokens from left to right`);
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("click", (event) => this.point(event, true));
    this.text = this.element.querySelector(".tokens");
    this.text.setAttribute("aria-label", `Prompt as kept by ${title}`);
    this.text.append(...answer.tokens.map((piece) => {
      const span = document.createElement("span");
      span.textContent = piece;
      return span;
    }));
    this.text.addEventListener("pointerover", (event) => {
      if (event.target !== this.text) inspect([...this.text.children].indexOf(event.target));
    });
    this.text.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 12, ArrowUp: -12 }[event.key];
      if (!step) return;
      event.preventDefault();
      inspect(Math.min(Math.max(cursor + step, 0), answer.tokens.length - 1), true);
    });
  }

  // Share of the selected heads that keep each token.
  shares({ layer, head }) {
    if (layer < 0 && head < 0) return this.policy.mean;
    const layers = layer < 0 ? this.kept : [this.kept[layer]];
    const chosen = layers.flatMap((heads) => (head < 0 ? heads : [heads[head]]));
    return answer.tokens.map((_, i) => chosen.reduce((sum, kept) => sum + kept[i], 0) / chosen.length);
  }

  paint() {
    const shares = this.shares(selection());
    [...this.text.children].forEach((span, i) => span.style.setProperty("--kept", shares[i].toFixed(3)));
  }

  paintMap() {
    const { canvas, kept } = this;
    const { layer, head } = selection();
    const columns = Math.max(Math.round(canvas.clientWidth * devicePixelRatio), 1), rows = kept.length, tokens = answer.tokens.length;
    canvas.width = columns;
    canvas.height = rows * 3;
    const context = canvas.getContext("2d");
    context.fillStyle = getComputedStyle(canvas).color;
    for (let l = 0; l < rows; l++) {
      const heads = head < 0 ? kept[l] : [kept[l][head]];
      const dimmed = layer >= 0 && layer !== l ? 0.25 : 1;
      for (let c = 0; c < columns; c++) {
        const from = Math.floor((c * tokens) / columns), to = Math.max(Math.floor(((c + 1) * tokens) / columns), from + 1);
        let sum = 0;
        for (const flags of heads) for (let i = from; i < to; i++) sum += flags[i];
        context.globalAlpha = (sum / (heads.length * (to - from))) * dimmed * 0.85;
        context.fillRect(c, l * 3, 1, 3);
      }
    }
  }

  point(event, choose) {
    const box = this.canvas.getBoundingClientRect();
    inspect(Math.floor(((event.clientX - box.left) / box.width) * answer.tokens.length), true);
    if (!choose) return;
    const layer = Math.floor(((event.clientY - box.top) / box.height) * answer.num_layers) + 1;
    $("layer").value = Number($("layer").value) === layer ? 0 : layer;
    paint();
  }

  mark(token, scroll) {
    this.text.querySelector(".here")?.classList.remove("here");
    const span = this.text.children[token];
    span.classList.add("here");
    if (!scroll) return;
    const top = span.offsetTop - this.text.offsetTop;
    if (top < this.text.scrollTop || top > this.text.scrollTop + this.text.clientHeight - 24) this.text.scrollTop = top - 40;
  }
}

function flags(spans, length) {
  const flags = new Uint8Array(length);
  for (const [from, to] of spans) flags.fill(1, from, to);
  return flags;
}
