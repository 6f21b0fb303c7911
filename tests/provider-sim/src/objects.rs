//! What a provider keeps for an account. Every credential of the account sees all of it: that is how the providers are, and
//! what a gate that shares one credential among many callers has to make up for.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use serde::Serialize;
use serde_json::Value;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Response,
    /// A piece of a stored response's output, which an input may name.
    Item,
    ChatCompletion,
    File,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Response => "response",
            Kind::Item => "item",
            Kind::ChatCompletion => "chat_completion",
            Kind::File => "file",
        }
    }
}

#[derive(Debug)]
pub struct Object {
    pub kind: Kind,
    pub id: String,
    /// The request that made it, and whose.
    pub seq: u64,
    pub credential: Arc<str>,
    pub content: Content,
}

#[derive(Debug)]
pub enum Content {
    Response(Box<StoredResponse>),
    Item(Value),
    Chat(Box<StoredChat>),
    File(StoredFile),
}

#[derive(Clone, Debug)]
pub struct StoredResponse {
    pub document: String,
    /// Works in the background: what it says until when.
    pub pending: Option<(Instant, String)>,
    pub background: bool,
    /// All input so far, that of the responses before it included.
    pub input: Vec<Value>,
    pub output: Vec<Value>,
    /// Tokens of `input` and `output` as the next response in the chain pays them.
    pub context_tokens: u64,
}

#[derive(Clone, Debug)]
pub struct StoredChat {
    pub document: String,
    pub model: &'static str,
    pub metadata: Value,
    pub messages: Vec<Value>,
}

#[derive(Clone, Debug)]
pub struct StoredFile {
    pub filename: String,
    pub purpose: String,
    pub created: u64,
    pub bytes: Bytes,
}

/// Objects an account keeps; the oldest go first, as they do by age at the provider.
const PER_ACCOUNT: usize = 50_000;

#[derive(Debug, Default)]
pub struct Objects(Mutex<HashMap<Arc<str>, Account>>);

#[derive(Debug, Default)]
struct Account {
    by_id: HashMap<String, Arc<Object>>,
    order: VecDeque<String>,
}

/// One object as the control API shows it.
#[derive(Debug, Serialize)]
pub struct Shown {
    kind: Kind,
    id: String,
    created_seq: u64,
    credential: Arc<str>,
}

impl Objects {
    /// Keeps an object, in the place of one that has its id.
    pub fn put(&self, account: &Arc<str>, object: Object) {
        let mut accounts = self.accounts();
        let account = accounts.entry(Arc::clone(account)).or_default();
        let id = object.id.clone();
        if account.by_id.insert(id.clone(), Arc::new(object)).is_none() {
            account.order.push_back(id);
        }
        if account.order.len() > PER_ACCOUNT
            && let Some(oldest) = account.order.pop_front()
        {
            account.by_id.remove(&oldest);
        }
    }

    pub fn find(&self, account: &str, kind: Kind, id: &str) -> Option<Arc<Object>> {
        self.accounts().get(account)?.by_id.get(id).filter(|object| object.kind == kind).cloned()
    }

    pub fn remove(&self, account: &str, id: &str) {
        if let Some(account) = self.accounts().get_mut(account)
            && account.by_id.remove(id).is_some()
        {
            account.order.retain(|other| other != id);
        }
    }

    /// All of a kind, oldest first.
    pub fn all(&self, account: &str, kind: Kind) -> Vec<Arc<Object>> {
        let accounts = self.accounts();
        let Some(account) = accounts.get(account) else { return Vec::new() };
        let objects = account.order.iter().filter_map(|id| account.by_id.get(id));
        objects.filter(|object| object.kind == kind).cloned().collect()
    }

    pub fn shown(&self) -> BTreeMap<Arc<str>, Vec<Shown>> {
        let accounts = self.accounts();
        let of = |account: &Account| {
            let objects = account.order.iter().filter_map(|id| account.by_id.get(id));
            let shown = |object: &Arc<Object>| Shown {
                kind: object.kind,
                id: object.id.clone(),
                created_seq: object.seq,
                credential: Arc::clone(&object.credential),
            };
            objects.map(shown).collect()
        };
        accounts.iter().map(|(name, account)| (Arc::clone(name), of(account))).collect()
    }

    pub fn clear(&self) {
        self.accounts().clear();
    }

    fn accounts(&self) -> std::sync::MutexGuard<'_, HashMap<Arc<str>, Account>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(id: &str) -> Object {
        let content = StoredFile { filename: "a".into(), purpose: "batch".into(), created: 1, bytes: Bytes::new() };
        Object { kind: Kind::File, id: id.into(), seq: 7, credential: "a".into(), content: Content::File(content) }
    }

    #[test]
    fn an_account_sees_its_own_objects_and_no_others() {
        let objects = Objects::default();
        objects.put(&"one".into(), file("file-1"));
        assert!(objects.find("one", Kind::File, "file-1").is_some());
        assert!(objects.find("two", Kind::File, "file-1").is_none());
        assert!(objects.find("one", Kind::Response, "file-1").is_none());
        objects.remove("two", "file-1");
        assert_eq!(objects.all("one", Kind::File).len(), 1);
        objects.remove("one", "file-1");
        assert!(objects.all("one", Kind::File).is_empty());
    }

    #[test]
    fn the_oldest_object_makes_room() {
        let objects = Objects::default();
        for number in 0..=PER_ACCOUNT {
            objects.put(&"one".into(), file(&format!("file-{number}")));
        }
        assert!(objects.find("one", Kind::File, "file-0").is_none());
        assert!(objects.find("one", Kind::File, "file-1").is_some());
    }
}
