//! Where a request may go: by the route of its model's name, by the provider that its path names, or by who sells the model.

use crate::config::{Route, RouteTarget, Unsupported};
use crate::directory::Organisation;
use keyward_core::admission::{Aim, operation};
use keyward_core::edge::{Ask, RequestId};
use keyward_core::operation::carries;
use keyward_core::price::PriceTable;
use keyward_core::refusal::{Code, Refusal};
use std::borrow::Cow;

/// A place that a request may go to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place<'a> {
    pub provider: Cow<'a, str>,
    /// The provider's name of the model.
    pub model: Option<Cow<'a, str>>,
    pub pool: Option<&'a str>,
}

impl Place<'_> {
    pub fn aim(&self) -> Aim<'_> {
        Aim { provider: &self.provider, model: self.model.as_deref() }
    }
}

/// Where a request may go, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Places<'a> {
    pub places: Vec<Place<'a>>,
    pub first_byte_ms: Option<u64>,
    pub drops: bool,
}

/// Finds where a request may go. `req` draws among weighted targets.
pub fn places<'a>(organisation: &'a Organisation, table: &PriceTable, ask: &'a Ask, req: RequestId) -> Result<Places<'a>, Refusal> {
    let mut places = match ask.model.as_deref().and_then(|model| organisation.route(model)) {
        Some(route) => by_route(route, ask, req)?,
        None => Places { places: vec![by_model(organisation, table, ask)], ..Places::default() },
    };
    // What is at a provider already is at one.
    if !ask.refs.is_empty() {
        places.places.truncate(1);
    }
    let mut refusal = None;
    places.places.retain(|place| match can_serve(organisation, ask, place) {
        Ok(()) => true,
        Err(why) => {
            refusal.get_or_insert(why);
            false
        }
    });
    match refusal.filter(|_| places.places.is_empty()) {
        Some(refusal) => Err(refusal),
        None => Ok(places),
    }
}

/// The provider that a request is for, as far as that can be told: who is named, or where its model leads first.
pub fn provider<'a>(organisation: &'a Organisation, table: &PriceTable, ask: &'a Ask) -> Cow<'a, str> {
    let route = ask.model.as_deref().and_then(|model| organisation.route(model)).and_then(|route| route.targets.first());
    match route.filter(|_| ask.provider.is_empty()) {
        Some(target) => Cow::Borrowed(&target.provider),
        None => by_model(organisation, table, ask).provider,
    }
}

fn by_route<'a>(route: &'a Route, ask: &Ask, req: RequestId) -> Result<Places<'a>, Refusal> {
    let named = |target: &&RouteTarget| ask.provider.is_empty() || target.provider == ask.provider;
    let mut targets: Vec<&RouteTarget> = route.targets.iter().filter(named).collect();
    if targets.is_empty() {
        let leads: Vec<&str> = route.targets.iter().map(|target| target.provider.as_str()).collect();
        let message = format!("this model leads to {}, and this endpoint is one of {}", leads.join(", "), ask.provider);
        return Err(Refusal::new(Code::UnknownModel, message));
    }
    if let Some(first) = drawn(&targets, req) {
        let first = targets.remove(first);
        targets.insert(0, first);
    }
    let place = |target: &'a RouteTarget| Place {
        provider: Cow::Borrowed(&target.provider),
        model: Some(Cow::Borrowed(&target.model)),
        pool: target.pool.as_deref(),
    };
    Ok(Places {
        places: targets.into_iter().map(place).collect(),
        first_byte_ms: route.first_byte_timeout_ms,
        drops: route.unsupported == Unsupported::Drop,
    })
}

/// The target that is first by chance, if any has a weight. The request's id is as random as anything.
fn drawn(targets: &[&RouteTarget], req: RequestId) -> Option<usize> {
    let weight = |target: &&RouteTarget| u64::from(target.weight.unwrap_or(0));
    let all: u64 = targets.iter().map(weight).sum();
    let [.., a, b, c, d, e, f, g, h] = req.0;
    let mut draw = u64::from_be_bytes([a, b, c, d, e, f, g, h]).checked_rem(all)?;
    targets.iter().position(|target| match draw.checked_sub(weight(target)) {
        Some(left) => {
            draw = left;
            false
        }
        None => true,
    })
}

/// Where a model goes that has no route.
fn by_model<'a>(organisation: &Organisation, table: &PriceTable, ask: &'a Ask) -> Place<'a> {
    let at = |provider: Cow<'a, str>, model: Option<&'a str>| Place { provider, model: model.map(Cow::Borrowed), pool: None };
    let model = ask.model.as_deref();
    if !ask.provider.is_empty() {
        return at(Cow::Borrowed(&ask.provider), model);
    }
    let default = ask.dialect.provider();
    let Some(name) = model else { return at(Cow::Borrowed(default), None) };
    if let Some((provider, rest)) = name.split_once('/').filter(|(provider, _)| organisation.document.knows_provider(provider)) {
        return at(Cow::Borrowed(provider), Some(rest));
    }
    let lists = |provider: &str| table.find(provider, name).is_some() || organisation.prices.names(provider, name);
    let can = |provider: &&str| lists(provider) && organisation.is_enabled(provider) && organisation.has_credential(provider);
    // The provider whose dialect it is comes first, then those that are built in, then the organisation's own.
    if can(&default) {
        return at(Cow::Borrowed(default), model);
    }
    if let Some(provider) = organisation.document.provider_names().into_iter().find(can) {
        return at(Cow::Owned(provider.to_owned()), model);
    }
    let maker = [("claude", "anthropic"), ("gemini", "gemini"), ("gpt-", "openai")].into_iter().find(|(start, _)| name.starts_with(start));
    at(Cow::Borrowed(maker.map_or(default, |(_, provider)| provider)), model)
}

/// Whether a place can be asked at all.
fn can_serve(organisation: &Organisation, ask: &Ask, place: &Place<'_>) -> Result<(), Refusal> {
    let provider = &place.provider;
    let Some(dialect) = organisation.dialect(provider) else {
        return Err(Refusal::new(Code::UnknownProvider, format!("there is no provider {provider}")));
    };
    if !organisation.is_enabled(provider) {
        return Err(Refusal::new(Code::UnknownProvider, format!("the provider {provider} is switched off")));
    }
    let operation = operation(ask);
    if !operation.lists_models() && !carries(operation, ask.dialect, dialect) {
        return Err(Refusal::new(Code::EndpointNotAllowed, format!("{provider} has nothing like {}", ask.endpoint)));
    }
    Ok(())
}
