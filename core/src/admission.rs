//! Whether a key may make a request, and what is reserved for it: pure decisions over a key's state.

use crate::edge::Ask;
use crate::limits::Moment;
use crate::money::Nanodollars;
use crate::operation::{Costs, OTHER, Operation};
use crate::price::{Price, Unit, image_price};
use crate::refusal::{Code, Refusal};
use crate::reserve::{Level, headroom, reserve};
use crate::usage::Usage;
use serde::{Deserialize, Serialize};

/// Tokens that the largest image of any priced model is billed as (PROVIDERS: high detail, the dearest of the small models).
const TOKENS_PER_IMAGE: u64 = 50_000;
/// The smallest output a request is clamped to; below it the request is refused.
pub const MIN_OUTPUT_TOKENS: u64 = 16;
/// Output that a provider may have made, unseen, by the time it notices that a stream was cut: per choice.
pub const IN_FLIGHT_TOKENS: u64 = 256;
/// Output tokens of an answer whose model has no known limit. On a key with a limit they are written down, so that they hold.
const GUESSED_OUTPUT: u64 = 16_384;
/// Output tokens of a picture that is shown before it is finished (API reference, `partial_images`).
const TOKENS_PER_PARTIAL_IMAGE: u64 = 100;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Active,
    /// An actual cost exceeded its hold: nothing more until an operator acts.
    Frozen,
    Revoked,
}

/// What a key may call. An empty list allows everything.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Allow {
    /// Globs over model names.
    pub models: Vec<String>,
    /// Globs over `METHOD /path`, or `provider:METHOD /path`. What is not in the table of operations must be spelled out
    /// in its first two segments.
    pub endpoints: Vec<String>,
    /// The key may let providers keep its answers and conversations, and refer to them.
    #[serde(skip_serializing_if = "is_false")]
    pub state: bool,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it with a reference")]
fn is_false(flag: &bool) -> bool {
    !flag
}

/// A key as the ledger has it at the moment of the decision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyState {
    pub status: Status,
    pub expires_ms: Option<u64>,
    pub allow: Allow,
    /// Further lists that must allow a request as well: its policy's, its team's.
    pub limits: Vec<Allow>,
}

/// What is set aside for one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Hold {
    pub total: Nanodollars,
    /// The input's share of `total`.
    pub input: Nanodollars,
    /// Output tokens the request is clamped to, for each choice; `None`: as it asked.
    pub clamp: Option<u64>,
    /// Tokens that it may come to.
    pub tokens: u64,
    /// Of `tokens`, those of output.
    pub output_tokens: u64,
}

impl Hold {
    pub fn input_tokens(&self) -> u64 {
        self.tokens.saturating_sub(self.output_tokens)
    }

    /// A hold that is not split: what is paid is known before.
    fn whole(total: Nanodollars, tokens: u64) -> Self {
        Hold { total, input: total, tokens, ..Hold::default() }
    }
}

/// Where a request may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Aim<'a> {
    pub provider: &'a str,
    /// The provider's name of the model.
    pub model: Option<&'a str>,
}

