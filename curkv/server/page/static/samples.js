// Texts to try: the log of a harbour with one fact in it, in three lengths, and what to try with them. What is said of
// them in samples.json is held against the default model by tests/server/test_samples.py.

import { get } from "./api.js";

const { days, question, samples, recommended, next } = await get("/page/samples.json");

export const SAMPLES = [
  ...samples.map(({ name, days: n }) => ({ name, text: days.slice(0, n).join("\n\n"), question })),
  { name: "Your own text", text: "", question: "" },
];
export const RECOMMENDED = recommended; // {policy, budget}
export const NEXT = next; // [{name, reason, policy, budget, boundary, answers}]
