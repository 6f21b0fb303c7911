//! `keyward keys` and `keyward credentials`.

use super::limits::{Enforce, Limits};
use super::{pairs, segment};
use crate::cli::{Access, Output, out, text};
use crate::failure::Failure;
use crate::secret;
use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Map, Value, json};

#[derive(Subcommand)]
pub enum Keys {
    /// Make a key and print its token, once
    Create {
        #[command(flatten)]
        access: Access,
        #[command(flatten)]
        fields: Box<Fields>,
        /// Where agents call, for the snippets
        #[arg(long, env = "KEYWARD_GATEWAY", default_value = "http://127.0.0.1:7800")]
        gateway: String,
    },
    /// List keys
    List {
        #[command(flatten)]
        access: Access,
        /// Only those of a team
        #[arg(long)]
        team: Option<String>,
    },
    /// Show one key
    Show {
        #[command(flatten)]
        access: Access,
        id: String,
    },
    /// Change a key; what is not named stays
    Update {
        #[command(flatten)]
        access: Access,
        id: String,
        #[command(flatten)]
        fields: Box<Fields>,
        /// Let a frozen key go on
        #[arg(long)]
        unfreeze: bool,
    },
    /// Give a key a new token, and print it once
    Rotate {
        #[command(flatten)]
        access: Access,
        id: String,
        /// How long the old token works on: 30s, 10m, 12h, 7d
        #[arg(long, default_value = "0s")]
        overlap: String,
        /// Where agents call, for the snippets
        #[arg(long, env = "KEYWARD_GATEWAY", default_value = "http://127.0.0.1:7800")]
        gateway: String,
    },
    /// Revoke a key for good
    Revoke {
        #[command(flatten)]
        access: Access,
        id: String,
    },
    /// Erase a key's personal fields and tags
    Erase {
        #[command(flatten)]
        access: Access,
        id: String,
    },
}

/// What a key is.
#[derive(Args)]
pub struct Fields {
    #[arg(long)]
    label: Option<String>,
    #[command(flatten)]
    limits: Limits,
    /// Whether its limits refuse
    #[arg(long, value_enum)]
    enforce: Option<Enforce>,
    /// Models it may use (globs); repeat for more; none: any
    #[arg(long = "model")]
    models: Vec<String>,
    /// Endpoints it may call, such as "POST /v1/chat/completions"; repeat for more; none: any
    #[arg(long = "endpoint")]
    endpoints: Vec<String>,
    /// 30s, 10m, 12h, 7d
    #[arg(long)]
    expires_in: Option<String>,
    #[arg(long)]
    team: Option<String>,
    #[arg(long)]
    policy: Option<String>,
    /// NAME=VALUE, such as feature=search; repeat for more
    #[arg(long = "tag")]
    tags: Vec<String>,
    /// Personal data, NAME=VALUE; repeat for more
    #[arg(long = "personal")]
    personal: Vec<String>,
}

impl Fields {
    /// Only what was named.
    fn body(&self) -> Result<Map<String, Value>, Failure> {
        let mut body = Map::new();
        let texts = [("label", &self.label), ("expires_in", &self.expires_in), ("team", &self.team), ("policy", &self.policy)];
        for (name, value) in texts {
            if let Some(value) = value {
                body.insert(name.to_owned(), value.as_str().into());
            }
        }
        if !self.models.is_empty() || !self.endpoints.is_empty() {
            body.insert("allow".to_owned(), json!({ "models": self.models, "endpoints": self.endpoints }));
        }
        self.limits.add_to(&mut body)?;
        if let Some(enforce) = self.enforce.and_then(|enforce| enforce.to_possible_value()) {
            body.insert("enforce".to_owned(), enforce.get_name().into());
        }
        for (name, given) in [("tags", &self.tags), ("personal", &self.personal)] {
            if !given.is_empty() {
                body.insert(name.to_owned(), pairs(given)?.into());
            }
        }
        Ok(body)
    }
}

const KEY_COLUMNS: [&str; 8] = ["id", "label", "team", "status", "budget_usd", "spent_usd", "reserved_usd", "in_flight"];

