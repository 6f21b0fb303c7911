//! `keyward.yaml`: read so that whatever is wrong in it has a line; its schema; the secrets it refers to.

use keyward_policy_service::config::{self, Document, Fault};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use serde_saphyr::{Location, Spanned};
use std::collections::BTreeMap;
use std::path::Path;

/// Largest file that is read, in bytes.
const MAX_FILE: u64 = 8 * 1024 * 1024;

/// A configuration as a file says it.
#[derive(Debug)]
pub struct Manifest {
    pub document: Document,
    places: Places,
}

/// Something wrong in a file: where, which field, and what would be right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    pub file: String,
    pub line: u64,
    pub column: u64,
    pub field: String,
    pub message: String,
    pub hint: Option<String>,
}

impl std::fmt::Display for Mistake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let field = if self.field.is_empty() { String::new() } else { format!("{}: ", self.field) };
        write!(f, "{}:{}:{}: {field}{}", self.file, self.line, self.column, self.message)?;
        self.hint.as_ref().map_or(Ok(()), |hint| write!(f, "\n    hint: {hint}"))
    }
}

/// All mistakes of a file, one a line.
pub fn tell(mistakes: &[Mistake]) -> String {
    mistakes.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

/// Where each field of a file stands.
#[derive(Debug, Default)]
struct Places {
    file: String,
    by_path: BTreeMap<String, Location>,
}

impl Places {
    /// The place of a field; of one that is not there, that of the nearest that contains it.
    fn of(&self, field: &str) -> (u64, u64) {
        let mut path = field;
        loop {
            if let Some(place) = self.by_path.get(path) {
                return (place.line(), place.column());
            }
            match path.rfind(['.', '[']) {
                Some(at) => path = path.get(..at).unwrap_or_default(),
                None if path.is_empty() => return (1, 1),
                None => path = "",
            }
        }
    }

    fn mistake(&self, field: &str, message: impl Into<String>, hint: Option<String>) -> Mistake {
        let (line, column) = self.of(field);
        Mistake { file: self.file.clone(), line, column, field: field.to_owned(), message: message.into(), hint }
    }
}

impl Manifest {
    /// Reads a file, or standard input for `-`. Secrets are not looked up yet.
    pub fn read(path: &Path) -> Result<Self, Vec<Mistake>> {
        let name = path.display().to_string();
        let unreadable = |error: std::io::Error| {
            vec![Mistake {
                file: name.clone(),
                line: 1,
                column: 1,
                field: String::new(),
                message: format!("can't be read: {error}"),
                hint: None,
            }]
        };
        let text = if name == "-" {
            std::io::read_to_string(std::io::stdin()).map_err(unreadable)?
        } else {
            if std::fs::metadata(path).map_err(unreadable)?.len() > MAX_FILE {
                return Err(unreadable(std::io::Error::other(format!("it is larger than {MAX_FILE} bytes"))));
            }
            std::fs::read_to_string(path).map_err(unreadable)?
        };
        Self::parse(&name, &text)
    }

    /// Reads the text of the file `name`.
    pub fn parse(name: &str, text: &str) -> Result<Self, Vec<Mistake>> {
        let mut places = Places { file: name.to_owned(), ..Places::default() };
        let tree = serde_saphyr::from_str::<Option<Spanned<Node>>>(text).map_err(|error| {
            let (line, column) = error.location().map_or((1, 1), |at| (at.line(), at.column()));
            let message = first_line(&error.without_snippet().to_string());
            let twice = message.strip_prefix("duplicate mapping key: ").and_then(|rest| rest.split(", set ").next());
            let (field, message) = match twice {
                Some(key) => (first_of_two(text, key, line, column), format!("the key {key:?} stands twice")),
                None => (String::new(), message),
            };
            vec![Mistake { file: name.to_owned(), line, column, field, message, hint: None }]
        })?;
        let value = tree.map_or_else(|| Value::Object(Map::new()), |tree| plain(&tree, "", &mut places.by_path));
        let value = if value.is_null() { Value::Object(Map::new()) } else { value };
        if !value.is_object() {
            return Err(vec![places.mistake(
                "",
                "invalid type: the file must be a map of teams, policies, providers, credentials, pools, routes",
                None,
            )]);
        }
        let document: Document = serde_path_to_error::deserialize(value).map_err(|error| {
            let path = error.path().to_string();
            let path = if path == "." { String::new() } else { path };
            let message = error.into_inner().to_string();
            let (field, hint) = explain(&path, &message);
            vec![places.mistake(&field, message, hint)]
        })?;
        let mut manifest = Manifest { document, places };
        let faults = manifest.faults();
        if faults.is_empty() { Ok(manifest) } else { Err(manifest.mistakes(&faults)) }
    }

    fn faults(&mut self) -> Vec<Fault> {
        let mut faults = config::check(&self.document);
        for (name, credential) in &self.document.credentials {
            let field = format!("credentials.{name}");
            if credential.secret.is_some() {
                let message = "a secret must not stand in the file; say where it is: from: env:NAME or from: file:PATH";
                faults.push(Fault { field: format!("{field}.secret"), message: message.to_owned() });
            } else if credential.from.is_none() {
                faults.push(Fault { field, message: "from is missing: env:NAME or file:PATH".to_owned() });
            }
        }
        faults
    }

    /// Faults, ours or the service's, with their places.
    pub fn mistakes(&self, faults: &[Fault]) -> Vec<Mistake> {
        faults.iter().map(|fault| self.places.mistake(&fault.field, fault.message.clone(), hint(&fault.message, &self.document))).collect()
    }

    /// Looks up the secrets. `file:` paths are relative to the file that names them.
    pub fn with_secrets(mut self, path: &Path) -> Result<Self, Vec<Mistake>> {
        let directory = path.parent().unwrap_or(Path::new(""));
        let mut mistakes = Vec::new();
        for (name, credential) in &mut self.document.credentials {
            let from = credential.from.clone().unwrap_or_default();
            match secret(&from, directory) {
                Ok(secret) => credential.secret = Some(secret),
                Err(message) => mistakes.push(self.places.mistake(&format!("credentials.{name}.from"), message, None)),
            }
        }
        if !mistakes.is_empty() {
            return Err(mistakes);
        }
        let faults = config::check(&self.document);
        if faults.is_empty() { Ok(self) } else { Err(self.mistakes(&faults)) }
    }
}

fn secret(from: &str, directory: &Path) -> Result<String, String> {
    let secret = if let Some(name) = from.strip_prefix("env:") {
        std::env::var(name).map_err(|_| format!("the environment variable {name} is not set"))?
    } else if let Some(path) = from.strip_prefix("file:") {
        let path = directory.join(path);
        std::fs::read_to_string(&path).map_err(|error| format!("{} can't be read: {error}", path.display()))?
    } else {
        return Err("expected env:NAME or file:PATH".to_owned());
    };
    let secret = secret.trim();
    if secret.is_empty() { Err(format!("{from} is empty")) } else { Ok(secret.to_owned()) }
}

/// The path of a key that stands again at `line`: the nearest of its name before, in the same column if there is one.
fn first_of_two(text: &str, key: &str, line: u64, column: u64) -> String {
    let options = serde_saphyr::options! { duplicate_keys: serde_saphyr::DuplicateKeyPolicy::FirstWins };
    let mut places = BTreeMap::new();
    if let Ok(Some(tree)) = serde_saphyr::from_str_with_options::<Option<Spanned<Node>>>(text, options) {
        plain(&tree, "", &mut places);
    }
    let named = |path: &str| path == key || path.ends_with(&format!(".{key}"));
    let before = places.into_iter().filter(|(path, at)| named(path) && (at.line(), at.column()) < (line, column));
    before.max_by_key(|(_, at)| (at.column() == column, at.line(), at.column())).map_or(String::new(), |(path, _)| path)
}

/// The JSON Schema of the file.
pub fn schema() -> Value {
    let mut schema = schemars::schema_for!(Document).to_value();
    if let Some(map) = schema.as_object_mut() {
        map.insert("title".to_owned(), "keyward.yaml".into());
    }
    schema
}

/// A YAML value whose parts know where they stand.
#[derive(Debug)]
enum Node {
    Scalar(Value),
    List(Vec<Spanned<Node>>),
    Map(Vec<(Spanned<String>, Spanned<Node>)>),
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;
    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a YAML value")
    }
    fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
        Ok(Node::Scalar(value.into()))
    }
    fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
        Ok(Node::Scalar(value.into()))
    }
    fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
        Ok(Node::Scalar(value.into()))
    }
    fn visit_f64<E>(self, value: f64) -> Result<Node, E> {
        Ok(Node::Scalar(value.into()))
    }
    fn visit_str<E>(self, value: &str) -> Result<Node, E> {
        Ok(Node::Scalar(value.into()))
    }
    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Scalar(Value::Null))
    }
    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Scalar(Value::Null))
    }
    fn visit_some<D: Deserializer<'de>>(self, from: D) -> Result<Node, D::Error> {
        Node::deserialize(from)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Node, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Node::List(list))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Node, A::Error> {
        let mut map = Vec::new();
        while let Some(entry) = entries.next_entry()? {
            map.push(entry);
        }
        Ok(Node::Map(map))
    }
}

