//! Transcriptions: sound comes as a form, is paid by its length, and says what the script says.

use super::fields::{missing, unsupported};
use super::files::{field, form};
use super::response::padding;
use super::{error, sound};
use crate::answer::{self, Answer, Asked, Extras, Wish};
use crate::api::Served;
use crate::call::{Call, Ready, Shape};
use crate::directive::Directive;
use crate::frames::{Frame, Frames};
use crate::models::{Kind, Model, Usage};
use crate::multipart::Field;
use crate::provider::{ApiError, Provider};
use crate::text::quoted;
use crate::ticket::Bill;
use crate::tokens::{self, Text};

const FORMATS: &[&str] = &["json", "text", "srt", "verbose_json", "vtt"];
/// Milliseconds of sound in one token.
const MS_PER_TOKEN: u64 = 100;

struct Request {
    model: &'static Model,
    format: String,
    /// Words that the sound may have in it; also where a directive goes.
    prompt: String,
    language: Option<String>,
    words: bool,
    stream: bool,
    ms: u64,
}

pub fn create(call: &mut Call) -> Result<Served, ApiError> {
    let form = form(call)?;
    let request = parse(&form)?;
    let (script, said) = call.steer(Some(request.model), request.stream, &request.prompt)?;
    let answer = answer::compose(&request.asked(), &script, &said, call.shared().bench);
    let usage = request.usage(&answer);
    call.admit(request.model, usage.prompt + usage.completion, &script)?;
    call.charge(Bill::new(request.model, usage, request.stream), None);
    let text = answer.choices.into_iter().next().map(|choice| choice.text).unwrap_or_default();
    let told = if script.no_usage { String::new() } else { format!(r#","usage":{}"#, request.told(&usage)) };
    if request.stream {
        let frames = stream(&text, &told, &script);
        return Ok(Ready::events(frames, script, |_| error::event(&error::server_error())).into());
    }
    let (body, shape) = match request.format.as_str() {
        "text" => (format!("{}\n", text.as_str()), Shape::Text),
        "srt" => (format!("1\n{} --> {}\n{}\n\n\n", clock(0, ','), clock(request.ms, ','), text.as_str()), Shape::Text),
        "vtt" => (format!("WEBVTT\n\n{} --> {}\n{}\n\n", clock(0, '.'), clock(request.ms, '.'), text.as_str()), Shape::Text),
        "verbose_json" => (request.verbose(&text, &told), Shape::Json),
        _ => (format!(r#"{{"text":{}{told}{}}}"#, quoted(text.as_str()), padding(&script)), Shape::Json),
    };
    Ok(Ready::whole(body, shape, script).into())
}

fn parse(form: &[Field]) -> Result<Request, ApiError> {
    let name = field(form, "model").ok_or_else(|| ApiError::invalid("you must provide a model parameter"))?;
    let model = Model::find(Provider::Openai, &name).ok_or_else(|| error::model_not_found(&name))?;
    let fits = |kind| matches!(kind, Kind::Listening { .. } | Kind::ListeningTokens { .. });
    if !fits(model.kind) {
        return Err(error::wrong_kind(model, fits));
    }
    let format = field(form, "response_format").unwrap_or_else(|| "json".into());
    if !FORMATS.contains(&format.as_str()) {
        return Err(unsupported("response_format", &format, FORMATS));
    }
    let by_token = matches!(model.kind, Kind::ListeningTokens { .. });
    if by_token && format != "json" && format != "text" {
        let message = format!("response_format '{format}' is not compatible with model '{name}'. Use 'json' or 'text' instead.");
        return Err(ApiError::invalid(message).param("response_format").code("unsupported_value"));
    }
    let file = form.iter().find(|field| field.name == "file").ok_or_else(|| missing("file"))?;
    let ms = sound::milliseconds(file.data).ok_or_else(|| {
        ApiError::invalid(
            "Invalid file format. Supported formats: ['flac', 'm4a', 'mp3', 'mp4', 'mpeg', 'mpga', 'oga', 'ogg', 'wav', 'webm']",
        )
    })?;
    if ms < MS_PER_TOKEN {
        return Err(ApiError::invalid("Audio file is too short. Minimum audio length is 0.1 seconds.")
            .param("file")
            .code("audio_too_short"));
    }
    let granularity = |field: &&Field| field.name.starts_with("timestamp_granularities");
    Ok(Request {
        model,
        format,
        prompt: field(form, "prompt").unwrap_or_default(),
        language: field(form, "language"),
        words: form.iter().filter(granularity).any(|field| field.data == b"word"),
        // The older model takes the wish and doesn't heed it.
        stream: by_token && field(form, "stream").is_some_and(|stream| stream == "true"),
        ms,
    })
}

impl Request {
    fn asked(&self) -> Asked {
        let by_time = matches!(self.model.kind, Kind::Listening { .. });
        Asked {
            model: self.model,
            stream: self.stream,
            include_usage: true,
            choices: 1,
            limit: if by_time { u64::MAX } else { self.model.max_output },
            stop: Vec::new(),
            tools: Vec::new(),
            forced_tool: None,
            prompt_tokens: 0,
            last_user: String::new(),
            after_tools: false,
            wish: Wish::default(),
            extras: Extras::default(),
        }
    }

    /// Begun seconds count. Tokens are counted for the model that is paid by them alone.
    fn usage(&self, answer: &Answer) -> Usage {
        let seconds = self.ms.div_ceil(1000);
        if matches!(self.model.kind, Kind::Listening { .. }) {
            return Usage { seconds, ..Usage::default() };
        }
        let audio = self.ms.div_ceil(MS_PER_TOKEN);
        let prompt = audio + tokens::count(&self.prompt);
        Usage { prompt, audio, completion: answer.usage.completion, seconds, ..Usage::default() }
    }

    fn told(&self, usage: &Usage) -> String {
        if matches!(self.model.kind, Kind::Listening { .. }) {
            return format!(r#"{{"type":"duration","seconds":{}}}"#, usage.seconds);
        }
        format!(
            r#"{{"type":"tokens","total_tokens":{},"input_tokens":{},"input_token_details":{{"text_tokens":{},"audio_tokens":{}}},"output_tokens":{}}}"#,
            usage.prompt + usage.completion,
            usage.prompt,
            usage.prompt - usage.audio,
            usage.audio,
            usage.completion,
        )
    }

    fn verbose(&self, text: &Text, told: &str) -> String {
        let end = decimal(self.ms);
        let words: Vec<String> =
            text.deltas(1).map(|(word, _)| format!(r#"{{"word":{},"start":0.0,"end":{end}}}"#, quoted(word.trim()))).collect();
        let words = if self.words { format!(r#","words":[{}]"#, words.join(",")) } else { String::new() };
        let segment = format!(
            r#"{{"id":0,"seek":0,"start":0.0,"end":{end},"text":{},"tokens":[],"temperature":0.0,"avg_logprob":-0.1,"compression_ratio":1.2,"no_speech_prob":0.01}}"#,
            quoted(text.as_str()),
        );
        let language = self.language.as_deref().filter(|language| *language != "en").unwrap_or("english");
        format!(
            r#"{{"task":"transcribe","language":{},"duration":{end},"text":{},"segments":[{segment}]{words}{told}}}"#,
            quoted(language),
            quoted(text.as_str()),
        )
    }
}

fn stream(text: &Text, told: &str, script: &Directive) -> Vec<Frame> {
    let event = |kind: &str, rest: &str| format!("data: {{\"type\":\"transcript.text.{kind}\",{rest}}}\n\n");
    let mut frames = Frames::default();
    for (piece, tokens) in text.deltas(script.deltas_of()) {
        frames.push_delta(event("delta", &format!(r#""delta":{}"#, quoted(piece))), tokens);
    }
    frames.push(event("done", &format!(r#""text":{}{told}"#, quoted(text.as_str()))));
    frames.push("data: [DONE]\n\n".into());
    frames.into_vec()
}

/// Seconds with three places.
fn decimal(ms: u64) -> String {
    format!("{}.{:03}", ms / 1000, ms % 1000)
}

/// A place in time as subtitles have it.
fn clock(ms: u64, point: char) -> String {
    format!("{:02}:{:02}:{:02}{point}{:03}", ms / 3_600_000, ms / 60_000 % 60, ms / 1000 % 60, ms % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(model: &str, ms: u64) -> Result<Request, ApiError> {
        let wav = sound::wav(ms);
        let field = |name: &str, data| Field { name: name.into(), filename: None, data };
        parse(&[field("file", wav.as_slice()), field("model", model.as_bytes()), field("prompt", b"hint")])
    }

    fn cost(model: &str, ms: u64, words: &str) -> Result<(u64, Usage), ApiError> {
        let request = asked(model, ms)?;
        let script = Directive::parse(words).map_err(ApiError::invalid)?;
        let usage = request.usage(&answer::compose(&request.asked(), &script, "", false));
        Ok((request.model.cost(&usage), usage))
    }

    #[test]
    fn time_is_paid_by_the_second_begun_and_sound_by_the_tenth() -> Result<(), ApiError> {
        let (spent, usage) = cost("whisper-1", 8_470, "tokens=20")?;
        assert_eq!((spent, usage.seconds, usage.completion), (900_000, 9, 0));
        let (spent, usage) = cost("gpt-4o-transcribe", 8_470, "tokens=20")?;
        assert_eq!((usage.audio, usage.prompt, usage.completion), (85, 86, 20));
        assert_eq!(spent, 85 * 6_000 + 2_500 + 20 * 10_000);
        Ok(())
    }

    #[test]
    fn too_little_sound_is_refused() {
        let code = asked("whisper-1", 50).err().and_then(|error| error.code);
        assert_eq!(code.as_deref(), Some("audio_too_short"));
        assert_eq!(clock(3_723_004, ','), "01:02:03,004");
    }
}
