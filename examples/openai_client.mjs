// OpenAI's npm package against a server of one's own.
//
//     dalle2 serve --system shapes
//     npm install openai
//     node examples/openai_client.mjs --image in.png --mask mask.png
//
// The image is square, and the transparent part of the mask is generated again.

import fs from "node:fs";
import path from "node:path";
import { parseArgs } from "node:util";

import OpenAI, { toFile } from "openai";

const { values: options } = parseArgs({
  options: {
    base_url: { type: "string", default: "http://127.0.0.1:8000/v1" },
    api_key: { type: "string", default: "none" },
    image: { type: "string" },
    mask: { type: "string" },
    response_format: { type: "string", default: "b64_json" },
    out: { type: "string", default: "out" },
  },
});
const client = new OpenAI({ baseURL: options.base_url, apiKey: options.api_key });
const { response_format } = options;

const png = (file) => toFile(fs.createReadStream(file), path.basename(file), { type: "image/png" });

const content = async ({ b64_json, url }) =>
  b64_json ? Buffer.from(b64_json, "base64") : Buffer.from(await (await fetch(url)).arrayBuffer());

const answers = {
  generated: await client.images.generate({ prompt: "a large red circle", n: 2, response_format, seed: 0 }),
  edited: await client.images.edit({
    image: await png(options.image),
    mask: await png(options.mask),
    prompt: "a large red circle",
    response_format,
    seed: 1,
  }),
  varied: await client.images.createVariation({ image: await png(options.image), n: 2, response_format, seed: 2 }),
};

fs.mkdirSync(options.out, { recursive: true });
for (const [name, { data }] of Object.entries(answers)) {
  for (const [number, item] of data.entries()) {
    const file = path.join(options.out, `${name}_${number}.png`);
    fs.writeFileSync(file, await content(item));
    console.log(file);
  }
}
