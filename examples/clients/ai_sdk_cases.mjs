// The cases of Vercel's AI SDK, whatever its provider.
import { embedMany, generateObject, generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";
import { all, check, checkCall, PERSON, PLACE, QUESTION } from "./cases.mjs";

const tools = { get_weather: tool({ description: "The weather in a city", inputSchema: jsonSchema(PLACE), execute: async () => "sunny" }) };

export function cases(model, embeddings) {
  const fixed = { model, prompt: QUESTION, maxRetries: 0, maxOutputTokens: 200, temperature: 0 };
  return {
    "chat": async () => check((await generateText(fixed)).text, "no text"),
    "stream": async () => check((await all(streamText(fixed).textStream)).length > 1, "no chunks"),
    "json schema": async () => check("name" in (await generateObject({ ...fixed, schema: jsonSchema(PERSON), prompt: "Ann is 30." })).object, "no name"),
    "tools auto": async () => check(await generateText({ ...fixed, tools, stopWhen: stepCountIs(2) }), "no answer"),
    "tools required": async () => {
      const [{ toolName, input }] = (await generateText({ ...fixed, tools, toolChoice: "required" })).toolCalls;
      checkCall(toolName, input);
    },
    "tools streamed": async () => {
      const run = streamText({ ...fixed, tools, toolChoice: "required" });
      await run.consumeStream();
      const [{ toolName, input }] = await run.toolCalls;
      checkCall(toolName, input);
    },
    "tool history": async () => {
      const choices = ({ stepNumber }) => ({ toolChoice: stepNumber ? "auto" : "required" });
      const run = await generateText({ ...fixed, tools, prepareStep: choices, stopWhen: stepCountIs(2) });
      check(run.steps.length === 2, `${run.steps.length} steps`);
    },
    "embeddings": async () => check((await embedMany({ model: embeddings, values: ["a", "b"], maxRetries: 0 })).embeddings.length === 2, "not two"),
  };
}
