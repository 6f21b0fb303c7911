//! The simulator over sockets, as a proxy meets it.

mod support;

use std::io::{Read, Write};

use serde_json::{Value, json};
use support::{ANTHROPIC, OPENAI, Outcome, Sim, read, request};

fn chat(text: &str) -> Value {
    json!({"model": "gpt-4o", "messages": [{"role": "user", "content": text}]})
}

fn streamed(text: &str) -> Value {
    let mut body = chat(text);
    body["stream"] = true.into();
    body["stream_options"] = json!({"include_usage": true});
    body
}

fn claude(text: &str, stream: bool) -> Value {
    json!({"model": "claude-haiku-4-5", "max_tokens": 50, "stream": stream, "messages": [{"role": "user", "content": text}]})
}

#[test]
fn a_buffered_completion_is_billed_as_it_says() -> Outcome {
    let sim = Sim::start()?;
    let answer = sim.chat(OPENAI, &chat("[[sim tokens=12]]"))?;
    let body = answer.json()?;
    assert_eq!((answer.status, answer.whole), (200, true));
    assert_eq!(body["usage"]["completion_tokens"], 12);
    assert!(answer.header("x-ratelimit-remaining-requests").is_some() && answer.header("set-cookie").is_some());
    let entry = sim.last_entry()?;
    let prompt = body["usage"]["prompt_tokens"].as_u64().ok_or("no prompt tokens")?;
    assert_eq!(entry["cost_nanodollars"], prompt * 2_500 + 12 * 10_000);
    assert_eq!((&entry["ended"], &entry["credential"], &entry["model"]), (&json!("complete"), &json!("o"), &json!("gpt-4o")));
    assert_eq!(entry["response_id"], body["id"]);
    assert!(prompt <= entry["body_bytes"].as_u64().unwrap_or(0));
    assert_eq!(sim.totals()?["violation_count"], 0);
    Ok(())
}

#[test]
fn what_is_asked_for_one_user_is_summed_however_it_ends() -> Outcome {
    let sim = Sim::start()?;
    let mut costs = 0;
    for (n, directive) in ["tokens=12", "tokens=30 cut_after_bytes=40", "status=500"].iter().enumerate() {
        let mut body = if n == 1 { streamed("") } else { chat("") };
        body["messages"][0]["content"] = format!("[[sim {directive}]]").into();
        body["user"] = "key_a".into();
        sim.chat(OPENAI, &body)?;
        let entry = sim.last_entry()?;
        assert_eq!(entry["tag"], "key_a");
        costs += entry["cost_nanodollars"].as_u64().ok_or("no cost")?;
    }
    let mut body = claude("[[sim tokens=60 runaway=1]]", false);
    body["metadata"] = json!({"user_id": "key_b"});
    sim.send("POST", "/v1/messages", ANTHROPIC, &body.to_string())?;
    sim.chat(OPENAI, &chat("nobody's"))?;
    let tags = sim.control("GET", "/control/tags", None)?;
    assert_eq!(tags["tags"]["key_a"]["cost_nanodollars"], costs);
    assert_eq!((&tags["tags"]["key_a"]["calls"], &tags["tags"]["key_a"]["running"]), (&json!(3), &json!(0)));
    assert_eq!(tags["tags"]["key_b"]["completion_tokens"], 60, "max_tokens is 50");
    assert_eq!(tags["tags"].as_object().map(serde_json::Map::len), Some(2));
    Ok(())
}

