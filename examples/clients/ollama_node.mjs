// The ollama package for Node, on /api.
import { Ollama } from "ollama";
import { all, check, checkCall, main, MODEL, PERSON, QUESTION, TOOL, URL_ } from "./cases.mjs";

const client = new Ollama({ host: URL_ });
const fixed = { model: MODEL, messages: [{ role: "user", content: QUESTION }], options: { num_predict: 200, temperature: 0 } };

main("ollama (Node)", "ollama", {
  "chat": async () => check((await client.chat(fixed)).message.content, "no text"),
  "stream": async () => check((await all(await client.chat({ ...fixed, stream: true }))).length > 1, "no parts"),
  "json schema": async () => check("name" in JSON.parse((await client.chat({ ...fixed, format: PERSON })).message.content), "no name"),
  "tools auto": async () => {
    for (const { function: call } of (await client.chat({ ...fixed, tools: [TOOL] })).message.tool_calls ?? []) checkCall(call.name, call.arguments);
  },
  "embeddings": async () => check((await client.embed({ model: MODEL, input: ["a", "b"] })).embeddings.length === 2, "not two"),
});