pub fn run(command: Keys) -> Result<(), Failure> {
    match command {
        Keys::Create { access, fields, gateway } => {
            let key = access.client()?.post("/v1/keys", &fields.body()?.into())?;
            show_token(&access, &key, &gateway)
        }
        Keys::List { access, team } => {
            let filter = team.map(|team| segment(&team)).transpose()?.map_or(String::new(), |team| format!("?team={team}"));
            access.print(&access.client()?.list(&format!("/v1/keys{filter}"))?, &KEY_COLUMNS)
        }
        Keys::Show { access, id } => access.print(&access.client()?.get(&path(&id)?)?, &KEY_COLUMNS),
        Keys::Update { access, id, fields, unfreeze } => {
            let mut body = fields.body()?;
            if unfreeze {
                body.insert("status".to_owned(), "active".into());
            }
            access.print(&access.client()?.patch(&path(&id)?, &body.into())?, &KEY_COLUMNS)
        }
        Keys::Rotate { access, id, overlap, gateway } => {
            let key = access.client()?.post(&format!("{}/rotate", path(&id)?), &json!({ "overlap": overlap }))?;
            show_token(&access, &key, &gateway)
        }
        Keys::Revoke { access, id } => access.client()?.delete(&path(&id)?),
        Keys::Erase { access, id } => access.client()?.delete(&format!("{}/personal", path(&id)?)),
    }
}

fn path(id: &str) -> Result<String, Failure> {
    Ok(format!("/v1/keys/{}", segment(id)?))
}

/// A token, this once, and how to use it.
fn show_token(access: &Access, key: &Value, gateway: &str) -> Result<(), Failure> {
    if access.output == Output::Json {
        return Ok(out(&format!("{key:#}\n"))?);
    }
    let (id, token, base) = (text(key, "id"), text(key, "token"), gateway.trim_end_matches('/'));
    Ok(out(&format!(
        r#"{id}  {token}
The token is shown this once.

curl:
  curl {base}/v1/chat/completions -H 'authorization: Bearer {token}' -H 'content-type: application/json' \
    -d '{{"model": "gpt-4o-mini", "messages": [{{"role": "user", "content": "Hello"}}]}}'

Python:
  from openai import OpenAI
  client = OpenAI(base_url="{base}/v1", api_key="{token}")
  print(client.chat.completions.create(model="gpt-4o-mini", messages=[{{"role": "user", "content": "Hello"}}]).choices[0].message.content)

Node:
  import OpenAI from "openai";
  const client = new OpenAI({{ baseURL: "{base}/v1", apiKey: "{token}" }});
  console.log((await client.chat.completions.create({{ model: "gpt-4o-mini", messages: [{{ role: "user", content: "Hello" }}] }})).choices[0].message.content);
"#
    ))?)
}

#[derive(Subcommand)]
pub enum Credentials {
    /// Store a provider's key; it is read from the environment or from standard input, never from the command line
    Add {
        #[command(flatten)]
        access: Access,
        /// openai, anthropic
        provider: String,
        /// Name for pools and configuration; default: its id
        #[arg(long)]
        name: Option<String>,
        /// Name of the environment variable that holds the secret; without it, standard input
        #[arg(long)]
        from_env: Option<String>,
        #[arg(long, default_value = "")]
        label: String,
        /// Provider account whose limits it shares; default: its own
        #[arg(long)]
        account: Option<String>,
    },
    /// List credentials, without their secrets: what keeps each from being used, and what is left of its limits
    List {
        #[command(flatten)]
        access: Access,
    },
    /// Show a credential, by name or id
    Show {
        #[command(flatten)]
        access: Access,
        name: String,
    },
    /// Replace a credential's secret, or change what is known of it
    Update {
        #[command(flatten)]
        access: Access,
        name: String,
        /// Read a new secret from this environment variable
        #[arg(long, conflicts_with = "from_stdin")]
        from_env: Option<String>,
        /// Read a new secret from standard input
        #[arg(long)]
        from_stdin: bool,
        #[arg(long)]
        label: Option<String>,
        #[arg(long)]
        account: Option<String>,
    },
    /// Use a credential again that the provider rejected or said to be used up, by name or id
    Reset {
        #[command(flatten)]
        access: Access,
        name: String,
    },
    /// Remove a credential, by name or id
    Remove {
        #[command(flatten)]
        access: Access,
        name: String,
    },
}

const CREDENTIAL_COLUMNS: [&str; 9] = ["id", "name", "provider", "label", "account", "source", "state", "until", "left"];

/// Prints credentials; in a table with what people ask first of their states.
fn show_credentials(access: &Access, value: &Value) -> Result<(), Failure> {
    if !access.is_table() {
        return access.print(value, &CREDENTIAL_COLUMNS);
    }
    let rows = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
    let rows: Vec<Value> = rows.iter().map(for_people).collect();
    access.print(&rows.into(), &CREDENTIAL_COLUMNS)
}

