// openai and anthropic for node, and Vercel's AI SDK with four providers.
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [url, folder] = process.argv.slice(2);
const resolve = createRequire(`${folder}/package.json`).resolve;
const load = (name) => import(pathToFileURL(resolve(name)).href);
const { default: OpenAI } = await load("openai");
const { default: Anthropic } = await load("@anthropic-ai/sdk");
const { generateText, streamText, generateObject, tool, stepCountIs } = await load("ai");
const { createOpenAI } = await load("@ai-sdk/openai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
const { createAnthropic } = await load("@ai-sdk/anthropic");
const { z } = await load("zod");

const schema = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const SUNNY = "It is sunny in Paris.";

const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "local" });
const runner = openai.chat.completions.runTools({
  model: "scripted",
  messages: [{ role: "user", content: "play:weather in Paris?" }],
  tools: [
    {
      type: "function",
      function: {
        name: "get_weather",
        parameters: schema,
        parse: JSON.parse,
        function: ({ city }) => `sunny in ${city}`,
      },
    },
  ],
});
assert.equal(await runner.finalContent(), SUNNY);
const response = await openai.responses.create({ model: "scripted", input: "play:weather" });
assert.equal(response.output_text, SUNNY);

const anthropic = new Anthropic({ baseURL: url, apiKey: "local" });
const stream = anthropic.messages.stream({
  model: "scripted",
  max_tokens: 512,
  messages: [{ role: "user", content: "play:weather in Paris?" }],
  tools: [{ name: "get_weather", input_schema: schema }],
});
const message = await stream.finalMessage();
assert.deepEqual(message.content.find((block) => block.type === "tool_use").input, { city: "Paris" });

const provider = createOpenAI({ baseURL: `${url}/v1`, apiKey: "local" });
const compatible = createOpenAICompatible({
  name: "cenacle",
  baseURL: `${url}/v1`,
  supportsStructuredOutputs: true,
});
const messages = createAnthropic({ baseURL: `${url}/v1`, apiKey: "local" });
const models = {
  chat: provider.chat("scripted"),
  responses: provider.responses("scripted"),
  compatible: compatible("scripted"),
  anthropic: messages("scripted"),
};
const tools = {
  get_weather: tool({
    description: "Weather in a city.",
    inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => `sunny in ${city}`,
  }),
};
for (const [name, model] of Object.entries(models)) {
  const asked = { model, tools, prompt: "play:weather in Paris?", stopWhen: stepCountIs(3) };
  const { text, steps } = await generateText(asked);
  assert.equal(text, SUNNY, name);
  assert.equal(steps.length, 2, name);
  assert.equal(await streamText(asked).text, SUNNY, name);
}
for (const name of ["chat", "responses", "compatible"]) {
  const { object } = await generateObject({
    model: models[name],
    schema: z.object({ name: z.literal("Ada"), age: z.literal(36) }),
    prompt: "play:person",
  });
  assert.deepEqual(object, { name: "Ada", age: 36 }, name);
}
