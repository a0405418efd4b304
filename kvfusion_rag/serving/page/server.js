/** Requests to the server that this page comes from. What comes back is data, and never becomes HTML. */

const KEY = "kvfusion.key";

/** A reply that is an error. `code` is the server's name for it. */
export class ServerError extends Error {
  constructor(message, status, code) {
    super(message);
    Object.assign(this, { status, code });
  }
}

/** Use an API key until the tab is closed. */
export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** Return the served model. */
export async function getModel() {
  return (await (await send("v1/models")).json()).data[0];
}

/** Return what the server's library contains, or null if it has none. */
export async function getLibrary() {
  try {
    return await (await send("v1/library")).json();
  } catch (error) {
    if (error.status === 404) return null;
    throw error;
  }
}

/** Add a file to the server's library. */
export async function upload(file) {
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
  await send("v1/library/upload", { name: file.name, content: url.slice(url.indexOf(",") + 1) });
}

/** Remove an uploaded file. */
export async function remove(name) {
  await send("v1/library/remove", { name });
}

/** Return a complete answer. */
export async function complete(body, signal) {
  return (await send("v1/chat/completions", body, signal)).json();
}

/** Yield the chunks of a streamed answer. */
export async function* stream(body, signal) {
  const response = await send("v1/chat/completions", { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const events = (rest + part.value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(chunk.error.message, response.status, chunk.error.code);
      yield chunk;
    }
  }
  throw new Error("The server ended the answer early.");
}

async function send(path, body, signal) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.authorization = `Bearer ${key}`;
  if (body) headers["content-type"] = "application/json";
  const response = await fetch(path, { method: body ? "POST" : "GET", headers, body: JSON.stringify(body), signal });
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  throw new ServerError(error?.message ?? `The server replied with status ${response.status}.`, response.status, error?.code);
}