#[test]
fn the_exact_request_is_kept_without_its_secret() -> Outcome {
    let sim = Sim::start()?;
    let body = r#"{ "messages":[{"content":"hi","role":"user"}], "model":"gpt-4o" }"#;
    sim.send("POST", "/v1/chat/completions", OPENAI, body)?;
    let seq = sim.last_entry()?["seq"].clone();
    assert_eq!(sim.raw_control(&format!("/control/bodies?seq={seq}"))?.text(), body);
    let headers = sim.control("GET", &format!("/control/headers?seq={seq}"), None)?;
    assert!(headers.to_string().contains(r#"["authorization","Bearer <credential:o>"]"#), "{headers}");
    Ok(())
}

#[test]
fn a_stream_carries_usage_only_when_asked() -> Outcome {
    let sim = Sim::start()?;
    let answer = sim.chat(OPENAI, &streamed("[[sim tokens=7 per_delta=2 split=5 unicode=1]]"))?;
    let events = answer.events();
    assert!(answer.whole && answer.text().ends_with("data: [DONE]\n\n"));
    let last = events.last().ok_or("no events")?;
    assert_eq!((&last["choices"], &last["usage"]["completion_tokens"]), (&json!([]), &json!(7)));
    assert!(events.iter().rev().skip(1).all(|event| event.get("usage") == Some(&Value::Null)));
    let deltas = events.iter().filter(|event| event.pointer("/choices/0/delta/content").is_some_and(|text| text != ""));
    assert_eq!(deltas.count(), 4);
    let mut bare = chat("hi");
    bare["stream"] = true.into();
    assert!(!sim.chat(OPENAI, &bare)?.text().contains("usage"));
    Ok(())
}

#[test]
fn anthropic_answers_in_its_own_dialect() -> Outcome {
    let sim = Sim::start()?;
    let body = sim.messages(ANTHROPIC, &claude("[[sim tokens=5 cache_read=4 cache_write=3]]", false))?.json()?;
    assert_eq!((&body["type"], &body["usage"]["output_tokens"]), (&json!("message"), &json!(5)));
    assert_eq!(body["usage"]["cache_read_input_tokens"], 4);
    let answer = sim.messages(ANTHROPIC, &claude("[[sim tokens=500]]", true))?;
    let kinds: Vec<String> = answer.events().iter().filter_map(|event| event["type"].as_str().map(str::to_owned)).collect();
    assert_eq!(kinds.first().map(String::as_str), Some("message_start"));
    assert_eq!(kinds.last().map(String::as_str), Some("message_stop"));
    let end = answer.events().into_iter().find(|event| event["type"] == "message_delta").ok_or("no message_delta")?;
    assert_eq!((&end["delta"]["stop_reason"], &end["usage"]["output_tokens"]), (&json!("max_tokens"), &json!(50)));
    let missing = sim.messages("x-api-key: sk-ant-test\r\n", &claude("hi", false))?;
    assert_eq!((missing.status, &missing.json()?["error"]["type"]), (400, &json!("invalid_request_error")));
    assert!(missing.header("request-id").is_some());
    Ok(())
}

#[test]
fn wrong_keys_states_and_models_are_refused_in_shape() -> Outcome {
    let sim = Sim::start()?;
    let stranger = sim.chat("authorization: Bearer sk-abcdefghijklmxyz\r\n", &chat("hi"))?;
    assert_eq!((stranger.status, &stranger.json()?["error"]["code"]), (401, &json!("invalid_api_key")));
    assert!(stranger.text().contains("sk-abc***xyz"));
    let foreign = sim.messages("x-api-key: sk-openai-test\r\nanthropic-version: 2023-06-01\r\n", &claude("hi", false))?;
    assert_eq!((foreign.status, &foreign.json()?["error"]["type"]), (401, &json!("authentication_error")));
    let unknown = json!({"model": "gpt-nope", "messages": [{"role": "user", "content": "hi"}]});
    assert_eq!(sim.chat(OPENAI, &unknown)?.status, 404);
    assert_eq!(sim.send("GET", "/v1/batches", OPENAI, "")?.status, 404);
    let states = [
        ("insufficient_quota", (429, "insufficient_quota"), (400, "invalid_request_error")),
        ("overloaded", (503, "server_error"), (529, "overloaded_error")),
        ("invalid", (401, "invalid_request_error"), (401, "authentication_error")),
        ("forbidden", (403, "invalid_request_error"), (403, "permission_error")),
    ];
    for (state, openai, anthropic) in states {
        for id in ["o", "c"] {
            sim.control("PATCH", &format!("/control/credentials/{id}"), Some(&json!({"state": state})))?;
        }
        for (answer, (status, kind)) in
            [(sim.chat(OPENAI, &chat("hi"))?, openai), (sim.messages(ANTHROPIC, &claude("hi", false))?, anthropic)]
        {
            assert_eq!((answer.status, &answer.json()?["error"]["type"]), (status, &json!(kind)), "{state}");
            assert_eq!(answer.header("retry-after").or(answer.header("x-ratelimit-remaining-requests")), None, "{state}");
        }
    }
    sim.control("PATCH", "/control/credentials/o", Some(&json!({"state": "ok"})))?;
    assert_eq!(sim.chat(OPENAI, &chat("hi"))?.status, 200);
    let totals = sim.totals()?;
    let what = totals["violations"].to_string();
    assert!(what.contains("unknown_secret: header authorization"), "{what}");
    assert!(what.contains("foreign_secret: header x-api-key has credential o"), "{what}");
    assert_eq!(totals["credentials"]["o"]["by_status"]["429"], 1);
    Ok(())
}

#[test]
fn requests_and_tokens_per_minute_are_enforced() -> Outcome {
    let sim = Sim::start()?;
    sim.control("PATCH", "/control/credentials/o", Some(&json!({"rpm": 2})))?;
    let statuses: Vec<u16> = (0..3).map(|_| sim.chat(OPENAI, &chat("hi")).map(|answer| answer.status)).collect::<Outcome<_>>()?;
    assert_eq!(statuses, [200, 200, 429]);
    sim.control("PATCH", "/control/credentials/o", Some(&json!({"rpm": null, "tpm": 60})))?;
    assert_eq!(sim.chat(OPENAI, &chat("[[sim tokens=20]]"))?.status, 200);
    let refused = sim.chat(OPENAI, &chat("[[sim tokens=30]]"))?;
    assert_eq!((refused.status, &refused.json()?["error"]["type"]), (429, &json!("tokens")));
    assert!(refused.header("retry-after").is_some());
    assert_eq!(sim.last_entry()?["cost_nanodollars"], 0);
    Ok(())
}

#[test]
fn limits_are_shared_by_an_account_s_credentials() -> Outcome {
    let sim = Sim::start()?;
    sim.credentials(&json!([
        {"id": "o", "provider": "openai", "secret": "sk-openai-test", "account": "both", "rpm": 1, "window_ms": 600_000},
        {"id": "p", "provider": "openai", "secret": "sk-openai-more", "account": "both"},
        {"id": "q", "provider": "openai", "secret": "sk-openai-else"},
    ]))?;
    let auth = |secret: &str| format!("authorization: Bearer {secret}\r\n");
    let status = |secret: &str| sim.chat(&auth(secret), &chat("hi")).map(|answer| answer.status);
    assert_eq!((status("sk-openai-test")?, status("sk-openai-more")?, status("sk-openai-else")?), (200, 429, 200));
    sim.control("PATCH", "/control/credentials/o", Some(&json!({"rpm": null, "limited_for_ms": 600_000})))?;
    assert_eq!((status("sk-openai-more")?, status("sk-openai-else")?), (429, 200));
    assert_eq!(sim.send("GET", "/v1/files", &auth("sk-openai-more"), "")?.status, 429);
    let shown = sim.control("GET", "/control/credentials", None)?["credentials"].take();
    assert_eq!((&shown[0]["requests"], &shown[1]["requests"], &shown[2]["requests"]), (&json!(1), &json!(3), &json!(2)));
    assert_eq!(
        (&shown[0]["window_ms"], &shown[2]["window_ms"], &shown[2]["limited_for_ms"]),
        (&json!(600_000), &json!(60_000), &Value::Null)
    );
    assert!((1..=600_000).contains(&shown[1]["limited_for_ms"].as_u64().unwrap_or(0)), "{shown}");
    sim.control("PATCH", "/control/credentials/p", Some(&json!({"limited_for_ms": null})))?;
    assert_eq!(status("sk-openai-test")?, 200);
    Ok(())
}

#[test]
fn a_limited_account_is_told_when_its_limit_ends() -> Outcome {
    let sim = Sim::start()?;
    for id in ["o", "c"] {
        sim.control("PATCH", &format!("/control/credentials/{id}"), Some(&json!({"limited_for_ms": 599_900})))?;
    }
    let refused = sim.chat(OPENAI, &chat("hi"))?;
    assert_eq!((refused.status, &refused.json()?["error"]["code"]), (429, &json!("rate_limit_exceeded")));
    let ms: u64 = refused.header("retry-after-ms").ok_or("no retry-after-ms")?.parse()?;
    assert!((540_000..=599_900).contains(&ms), "{ms}");
    assert_eq!(refused.header("retry-after").map(str::to_owned), Some(ms.div_ceil(1000).to_string()));
    assert_eq!(refused.header("x-ratelimit-remaining-requests"), Some("0"));
    assert_eq!(refused.header("x-ratelimit-reset-requests").map(str::to_owned), Some(format!("9m{}s", ms / 1000 - 540)));
    let refused = sim.messages(ANTHROPIC, &claude("hi", false))?;
    assert_eq!((refused.status, &refused.json()?["error"]["type"]), (429, &json!("rate_limit_error")));
    let seconds: u64 = refused.header("retry-after").ok_or("no retry-after")?.parse()?;
    assert!((540..=600).contains(&seconds), "{seconds}");
    assert_eq!((refused.header("retry-after-ms"), refused.header("anthropic-ratelimit-requests-remaining")), (None, Some("0")));
    let count = json!({"model": "claude-haiku-4-5", "messages": [{"role": "user", "content": "hi"}]});
    assert_eq!(sim.send("POST", "/v1/messages/count_tokens", ANTHROPIC, &count.to_string())?.status, 429);
    Ok(())
}

#[test]
fn the_script_s_headers_and_body_go_before_the_simulator_s_own() -> Outcome {
    let sim = Sim::start()?;
    let fault = r#"status=429 retry_after=7 header=Retry-After:-1 header="retry-after:Wed, 21 Oct 2026 07:28:00 GMT" header=x-a:b%20c%ff"#;
    sim.control("POST", "/control/faults", Some(&json!({"sim": fault})))?;
    let answer = sim.chat(OPENAI, &chat("hi"))?;
    let given: Vec<&str> = answer.head.lines().filter(|line| line.starts_with("retry-after: ")).collect();
    assert_eq!(given, ["retry-after: -1", "retry-after: Wed, 21 Oct 2026 07:28:00 GMT"]);
    assert_eq!((answer.header("retry-after-ms"), answer.header("x-a")), (Some("7000"), Some("b c\u{fffd}")));
    let answer = sim.chat(OPENAI, &chat("[[sim header=x-ratelimit-remaining-requests:3 header=content-type:text/plain]]"))?;
    assert_eq!((answer.status, answer.header("x-ratelimit-remaining-requests")), (200, Some("3")));
    assert_eq!(answer.header("content-type"), Some("text/plain"));
    let answer = sim.chat(OPENAI, &chat("[[sim status=429 retry_after=7 no_limit_headers=1 body=%3Chtml%3E%20slow%5d%5d]]"))?;
    assert_eq!((answer.status, answer.text().as_str(), answer.whole), (429, "<html> slow]]", true));
    assert!(!answer.head.contains("retry-after") && !answer.head.contains("ratelimit"), "{}", answer.head);
    let answer = sim.messages(ANTHROPIC, &claude("[[sim no_limit_headers=1 body=nothing]]", true))?;
    assert!(answer.status == 200 && !answer.head.contains("ratelimit") && answer.text().contains("message_stop"));
    Ok(())
}

#[test]
fn the_books_say_when_the_head_was_sent_and_under_which_idempotency_key() -> Outcome {
    let sim = Sim::start()?;
    let auth = format!("{OPENAI}idempotency-key: once\r\n");
    let statuses = ["first_ms=30", "status=429", "first_ms=30 tokens=0"].map(|words| (words, chat(&format!("[[sim {words}]]"))));
    for (words, body) in statuses {
        sim.chat(&auth, &body)?;
        let entry = sim.last_entry()?;
        let at = |name: &str| entry[name].as_u64().ok_or_else(|| format!("{words}: no {name}"));
        let waited = if words.starts_with("first_ms") { 30_000 } else { 0 };
        assert!(at("started_unix_us")? + waited <= at("answered_unix_us")? && at("answered_unix_us")? <= at("ended_unix_us")?, "{entry}");
        assert_eq!(entry["idempotency_key"], "once");
    }
    Ok(())
}

#[test]
fn a_client_that_leaves_a_stream_pays_a_little_more_than_it_saw() -> Outcome {
    let sim = Sim::start()?;
    let body = streamed("[[sim tokens=1000 per_delta=1 pace_ms=60000]]").to_string();
    let mut stream = sim.connect()?;
    stream.write_all(request("POST", "/v1/chat/completions", OPENAI, &body).as_bytes())?;
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains("\"the\"") {
        let mut buffer = [0; 4096];
        let read = stream.read(&mut buffer)?;
        seen.extend_from_slice(&buffer[..read]);
    }
    drop(stream);
    sim.settle()?;
    let entry = sim.last_entry()?;
    assert_eq!((&entry["ended"], &entry["completion_tokens"]), (&json!("client_gone"), &json!(17)));
    Ok(())
}

#[test]
fn a_client_that_leaves_a_buffered_request_pays_it_in_full() -> Outcome {
    let sim = Sim::start()?;
    let mut stream = sim.connect()?;
    let body = chat("[[sim tokens=100 first_ms=600000]]").to_string();
    stream.write_all(request("POST", "/v1/chat/completions", OPENAI, &body).as_bytes())?;
    // Known to have begun once its answer is decided.
    while sim.control("GET", "/control/ledger", None)?["requests"][0]["response_id"].is_null() {
        std::thread::yield_now();
    }
    assert_eq!(sim.last_entry()?["ended"], Value::Null);
    drop(stream);
    sim.settle()?;
    let entry = sim.last_entry()?;
    assert_eq!((&entry["ended"], &entry["completion_tokens"]), (&json!("client_gone"), &json!(100)));
    Ok(())
}

#[test]
fn bodies_break_off_where_the_script_says() -> Outcome {
    let sim = Sim::start()?;
    for words in ["cut_after_bytes=100", "reset_after_bytes=100"] {
        for body in [chat(&format!("[[sim {words}]]")), streamed(&format!("[[sim {words}]]"))] {
            let answer = sim.chat(OPENAI, &body)?;
            assert_eq!((answer.status, answer.body.len(), answer.whole), (200, 100, false), "{words}");
            assert_eq!(sim.last_entry()?["ended"], "fault");
        }
    }
    let answer = sim.chat(OPENAI, &streamed("[[sim error_midstream=1 tokens=30]]"))?;
    assert_eq!(answer.events().last().and_then(|event| event.pointer("/error/type").cloned()), Some(json!("server_error")));
    assert_eq!(sim.last_entry()?["completion_tokens"], 30);
    let gzip = sim.chat(OPENAI, &chat("[[sim gzip=1]]"))?;
    assert_eq!((gzip.header("content-encoding"), gzip.body.first()), (Some("gzip"), Some(&0x1f)));
    Ok(())
}

#[test]
fn trailers_follow_a_body_when_the_client_takes_them() -> Outcome {
    let sim = Sim::start()?;
    let mut stream = sim.connect()?;
    let body = streamed("[[sim trailers=1]]").to_string();
    let headers = format!("{OPENAI}te: trailers\r\n");
    stream.write_all(request("POST", "/v1/chat/completions", &headers, &body).as_bytes())?;
    let mut raw = String::new();
    stream.read_to_string(&mut raw)?;
    assert!(raw.ends_with("\r\n0\r\nx-sim-trailer: 1\r\n\r\n"), "{raw}");
    Ok(())
}

#[test]
fn queued_faults_meet_the_next_requests_that_fit() -> Outcome {
    let sim = Sim::start()?;
    let fault = json!([{"provider": "openai", "credential": "o", "count": 2, "sim": "status=429 retry_after=7"}]);
    sim.control("POST", "/control/faults", Some(&fault))?;
    assert_eq!(sim.messages(ANTHROPIC, &claude("hi", false))?.status, 200);
    let first = sim.chat(OPENAI, &chat("hi"))?;
    assert_eq!((first.status, first.header("retry-after")), (429, Some("7")));
    sim.control("DELETE", "/control/faults", None)?;
    assert_eq!(sim.chat(OPENAI, &chat("hi"))?.status, 200);
    Ok(())
}

#[test]
fn what_must_not_arrive_is_seen_on_the_wire() -> Outcome {
    let sim = Sim::start()?;
    let body = r#"{"model":"gpt-4o","messages":[{"role":"user","content":"vk_0123456789abc"}],"model":"o3"}"#;
    let headers = format!("{OPENAI}x-keyward-plan: 1\r\ncontent-length: {}\r\n", body.len());
    sim.send("POST", "/v1/chat/completions", &headers, body)?;
    let mut garbage = sim.connect()?;
    garbage.write_all(b"{\"left\":\"over\"}\r\n\r\n")?;
    assert_eq!(read(&mut garbage)?.status, 400);
    let mut truncated = sim.connect()?;
    truncated.write_all(b"POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{}")?;
    drop(truncated);
    let found = loop {
        let violations = sim.settle()?["violations"].to_string();
        if violations.contains("parse_error") && violations.contains("body_length") {
            break violations;
        }
    };
    for what in [
        "virtual_key: body",
        "several_content_lengths: 2",
        "internal_header: x-keyward-plan",
        "duplicate_key: model",
        "body_length: announced 50, got less",
    ] {
        assert!(found.contains(what), "{what} is not in {found}");
    }
    sim.control("POST", "/control/reset", None)?;
    assert_eq!(sim.totals()?["violation_count"], 0);
    Ok(())
}

#[test]
fn one_account_has_its_objects_in_common_and_the_books_say_who_named_them() -> Outcome {
    let sim = Sim::start()?;
    sim.credentials(&json!([
        {"id": "o", "provider": "openai", "secret": "sk-openai-test", "account": "both"},
        {"id": "p", "provider": "openai", "secret": "sk-openai-more", "account": "both"},
        {"id": "q", "provider": "openai", "secret": "sk-openai-else"},
    ]))?;
    let auth = |secret: &str| format!("authorization: Bearer {secret}\r\n");
    let made = sim.send("POST", "/v1/responses", OPENAI, r#"{"model":"gpt-4o","input":"[[sim tokens=4]]"}"#)?.json()?;
    let (id, seq) = (made["id"].as_str().ok_or("no id")?.to_owned(), sim.last_entry()?["seq"].clone());
    let path = format!("/v1/responses/{id}");
    assert_eq!(sim.send("GET", &path, &auth("sk-openai-more"), "")?.json()?, made);
    let reference = json!({"kind": "response", "id": id, "how": "read", "created_seq": seq, "created_by": "o"});
    assert_eq!(sim.last_entry()?["referenced"], json!([reference]));
    assert_eq!(sim.send("GET", &path, &auth("sk-openai-else"), "")?.status, 404);
    assert_eq!(sim.last_entry()?["referenced"][0]["created_seq"], Value::Null);
    let objects = sim.control("GET", "/control/objects", None)?;
    assert_eq!(objects["accounts"]["both"][0], json!({"kind": "response", "id": id, "created_seq": seq, "credential": "o"}));
    sim.control("POST", "/control/reset", None)?;
    assert_eq!(sim.send("GET", &path, OPENAI, "")?.status, 404);
    Ok(())
}

#[test]
fn a_client_that_leaves_a_streamed_response_pays_what_was_made() -> Outcome {
    let sim = Sim::start()?;
    let body = json!({"model": "gpt-4o", "stream": true, "input": "[[sim tokens=1000 per_delta=1 pace_ms=60000]]"}).to_string();
    let mut stream = sim.connect()?;
    stream.write_all(request("POST", "/v1/responses", OPENAI, &body).as_bytes())?;
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains("output_text.delta") {
        let mut buffer = [0; 4096];
        let read = stream.read(&mut buffer)?;
        seen.extend_from_slice(&buffer[..read]);
    }
    drop(stream);
    sim.settle()?;
    let entry = sim.last_entry()?;
    assert_eq!((&entry["ended"], &entry["completion_tokens"]), (&json!("client_gone"), &json!(17)));
    Ok(())
}
