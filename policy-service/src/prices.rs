//! Prices that an operator gives, over those of the table; and the prices at which requests in flight were admitted.

use crate::config::{Document, Fault, OwnPrice, parse_usd};
use keyward_core::admission::{Allow, model_fits};
use keyward_core::edge::RequestId;
use keyward_core::money::Nanodollars;
use keyward_core::price::{ImagePrice, Mode, Price, PriceTable, Rates, Unit};
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

/// Dearest price of a million that is taken, in nanodollars: a million dollars.
const DEAREST: Nanodollars = Nanodollars(1_000_000_000_000_000);
/// Requests whose prices are remembered; of older ones the prices as they stand hold.
const REMEMBERED: usize = 65_536;

/// The prices of one organisation, by provider.
#[derive(Debug, Clone, Default)]
pub struct OwnPrices(HashMap<String, Vec<Entry>>);

/// The price of all models that a pattern fits.
#[derive(Debug, Clone)]
struct Entry {
    pattern: String,
    fits: Allow,
    price: Stated,
}

/// What an operator said of a price, read. What was not said is the table's, where it lists the model.
#[derive(Debug, Clone)]
struct Stated {
    mode: Option<Mode>,
    unit: Unit,
    base: Rates,
    tier: Option<(u64, Rates)>,
    context: Option<u64>,
    max_output: Option<u64>,
    reasoning: Option<bool>,
}

impl OwnPrices {
    /// The prices of a document that has been checked; what can't be read is left out.
    pub fn of(document: &Document) -> Self {
        let mut all = HashMap::new();
        for (provider, settings) in &document.providers {
            let read = |(pattern, price): (&String, &OwnPrice)| {
                let fits = Allow { models: vec![pattern.clone()], ..Allow::default() };
                Some(Entry { pattern: pattern.clone(), fits, price: read(price).ok()? })
            };
            let mut entries: Vec<Entry> = settings.prices.iter().filter_map(read).collect();
            // An exact name before any pattern, a longer pattern before a shorter.
            let order = |entry: &Entry| (entry.pattern.contains('*'), usize::MAX - entry.pattern.len(), entry.pattern.clone());
            entries.sort_by_key(order);
            if !entries.is_empty() {
                all.insert(provider.clone(), entries);
            }
        }
        OwnPrices(all)
    }

    /// What the operator says that a model costs in an operation made for models of these `modes`.
    pub fn find(&self, table: &PriceTable, provider: &str, model: &str, modes: &[Mode]) -> Option<Price> {
        let entry = self.0.get(provider)?.iter().find(|entry| model_fits(&entry.fits, model))?;
        let listed = table.find(provider, model);
        let price = entry.price.over(listed);
        modes.contains(&price.mode).then_some(price)
    }

    /// Whether the operator says anything of a provider's prices.
    pub fn gives(&self, provider: &str) -> bool {
        self.0.contains_key(provider)
    }

    /// Whether the operator gives a price for a model of a provider.
    pub fn names(&self, provider: &str, model: &str) -> bool {
        self.0.get(provider).is_some_and(|entries| entries.iter().any(|entry| model_fits(&entry.fits, model)))
    }

    /// Models of a provider that are named in full.
    pub fn models(&self, provider: &str) -> impl Iterator<Item = &str> {
        self.0.get(provider).into_iter().flatten().map(|entry| entry.pattern.as_str()).filter(|pattern| !pattern.contains('*'))
    }
}

impl Stated {
    fn over(&self, listed: Option<&Price>) -> Price {
        Price {
            mode: self.mode.or(listed.map(|listed| listed.mode)).unwrap_or_default(),
            unit: self.unit.clone(),
            base: self.base,
            tier: self.tier,
            context: self.context.or(listed.and_then(|listed| listed.context)),
            max_output: self.max_output.or(listed.and_then(|listed| listed.max_output)),
            reasoning: self.reasoning.or(listed.map(|listed| listed.reasoning)).unwrap_or(true),
            stand_in: false,
        }
    }
}

/// What is wrong with a price, by field.
pub fn check(price: &OwnPrice) -> Result<(), Fault> {
    read(price).map(|_| ())
}

