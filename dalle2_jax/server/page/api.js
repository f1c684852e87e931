// Requests to the server of this page.

const KEY = "dalle2-key";

export const keyOf = () => sessionStorage.getItem(KEY) ?? "";
export const setKey = (key) => sessionStorage.setItem(KEY, key);

async function send(path, options = {}) {
  const key = keyOf();
  const headers = { ...(key && { Authorization: `Bearer ${key}` }), ...options.headers };
  const response = await fetch(path, { ...options, headers });
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    throw new Error(body?.error?.message ?? `the server answered ${response.status}`);
  }
  return response;
}

export const models = async () => (await (await send("v1/models")).json()).data.map((model) => model.id);

export const describe = async (model) => (await send(`dalle2/models/${encodeURIComponent(model)}`)).json();

export const cancel = (id) => send(`dalle2/jobs/${id}`, { method: "DELETE" });

// Yields [name, value] of the server-sent events of a response.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const fields = Object.fromEntries(part.split("\n").map((line) => line.split(/: (.*)/s)));
      if (fields.data) yield [fields.event, JSON.parse(fields.data)];
    }
  }
}

// Starts a job; calls started(id) and progress(event); returns the answer with the images.
export async function run({ command, ...body }, started, progress) {
  const content = { ...body, background: true, previews: true, response_format: "b64_json" };
  const job = await (await send(`dalle2/${command}`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(content),
  })).json();
  started(job.id);
  for await (const [name, value] of events(await send(`dalle2/jobs/${job.id}/events`))) {
    if (name === "progress") progress(value);
    if (name === "done") return value.result;
    if (name === "failed") throw new Error(value.error.message);
  }
  throw new Error("the connection ended before the images were there");
}