fn for_people(credential: &Value) -> Value {
    let mut row = credential.as_object().cloned().unwrap_or_default();
    if let Some(worst) = credential.pointer("/states/0") {
        let model = worst.get("model").and_then(Value::as_str).map_or(String::new(), |model| format!(" ({model})"));
        row.insert("state".to_owned(), format!("{}{model}", text(worst, "state")).into());
        let left = worst.get("remaining_ms").and_then(Value::as_u64);
        row.insert("until".to_owned(), left.map_or_else(|| "reset".to_owned(), |ms| format!("in {}", span(ms))).into());
    }
    let rooms = credential.get("headroom").and_then(Value::as_array).into_iter().flatten();
    let left: Vec<String> = rooms.filter_map(headroom).collect();
    row.insert("left".to_owned(), if left.is_empty() { "-".to_owned() } else { left.join("; ") }.into());
    row.into()
}

/// `gpt-4o: 58/60 requests, 149000/150000 tokens`
fn headroom(of_model: &Value) -> Option<String> {
    let figure = |what: &str| {
        let left = of_model.get(what).filter(|left| left.is_object())?;
        let limit = left.get("limit").and_then(Value::as_u64).map_or(String::new(), |limit| format!("/{limit}"));
        Some(format!("{}{limit} {what}", text(left, "remaining")))
    };
    let figures: Vec<String> = ["requests", "tokens"].into_iter().filter_map(figure).collect();
    (!figures.is_empty()).then(|| format!("{}: {}", text(of_model, "model"), figures.join(", ")))
}

/// Milliseconds, in the largest unit that leaves two figures.
fn span(ms: u64) -> String {
    match ms.div_ceil(1_000) {
        seconds @ 0..=119 => format!("{seconds}s"),
        seconds @ 120..=7_199 => format!("{}m", seconds / 60),
        seconds => format!("{}h", seconds / 3_600),
    }
}

pub fn run_credentials(command: Credentials) -> Result<(), Failure> {
    let at = |name: &str| Ok::<_, Failure>(format!("/v1/credentials/{}", segment(name)?));
    match command {
        Credentials::Add { access, provider, name, from_env, label, account } => {
            let secret = secret::read(from_env.as_deref(), &format!("Key of {provider}: "))?;
            let body = json!({ "name": name, "provider": provider, "label": label, "account": account, "secret": secret.as_str() });
            show_credentials(&access, &access.client()?.post("/v1/credentials", &body)?)
        }
        Credentials::List { access } => show_credentials(&access, &access.client()?.list("/v1/credentials")?),
        Credentials::Show { access, name } => show_credentials(&access, &access.client()?.get(&at(&name)?)?),
        Credentials::Reset { access, name } => {
            show_credentials(&access, &access.client()?.post(&format!("{}/reset", at(&name)?), &json!({}))?)
        }
        Credentials::Update { access, name, from_env, from_stdin, label, account } => {
            let mut body = Map::new();
            for (field, value) in [("label", label), ("account", account)] {
                if let Some(value) = value {
                    body.insert(field.to_owned(), value.into());
                }
            }
            if from_stdin || from_env.is_some() {
                body.insert("secret".to_owned(), secret::read(from_env.as_deref(), "New secret: ")?.as_str().into());
            }
            show_credentials(&access, &access.client()?.patch(&at(&name)?, &body.into())?)
        }
        Credentials::Remove { access, name } => access.client()?.delete(&at(&name)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_see_what_keeps_a_credential_from_being_used_and_what_is_left() {
        let state =
            |state: &str, ms: Value| json!({ "state": state, "model": "gpt-4o", "until": "2026-01-01T00:00:00Z", "remaining_ms": ms });
        let row = |states: Vec<Value>, headroom: Value| {
            let row = for_people(&json!({ "state": "x", "until": null, "states": states, "headroom": headroom }));
            [text(&row, "state"), text(&row, "until"), text(&row, "left")].join(" | ")
        };
        let room = json!([{ "model": "gpt-4o", "requests": { "remaining": 58, "limit": 60 }, "tokens": { "remaining": 9, "limit": null } },
            { "model": "o3", "requests": null, "tokens": null }]);
        assert_eq!(row(vec![], json!([])), "x | - | -");
        assert_eq!(
            row(vec![state("rate_limited", 11_001.into())], room),
            "rate_limited (gpt-4o) | in 12s | gpt-4o: 58/60 requests, 9 tokens"
        );
        assert_eq!(row(vec![state("rejected", Value::Null), state("exhausted", 5.into())], json!([])), "rejected (gpt-4o) | reset | -");
        assert_eq!([119_000, 120_000, 7_200_000].map(span), ["119s", "2m", "2h"]);
    }
}
