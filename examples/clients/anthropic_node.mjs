// Anthropic's package for Node, on /v1/messages.
import Anthropic from "@anthropic-ai/sdk";
import { check, checkCall, main, MODEL, PLACE, QUESTION, URL_ } from "./cases.mjs";

const client = new Anthropic({ baseURL: URL_, apiKey: "none", maxRetries: 0 });
const tools = [{ name: "get_weather", description: "The weather in a city", input_schema: PLACE }];
const fixed = { model: MODEL, max_tokens: 200, messages: [{ role: "user", content: QUESTION }] };
const called = ({ content }) => content.filter(({ type }) => type === "tool_use");

main("anthropic (Node)", "@anthropic-ai/sdk", {
  "chat": async () => check((await client.messages.create(fixed)).content[0].text, "no text"),
  "stream": async () => check(await client.messages.stream(fixed).finalText(), "no text"),
  "tools required": async () => {
    const [{ name, input }] = called(await client.messages.create({ ...fixed, tools, tool_choice: { type: "any" } }));
    checkCall(name, input);
  },
  "tools streamed": async () => {
    const [{ name, input }] = called(await client.messages.stream({ ...fixed, tools, tool_choice: { type: "any" } }).finalMessage());
    checkCall(name, input);
  },
});
