// Calls to the server: the key, errors as the server tells them, and server-sent events over fetch (EventSource
// cannot send a key).

const KEY = "mm-key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** What the server said was wrong. */
export class ApiError extends Error {
  constructor(status, error) {
    super(error.message ?? `The server answered with status ${status}.`);
    this.status = status;
    this.code = error.code ?? "";
    this.requestId = error.request_id ?? "";
  }
}

export async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let reply;
  try {
    reply = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { message: "The server cannot be reached.", code: "unreachable" });
  }
  if (!reply.ok) {
    const body = await reply.json().catch(() => ({}));
    throw new ApiError(reply.status, body.error ?? {});
  }
  return reply;
}

/** The data of each event of a stream, as text. */
export async function* events(reply) {
  const decoder = new TextDecoder();
  const reader = reply.body.getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + decoder.decode(value, { stream: true })).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const lines = part.split("\n").filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** A chat's chunks as objects. */
export async function* chat(body, signal) {
  const headers = { "Content-Type": "application/json" };
  yield* chunks("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
}

/** A transcription's events as objects. fields: of the form. */
export async function* transcribe(fields, signal) {
  const body = new FormData();
  for (const [name, value] of Object.entries(fields)) body.append(name, value);
  yield* chunks("/v1/audio/transcriptions", { method: "POST", body, signal });
}

/** Events up to the last one; an error that comes in the stream is raised. */
async function* chunks(path, options) {
  const reply = await call(path, options);
  for await (const data of events(reply)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(200, chunk.error);
    yield chunk;
  }
  throw new ApiError(0, { message: "The answer broke off.", code: "broken_stream" });
}