/// The value without its places, which go into `places` by path. A field stands where its key does.
fn plain(node: &Spanned<Node>, path: &str, places: &mut BTreeMap<String, Location>) -> Value {
    places.entry(path.to_owned()).or_insert(node.referenced);
    match &node.value {
        Node::Scalar(value) => value.clone(),
        Node::List(items) => items.iter().enumerate().map(|(i, item)| plain(item, &format!("{path}[{i}]"), places)).collect(),
        Node::Map(entries) => {
            let dot = if path.is_empty() { "" } else { "." };
            let entry = |(key, value): &(Spanned<String>, Spanned<Node>)| {
                let path = format!("{path}{dot}{}", key.value);
                places.insert(path.clone(), key.referenced);
                (key.value.clone(), plain(value, &path, places))
            };
            Value::Object(entries.iter().map(entry).collect())
        }
    }
}

/// The field that a serde message is about, and what to do.
fn explain(path: &str, message: &str) -> (String, Option<String>) {
    let quoted = |message: &str| message.split('`').nth(1).map(str::to_owned);
    if message.starts_with("unknown field") {
        // serde names the parent's path or the field's own, as the error came.
        let name = quoted(message).unwrap_or_default();
        let field = if path == name || path.ends_with(&format!(".{name}")) { path.to_owned() } else { join(path, &name) };
        let known: Vec<&str> = message.split('`').skip(3).step_by(2).collect();
        let near = nearest(&name, &known).map(|near| format!("did you mean {near}?"));
        return (field, near);
    }
    let hint = if message.contains("invalid type: integer") || message.contains("invalid type: floating point") {
        Some("put quotes around it: amounts and names are text".to_owned())
    } else {
        None
    };
    (path.to_owned(), hint)
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

/// A hint for a name that leads nowhere: the nearest one that does.
fn hint(message: &str, document: &Document) -> Option<String> {
    let wanted = message.split('"').nth(1)?;
    let known: Vec<&str> = if message.starts_with("there is no pool") {
        document.pools.keys().map(String::as_str).collect()
    } else if message.starts_with("there is no credential") {
        document.credentials.keys().map(String::as_str).collect()
    } else if message.starts_with("there is no provider") {
        document.provider_names()
    } else {
        return None;
    };
    match nearest(wanted, &known) {
        Some(near) => Some(format!("did you mean {near}?")),
        None if known.is_empty() => Some("none is defined".to_owned()),
        None => Some(format!("there are {}", known.join(", "))),
    }
}

/// The known name that is at most two edits away.
fn nearest<'a>(wanted: &str, known: &[&'a str]) -> Option<&'a str> {
    let best = known.iter().map(|name| (distance(wanted, name), *name)).min();
    best.filter(|(edits, name)| *edits <= 2 && *edits < name.len()).map(|(_, name)| name)
}

