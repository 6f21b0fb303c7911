// The anthropic SDK through Keyward. Needs ANTHROPIC_BASE_URL and ANTHROPIC_API_KEY, which the SDK reads by itself.
import Anthropic from "@anthropic-ai/sdk";

const ask = { model: "claude-haiku-4-5", max_tokens: 200 };
const tools = [{
  name: "get_weather",
  description: "The weather in a city",
  input_schema: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
}];
const getWeather = ({ city }) => `21 degrees and sunny in ${city}`;
const text = (message) => message.content.filter((block) => block.type === "text").map((block) => block.text).join("");
const client = new Anthropic();

async function plain() {
  const messages = [{ role: "user", content: "Name a river in Paris." }];
  console.log("plain:", text(await client.messages.create({ ...ask, messages })));
}

async function stream() {
  process.stdout.write("stream: ");
  const events = client.messages.stream({ ...ask, messages: [{ role: "user", content: "Count to five." }] });
  events.on("text", (part) => process.stdout.write(part));
  await events.finalMessage();
  process.stdout.write("\n");
}

async function useTools() {
  const messages = [{ role: "user", content: "What is the weather in Paris?" }];
  let answer = await client.messages.create({ ...ask, messages, tools });
  const results = [];
  for (const use of answer.content.filter((block) => block.type === "tool_use")) {
    const result = getWeather(use.input);
    console.log("tool:", use.name, JSON.stringify(use.input), "->", result);
    results.push({ type: "tool_result", tool_use_id: use.id, content: result });
  }
  if (results.length > 0) {
    messages.push({ role: "assistant", content: answer.content }, { role: "user", content: results });
    answer = await client.messages.create({ ...ask, messages, tools });
  }
  console.log("tools:", text(answer));
}

await plain();
await stream();
await useTools();
