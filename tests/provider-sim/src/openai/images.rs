//! Pictures: by the piece (DALL-E) or by the token.

use super::error;
use super::fields::{self, Fields, flag, integer, missing, too_long, unsupported, word};
use super::response::padding;
use crate::api::Served;
use crate::call::{Call, Ready, Shape};
use crate::frames::{Frame, Frames};
use crate::models::{Kind, Model, Usage};
use crate::provider::ApiError;
use crate::text::{identifier, quoted, unix_us};
use crate::ticket::Bill;
use crate::tokens;

const KNOWN: &[&str] = &[
    "background",
    "model",
    "moderation",
    "n",
    "output_compression",
    "output_format",
    "partial_images",
    "prompt",
    "quality",
    "response_format",
    "size",
    "stream",
    "style",
    "user",
];
const FORMATS: &[&str] = &["png", "jpeg", "webp"];
/// One black pixel: what is in a picture matters to no test.
const PIXEL: &str = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==";
/// Output tokens for each picture shown before the last one.
const PARTIAL_TOKENS: u64 = 100;

/// One kind of picture that can be had: its price in nanodollars, or its tokens.
struct Sort {
    model: &'static str,
    quality: &'static str,
    size: &'static str,
    price: u64,
    tokens: u64,
}

const fn piece(model: &'static str, quality: &'static str, size: &'static str, mills: u64) -> Sort {
    Sort { model, quality, size, price: mills * 1_000_000, tokens: 0 }
}

const fn painted(quality: &'static str, size: &'static str, tokens: u64) -> Sort {
    Sort { model: "gpt-image-1", quality, size, price: 0, tokens }
}

/// List prices in thousandths of a dollar; of each model, the first is what it makes by default. Where `auto` leaves the choice
/// to the model this one takes the dearest: a gate that expects less is to be found out.
const SORTS: [Sort; 18] = [
    piece("dall-e-2", "standard", "1024x1024", 20),
    piece("dall-e-2", "standard", "512x512", 18),
    piece("dall-e-2", "standard", "256x256", 16),
    piece("dall-e-3", "standard", "1024x1024", 40),
    piece("dall-e-3", "standard", "1024x1792", 80),
    piece("dall-e-3", "standard", "1792x1024", 80),
    piece("dall-e-3", "hd", "1024x1024", 80),
    piece("dall-e-3", "hd", "1024x1792", 120),
    piece("dall-e-3", "hd", "1792x1024", 120),
    painted("high", "1024x1536", 6240),
    painted("high", "1536x1024", 6208),
    painted("high", "1024x1024", 4160),
    painted("medium", "1024x1536", 1584),
    painted("medium", "1536x1024", 1568),
    painted("medium", "1024x1024", 1056),
    painted("low", "1024x1536", 408),
    painted("low", "1536x1024", 400),
    painted("low", "1024x1024", 272),
];

struct Request {
    model: &'static Model,
    sort: &'static Sort,
    prompt: String,
    n: u64,
    stream: bool,
    partial: u64,
    format: String,
    background: String,
    base64: bool,
}

