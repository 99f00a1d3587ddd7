// Errors in the words of the page: named by its own fields, with what to do.

const OF_A_SIDE = { "X-KV-Policy": "policy", "X-KV-Budget": "budget", "X-KV-Decode-Budget": "decode" };
const LABELS = {
  policy: "Policy", budget: "Budget", decode: "While generating", "X-KV-Protect": "Protect tokens", messages: "Text", prompt: "Text",
  max_tokens: "Most tokens", max_completion_tokens: "Most tokens", temperature: "Temperature",
};
const BY_STATUS = {
  401: "This server wants an API key: give it under More.",
  413: "The text is larger than what this server reads.",
  429: "The server has too much to do: try again in a moment.",
  503: "The server takes no requests at the moment.",
};

// Which control of a side is at fault, if it is one of them.
export const controlOf = (error) => OF_A_SIDE[error.param];

export function words(error) {
  if (error instanceof TypeError) return "The server does not answer.";
  if (BY_STATUS[error.status]) return BY_STATUS[error.status];
  const label = LABELS[controlOf(error) ?? error.param];
  return label ? `${label}: ${error.message}` : error.message;
}
