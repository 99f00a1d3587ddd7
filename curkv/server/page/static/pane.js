// One answer: streamed text, what its cache holds from moment to moment, and the numbers at the end.

import { curl, stream } from "./api.js";
import { bytes, count, percent, seconds } from "./format.js";

export class Pane {
  constructor(side) {
    this.side = side;
    this.element = document.getElementById("pane-template").content.firstElementChild.cloneNode(true);
    this.element.classList.add(side);
    this.part = (name) => this.element.querySelector(name);
    this.part(".curl").addEventListener("click", () => this.copy());
    this.part("h2").textContent = side.toUpperCase();
    this.peak = 0;
  }

  // What the next run will ask for; shown at once and copied as curl.
  prepare({ path, body, headers, title, policy }) {
    Object.assign(this, { path, body, headers, policy });
    this.part("h2").textContent = title;
  }

  async copy() {
    const button = this.part(".curl");
    try {
      await navigator.clipboard.writeText(curl(this.path, this.body, this.headers));
      button.textContent = "Copied";
    } catch {
      button.textContent = "No clipboard here";
    }
    setTimeout(() => { button.textContent = "Copy as curl"; }, 1500);
  }

  // Takes away all that an earlier run has left.
  clear() {
    Object.assign(this, { id: null, tokens: 0, peak: 0, held: 0 });
    this.part(".answer").textContent = "";
    this.part(".answer").classList.remove("failed");
    for (const name of ["ttft", "rate", "kept", "peak-text", "held-text"]) this.part(`.${name}`).textContent = "–";
    this.part(".freed-text").textContent = "KV cache held";
    this.part(".kept").title = "";
    this.showMemory(1);
  }

  // Raises what the server refuses, or an AbortError.
  async run(signal) {
    this.clear();
    Object.assign(this, { active: true, ran: true, started: performance.now() });
    this.element.classList.add("busy");
    const answer = this.part(".answer");
    try {
      for await (const chunk of stream(this.path, this.body, this.headers, signal)) this.take(chunk, answer);
    } finally {
      this.active = false;
      this.element.classList.remove("busy");
    }
  }

  stopped() {
    this.part(".answer").append(" (stopped)");
  }

  fail(text) {
    this.part(".answer").classList.add("failed");
    this.part(".answer").append(text);
  }

  take(chunk, answer) {
    this.id = chunk.id;
    const [choice] = chunk.choices;
    const text = choice?.text ?? choice?.delta?.content;
    if (text) {
      const now = performance.now();
      if (!this.tokens) {
        this.first = now;
        this.part(".ttft").textContent = seconds((now - this.started) / 1000);
      }
      this.tokens += 1;
      this.last = now;
      answer.append(text);
      answer.scrollTop = answer.scrollHeight;
      this.showRate(this.tokens);
    }
    if (chunk.usage) {
      this.showRate(chunk.usage.completion_tokens);
      this.finish(chunk.usage);
    }
  }

  showRate(tokens) {
    const elapsed = (this.last - this.first) / 1000;
    if (tokens > 1 && elapsed > 0) this.part(".rate").textContent = ((tokens - 1) / elapsed).toFixed(1);
  }

  finish({ prompt_tokens: prompt, kv }) {
    this.peak = Math.max(this.peak, kv.peak_bytes);
    this.held = kv.bytes;
    this.part(".kept").textContent = percent(kv.kept_ratio);
    this.part(".kept").title = `${count(kv.kept_tokens)} of ${count(prompt)} tokens per head`;
  }

  // Whether a running sequence is this pane's; before the first token only its policy is known, unless that is chosen for it.
  owns(sequence, known) {
    if (this.id) return sequence.request_id.startsWith(this.id);
    return [sequence.policy, "auto"].includes(this.policy) && !known.has(sequence.request_id);
  }

  hold(sequence) {
    this.held = sequence.held_bytes;
    this.peak = Math.max(this.peak, sequence.peak_bytes, sequence.held_bytes);
  }

  // Draws the memory bar; `scale` is the most that either pane has held.
  showMemory(scale) {
    const width = (n) => `${(n / (scale || 1)) * 100}%`;
    this.part(".held").style.width = width(this.held);
    this.part(".peak").style.width = width(this.peak);
    if (!this.peak) return;
    const freed = this.peak - this.held;
    this.part(".peak-text").textContent = bytes(this.peak);
    this.part(".held-text").textContent = bytes(this.held);
    this.part(".freed-text").textContent = freed > 0 ? `held, ${bytes(freed)} given back` : "held";
  }
}
