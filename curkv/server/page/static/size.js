// How long the prompt is: counted by the server, in the model's own tokens.

import { post } from "./api.js";
import { count } from "./format.js";
import { words } from "./words.js";

const PAUSE = 300; // milliseconds without a key before the server is asked

const line = document.getElementById("size");
let timer = 0, asked = 0;

// Counts once nobody has typed for a moment; `prompt` gives what /tokenize takes, or null if there is nothing.
export function measureSoon(prompt, answer) {
  clearTimeout(timer);
  timer = setTimeout(() => measure(prompt(), answer()), PAUSE);
}

// Shows the size, and returns why the prompt cannot be sent: "" if it can.
export async function measure(prompt, answer, signal) {
  clearTimeout(timer);
  const mine = (asked += 1);
  const [text, problem] = await judge(prompt, answer, signal);
  if (mine === asked) {
    line.textContent = text;
    line.classList.toggle("over", Boolean(text && problem));
  }
  return problem;
}

// The line to show and the problem, each "" if there is none.
async function judge(prompt, answer, signal) {
  if (!prompt) return ["", "Write or paste a text, or choose one above."];
  try {
    const { count: tokens, max_model_len: limit } = await post("/tokenize", prompt, signal);
    const shown = `${count(tokens)} tokens of ${count(limit)}`;
    if (tokens + answer <= limit) return [shown, ""];
    const over = tokens + answer - limit;
    return [shown, `The text is ${count(over)} tokens too long: the model reads ${count(limit)}, ${count(answer)} of them for the answer.`];
  } catch (error) {
    if (error.name === "AbortError") throw error;
    return [error.status === 400 ? "too long" : "", words(error)];
  }
}
