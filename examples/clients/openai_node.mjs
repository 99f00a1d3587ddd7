// The openai package for Node.
import OpenAI from "openai";
import { all, BASE, check, checkCall, HISTORY, main, MODEL, PERSON, QUESTION, TOOL } from "./cases.mjs";

const client = new OpenAI({ baseURL: BASE, apiKey: "none", maxRetries: 0 });
const fixed = { model: MODEL, messages: [{ role: "user", content: QUESTION }], max_tokens: 200, temperature: 0 };
const create = (options) => client.chat.completions.create({ ...fixed, ...options });

main("openai (Node)", "openai", {
  "chat": async () => check((await create()).choices[0].message.content, "no text"),
  "stream": async () => check((await all(await create({ stream: true }))).length > 1, "no chunks"),
  "json schema": async () => {
    const json_schema = { name: "person", schema: PERSON, strict: true };
    const answer = await client.chat.completions.parse({ ...fixed, response_format: { type: "json_schema", json_schema } });
    check("name" in JSON.parse(answer.choices[0].message.content), "no name");
  },
  "tools auto": async () => {
    for (const { function: call } of (await create({ tools: [TOOL] })).choices[0].message.tool_calls ?? []) checkCall(call.name, call.arguments);
  },
  "tools required": async () => {
    const [{ function: call }] = (await create({ tools: [TOOL], tool_choice: "required" })).choices[0].message.tool_calls;
    checkCall(call.name, call.arguments);
  },
  "tools streamed": async () => {
    const run = client.chat.completions.stream({ ...fixed, tools: [TOOL], tool_choice: "required" });
    const [{ function: call }] = (await run.finalChatCompletion()).choices[0].message.tool_calls;
    checkCall(call.name, call.arguments);
  },
  "tools parallel": async () => {
    const answer = await create({ tools: [TOOL], tool_choice: "required", parallel_tool_calls: false });
    check(answer.choices[0].message.tool_calls.length === 1, "several calls");
  },
  "tool history": async () => check((await create({ messages: HISTORY, tools: [TOOL] })).choices[0].message, "no answer"),
  "responses": async () => {
    check((await client.responses.create({ model: MODEL, input: QUESTION, max_output_tokens: 20 })).output_text, "no text");
    const run = client.responses.stream({ model: MODEL, input: QUESTION, max_output_tokens: 20 });
    check((await run.finalResponse()).output_text, "no text of the stream");
  },
  "embeddings": async () => check((await client.embeddings.create({ model: MODEL, input: ["a", "b"] })).data.length === 2, "not two"),
});
