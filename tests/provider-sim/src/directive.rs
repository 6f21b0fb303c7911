//! `[[sim tokens=200 pace_ms=10 ...]]`: how one request is steered from inside its last user message, and the same words
//! as queued through the control API.

use bytes::Bytes;
use hyper::header::{self as names, HeaderName, HeaderValue};
use serde_json::Value;

/// One scripted call of a tool.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolScript {
    pub name: String,
    /// JSON text of the arguments.
    pub args: String,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Directive {
    /// Visible output tokens.
    pub tokens: Option<u64>,
    /// Hidden output tokens.
    pub reasoning: Option<u64>,
    /// Milliseconds between deltas.
    pub pace_ms: Option<u64>,
    /// Tokens in each delta.
    pub per_delta: Option<u64>,
    pub tools: Vec<ToolScript>,
    /// Answers with this HTTP error.
    pub status: Option<u16>,
    /// The error's code (OpenAI), type (Anthropic) or status (Gemini); alone it brings its own HTTP status.
    pub error: Option<String>,
    /// Seconds.
    pub retry_after: Option<u64>,
    /// Milliseconds before the headers.
    pub first_ms: Option<u64>,
    /// Milliseconds between the headers and the first byte of the body.
    pub silent_ms: Option<u64>,
    /// Headers of the answer, before those that the simulator has itself.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// No figures of limits, nor when to try again, but for what `headers` says.
    pub no_limit_headers: bool,
    /// What the error's body is.
    pub body: Option<Bytes>,
    pub cut_after_bytes: Option<u64>,
    pub reset_after_bytes: Option<u64>,
    /// Body bytes in each write.
    pub split: Option<u64>,
    pub cache_read: Option<u64>,
    pub cache_write: Option<u64>,
    pub pad_bytes: Option<u64>,
    pub gzip: bool,
    pub trailers: bool,
    pub crlf: bool,
    pub no_usage: bool,
    pub error_midstream: bool,
    /// Why the answer ends, in the words of its dialect.
    pub finish: Option<String>,
    /// Why the prompt is not answered at all.
    pub block: Option<String>,
    /// The error stands in a list of one, as Google's sometimes does.
    pub wrapped: bool,
    /// A response that ends as failed.
    pub failed: bool,
    pub echo: bool,
    pub unicode: bool,
    /// Goes on beyond the output limit of the request.
    pub runaway: bool,
}

const DEFAULT_PER_DELTA: u64 = 3;

/// A directive found in a text, with the bytes it occupies.
#[derive(Debug, PartialEq)]
pub struct Found {
    pub directive: Directive,
    pub start: usize,
    pub end: usize,
}

impl Directive {
    /// The first directive of `text`. A word that isn't known is an error, so that a typo can't pass as a plain request.
    pub fn find(text: &str) -> Result<Option<Found>, String> {
        const OPEN: &str = "[[sim";
        let Some(start) = text.find(OPEN) else { return Ok(None) };
        let rest = text.get(start + OPEN.len()..).unwrap_or_default();
        let (directive, left) = Directive::words(rest, true)?;
        Ok(Some(Found { directive, start, end: text.len() - left.len() }))
    }

    /// Tokens in each delta.
    pub fn deltas_of(&self) -> usize {
        usize::try_from(self.per_delta.unwrap_or(DEFAULT_PER_DELTA)).unwrap_or(usize::MAX)
    }

    /// Words alone, as a queued fault has them.
    pub fn parse(words: &str) -> Result<Directive, String> {
        Directive::words(words, false).map(|(directive, _)| directive)
    }

    /// What `self` says, completed by `other`.
    pub fn or(self, other: Directive) -> Directive {
        Directive {
            tokens: self.tokens.or(other.tokens),
            reasoning: self.reasoning.or(other.reasoning),
            pace_ms: self.pace_ms.or(other.pace_ms),
            per_delta: self.per_delta.or(other.per_delta),
            tools: if self.tools.is_empty() { other.tools } else { self.tools },
            status: self.status.or(other.status),
            error: self.error.or(other.error),
            retry_after: self.retry_after.or(other.retry_after),
            first_ms: self.first_ms.or(other.first_ms),
            silent_ms: self.silent_ms.or(other.silent_ms),
            headers: if self.headers.is_empty() { other.headers } else { self.headers },
            no_limit_headers: self.no_limit_headers || other.no_limit_headers,
            body: self.body.or(other.body),
            cut_after_bytes: self.cut_after_bytes.or(other.cut_after_bytes),
            reset_after_bytes: self.reset_after_bytes.or(other.reset_after_bytes),
            split: self.split.or(other.split),
            cache_read: self.cache_read.or(other.cache_read),
            cache_write: self.cache_write.or(other.cache_write),
            pad_bytes: self.pad_bytes.or(other.pad_bytes),
            gzip: self.gzip || other.gzip,
            trailers: self.trailers || other.trailers,
            crlf: self.crlf || other.crlf,
            no_usage: self.no_usage || other.no_usage,
            error_midstream: self.error_midstream || other.error_midstream,
            finish: self.finish.or(other.finish),
            block: self.block.or(other.block),
            wrapped: self.wrapped || other.wrapped,
            failed: self.failed || other.failed,
            echo: self.echo || other.echo,
            unicode: self.unicode || other.unicode,
            runaway: self.runaway || other.runaway,
        }
    }