fn read(price: &OwnPrice) -> Result<Stated, Fault> {
    let fault = |field: &str, message: String| Fault { field: field.to_owned(), message };
    let units: Vec<&str> =
        [("input", &price.input), ("characters", &price.characters), ("seconds", &price.seconds), ("picture", &price.picture)]
            .into_iter()
            .filter(|(_, said)| said.is_some())
            .map(|(name, _)| name)
            .collect();
    let unit = match units.as_slice() {
        ["input"] => Unit::Tokens,
        ["characters"] => Unit::Characters(money("characters", price.characters.as_ref())?.unwrap_or_default()),
        ["seconds"] => Unit::Seconds(money("seconds", price.seconds.as_ref())?.unwrap_or_default()),
        [_, second, ..] => {
            return Err(fault(second, "a model is paid by one thing: input and output, characters, seconds, or picture".to_owned()));
        }
        [] => return Err(fault("", "needs input and output, or one of characters, seconds, picture".to_owned())),
        [_] => {
            let each = money("picture", price.picture.as_ref())?.unwrap_or_default();
            Unit::Images(vec![ImagePrice { quality: String::new(), size: String::new(), price: each }])
        }
    };
    let base = match unit {
        Unit::Tokens => rates(price, &price.output)?,
        _ => tokens_only(price)
            .map_or(Ok(Rates::default()), |field| Err(fault(field, "is for models that are paid by tokens".to_owned())))?,
    };
    let tier = match &price.long_prompt {
        None => None,
        Some(_) if unit != Unit::Tokens => return Err(fault("long_prompt", "is for models that are paid by tokens".to_owned())),
        Some(long) => {
            let within = |fault: Fault| Fault { field: format!("long_prompt.{}", fault.field), ..fault };
            let as_price = OwnPrice {
                input: Some(long.input.clone()),
                output: Some(long.output.clone()),
                cache_read: long.cache_read.clone(),
                cache_write: long.cache_write.clone(),
                cache_write_1h: long.cache_write_1h.clone(),
                audio_input: price.audio_input.clone(),
                image_input: price.image_input.clone(),
                audio_output: price.audio_output.clone(),
                ..OwnPrice::default()
            };
            Some((long.above, rates(&as_price, &as_price.output).map_err(within)?))
        }
    };
    let mode = match &price.mode {
        None => None,
        Some(name) => {
            let names = "chat, responses, completion, embedding, moderation, image, speech or transcription";
            Some(Mode::by_name(name).ok_or_else(|| fault("mode", format!("expected {names}")))?)
        }
    };
    for (field, count) in [("context", price.context), ("max_output", price.max_output)] {
        if count.is_some_and(|count| count > 1_000_000_000) {
            return Err(fault(field, "expected at most 1,000,000,000 tokens".to_owned()));
        }
    }
    Ok(Stated { mode, unit, base, tier, context: price.context, max_output: price.max_output, reasoning: price.reasoning })
}

fn rates(price: &OwnPrice, output: &Option<String>) -> Result<Rates, Fault> {
    let missing = |field: &str| Fault { field: field.to_owned(), message: "is missing: input and output go together".to_owned() };
    let input = money("input", price.input.as_ref())?.ok_or_else(|| missing("input"))?;
    let output = money("output", output.as_ref())?.ok_or_else(|| missing("output"))?;
    let or = |field: &str, said: &Option<String>, otherwise| Ok(money(field, said.as_ref())?.unwrap_or(otherwise));
    let cache_write = or("cache_write", &price.cache_write, input)?;
    Ok(Rates {
        input,
        cache_read: or("cache_read", &price.cache_read, input)?,
        cache_write,
        cache_write_1h: or("cache_write_1h", &price.cache_write_1h, cache_write)?,
        output,
        audio_input: or("audio_input", &price.audio_input, input)?,
        image_input: or("image_input", &price.image_input, input)?,
        media_output: or("audio_output", &price.audio_output, output)?,
    })
}

/// A field that says something of tokens.
fn tokens_only(price: &OwnPrice) -> Option<&'static str> {
    let fields = [
        ("output", &price.output),
        ("cache_read", &price.cache_read),
        ("cache_write", &price.cache_write),
        ("cache_write_1h", &price.cache_write_1h),
        ("audio_input", &price.audio_input),
        ("image_input", &price.image_input),
        ("audio_output", &price.audio_output),
    ];
    fields.into_iter().find(|(_, said)| said.is_some()).map(|(field, _)| field)
}

fn money(field: &str, said: Option<&String>) -> Result<Option<Nanodollars>, Fault> {
    let Some(text) = said else { return Ok(None) };
    let amount = parse_usd(text).ok().filter(|amount| *amount <= DEAREST);
    let message = || "expected dollars such as \"2.50\", with at most nine decimals, at most a million".to_owned();
    amount.map(Some).ok_or_else(|| Fault { field: field.to_owned(), message: message() })
}

/// The prices of requests in flight: what was in force when they were admitted, also when it is edited before they end. In memory
/// only; a restart forgets them.
#[derive(Debug, Default)]
pub struct AdmittedPrices(Mutex<Remembered>);

#[derive(Debug, Default)]
struct Remembered {
    /// Of each target.
    by_request: HashMap<[u8; 16], Arc<[Option<Price>]>>,
    order: VecDeque<[u8; 16]>,
}

