// The openai SDK through Keyward. Needs OPENAI_BASE_URL and OPENAI_API_KEY, which the SDK reads by itself.
import OpenAI from "openai";

const model = "gpt-4o-mini";
const tools = [{
  type: "function",
  function: {
    name: "get_weather",
    description: "The weather in a city",
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
}];
const getWeather = ({ city }) => `21 degrees and sunny in ${city}`;
const client = new OpenAI();

async function plain() {
  const answer = await client.chat.completions.create({ model, messages: [{ role: "user", content: "Name a river in Paris." }] });
  console.log("plain:", answer.choices[0].message.content);
}

async function stream() {
  const chunks = await client.chat.completions.create({
    model, messages: [{ role: "user", content: "Count to five." }], stream: true,
  });
  process.stdout.write("stream: ");
  for await (const chunk of chunks) process.stdout.write(chunk.choices[0]?.delta?.content ?? "");
  process.stdout.write("\n");
}

async function useTools() {
  const messages = [{ role: "user", content: "What is the weather in Paris?" }];
  const { message } = (await client.chat.completions.create({ model, messages, tools })).choices[0];
  messages.push(message);
  for (const call of message.tool_calls ?? []) {
    const result = getWeather(JSON.parse(call.function.arguments));
    console.log("tool:", call.function.name, call.function.arguments, "->", result);
    messages.push({ role: "tool", tool_call_id: call.id, content: result });
  }
  const answer = await client.chat.completions.create({ model, messages, tools });
  console.log("tools:", answer.choices[0].message.content);
}

async function responses() {
  console.log("responses:", (await client.responses.create({ model, input: "Name a bridge in Paris." })).output_text);
  process.stdout.write("responses stream: ");
  for await (const event of await client.responses.create({ model, input: "Count to three.", stream: true })) {
    if (event.type === "response.output_text.delta") process.stdout.write(event.delta);
  }
  process.stdout.write("\n");
}

async function embeddings() {
  const { data } = await client.embeddings.create({ model: "text-embedding-3-small", input: ["Seine", "Danube"] });
  console.log("embeddings:", data.length, "vectors of", data[0].embedding.length);
}

await plain();
await stream();
await useTools();
await responses();
await embeddings();
