// The server's HTTP API: JSON, server-sent events, and the same requests as curl commands.

let key = "";
export const setKey = (value) => { key = value.trim(); };

const headers = (extra) => ({ "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }), ...extra });

// The server's refusal, with the field at fault if it names one.
async function failure(response) {
  const { status } = response;
  try {
    const { error } = await response.json();
    return Object.assign(new Error(error.message), { status, param: error.param });
  } catch {
    return Object.assign(new Error(`${status} ${response.statusText}`), { status });
  }
}

export async function get(path) {
  const response = await fetch(path, { headers: headers() });
  if (!response.ok) throw await failure(response);
  return response.json();
}

export async function post(path, body, signal) {
  const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (!response.ok) throw await failure(response);
  return response.json();
}

export async function remove(path) {
  const response = await fetch(path, { method: "DELETE", headers: headers() });
  if (!response.ok) throw await failure(response);
  return response.json();
}

// Yields the JSON of each event of a stream until `data: [DONE]`.
export async function* stream(path, body, extra, signal) {
  const response = await fetch(path, { method: "POST", headers: headers(extra), body: JSON.stringify(body), signal });
  if (!response.ok) throw await failure(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    pending += value;
    const events = pending.split("\n\n");
    pending = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

export function curl(path, body, extra) {
  const lines = [`curl -N ${location.origin}${path} -H 'Content-Type: application/json'`];
  if (key) lines.push(`-H "Authorization: Bearer $CURKV_API_KEY"`);
  for (const [name, value] of Object.entries(extra)) lines.push(`-H ${quoted(`${name}: ${value}`)}`);
  lines.push(`-d ${quoted(JSON.stringify(body))}`);
  return lines.join(" \\\n  ");
}
