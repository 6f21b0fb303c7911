//! What a provider is sent of a request's body: the caller's own bytes with the admitted values in them, or another document in the
//! provider's dialect.

use crate::body::{BodyFacts, Edits, Splice, splice_piece, spliced_length};
use crate::edge::{Plan, PlanTarget};
use crate::operation::{Dialect, Form, Operation, Site};
use crate::translate::request::{Terms, Untranslatable, translate};

/// What a request's body told, for as long as it may have to be written anew.
#[derive(Debug)]
pub struct Rewriting {
    pub facts: BodyFacts,
    /// The caller's.
    pub operation: &'static Operation,
    /// The limit on output tokens that the caller set, or that goes without saying.
    pub max_tokens: Option<u64>,
}

impl Rewriting {
    /// The changes that make the body what was admitted for this target, whose provider speaks the caller's dialect.
    pub fn splices(&self, plan: &Plan, target: &PlanTarget, site: &Site) -> Vec<Splice> {
        if self.facts.bytes == 0 {
            return Vec::new();
        }
        // A limit that the provider would set by itself is written down, since the hold rests on it.
        let own_limit = self.max_tokens.filter(|_| self.operation.default_limit().is_some());
        self.facts.splices(&Edits {
            model: target.model.as_deref(),
            max_tokens: clamp(plan, target).or(own_limit),
            limits: self.operation.limits(),
            include_usage: self.operation.asks_for_usage() && self.facts.stream,
            no_store: self.must_not_store(plan, site),
            list_price: self.operation.has_tiers() && site.defaults_tier(),
        })
    }

    /// `"store": false` must stand in the body.
    fn must_not_store(&self, plan: &Plan, site: &Site) -> bool {
        self.operation.may_store() && site.stores_answers(self.operation.form()) && !plan.state
    }

    /// The body for a target.
    pub fn body(&self, body: &[u8], plan: &Plan, target: &PlanTarget, site: &Site, caller: Dialect) -> Result<Vec<u8>, Untranslatable> {
        if let Some(form) = self.translated(site, caller) {
            let terms = Terms {
                form,
                to: site.dialect,
                is_newest: site.is_newest(),
                model: target.model.as_deref().unwrap_or_default(),
                max_tokens: clamp(plan, target),
                max_output: target.max_output,
                no_store: site.stores_answers(Some(Form::Chat)) && !plan.state,
                list_price: site.defaults_tier(),
                drops: plan.drops,
            };
            return translate(body, &terms).map(String::into_bytes);
        }
        let splices = self.splices(plan, target, site);
        let length = spliced_length(body.len() as u64, &splices);
        let mut out = Vec::with_capacity(usize::try_from(length).unwrap_or(0));
        splice_piece(body, 0, &splices, &mut out);
        Ok(out)
    }

    /// The form of a body that can't go on as it came: its provider speaks another dialect, or an older form of the caller's.
    fn translated(&self, site: &Site, caller: Dialect) -> Option<Form> {
        let form = self.operation.form()?;
        let is_older = form == Form::Chat && site.dialect == Dialect::OpenAi && !site.is_newest();
        (site.dialect != caller || is_older).then_some(form)
    }

    /// Whether the gate can write the body once for all tries.
    pub fn is_written_once(&self, plan: &Plan, site: &Site, caller: Dialect) -> bool {
        plan.targets.len() == 1 && self.translated(site, caller).is_none()
    }
}

/// The limit to write for a target: of several, not all give as much.
fn clamp(plan: &Plan, target: &PlanTarget) -> Option<u64> {
    plan.clamp.map(|clamp| clamp.min(target.max_output.unwrap_or(u64::MAX)))
}