/// Decides one request that may go to `aims`. `price` is `None` when the operation or a model has no price. Whether what the request
/// refers to is the key's own is for the ledger to say.
pub fn decide(
    key: &KeyState,
    levels: &[Level<'_>],
    ask: &Ask,
    aims: &[Aim<'_>],
    price: Option<&Price>,
    now: Moment,
) -> Result<Hold, Refusal> {
    check_standing(key, now.wall_ms)?;
    let operation = operation(ask);
    check_allowed(&key.lists(), ask, aims, operation)?;
    check_state(&key.allow, ask, operation)?;
    reserve(levels, ask, operation, price, now).map_err(|refusal| Refusal { headroom: headroom(levels, now).map(Box::new), ..refusal })
}

impl KeyState {
    /// All lists that must allow a request.
    pub fn lists(&self) -> Vec<&Allow> {
        std::iter::once(&self.allow).chain(&self.limits).collect()
    }
}

/// The operation asked for: of the table, or any other.
pub fn operation(ask: &Ask) -> &'static Operation {
    Operation::by_endpoint(ask.dialect, &ask.endpoint).unwrap_or(&OTHER)
}

/// Whether the key may be used at all.
pub fn check_standing(key: &KeyState, now_ms: u64) -> Result<(), Refusal> {
    standing(key.status, key.expires_ms, now_ms)
}

/// Whether a key of this status and expiry may be used.
pub fn standing(status: Status, expires_ms: Option<u64>, now_ms: u64) -> Result<(), Refusal> {
    match status {
        Status::Revoked => return Err(Refusal::new(Code::Revoked, "this virtual key has been revoked")),
        Status::Frozen => {
            return Err(Refusal::new(Code::CapExhausted, "this virtual key is frozen: a charge exceeded what was reserved for it"));
        }
        Status::Active => {}
    }
    match expires_ms {
        Some(at) if at <= now_ms => Err(Refusal::new(Code::Expired, "this virtual key has expired")),
        _ => Ok(()),
    }
}

/// Whether what was admitted may go on, now that the lists may be others.
pub fn may_go_on(lists: &[&Allow], ask: &Ask, aims: &[Aim<'_>]) -> Result<(), Refusal> {
    check_allowed(lists, ask, aims, operation(ask))
}

/// Every list that names endpoints must name this one, and so with models. What is not in the table of operations must be
/// spelled out in at least one list.
fn check_allowed(lists: &[&Allow], ask: &Ask, aims: &[Aim<'_>], operation: &'static Operation) -> Result<(), Refusal> {
    let at = |allow: &Allow, provider: &str, in_table| {
        allow.endpoints.iter().any(|pattern| endpoint_fits(pattern, provider, &ask.endpoint, in_table))
    };
    // Wherever it may go.
    let fits = |allow: &Allow, in_table| aims.iter().all(|aim| at(allow, aim.provider, in_table));
    let named = operation != &OTHER || lists.iter().any(|allow| fits(allow, false));
    if !named || lists.iter().any(|allow| !allow.endpoints.is_empty() && !fits(allow, true)) {
        return Err(Refusal::new(Code::EndpointNotAllowed, format!("this virtual key may not call {}", ask.endpoint)));
    }
    let Some(model) = &ask.model else { return Ok(()) };
    // Who may use a route's name may use what it leads to, and the other way round.
    let leads_to = |allow: &Allow| !aims.is_empty() && aims.iter().all(|aim| aim.model.is_some_and(|model| model_fits(allow, model)));
    if lists.iter().all(|allow| model_fits(allow, model) || leads_to(allow)) {
        return Ok(());
    }
    Err(Refusal::new(Code::ModelNotAllowed, format!("this virtual key may not use the model {model}")))
}

/// Whether a key may use a model.
pub fn model_fits(allow: &Allow, model: &str) -> bool {
    allow.models.is_empty() || allow.models.iter().any(|pattern| glob(pattern, model))
}

/// Whether a key may call an operation of the table.
pub fn operation_fits(allow: &Allow, provider: &str, operation: &Operation) -> bool {
    let endpoint = format!("{} {}", operation.method, operation.path);
    allow.endpoints.is_empty() || allow.endpoints.iter().any(|pattern| endpoint_fits(pattern, provider, &endpoint, true))
}

fn endpoint_fits(pattern: &str, provider: &str, endpoint: &str, in_table: bool) -> bool {
    let pattern = match pattern.split_once(':') {
        Some((of, rest)) if !of.contains([' ', '/']) => {
            if of != provider {
                return false;
            }
            rest
        }
        _ => pattern,
    };
    glob(pattern, endpoint) && (in_table || spells_out(pattern, endpoint))
}

/// Whether the first two segments of the endpoint's path stand in the pattern literally: what nobody has looked at is not
/// opened by a `*`.
fn spells_out(pattern: &str, endpoint: &str) -> bool {
    let path = |text: &'_ str| text.split_once(' ').map(|(_, path)| path.to_owned()).unwrap_or_default();
    let (pattern, path) = (path(pattern), path(endpoint));
    let literal = pattern.split('*').next().unwrap_or_default();
    let second_ends = path.match_indices('/').nth(2).map_or(path.len(), |(at, _)| at);
    path.matches('/').count() >= 2 && path.get(..second_ends).is_some_and(|start| literal.starts_with(start))
}

fn check_state(allow: &Allow, ask: &Ask, operation: &'static Operation) -> Result<(), Refusal> {
    if ask.keeps && !allow.state {
        return Err(Refusal::new(Code::StateNotOwned, "this virtual key may not keep state at the provider"));
    }
    // Without an object of its own, such a request shows or changes what others made with the same account.
    if operation == &OTHER && ask.refs.is_empty() && !ask.endpoint.starts_with("POST ") {
        return Err(Refusal::new(Code::StateNotOwned, format!("{} does not name an object of this virtual key", ask.endpoint)));
    }
    Ok(())
}

/// `*` stands for any run of characters; everything else for itself.
fn glob(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| text.strip_prefix(first)) else { return false };
    let Some(last) = pattern.contains('*').then(|| parts.next_back().unwrap_or_default()) else { return rest.is_empty() };
    for part in parts {
        let Some((_, tail)) = rest.split_once(part) else { return false };
        rest = tail;
    }
    rest.ends_with(last)
}

/// What of a hold is one target's, whose price this is. `bounded`: some limit holds the request to it.
pub fn part(ask: &Ask, operation: &'static Operation, price: Option<&Price>, clamp: Option<u64>, bounded: bool) -> Hold {
    let whole = price.filter(|_| bounded).and_then(|price| bound(ask, operation, price, clamp));
    whole.unwrap_or_else(|| crate::reserve::unlimited(ask, operation, price))
}

pub(crate) fn asked_output(ask: &Ask, price: &Price) -> u64 {
    let most = price.max_output.unwrap_or(u64::MAX);
    ask.max_tokens.unwrap_or(price.max_output.unwrap_or(GUESSED_OUTPUT)).min(most.max(1))
}

/// The most the request can cost; `None` when nothing bounds it. Where output has a limit that stands in the body, it is
/// limited to `clamp` tokens a choice: a limit that the caller did not set, or set higher than the model's own, is written.
pub(crate) fn bound(ask: &Ask, operation: &'static Operation, price: &Price, clamp: Option<u64>) -> Option<Hold> {
    let whole = |total| Some(Hold::whole(total, 0));
    match (operation.costs, &price.unit) {
        (Costs::Tokens, Unit::Tokens) => tokens_bound(ask, operation, price, clamp),
        (Costs::Speech, Unit::Characters(each)) => whole(Nanodollars::of_tokens(&[(ask.characters, *each)])),
        (Costs::Images, Unit::Images(prices)) => {
            let each = image_price(prices, ask.size.as_deref(), ask.quality.as_deref())?;
            whole(Nanodollars(each.0.saturating_mul(i64::try_from(ask.choices.max(1)).unwrap_or(i64::MAX))))
        }
        (Costs::Images, Unit::Tokens) => {
            let each = price.max_output?.saturating_add(ask.partial_images.saturating_mul(TOKENS_PER_PARTIAL_IMAGE));
            let pictures = (each.saturating_mul(ask.choices.max(1)), price.dearest_output());
            Some(Hold::whole(Nanodollars::of_tokens(&[(ask.bytes, price.dearest_input()), pictures]), ask.bytes.saturating_add(pictures.0)))
        }
        (Costs::Recording, Unit::Seconds(each)) => whole(Nanodollars::of_tokens(&[(ask.seconds?, *each)])),
        // Whatever its length, the model takes and gives no more than that.
        (Costs::Recording, Unit::Tokens) => {
            let (input, output) = (price.context?, price.max_output?);
            let total = Nanodollars::of_tokens(&[(input, price.dearest_input()), (output, price.dearest_output())]);
            Some(Hold::whole(total, input.saturating_add(output)))
        }
        _ => None,
    }
}

/// The most tokens of input that a request can have; `None` when nothing bounds them.
pub(crate) fn input_tokens(ask: &Ask, price: &Price) -> Option<u64> {
    let seen = ask.bytes.saturating_add(ask.images.saturating_mul(TOKENS_PER_IMAGE)).saturating_add(ask.added);
    let context = price.context.map(|context| context.saturating_mul(ask.texts.max(1)));
    // What the provider remembers is not in the body.
    if ask.history { context } else { Some(seen.min(context.unwrap_or(u64::MAX))) }
}

fn tokens_bound(ask: &Ask, operation: &'static Operation, price: &Price, clamp: Option<u64>) -> Option<Hold> {
    let input_tokens = input_tokens(ask, price)?;
    let limit = if operation.limits().is_empty() { price.max_output? } else { clamp.unwrap_or(u64::MAX).min(asked_output(ask, price)) };
    let (each_input, each_output) = price.dearest_for(input_tokens);
    let input = (input_tokens, each_input);
    let output = (limit.saturating_mul(ask.choices.max(1)), each_output);
    let written = ask.max_tokens.is_none_or(|asked| asked > limit) && !operation.limits().is_empty();
    Some(Hold {
        total: Nanodollars::of_tokens(&[input, output]),
        input: Nanodollars::of_tokens(&[input]),
        clamp: Some(limit).filter(|_| written),
        tokens: input.0.saturating_add(output.0),
        output_tokens: output.0,
    })
}

/// What a request may cost that has no bound: an estimate, for keys without a budget. Recordings at 8 kbit/s; of speech that
/// is paid by tokens, four to a character.
pub(crate) fn guess(ask: &Ask, operation: &'static Operation, price: &Price) -> Option<Hold> {
    let total = match (operation.costs, &price.unit) {
        (Costs::Recording, Unit::Seconds(each)) => Nanodollars::of_tokens(&[(ask.bytes.div_ceil(1_000), *each)]),
        (Costs::Speech, Unit::Tokens) => {
            Nanodollars::of_tokens(&[(ask.bytes, price.dearest_input()), (ask.characters.saturating_mul(4), price.dearest_output())])
        }
        // A model of which nobody says how much it gives, or what it remembers.
        (Costs::Tokens | Costs::Images, Unit::Tokens) => {
            let output = ask.max_tokens.or(price.max_output).unwrap_or(GUESSED_OUTPUT).saturating_mul(ask.choices.max(1));
            let input = ask.bytes.saturating_add(ask.images.saturating_mul(TOKENS_PER_IMAGE));
            Nanodollars::of_tokens(&[(input, price.dearest_input()), (output, price.dearest_output())])
        }
        _ => return None,
    };
    Some(Hold::whole(total, 0))
}

/// How a request ended, as far as its price goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended<'a> {
    /// Some try may have reached the provider.
    pub sent: bool,
    /// The provider's status, when it answered.
    pub status: Option<u16>,
    pub stream: bool,
    /// Final usage, when the provider told it.
    pub usage: Option<&'a Usage>,
    /// Usage of the input alone.
    pub input: Option<&'a Usage>,
    /// Bytes of text that passed; `None` when they could not be told.
    pub visible_bytes: Option<u64>,
    /// More passed than the hold allows.
    pub beyond: bool,
    pub choices: u64,
}

/// A charge, and whether it is an estimate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Charge {
    pub amount: Nanodollars,
    pub tokens: u64,
    pub estimated: bool,
}

