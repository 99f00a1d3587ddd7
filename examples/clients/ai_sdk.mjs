// Vercel's AI SDK with its provider for compatible servers.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { cases } from "./ai_sdk_cases.mjs";
import { BASE, main, MODEL } from "./cases.mjs";

const provider = createOpenAICompatible({ name: "curkv", baseURL: BASE, apiKey: "none", supportsStructuredOutputs: true });
main("AI SDK, openai-compatible", "@ai-sdk/openai-compatible", cases(provider.chatModel(MODEL), provider.textEmbeddingModel(MODEL)));
