//! Parts of a merge patch (RFC 7396): what is absent stays, `null` takes it away.

use super::{Budget, Quota, Rates};
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use std::fmt;
use std::marker::PhantomData;
use utoipa::ToSchema;

/// Tells `null` from absent.
pub fn present<'de, T: Deserialize<'de>, D: Deserializer<'de>>(from: D) -> Result<Option<Option<T>>, D::Error> {
    Option::deserialize(from).map(Some)
}

/// Takes no `null`.
pub fn some<'de, T: Deserialize<'de>, D: Deserializer<'de>>(from: D) -> Result<Option<T>, D::Error> {
    T::deserialize(from).map(Some)
}

/// Takes an object and nothing else: by itself, serde would take a list of the fields' values as well.
pub fn object<'de, T: Deserialize<'de>, D: Deserializer<'de>>(from: D) -> Result<T, D::Error> {
    struct Object<T>(PhantomData<T>);
    impl<'de, T: Deserialize<'de>> Visitor<'de> for Object<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
            T::deserialize(MapAccessDeserializer::new(map))
        }
    }
    from.deserialize_map(Object(PhantomData))
}

/// What changes in the rates; a field that is absent stays, `null` takes it away.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ChangeRates {
    #[serde(deserialize_with = "present")]
    #[schema(value_type = Option<u64>)]
    rpm: Option<Option<u64>>,
    #[serde(deserialize_with = "present")]
    #[schema(value_type = Option<u64>)]
    tpm: Option<Option<u64>>,
    #[serde(deserialize_with = "present")]
    #[schema(value_type = Option<u64>)]
    max_in_flight: Option<Option<u64>>,
}

/// What changes in the limits of a key or of the organisation: the outer `None` stays as it is, the inner one takes all away.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LimitsPatch {
    pub budgets: Option<Option<Vec<Budget>>>,
    pub quotas: Option<Option<Vec<Quota>>>,
    pub rates: Option<Option<ChangeRates>>,
}

impl LimitsPatch {
    pub fn is_empty(&self) -> bool {
        *self == LimitsPatch::default()
    }

    pub fn apply(&self, budgets: &mut Vec<Budget>, quotas: &mut Vec<Quota>, rates: &mut Rates) {
        if let Some(new) = &self.budgets {
            *budgets = new.clone().unwrap_or_default();
        }
        if let Some(new) = &self.quotas {
            *quotas = new.clone().unwrap_or_default();
        }
        if let Some(change) = &self.rates {
            *rates = change.map_or_else(Rates::default, |change| Rates {
                rpm: change.rpm.unwrap_or(rates.rpm),
                tpm: change.tpm.unwrap_or(rates.tpm),
                max_in_flight: change.max_in_flight.unwrap_or(rates.max_in_flight),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_no_object() {
        let team = |rates: &str| serde_json::from_str::<crate::config::Team>(&format!(r#"{{"rates": {rates}}}"#));
        assert!(team(r#"{"rpm": 5}"#).is_ok_and(|team| team.rates.rpm == Some(5)));
        for wrong in ["[null, null]", "[5, 5, 5]", "[]", "5", "null"] {
            assert!(team(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_absent_stays_and_null_takes_away() {
        let mut budgets = vec![Budget { usd: "1.00".to_owned(), window: "day".to_owned() }];
        let mut quotas = vec![Quota { requests: Some(3), tokens: None, window: "day".to_owned() }];
        let mut rates = Rates { rpm: Some(5), tpm: Some(7), max_in_flight: None };
        let before = budgets.clone();
        let mut change = |patch: LimitsPatch| {
            patch.apply(&mut budgets, &mut quotas, &mut rates);
            (budgets.clone(), quotas.len(), rates)
        };
        assert!(LimitsPatch::default().is_empty());
        let some: ChangeRates = serde_json::from_str(r#"{"rpm": null, "max_in_flight": 2}"#).unwrap();
        let changed = Rates { rpm: None, tpm: Some(7), max_in_flight: Some(2) };
        assert_eq!(change(LimitsPatch { rates: Some(Some(some)), ..LimitsPatch::default() }), (before.clone(), 1, changed));
        assert_eq!(change(LimitsPatch { quotas: Some(None), ..LimitsPatch::default() }), (before, 0, changed));
        let none = LimitsPatch { budgets: Some(Some(vec![])), rates: Some(None), ..LimitsPatch::default() };
        assert_eq!(change(none), (vec![], 0, Rates::default()));
    }
}
