// LangChain.js: ChatOpenAI, withStructuredOutput, bindTools, createAgent.
import { AIMessage, HumanMessage, ToolMessage } from "@langchain/core/messages";
import { tool } from "@langchain/core/tools";
import { ChatOpenAI, OpenAIEmbeddings } from "@langchain/openai";
import { createAgent } from "langchain";
import { z } from "zod";
import { all, BASE, check, checkCall, main, MODEL, QUESTION } from "./cases.mjs";

const configuration = { baseURL: BASE };
const model = new ChatOpenAI({ model: MODEL, apiKey: "none", configuration, maxRetries: 0, temperature: 0, maxTokens: 200 });
const Person = z.object({ name: z.string().max(20), age: z.number().int().min(0).max(120) });
const weather = tool(() => "sunny", { name: "get_weather", description: "The weather in a city", schema: z.object({ city: z.string().max(20) }) });

main("LangChain.js", "@langchain/openai", {
  "chat": async () => check((await model.invoke(QUESTION)).content, "no text"),
  "stream": async () => check((await all(await model.stream(QUESTION))).length > 1, "no chunks"),
  "json schema": async () => {
    for (const method of ["jsonSchema", "functionCalling"])
      Person.parse(await model.withStructuredOutput(Person, { method, name: "person" }).invoke("Ann is 30."));
  },
  "tools auto": async () => {
    for (const { name, args } of (await model.bindTools([weather]).invoke(QUESTION)).tool_calls) checkCall(name, args);
    await createAgent({ model, tools: [weather] }).invoke({ messages: [new HumanMessage(QUESTION)] }, { recursionLimit: 8 });
  },
  "tools required": async () => {
    const [{ name, args }] = (await model.bindTools([weather], { tool_choice: "required" }).invoke(QUESTION)).tool_calls;
    checkCall(name, args);
  },
  "tools streamed": async () => {
    const chunks = await all(await model.bindTools([weather], { tool_choice: "required" }).stream(QUESTION));
    const [{ name, args }] = chunks.reduce((whole, chunk) => whole.concat(chunk)).tool_calls;
    checkCall(name, args);
  },
  "tool history": async () => {
    const call = { name: "get_weather", args: { city: "Paris" }, id: "call_1", type: "tool_call" };
    const past = [new HumanMessage(QUESTION), new AIMessage({ content: "", tool_calls: [call] }), new ToolMessage({ content: "sunny", tool_call_id: "call_1" })];
    check(await model.bindTools([weather]).invoke(past), "no answer");
  },
  "embeddings": async () => {
    const embed = new OpenAIEmbeddings({ model: MODEL, apiKey: "none", configuration });
    check((await embed.embedDocuments(["a", "b"])).length === 2, "not two");
  },
});
