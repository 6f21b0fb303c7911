// Asks through the openai SDK what each line of input says, and answers with a line: see Node in ../dialects.py.
import { createInterface } from "node:readline";
import OpenAI, { AzureOpenAI } from "openai";

function clientAt(at) {
  if (at.azure) return new AzureOpenAI({ endpoint: at.server, apiKey: at.key, apiVersion: at.azure, maxRetries: 0 });
  return new OpenAI({ baseURL: at.openai, apiKey: at.key, maxRetries: 0 });
}

async function whole(client, body) {
  const made = await client.chat.completions.create(body);
  return { made, pieces: 1 };
}

// With the SDK's own helper, which puts the message together.
async function streamed(client, body) {
  let pieces = 0;
  const stream = client.chat.completions.stream({ ...body, stream_options: { include_usage: true } });
  stream.on("content", () => { pieces += 1; });
  return { made: await stream.finalChatCompletion(), pieces };
}

async function run({ at, body, stream, results }) {
  const client = clientAt(at);
  const answers = [];
  for (;;) {
    const { made, pieces } = await (stream ? streamed : whole)(client, body);
    const [{ message, finish_reason: finish }] = made.choices;
    const calls = message.tool_calls ?? [];
    answers.push({
      text: message.content ?? "", calls: calls.map(({ function: { name, arguments: given } }) => [name, given]), finish, pieces,
      usage: made.usage ? [made.usage.prompt_tokens, made.usage.completion_tokens] : null,
    });
    if (calls.length === 0 || Object.keys(results).length === 0) return answers;
    const given = calls.map((call) => ({ role: "tool", tool_call_id: call.id, content: results[call.function.name] }));
    body.messages.push(message, ...given);
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  let said;
  try {
    said = { answers: await run(JSON.parse(line)) };
  } catch (error) {
    const { status = null, code = null } = error;
    said = { error: { kind: error.constructor.name, message: String(error.message), status, code, headers: Object.fromEntries(error.headers ?? []) } };
  }
  process.stdout.write(`${JSON.stringify(said)}\n`);
}