pub fn create(call: &mut Call) -> Result<Served, ApiError> {
    let request = parse(call.body)?;
    let (script, _) = call.steer(Some(request.model), request.stream, &request.prompt)?;
    let usage = request.usage();
    call.admit(request.model, usage.prompt + usage.completion, &script)?;
    // A picture begun is a picture paid, whoever still waits for it.
    call.charge(Bill { pieces: request.sort.price * request.n, ..Bill::new(request.model, usage, false) }, None);
    let told = if script.no_usage { String::new() } else { format!(r#","usage":{}"#, told(&usage)) };
    if request.stream {
        let frames = request.stream(&told);
        return Ok(Ready::events(frames, script, |_| error::event(&error::server_error())).into());
    }
    let text = request.document(&told, &padding(&script));
    Ok(Ready::whole(text, Shape::Json, script).into())
}

fn parse(body: &[u8]) -> Result<Request, ApiError> {
    let fields = fields::object(body)?;
    fields::only(&fields, KNOWN)?;
    let model = fields::model(&fields, Some("dall-e-2"), |kind| matches!(kind, Kind::Picture | Kind::PictureTokens))?;
    let by_token = model.kind == Kind::PictureTokens;
    let foreign: &[&str] = if by_token { &["response_format", "style"] } else { &["background", "output_format", "partial_images"] };
    if let Some(unknown) = foreign.iter().find(|name| fields.contains_key(**name)) {
        let error = ApiError::invalid(format!("Unknown parameter: '{unknown}'."));
        return Err(error.param(*unknown).code("unknown_parameter"));
    }
    let prompt = fields::text(&fields, "prompt")?.ok_or_else(|| missing("prompt"))?;
    let length = prompt.chars().count() as u64;
    if length > model.context {
        return Err(too_long("prompt", model.context, length));
    }
    let most = if model.name == "dall-e-3" { 1 } else { 10 };
    let stream = by_token && flag(&fields, "stream")?.unwrap_or(false);
    Ok(Request {
        model,
        sort: sort(&fields, model)?,
        prompt: prompt.to_owned(),
        n: integer(&fields, "n", 1, most)?.unwrap_or(1),
        stream,
        partial: if stream { integer(&fields, "partial_images", 0, 3)?.unwrap_or(0) } else { 0 },
        format: word(&fields, "output_format", FORMATS)?.unwrap_or("png").to_owned(),
        background: word(&fields, "background", &["transparent", "opaque", "auto"])?.unwrap_or("opaque").replace("auto", "opaque"),
        base64: by_token || word(&fields, "response_format", &["url", "b64_json"])? == Some("b64_json"),
    })
}

fn sort(fields: &Fields, model: &Model) -> Result<&'static Sort, ApiError> {
    let sorts = || SORTS.iter().filter(|sort| sort.model == model.name);
    let asked = |name: &str| fields::text(fields, name).map(|given| given.filter(|given| *given != "auto"));
    let (quality, size) = (asked("quality")?, asked("size")?);
    let fits = |sort: &&Sort| quality.is_none_or(|quality| quality == sort.quality) && size.is_none_or(|size| size == sort.size);
    let known = |name: &str, given: Option<&str>, of: fn(&Sort) -> &'static str| {
        let mut words: Vec<&str> = sorts().map(of).collect();
        words.dedup();
        given.filter(|given| !words.contains(given)).map(|given| unsupported(name, given, &words))
    };
    sorts().find(fits).ok_or_else(|| {
        let wrong = known("quality", quality, |sort| sort.quality).or_else(|| known("size", size, |sort| sort.size));
        wrong.unwrap_or_else(|| ApiError::invalid("This size is not available in this quality."))
    })
}

impl Request {
    fn usage(&self) -> Usage {
        if self.model.kind != Kind::PictureTokens {
            return Usage { images: self.n, ..Usage::default() };
        }
        let image = self.n * (self.sort.tokens + self.partial * PARTIAL_TOKENS);
        Usage { prompt: tokens::count(&self.prompt), completion: image, image, images: self.n, ..Usage::default() }
    }