    fn words(mut rest: &str, bracketed: bool) -> Result<(Directive, &str), String> {
        let mut directive = Directive::default();
        loop {
            rest = rest.trim_start();
            if let Some(left) = rest.strip_prefix("]]").filter(|_| bracketed) {
                return Ok((directive, left));
            }
            if rest.is_empty() {
                return if bracketed { Err("the directive has no closing ]]".into()) } else { Ok((directive, rest)) };
            }
            let (key, after) = rest.split_once('=').ok_or_else(|| format!("expected key=value at `{}`", head(rest)))?;
            let (value, left) = value(after, bracketed)?;
            directive.set(key, &value)?;
            rest = left;
        }
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        let number = || value.parse::<u64>().map_err(|_| format!("`{}` needs a number, not `{}`", key, head(value)));
        let flag = || match value {
            "1" | "true" => Ok(true),
            "0" | "false" => Ok(false),
            _ => Err(format!("`{}` is 0 or 1, not `{}`", key, head(value))),
        };
        match key {
            "tokens" => self.tokens = Some(number()?),
            "reasoning" => self.reasoning = Some(number()?),
            "pace_ms" => self.pace_ms = Some(number()?),
            "per_delta" => self.per_delta = Some(number()?.max(1)),
            "tool" => self.tools.push(ToolScript { name: value.to_owned(), args: "{}".into() }),
            "args" => match self.tools.last_mut() {
                Some(tool) => value.clone_into(&mut tool.args),
                None => return Err("`args` must follow `tool`".into()),
            },
            "status" => match number()?.try_into() {
                Ok(status @ 400..600) => self.status = Some(status),
                _ => return Err("`status` is an error status, 400 to 599".into()),
            },
            "error" => self.error = Some(value.to_owned()),
            "retry_after" => self.retry_after = Some(number()?),
            "first_ms" => self.first_ms = Some(number()?),
            "silent_ms" => self.silent_ms = Some(number()?),
            "header" => self.headers.push(header(value)?),
            "no_limit_headers" => self.no_limit_headers = flag()?,
            "body" => self.body = Some(unescaped(value)?.into()),
            "cut_after_bytes" => self.cut_after_bytes = Some(number()?),
            "reset_after_bytes" => self.reset_after_bytes = Some(number()?),
            "split" => self.split = Some(number()?.max(1)),
            "cache_read" => self.cache_read = Some(number()?),
            "cache_write" => self.cache_write = Some(number()?),
            "pad_bytes" => self.pad_bytes = Some(number()?),
            "gzip" => self.gzip = flag()?,
            "trailers" => self.trailers = flag()?,
            "crlf" => self.crlf = flag()?,
            "no_usage" => self.no_usage = flag()?,
            "error_midstream" => self.error_midstream = flag()?,
            "finish" => self.finish = Some(word(key, value)?),
            "block" => self.block = Some(word(key, value)?),
            "wrapped" => self.wrapped = flag()?,
            "failed" => self.failed = flag()?,
            "echo" => self.echo = flag()?,
            "unicode" => self.unicode = flag()?,
            "runaway" => self.runaway = flag()?,
            _ => return Err(format!("unknown word `{}`", head(key))),
        }
        Ok(())
    }
}

/// A value and what follows it. JSON is read as JSON, since it may hold spaces and `]]`.
fn value(text: &str, bracketed: bool) -> Result<(String, &str), String> {
    if text.starts_with(['{', '[', '"']) {
        let mut stream = serde_json::Deserializer::from_str(text).into_iter::<Value>();
        let parsed = stream.next().and_then(Result::ok).ok_or_else(|| format!("bad JSON at `{}`", head(text)))?;
        let (raw, left) = text.split_at(stream.byte_offset());
        return Ok((parsed.as_str().map_or_else(|| raw.to_owned(), str::to_owned), left));
    }
    let mut end = text.find(char::is_whitespace).unwrap_or(text.len());
    if bracketed {
        end = end.min(text.find("]]").unwrap_or(text.len()));
    }
    let (raw, left) = text.split_at(end);
    Ok((raw.to_owned(), left))
}

/// A reason as the dialects write them: letters and underscores.
fn word(key: &str, value: &str) -> Result<String, String> {
    let fits = !value.is_empty() && value.chars().all(|char| char.is_ascii_alphabetic() || char == '_');
    if fits { Ok(value.to_owned()) } else { Err(format!("`{key}` is one word, not `{}`", head(value))) }
}

