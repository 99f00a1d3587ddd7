// Vercel's AI SDK with OpenAI's own provider, which speaks /v1/responses.
import { createOpenAI } from "@ai-sdk/openai";
import { generateText } from "ai";
import { cases } from "./ai_sdk_cases.mjs";
import { BASE, check, main, MODEL, QUESTION } from "./cases.mjs";

const provider = createOpenAI({ baseURL: BASE, apiKey: "none" });
main("AI SDK, openai", "@ai-sdk/openai", {
  ...cases(provider.chat(MODEL), provider.textEmbeddingModel(MODEL)),
  "responses": async () => check((await generateText({ model: provider.responses(MODEL), prompt: QUESTION, maxRetries: 0 })).text, "no text"),
});
