//! The difference between two configurations.

use super::Kind;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What an `apply` would do to one object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    Create,
    Update,
    Delete,
}

/// One object that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Difference {
    pub action: Action,
    pub kind: Kind,
    pub name: String,
    /// Fields that differ, by path, with what they were and will be. A secret is only said to differ.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fields: Vec<FieldChange>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FieldChange {
    pub field: String,
    pub from: serde_json::Value,
    pub to: serde_json::Value,
}

/// The fields in which two JSON values differ.
pub fn field_changes(from: &serde_json::Value, to: &serde_json::Value) -> Vec<FieldChange> {
    fn walk(at: &str, from: &serde_json::Value, to: &serde_json::Value, out: &mut Vec<FieldChange>) {
        use serde_json::Value::{Null, Object};
        if let (Object(a), Object(b)) = (from, to) {
            let names: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            for name in names {
                let dot = if at.is_empty() { "" } else { "." };
                walk(&format!("{at}{dot}{name}"), a.get(name).unwrap_or(&Null), b.get(name).unwrap_or(&Null), out);
            }
        } else if from != to {
            out.push(FieldChange { field: at.to_owned(), from: from.clone(), to: to.clone() });
        }
    }
    let mut out = Vec::new();
    walk("", from, to, &mut out);
    out
}
