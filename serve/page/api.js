/** Requests to this page's service. Errors have a message for the user. */

const KEY = "addressvlm-key"; // in this tab's session storage

export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status; // 0: no response
  }
}

export function rememberKey(key) {
  sessionStorage.setItem(KEY, key);
}

async function send(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The service can't be reached. Check the connection, then try again.", 0);
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Refused(body?.error?.message ?? `The service answered ${response.status}.`, response.status);
}

/** The answer to a GET, or to a POST of a form. */
export async function request(path, form, signal) {
  const response = await send(path, form ? { method: "POST", body: form, signal } : { signal });
  return response.json();
}

/** A file of the service, as a Blob. */
export async function download(path) {
  return (await send(path)).blob();
}

/** The text of a chat answer, piece by piece as the model writes it. */
export async function* chat(body, signal) {
  const response = await send("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new Refused(event.error.message, 500);
    const text = event.choices[0]?.delta.content;
    if (text) yield text;
  }
  throw new Refused("The answer broke off. Ask again.", 0);
}

/** The data of server-sent events. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new Refused("The answer broke off. Ask again.", 0);
    });
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}
