// Requests to the server that this page came from.

/** An answer that is an error. `status` is 0 if there was no answer, and `param` names the field that is wrong. */
export class ServerError extends Error {
  constructor(message, { status = 0, param = null } = {}) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

/** The response to a request. Throws ServerError if it is an error, or if there is none. */
async function request(path, key, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached.");
  }
  if (response.ok) return response;
  let found = {};
  try {
    found = (await response.json()).error ?? {};
  } catch {
    // a proxy's page
  }
  const message = found.message ?? `The server answered with status ${response.status} ${response.statusText}.`;
  throw new ServerError(message, { status: response.status, param: found.param });
}

/** The names of the models. */
export async function listModels(key) {
  const response = await request("/v1/models", key);
  return (await response.json()).data.map((model) => model.id);
}

/** Yields the objects of a streamed answer. Throws ServerError for an error in it, or if it has no end. */
export async function* stream(path, body, key, signal) {
  const response = await request(path, key, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error.message);
    yield chunk;
  }
  throw new ServerError("The connection ended before the answer did.");
}

/** Yields the data of server-sent events, each of which is one line. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data: ")) yield line.slice("data: ".length).trimEnd();
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The connection to the server was lost.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