/// `NAME:VALUE`, the value escaped as in a URL.
fn header(text: &str) -> Result<(HeaderName, HeaderValue), String> {
    let bad = || format!("`header` needs NAME:VALUE, not `{}`", head(text));
    let (name, value) = text.split_once(':').ok_or_else(bad)?;
    let name: HeaderName = name.parse().map_err(|_| bad())?;
    if [names::CONTENT_LENGTH, names::TRANSFER_ENCODING, names::CONNECTION].contains(&name) {
        return Err(format!("`{name}` frames the answer and can't be set"));
    }
    Ok((name, HeaderValue::from_bytes(&unescaped(value)?).map_err(|_| bad())?))
}

/// The bytes of a text in which `%XX` is the byte of this number.
fn unescaped(text: &str) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digits = rest.split_at_checked(2).filter(|(digits, _)| digits.iter().all(u8::is_ascii_hexdigit));
        let byte = digits.and_then(|(digits, _)| u8::from_str_radix(str::from_utf8(digits).ok()?, 16).ok());
        let (Some(byte), Some((_, after))) = (byte, digits) else {
            return Err(format!("a lone % in `{}`: write %25", head(text)));
        };
        bytes.push(byte);
        rest = after;
    }
    Ok(bytes)
}

fn head(text: &str) -> String {
    text.chars().take(30).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_understood() -> Result<(), String> {
        let words = "tokens=200 pace_ms=10 per_delta=3 reasoning=50 tool=get_weather args={\"city\":\"Paris\"} status=429 \
                     error=insufficient_quota retry_after=2 first_ms=500 silent_ms=60000 cut_after_bytes=100 \
                     reset_after_bytes=101 split=1 gzip=1 trailers=1 crlf=1 no_usage=1 error_midstream=1 failed=1 cache_read=10 \
                     cache_write=11 echo=1 pad_bytes=100000 unicode=1 runaway=1 header=retry-after:-1 header=\"x-a:b, c\" \
                     no_limit_headers=1 body=%7B%22a%22:%20%25%7D finish=SAFETY block=OTHER wrapped=1";
        let expected = Directive {
            tokens: Some(200),
            reasoning: Some(50),
            pace_ms: Some(10),
            per_delta: Some(3),
            tools: vec![ToolScript { name: "get_weather".into(), args: "{\"city\":\"Paris\"}".into() }],
            status: Some(429),
            error: Some("insufficient_quota".into()),
            retry_after: Some(2),
            first_ms: Some(500),
            silent_ms: Some(60_000),
            headers: vec![
                (names::RETRY_AFTER, HeaderValue::from_static("-1")),
                (HeaderName::from_static("x-a"), HeaderValue::from_static("b, c")),
            ],
            no_limit_headers: true,
            body: Some(Bytes::from_static(b"{\"a\": %}")),
            cut_after_bytes: Some(100),
            reset_after_bytes: Some(101),
            split: Some(1),
            cache_read: Some(10),
            cache_write: Some(11),
            pad_bytes: Some(100_000),
            gzip: true,
            trailers: true,
            crlf: true,
            no_usage: true,
            error_midstream: true,
            finish: Some("SAFETY".into()),
            block: Some("OTHER".into()),
            wrapped: true,
            failed: true,
            echo: true,
            unicode: true,
            runaway: true,
        };
        assert_eq!(Directive::parse(words)?, expected);
        assert_eq!(expected.clone().or(Directive::default()), expected);
        assert_eq!(Directive::default().or(expected.clone()), expected);
        Ok(())
    }

    #[test]
    fn it_is_found_inside_a_message_even_around_brackets() -> Result<(), String> {
        let text = "before [[sim tool=t args={\"a\": [[1]]} tokens=5]] after]]";
        let found = Directive::find(text)?.ok_or("not found")?;
        assert_eq!(found.directive.tokens, Some(5));
        assert_eq!(found.directive.tools.first().map(|tool| tool.args.as_str()), Some("{\"a\": [[1]]}"));
        assert_eq!((&text[..found.start], &text[found.end..]), ("before ", " after]]"));
        assert_eq!(Directive::find("nothing here")?, None);
        assert_eq!(Directive::find("[[sim]]")?.map(|found| found.directive), Some(Directive::default()));
        Ok(())
    }

    #[test]
    fn mistakes_are_named() {
        for (words, complaint) in [
            ("[[sim tokns=5]]", "unknown word `tokns`"),
            ("[[sim tokens=x]]", "`tokens` needs a number"),
            ("[[sim tokens=5", "no closing"),
            ("[[sim gzip=yes]]", "0 or 1"),
            ("[[sim status=200]]", "error status"),
            ("[[sim args={}]]", "must follow"),
            ("[[sim tool=a args={]]", "bad JSON"),
            ("[[sim lonely]]", "key=value"),
            ("[[sim header=retry-after]]", "NAME:VALUE"),
            ("[[sim header=a:b%0d%0ac:d]]", "NAME:VALUE"),
            ("[[sim header=Content-Length:1]]", "frames the answer"),
            ("[[sim body=100%]]", "lone %"),
            ("[[sim finish=\"a b\"]]", "one word"),
        ] {
            let error = Directive::find(words).err().unwrap_or_default();
            assert!(error.contains(complaint), "{words}: {error}");
        }
    }
}