/// Levenshtein's distance.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = i;
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
        for (j, y) in b.chars().enumerate() {
            let above = row.get(j + 1).copied().unwrap_or(0);
            let left = row.get(j).copied().unwrap_or(0);
            let best = (diagonal + usize::from(x != y)).min(above + 1).min(left + 1);
            if let Some(cell) = row.get_mut(j + 1) {
                *cell = best;
            }
            diagonal = above;
        }
    }
    row.last().copied().unwrap_or(0)
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_good_file_is_read() {
        let text =
            "# ours\nteams:\n  search: {max_keys: 3, max_key_usd: \"10.00\"}\npolicies:\n  p:\n    allow:\n      models: [gpt-4o*]\n";
        let manifest = Manifest::parse("k.yaml", text).unwrap();
        assert_eq!(manifest.document.teams["search"].max_keys, Some(3));
        assert_eq!(manifest.document.policies["p"].allow.models, ["gpt-4o*"]);
        assert!(Manifest::parse("k.yaml", "").unwrap().document.teams.is_empty(), "an empty file says nothing");
        assert!(Manifest::parse("k.yaml", "# nothing\n").unwrap().document.teams.is_empty());
    }

    #[test]
    fn the_schema_knows_what_the_reader_knows() {
        let schema = schema();
        let sections: Vec<&String> = schema["properties"].as_object().unwrap().keys().collect();
        assert_eq!(sections, ["credentials", "organisation", "policies", "pools", "providers", "routes", "teams"]);
        assert!(!schema.to_string().contains("\"secret\""), "a secret has no place in the file");
    }

    /// Whoever wrote the file is led to the line, the field and, where one is near, the cure.
    #[test]
    fn every_mistake_has_its_line_and_field() {
        let table = include_str!("../tests/manifests/malformed.txt");
        let cases: Vec<&str> = table.split("\n=== ").skip(1).collect();
        assert!(cases.len() >= 50, "{}", cases.len());
        let mut wrong = Vec::new();
        for case in cases {
            let (head, text) = case.split_once('\n').unwrap();
            let mut parts = head.split('|').map(str::trim);
            let (line, field) = parts.next().unwrap().split_once(' ').unwrap();
            let (message, hint) = (parts.next().unwrap(), parts.next().unwrap());
            let mistakes = Manifest::parse("k.yaml", text).err().unwrap_or_default();
            let fits = |m: &Mistake| {
                let field = if field == "-" { "" } else { field };
                m.line.to_string() == line
                    && m.field == field
                    && m.message.contains(message)
                    && m.hint.clone().unwrap_or_default().contains(hint)
            };
            if !mistakes.iter().any(fits) {
                wrong.push(format!("{head}\n{text}\ngot: {mistakes:?}\n"));
            }
        }
        assert!(wrong.is_empty(), "{} cases\n{}", wrong.len(), wrong.join("\n"));
    }

    #[test]
    fn names_that_are_near() {
        assert_eq!(nearest("polices", &["policies", "pools"]), Some("policies"));
        assert_eq!(nearest("zzz", &["policies", "pools"]), None);
    }
}