impl AdmittedPrices {
    pub fn remember(&self, req: RequestId, prices: Vec<Option<Price>>) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.by_request.insert(req.0, prices.into()).is_none() {
            all.order.push_back(req.0);
        }
        if all.order.len() > REMEMBERED
            && let Some(oldest) = all.order.pop_front()
        {
            all.by_request.remove(&oldest);
        }
    }

    /// The prices that a request was admitted at, of each target; `None` inside: it had none. `None`: nobody remembers.
    pub fn of(&self, req: RequestId) -> Option<Arc<[Option<Price>]>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).by_request.get(&req.0).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use keyward_core::usage::Usage;

    const TALKS: &[Mode] = &[Mode::Chat, Mode::Responses];

    fn own(prices: serde_json::Value) -> OwnPrices {
        let document: Document = serde_json::from_value(serde_json::json!({ "providers": { "openai": { "prices": prices } } })).unwrap();
        assert_eq!(crate::config::check(&document), []);
        OwnPrices::of(&document)
    }

    #[test]
    fn an_own_price_replaces_the_tables() {
        let table = PriceTable::built_in().unwrap();
        let own = own(serde_json::json!({
            "gpt-4o": {"input": "2", "output": "8"},
            "gpt-4o*": {"input": "7", "output": "7"},
            "*": {"input": "9", "output": "9"},
            "acme-1": {"input": "1.000000001", "output": "3", "cache_read": "0.10", "context": 1_000, "max_output": 100, "reasoning": false},
            "acme-draws": {"picture": "0.50", "mode": "image"},
        }));
        let find = |model: &str| own.find(&table, "openai", model, TALKS).unwrap();
        let known = find("gpt-4o");
        // A cached token costs what a fresh one does, unless the operator says so.
        assert_eq!((known.base.cache_read.to_usd().as_str(), known.context, known.max_output), ("2.00", Some(128_000), Some(16_384)));
        assert!(!known.reasoning && !known.stand_in);
        let new = find("acme-1");
        assert_eq!(
            (new.base.input, new.base.cache_read, new.max_output),
            (Nanodollars(1_000_000_001), Nanodollars(100_000_000), Some(100))
        );
        assert_eq!(find("gpt-4o-mini").base.input.to_usd(), "7.00", "the longer pattern");
        assert_eq!(find("o3").base.input.to_usd(), "9.00");
        assert!(find("unheard-of").reasoning && find("unheard-of").max_output.is_none(), "nobody says that it does not think");
        assert!(own.find(&table, "anthropic", "gpt-4o", TALKS).is_none() && own.find(&table, "openai", "acme-draws", TALKS).is_none());
        assert!(matches!(own.find(&table, "openai", "acme-draws", &[Mode::Image]).unwrap().unit, Unit::Images(_)));
        assert_eq!(own.models("openai").collect::<Vec<_>>(), ["acme-draws", "acme-1", "gpt-4o"]);
    }

    #[test]
    fn a_long_prompt_has_its_own_prices() {
        let table = PriceTable::built_in().unwrap();
        let long = serde_json::json!({"above": 1_000, "input": "4", "output": "20"});
        let own = own(serde_json::json!({"m": {"input": "2", "output": "10", "long_prompt": long}}));
        let price = own.find(&table, "openai", "m", TALKS).unwrap();
        let cost = |input| price.cost(&Usage { input, output: 100, ..Usage::default() }).unwrap().to_usd();
        assert_eq!((cost(1_000).as_str(), cost(1_001).as_str()), ("0.003", "0.006004"));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let wrong = |price: serde_json::Value| check(&serde_json::from_value(price).unwrap()).map_err(|fault| fault.field).unwrap_err();
        for (price, field) in [
            (serde_json::json!({}), ""),
            (serde_json::json!({"input": "1"}), "output"),
            (serde_json::json!({"output": "1"}), ""),
            (serde_json::json!({"input": "-1", "output": "1"}), "input"),
            (serde_json::json!({"input": "1e3", "output": "1"}), "input"),
            (serde_json::json!({"input": "1", "output": "1000000.01"}), "output"),
            (serde_json::json!({"input": "1", "output": "1", "cache_read": "0.0000000001"}), "cache_read"),
            (serde_json::json!({"input": "1", "output": "1", "mode": "video"}), "mode"),
            (serde_json::json!({"input": "1", "output": "1", "context": 2_000_000_000}), "context"),
            (serde_json::json!({"input": "1", "output": "1", "seconds": "1"}), "seconds"),
            (serde_json::json!({"characters": "1", "output": "1"}), "output"),
            (
                serde_json::json!({"input": "1", "output": "1", "long_prompt": {"above": 1, "input": "x", "output": "1"}}),
                "long_prompt.input",
            ),
        ] {
            assert_eq!(wrong(price.clone()), field, "{price}");
        }
        assert!(serde_json::from_value::<OwnPrice>(serde_json::json!({"input": 2.5, "output": "1"})).is_err(), "no floats near money");
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let prices = AdmittedPrices::default();
        let req = |n: u64| {
            let mut id = [0; 16];
            id[..8].copy_from_slice(&n.to_be_bytes());
            RequestId(id)
        };
        for n in 0..REMEMBERED as u64 + 2 {
            prices.remember(req(n), vec![None]);
        }
        prices.remember(req(5), vec![None]);
        assert_eq!((prices.of(req(1)), prices.of(req(2))), (None, Some(Arc::from([None]))), "the oldest goes first");
        assert_eq!(prices.0.lock().unwrap().by_request.len(), REMEMBERED);
    }
}
