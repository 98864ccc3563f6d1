// What `test_http_npm.py` runs: the stock npm client, plain, streaming and with a file; prints what came, as JSON.
import OpenAI, { toFile } from "openai";

const [baseURL, image] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const options = { prompt: "a red car", seed: 5, steps: 4 };

const plain = await client.images.generate(options);
const events = [];
for await (const event of await client.images.generate({ ...options, stream: true, partial_images: 2 })) events.push(event);
const edit = await client.images.edit({ ...options, image: await toFile(Buffer.from(image, "base64"), "image.png") });
const models = [];
for await (const model of client.models.list()) models.push(model.id);
const refused = await client.images.generate({ ...options, steps: 99 }).catch((error) => [error.status, error.param, error.type]);

console.log(
  JSON.stringify({
    plain: plain.data[0].b64_json,
    events: events.map((event) => event.type),
    streamed: events.at(-1).b64_json,
    edit: edit.data[0].b64_json,
    models,
    refused,
  }),
);