/// What a request that was held for is charged.
pub fn charge(hold: &Hold, price: Option<&Price>, ended: &Ended<'_>) -> Charge {
    let charge = charge_by(hold, price, ended);
    let guessed = price.is_some_and(|price| price.stand_in) && charge.amount > Nanodollars::ZERO;
    Charge { estimated: charge.estimated || guessed, ..charge }
}

fn charge_by(hold: &Hold, price: Option<&Price>, ended: &Ended<'_>) -> Charge {
    let told = ended.usage.map(Usage::tokens);
    let nothing = Charge { amount: Nanodollars::ZERO, tokens: 0, estimated: false };
    let whole = Charge { amount: hold.total, tokens: told.unwrap_or(hold.tokens), estimated: true };
    let cost = price.zip(ended.usage).and_then(|(price, usage)| price.cost(usage));
    match (ended.sent, ended.status, cost, price) {
        (false, ..) => nothing,
        (true, _, Some(amount), _) => Charge { amount, estimated: false, ..whole },
        // Sent, and nobody knows what became of it.
        (true, None, None, Some(_)) => whole,
        (true, Some(status), None, _) if status >= 300 => nothing,
        (true, _, None, None) => Charge { amount: Nanodollars::ZERO, estimated: told.is_none(), ..whole },
        // Free, or paid by what was known beforehand.
        (true, Some(_), None, Some(price))
            if hold.total == Nanodollars::ZERO || matches!(price.unit, Unit::Characters(_) | Unit::Images(_)) =>
        {
            Charge { estimated: false, ..whole }
        }
        (true, Some(_), None, Some(price)) => cut(whole, hold, price, ended),
    }
}