    fn look(&self) -> String {
        let Request { background, format, sort, .. } = self;
        format!(r#""background":"{background}","output_format":"{format}","quality":"{}","size":"{}""#, sort.quality, sort.size)
    }

    fn document(&self, usage: &str, padding: &str) -> String {
        let revised = if self.model.name == "dall-e-3" { format!(r#""revised_prompt":{},"#, quoted(&self.prompt)) } else { String::new() };
        let one = |_| {
            if self.base64 {
                return format!(r#"{{{revised}"b64_json":"{PIXEL}"}}"#);
            }
            // A name that leads nowhere: nothing is to be fetched in a test.
            format!(r#"{{{revised}"url":"https://images.invalid/{}.png"}}"#, identifier("img-", 24))
        };
        let data: Vec<String> = (0..self.n).map(one).collect();
        let created = unix_us() / 1_000_000;
        if self.model.kind == Kind::Picture {
            return format!(r#"{{"created":{created},"data":[{}]{padding}}}"#, data.join(","));
        }
        format!(r#"{{"created":{created},{},"data":[{}]{usage}{padding}}}"#, self.look(), data.join(","))
    }

    fn stream(&self, usage: &str) -> Vec<Frame> {
        let event = |kind: &str, rest: &str| {
            let (created, look) = (unix_us() / 1_000_000, self.look());
            format!(
                "event: image_generation.{kind}\ndata: {{\"type\":\"image_generation.{kind}\",\"created_at\":{created},{look},\
                 \"b64_json\":\"{PIXEL}\"{rest}}}\n\n"
            )
        };
        let mut frames = Frames::default();
        for index in 0..self.partial {
            frames.push_delta(event("partial_image", &format!(r#","partial_image_index":{index}"#)), PARTIAL_TOKENS);
        }
        for _ in 0..self.n {
            frames.push_delta(event("completed", usage), self.sort.tokens);
        }
        frames.into_vec()
    }
}

fn told(usage: &Usage) -> String {
    format!(
        r#"{{"input_tokens":{prompt},"input_tokens_details":{{"image_tokens":0,"text_tokens":{prompt}}},"output_tokens":{made},"output_tokens_details":{{"image_tokens":{made},"text_tokens":0}},"total_tokens":{}}}"#,
        usage.prompt + usage.completion,
        prompt = usage.prompt,
        made = usage.completion,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn price(body: &str) -> Result<u64, ApiError> {
        let request = parse(body.as_bytes())?;
        Ok(request.sort.price * request.n + request.model.cost(&request.usage()))
    }

    #[test]
    fn prices_match_figures_worked_out_by_hand() -> Result<(), ApiError> {
        const CENT: u64 = 10_000_000;
        for (body, cost) in [
            (r#"{"prompt":"a"}"#, 2 * CENT),
            (r#"{"prompt":"a","size":"256x256","n":5}"#, 8 * CENT),
            (r#"{"prompt":"a","model":"dall-e-3"}"#, 4 * CENT),
            (r#"{"prompt":"a","model":"dall-e-3","quality":"hd"}"#, 8 * CENT),
            (r#"{"prompt":"a","model":"dall-e-3","size":"1792x1024"}"#, 8 * CENT),
            (r#"{"prompt":"a","model":"dall-e-3","size":"1024x1792","quality":"hd"}"#, 12 * CENT),
            // one token of text, 272 of picture
            (r#"{"prompt":"a","model":"gpt-image-1","size":"1024x1024","quality":"low"}"#, 5_000 + 272 * 40_000),
            (r#"{"prompt":"a","model":"gpt-image-1","size":"1024x1024","quality":"medium","n":2}"#, 5_000 + 2 * 1056 * 40_000),
            (r#"{"prompt":"a","model":"gpt-image-1"}"#, 5_000 + 6240 * 40_000),
            (
                r#"{"prompt":"a","model":"gpt-image-1","quality":"low","size":"1024x1024","stream":true,"partial_images":2}"#,
                5_000 + 472 * 40_000,
            ),
        ] {
            assert_eq!(price(body)?, cost, "{body}");
        }
        Ok(())
    }

    #[test]
    fn what_a_model_does_not_make_is_refused() {
        for (body, complaint) in [
            (r#"{"prompt":"a","model":"dall-e-3","n":2}"#, "Expected a value <= 1"),
            (r#"{"prompt":"a","model":"dall-e-3","size":"256x256"}"#, "Invalid value: '256x256'"),
            (r#"{"prompt":"a","model":"dall-e-2","quality":"hd"}"#, "Supported values are: 'standard'."),
            (r#"{"prompt":"a","model":"gpt-image-1","response_format":"b64_json"}"#, "Unknown parameter: 'response_format'."),
            (r#"{"prompt":"a","model":"gpt-4o"}"#, "not supported by this endpoint"),
            (r#"{"model":"dall-e-3"}"#, "Missing required parameter: 'prompt'."),
        ] {
            let message = price(body).err().map(|error| error.message).unwrap_or_default();
            assert!(message.contains(complaint), "{body}: {message}");
        }
    }
}
