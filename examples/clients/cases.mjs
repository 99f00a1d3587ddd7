// What cases.py is for the clients in Node.
import { readFileSync } from "node:fs";

export const URL_ = process.argv[2] ?? "http://127.0.0.1:8000";
export const BASE = `${URL_}/v1`;
export const MODEL = "smollm2-135m-instruct";
export const QUESTION = "What is the weather in Paris?";
export const PERSON = {
  type: "object",
  properties: { name: { type: "string", maxLength: 20 }, age: { type: "integer", minimum: 0, maximum: 120 } },
  required: ["name", "age"],
  additionalProperties: false,
};
export const PLACE = {
  type: "object",
  properties: { city: { type: "string", maxLength: 20 } },
  required: ["city"],
  additionalProperties: false,
};
export const TOOL = { type: "function", function: { name: "get_weather", description: "The weather in a city", parameters: PLACE } };
export const CALL = { id: "call_1", type: "function", function: { name: "get_weather", arguments: '{"city": "Paris"}' } };
export const HISTORY = [
  { role: "user", content: QUESTION },
  { role: "assistant", content: null, tool_calls: [CALL] },
  { role: "tool", tool_call_id: "call_1", content: "18 degrees and sunny" },
];

const SECONDS = 120;

export class NotOurs extends Error {}

export function check(condition, what) {
  if (!condition) throw new Error(typeof what === "string" ? what : JSON.stringify(what));
}

export function checkCall(name, args) {
  const given = typeof args === "string" ? JSON.parse(args) : args;
  check(name === "get_weather" && typeof given.city === "string", `${name}(${JSON.stringify(args)})`);
}

export async function all(iterable) {
  const items = [];
  for await (const item of iterable) items.push(item);
  return items;
}

export async function main(client, name, cases) {
  const { dependencies } = JSON.parse(readFileSync(new URL("package.json", import.meta.url)));
  for (const [title, run] of Object.entries(cases)) {
    let result = "yes", reason = "";
    let timer;
    const late = new Promise((_, reject) => { timer = setTimeout(() => reject(new Error(`no answer in ${SECONDS} s`)), SECONDS * 1000); });
    try {
      await Promise.race([run(), late]);
    } catch (error) {
      result = error instanceof NotOurs ? "not ours" : "no";
      reason = `${error.name}: ${error.message}`.replace(/\s+/g, " ").slice(0, 300);
    }
    clearTimeout(timer);
    console.log("\n" + JSON.stringify({ client, version: dependencies[name], case: title, result, reason }));
  }
  process.exit();
}