/// The charge of an answer that stopped without telling usage.
fn cut(whole: Charge, hold: &Hold, price: &Price, ended: &Ended<'_>) -> Charge {
    let Some(bytes) = ended.visible_bytes.filter(|_| ended.stream && (ended.beyond || !price.reasoning)) else { return whole };
    let input = ended.input.and_then(|usage| price.cost(usage)).unwrap_or(hold.input);
    let output = bytes.saturating_add(IN_FLIGHT_TOKENS.saturating_mul(ended.choices.max(1)));
    let tokens = ended.input.map_or(hold.input_tokens(), Usage::tokens).saturating_add(output);
    let amount = input.plus(Nanodollars::of_tokens(&[(output, price.dearest_output())]));
    if ended.beyond {
        // The provider broke its word: all that passed is charged, and the key is frozen for it.
        return Charge { amount: whole.amount.max(amount), tokens: whole.tokens.max(tokens), estimated: true };
    }
    Charge { amount: whole.amount.min(amount), tokens: whole.tokens.min(tokens), estimated: true }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::{Account, Budget, Limits, Recent, Sums, Window};
    use crate::price::{Mode, PriceTable};
    use crate::reserve::Of;
    use proptest::prelude::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn key() -> KeyState {
        KeyState { status: Status::Active, expires_ms: None, allow: Allow::default(), limits: Vec::new() }
    }

    /// A key's account with one budget for good.
    fn account(spent: i64, reserved: i64, in_flight: u64) -> Account {
        let total = Sums { spent: Nanodollars(spent), reserved: Nanodollars(reserved), ..Sums::default() };
        Account::new(0, [Sums::default(), Sums::default(), total], in_flight, Recent::default())
    }

    fn on(cap: Option<i64>, account: &Account, ask: &Ask, price: Option<&Price>) -> Result<Hold, Refusal> {
        let budgets = cap.map(|cap| Budget { window: Window::Total, cap: Nanodollars(cap) }).into_iter().collect();
        let limits = Limits { budgets, ..Limits::default() };
        let level = Level { of: Of::Key, limits: vec![&limits], account };
        decide(&key(), &[level], ask, &aims(ask), price, Moment::at(0))
    }

    fn aims(ask: &Ask) -> Vec<Aim<'_>> {
        vec![Aim { provider: &ask.provider, model: ask.model.as_deref() }]
    }

    fn fresh(cap: Option<i64>, ask: &Ask, price: Option<&Price>) -> Result<Hold, Refusal> {
        on(cap, &Account::default(), ask, price)
    }

    fn at(key: &KeyState, ask: &Ask, price: Option<&Price>, ms: u64) -> Result<Hold, Refusal> {
        decide(key, &[], ask, &aims(ask), price, Moment::at(ms))
    }

    fn ask(model: &str, bytes: u64, max_tokens: Option<u64>) -> Ask {
        Ask {
            provider: "openai".into(),
            endpoint: "POST /v1/chat/completions".into(),
            model: Some(model.into()),
            bytes,
            max_tokens,
            choices: 1,
            ..Ask::default()
        }
    }

    fn price() -> Price {
        PriceTable::built_in().unwrap().find("openai", "gpt-4o").unwrap().clone()
    }

    #[test]
    fn standing_comes_first() {
        let refused = |key: &KeyState| at(key, &ask("gpt-4o", 10, None), Some(&price()), 1_000).unwrap_err().code;
        assert_eq!(refused(&KeyState { status: Status::Revoked, ..key() }), Code::Revoked);
        assert_eq!(refused(&KeyState { expires_ms: Some(1_000), ..key() }), Code::Expired);
        assert_eq!(refused(&KeyState { status: Status::Frozen, ..key() }), Code::CapExhausted);
        assert!(at(&KeyState { expires_ms: Some(1_001), ..key() }, &ask("gpt-4o", 10, None), Some(&price()), 1_000).is_ok());
    }

    #[test]
    fn globs() {
        for (pattern, text, fits) in [
            ("gpt-4o", "gpt-4o", true),
            ("gpt-4o", "gpt-4o-mini", false),
            ("gpt-4o*", "gpt-4o-mini", true),
            ("*", "", true),
            ("*mini", "gpt-4o-mini", true),
            ("g*o*i", "gpt-4o-mini", true),
            ("g*o*x", "gpt-4o-mini", false),
            ("a*a", "a", false),
            ("", "", true),
            ("", "x", false),
            ("ab*ba", "aba", false),
        ] {
            assert_eq!(glob(pattern, text), fits, "{pattern} on {text}");
        }
    }

    #[test]
    fn models_and_endpoints() {
        let allow = |models: &[&str], endpoints: &[&str]| KeyState {
            allow: Allow {
                models: models.iter().map(|s| (*s).into()).collect(),
                endpoints: endpoints.iter().map(|s| (*s).into()).collect(),
                state: false,
            },
            ..key()
        };
        let code = |key: &KeyState| at(key, &ask("gpt-4o", 10, None), Some(&price()), 0).map_err(|r| r.code).err();
        assert_eq!(code(&allow(&["gpt-4o"], &["POST /v1/chat/*"])), None);
        assert_eq!(code(&allow(&[], &["openai:POST /v1/*"])), None);
        assert_eq!(code(&allow(&[], &["anthropic:POST /v1/*"])), Some(Code::EndpointNotAllowed));
        assert_eq!(code(&allow(&["claude-*"], &[])), Some(Code::ModelNotAllowed));
    }

    #[test]
    fn a_small_budget_is_clamped_then_reserved_then_spent() {
        // gpt-4o: 2,500 nanodollars an input token, 10,000 an output token.
        let cap = Some(10 * 2_500 + 100 * 10_000);
        let hold = fresh(cap, &ask("gpt-4o", 10, None), Some(&price())).unwrap();
        assert_eq!((hold.clamp, hold.total, hold.input), (Some(100), Nanodollars(1_025_000), Nanodollars(25_000)));
        let refusal = on(cap, &account(0, hold.total.0, 1), &ask("gpt-4o", 10, None), Some(&price())).unwrap_err();
        assert_eq!((refusal.code, refusal.retry_after_ms), (Code::CapReserved, Some(2_000)));
        let refusal = on(cap, &account(hold.total.0, 0, 0), &ask("gpt-4o", 10, None), Some(&price())).unwrap_err();
        assert_eq!((refusal.code, refusal.retry_after_ms), (Code::CapExhausted, None));
    }

    #[test]
    fn what_has_no_bound_or_no_price_needs_a_key_without_budget() {
        let mut hosted = ask("gpt-4o", 10, Some(5));
        hosted.unbounded = Some("web_search_options".into());
        assert_eq!(fresh(Some(1 << 40), &hosted, Some(&price())).unwrap_err().code, Code::UnboundedInput);
        assert!(fresh(None, &hosted, Some(&price())).is_ok());
        assert_eq!(fresh(Some(1 << 40), &ask("mystery", 10, Some(5)), None).unwrap_err().code, Code::UnboundedInput);
        assert_eq!(fresh(None, &ask("mystery", 10, Some(5)), None), Ok(Hold::default()));
        // A provider of the operator's own, whose models nobody lists.
        let table = PriceTable::built_in().unwrap();
        for model in ["gpt-4o", "our-model"] {
            let guessed = table.price("acme", model, &[Mode::Chat]);
            let asked = ask(model, 10, Some(5));
            assert_eq!(fresh(Some(1 << 60), &asked, guessed.as_deref()).unwrap_err().code, Code::UnboundedInput, "{model}");
            assert!(fresh(None, &asked, guessed.as_deref()).unwrap().total > Nanodollars::ZERO, "{model}");
        }
    }

    #[test]
    fn a_thinking_budget_is_never_clamped_away() {
        let mut thinking = ask("gpt-4o", 10, Some(4_000));
        thinking.thinking_budget = 2_000;
        let refusal = fresh(Some(1_000_000), &thinking, Some(&price())).unwrap_err();
        assert_eq!(refusal.code, Code::CapExhausted);
    }

    #[test]
    fn every_ending_has_its_charge() {
        let price = price();
        let asked = ask("gpt-4o", 100, Some(1_000));
        let hold = bound(&asked, operation(&asked), &price, None).unwrap();
        let usage = Usage { input: 10, output: 20, ..Usage::default() };
        let base = Ended {
            sent: true,
            status: Some(200),
            stream: true,
            usage: None,
            input: None,
            visible_bytes: Some(40),
            beyond: false,
            choices: 1,
        };
        let of = |ended: Ended<'_>| charge(&hold, Some(&price), &ended);
        assert_eq!(of(Ended { usage: Some(&usage), ..base }), Charge { amount: Nanodollars(225_000), tokens: 30, estimated: false });
        assert_eq!(of(Ended { sent: false, status: None, ..base }).amount, Nanodollars::ZERO);
        assert_eq!(of(Ended { status: None, ..base }), Charge { amount: hold.total, tokens: hold.tokens, estimated: true });
        assert_eq!(of(Ended { status: Some(429), ..base }).amount, Nanodollars::ZERO);
        assert_eq!(of(base), Charge { amount: Nanodollars(250_000 + (40 + 256) * 10_000), tokens: 100 + 296, estimated: true });
        assert_eq!(of(Ended { visible_bytes: None, ..base }).amount, hold.total, "an unreadable answer");
        assert_eq!(of(Ended { stream: false, ..base }).amount, hold.total, "a buffered answer cut short was made in full");
        let runaway = of(Ended { visible_bytes: Some(9_000_000), beyond: true, ..base });
        assert_eq!(runaway.amount, Nanodollars(250_000 + 9_000_256 * 10_000), "whatever was held");
        let thinker = Price { reasoning: true, ..price.clone() };
        assert_eq!(charge(&hold, Some(&thinker), &base).amount, hold.total, "hidden output can't be estimated");
    }

    #[test]
    fn what_is_not_in_the_table_must_be_spelled_out() {
        let code = |endpoints: &[&str], endpoint: &str, refs: &[&str]| {
            let allow = Allow { endpoints: endpoints.iter().map(|s| (*s).into()).collect(), ..Allow::default() };
            let asked =
                Ask { endpoint: endpoint.into(), model: None, refs: refs.iter().map(|s| (*s).into()).collect(), ..ask("", 10, None) };
            at(&KeyState { allow, ..key() }, &asked, None, 0).err().map(|refusal| refusal.code)
        };
        for open in
            ["*", "POST *", "POST /v1/*", "POST /v1/fil*", "POST /v1/f*iles", "anthropic:POST /v1/files", "GET /v1/files", "", "/v1/files"]
        {
            assert_eq!(code(&[open], "POST /v1/files", &[]), Some(Code::EndpointNotAllowed), "{open}");
        }
        assert_eq!(code(&[], "POST /v1/files", &[]), Some(Code::EndpointNotAllowed), "no list is no permission for what nobody knows");
        for spelled in ["POST /v1/files", "* /v1/files*", "openai:POST /v1/files", "POST /v1/files*"] {
            assert_eq!(code(&["*", spelled], "POST /v1/files", &[]), None, "{spelled}");
        }
        assert_eq!(code(&["POST /v1/files*"], "POST /v1/filesets", &[]), Some(Code::EndpointNotAllowed));
        assert_eq!(code(&["GET /v1/files/*"], "GET /v1/files/file-1", &["file-1"]), None);
        assert_eq!(code(&["GET /v1/files"], "GET /v1/files", &[]), Some(Code::StateNotOwned), "a list shows what others made");
        assert_eq!(code(&["DELETE /v1/files"], "DELETE /v1/files", &[]), Some(Code::StateNotOwned));
        assert_eq!(code(&["*"], "GET /v1/responses/{id}", &["resp_1"]), None, "the table opens its own");
    }

    #[test]
    fn every_operation_is_free_priced_or_refused_on_a_budget() {
        let prices = PriceTable::built_in().unwrap();
        let of = |endpoint: &str, model: &str, change: fn(&mut Ask)| {
            let mut asked = Ask { endpoint: endpoint.into(), ..ask(model, 1_000, None) };
            change(&mut asked);
            fresh(Some(1 << 50), &asked, prices.find("openai", model)).map(|hold| (hold.total.to_usd(), hold.clamp)).map_err(|r| r.code)
        };
        let held = |usd: &str| Ok((usd.to_owned(), None));
        assert_eq!(of("POST /v1/moderations", "omni-moderation-latest", |_| ()), held("0.00"));
        assert_eq!(of("POST /v1/moderations", "no-such-model", |_| ()), held("0.00"), "free whatever it names");
        assert_eq!(of("POST /v1/embeddings", "text-embedding-3-small", |_| ()), held("0.00002"));
        assert_eq!(of("POST /v1/embeddings", "text-embedding-3-small", |a| a.bytes = 20_000), held("0.00016384"));
        assert_eq!(of("POST /v1/embeddings", "text-embedding-3-small", |a| (a.bytes, a.texts) = (20_000, 3)), held("0.0004"));
        assert_eq!(of("POST /v1/audio/speech", "tts-1", |a| a.characters = 1_000), held("0.015"));
        assert_eq!(of("POST /v1/audio/speech", "gpt-4o-mini-tts", |a| a.characters = 10), Err(Code::UnboundedInput));
        assert_eq!(of("POST /v1/audio/transcriptions", "whisper-1", |a| a.seconds = Some(60)), held("0.006"));
        assert_eq!(of("POST /v1/audio/transcriptions", "whisper-1", |_| ()), Err(Code::UnboundedInput));
        assert_eq!(of("POST /v1/audio/transcriptions", "gpt-4o-transcribe", |_| ()), held("0.116"));
        assert_eq!(of("POST /v1/images/generations", "dall-e-3", |a| a.choices = 2), held("0.08"));
        assert_eq!(of("POST /v1/images/generations", "dall-e-3", |a| a.quality = Some("hd".into())), held("0.08"));
        assert_eq!(of("POST /v1/images/generations", "gpt-image-1.5", |_| ()), Err(Code::UnboundedInput));
        assert_eq!(of("POST /v1/chat/completions", "dall-e-3", |_| ()), Err(Code::UnboundedInput), "not made for that");
        assert_eq!(of("GET /v1/responses/{id}", "", |a| (a.model, a.refs) = (None, vec!["resp_1".into()])), held("0.00"));
        let other = of("POST /v1/files", "", |a| a.model = None);
        assert_eq!(other, Err(Code::EndpointNotAllowed));
    }

    /// What the provider remembers is not in the body: the hold is for all that the model can read.
    #[test]
    fn an_earlier_answer_fills_the_context() {
        let asked = |history| Ask { endpoint: "POST /v1/responses".into(), history, ..ask("gpt-4o", 100, Some(10)) };
        let hold = |history| fresh(Some(1 << 50), &asked(history), Some(&price())).unwrap();
        assert_eq!(hold(false).input, Nanodollars(100 * 2_500));
        assert_eq!(hold(true).input, Nanodollars(128_000 * 2_500));
        let boundless = Price { context: None, ..price() };
        assert_eq!(fresh(Some(1 << 50), &asked(true), Some(&boundless)).unwrap_err().code, Code::UnboundedInput);
    }

    proptest! {
        /// I1 at admission: no request is ever given more than is left, and what it is given covers its own worst case.
        #[test]
        fn a_hold_fits_and_covers(cap in 0i64..1 << 40, spent in 0i64..1 << 40, reserved in 0i64..1 << 40, in_flight in 0u64..100,
            bytes in 1u64..200_000, max in proptest::option::of(0u64..200_000), choices in 1u64..8, images in 0u64..3) {
            let asked = Ask { choices, images, ..ask("gpt-4o", bytes, max) };
            let price = price();
            if let Ok(hold) = on(Some(cap), &account(spent, reserved, in_flight), &asked, Some(&price)) {
                prop_assert!(spent + reserved + hold.total.0 <= cap);
                let output = hold.clamp.or(max).unwrap_or(u64::MAX).min(price.max_output.unwrap());
                let input = bytes.min(price.context.unwrap());
                let worst = price.cost(&Usage { input, output: output * choices, ..Usage::default() }).unwrap();
                prop_assert!(worst <= hold.total);
                if let (Some(clamp), Some(max)) = (hold.clamp, max) { prop_assert!(clamp < max); }
            }
        }

        /// I2 for every operation and every model on the list: what a provider can truly charge within its own limits is held.
        #[test]
        fn no_operation_can_cost_more_than_its_hold(
            pick in 0usize..10_000, bytes in 1u64..300_000, max in proptest::option::of(1u64..50_000), choices in 1u64..5, texts in 1u64..5,
            images in 0u64..3, history: bool, characters in 0u64..5_000, seconds in proptest::option::of(1u64..10_000), partial_images in 0u64..4,
            shares in proptest::collection::vec(0u64..100, 8), size in 0usize..4, quality in 0usize..4,
        ) {
            let table = PriceTable::built_in().unwrap();
            let mut cases: Vec<(&str, &Price, &'static Operation)> = Vec::new();
            for provider in &crate::operation::PROVIDERS {
                for (model, price) in table.models(provider.name) {
                    let fits = |op: &&Operation| op.dialect == provider.dialect && op.models.contains(&price.mode) && op.costs != Costs::Free;
                    cases.extend(crate::operation::OPERATIONS.iter().filter(fits).map(|op| (model, price, op)));
                }
            }
            cases.sort_by_key(|(model, _, op)| (*model, op.path));
            let (model, price, op) = cases[pick % cases.len()];
            let provider = if op.dialect == crate::operation::Dialect::OpenAi { "openai" } else { "anthropic" };
            let asked = Ask {
                provider: provider.into(), endpoint: format!("{} {}", op.method, op.path), choices: choices * if op.name == "completions" { texts } else { 1 },
                texts, images, history, characters, seconds, partial_images,
                size: [None, Some("1024x1024"), Some("1792x1024"), Some("odd")][size].map(str::to_owned),
                quality: [None, Some("hd"), Some("standard"), Some("odd")][quality].map(str::to_owned),
                ..ask(model, bytes, max)
            };
            prop_assume!(operation(&asked) == op);
            let Ok(hold) = fresh(Some(1 << 60), &asked, Some(price)) else { return Ok(()) };
            let context = price.context.unwrap_or(u64::MAX).saturating_mul(texts);
            let share = |n: u64, i: usize| {
                let all = if i < 6 { 0..6 } else { 6..8 };
                n * shares[i] / shares[all].iter().sum::<u64>().max(1)
            };
            let input = match (op.costs, history) {
                (Costs::Tokens, true) => price.context.unwrap(),
                (Costs::Tokens, false) => (bytes + images * TOKENS_PER_IMAGE).min(context),
                (Costs::Recording, _) => price.context.unwrap_or(0),
                _ => bytes,
            };
            let output = match op.costs {
                Costs::Images => price.max_output.unwrap_or(0) * choices + partial_images * TOKENS_PER_PARTIAL_IMAGE * choices,
                Costs::Recording => price.max_output.unwrap_or(0),
                _ => hold.clamp.or(max).unwrap_or(u64::MAX).min(price.max_output.unwrap_or(0)).saturating_mul(asked.choices),
            };
            let usage = match price.unit {
                Unit::Seconds(_) => Usage { seconds: seconds.unwrap(), ..Usage::default() },
                _ => Usage {
                    input: share(input, 0), cache_read: share(input, 1), cache_write: share(input, 2), cache_write_1h: share(input, 3),
                    audio_input: share(input, 4), image_input: share(input, 5), output: share(output, 6), media_output: share(output, 7),
                    ..Usage::default()
                },
            };
            let worst = match &price.unit {
                Unit::Characters(each) => Nanodollars::of_tokens(&[(characters, *each)]),
                Unit::Images(listed) => {
                    let one = image_price(listed, asked.size.as_deref(), asked.quality.as_deref()).unwrap();
                    Nanodollars(one.0 * i64::try_from(choices).unwrap())
                }
                Unit::Tokens | Unit::Seconds(_) => price.cost(&usage).unwrap(),
            };
            prop_assert!(worst <= hold.total, "{model} at {}: {worst:?} above {:?}", op.path, hold.total);
            // What the record tells is charged, and nothing else tells less.
            let told = Some(&usage).filter(|_| matches!(price.unit, Unit::Tokens | Unit::Seconds(_)));
            let ended = Ended { sent: true, status: Some(200), stream: false, usage: told, input: None, visible_bytes: None, beyond: false, choices };
            prop_assert_eq!(charge(&hold, Some(price), &ended).amount, worst);
            let untold = charge(&hold, Some(price), &Ended { usage: None, ..ended }).amount;
            prop_assert!(untold >= worst && untold <= hold.total);
        }
    }
}
