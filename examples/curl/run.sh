#!/bin/sh
# Keyward by curl. Needs OPENAI_BASE_URL and OPENAI_API_KEY, as `keyward up` prints them.
set -eu
model=gpt-4o-mini

# ask PATH BODY: prints the answer; a refusal ends the script, with its body and x-keyward-reason shown.
ask() {
    curl --silent --show-error --fail-with-body --no-buffer "$OPENAI_BASE_URL$1" \
        --write-out '%{stderr}%header{x-keyward-reason}' \
        -H "authorization: Bearer $OPENAI_API_KEY" -H 'content-type: application/json' -d "$2"
    echo
}

echo '--- plain'
ask /chat/completions '{"model": "'$model'", "messages": [{"role": "user", "content": "Name a river in Paris."}]}'

echo '--- stream'
ask /chat/completions '{"model": "'$model'", "stream": true, "messages": [{"role": "user", "content": "Count to five."}]}'

weather='[{"type": "function", "function": {"name": "get_weather", "description": "The weather in a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]'
question='{"role": "user", "content": "What is the weather in Paris?"}'

echo '--- tools: the model asks for a call'
ask /chat/completions '{"model": "'$model'", "tools": '"$weather"', "messages": ['"$question"']}'

echo '--- tools: it gets the result'
ask /chat/completions '{"model": "'$model'", "tools": '"$weather"', "messages": ['"$question"',
    {"role": "assistant", "content": null, "tool_calls": [{"id": "call_1", "type": "function",
        "function": {"name": "get_weather", "arguments": "{\"city\": \"Paris\"}"}}]},
    {"role": "tool", "tool_call_id": "call_1", "content": "21 degrees, sunny"}]}'

echo '--- responses'
ask /responses '{"model": "'$model'", "input": "Name a bridge in Paris."}'

echo '--- embeddings'
ask /embeddings '{"model": "text-embedding-3-small", "dimensions": 8, "input": ["Seine", "Danube"]}'
