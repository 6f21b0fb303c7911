//! Limits as they are given on the command line, and `keyward organisation`.

use crate::cli::Access;
use crate::failure::{Exit, Failure};
use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Map, Value, json};

/// What may be spent and used.
#[derive(Args)]
pub struct Limits {
    /// Hard cap in dollars, USD or USD/WINDOW, such as 25.00 (for good), 5.00/day, 100/month; repeat for more
    #[arg(long = "budget")]
    budgets: Vec<String>,
    /// Most requests, N or N/WINDOW, such as 1000/day; repeat for more
    #[arg(long = "max-requests")]
    requests: Vec<String>,
    /// Most tokens of input and output, N or N/WINDOW; repeat for more
    #[arg(long = "max-tokens")]
    tokens: Vec<String>,
    /// Requests in any 60 seconds
    #[arg(long)]
    rpm: Option<u64>,
    /// Tokens in any 60 seconds
    #[arg(long)]
    tpm: Option<u64>,
    /// Requests at the same time
    #[arg(long)]
    max_in_flight: Option<u64>,
}

/// What a refused limit does.
#[derive(Clone, Copy, ValueEnum)]
pub enum Enforce {
    Enforce,
    /// Refuse nothing, record what would have been refused
    Shadow,
}

impl Limits {
    /// Adds only what was named to the body of a request.
    pub fn add_to(&self, body: &mut Map<String, Value>) -> Result<(), Failure> {
        if !self.budgets.is_empty() {
            let budgets: Vec<Value> =
                self.budgets.iter().map(|text| windowed(text)).map(|(usd, window)| json!({ "usd": usd, "window": window })).collect();
            body.insert("budgets".to_owned(), budgets.into());
        }
        let quotas = self.quotas()?;
        if !quotas.is_empty() {
            body.insert("quotas".to_owned(), quotas.into());
        }
        let rates: Map<String, Value> = [("rpm", self.rpm), ("tpm", self.tpm), ("max_in_flight", self.max_in_flight)]
            .into_iter()
            .filter_map(|(name, rate)| Some((name.to_owned(), rate?.into())))
            .collect();
        if !rates.is_empty() {
            body.insert("rates".to_owned(), rates.into());
        }
        Ok(())
    }

    /// One object for each window, with requests, tokens or both.
    fn quotas(&self) -> Result<Vec<Value>, Failure> {
        let mut quotas: Vec<Map<String, Value>> = Vec::new();
        for (field, given) in [("requests", &self.requests), ("tokens", &self.tokens)] {
            for text in given {
                let (number, window) = windowed(text);
                let wrong =
                    || Failure::new(Exit::Invalid, format!("{text:?}: expected a number, or a number and a window such as 1000/day"));
                let number: u64 = number.parse().map_err(|_| wrong())?;
                match quotas.iter_mut().find(|quota| quota.get("window").is_some_and(|of| of == window) && !quota.contains_key(field)) {
                    Some(quota) => drop(quota.insert(field.to_owned(), number.into())),
                    None => quotas.push(Map::from_iter([("window".to_owned(), window.into()), (field.to_owned(), number.into())])),
                }
            }
        }
        Ok(quotas.into_iter().map(Value::Object).collect())
    }
}

/// `5.00/day`: an amount and its window. Without one it is for good.
fn windowed(text: &str) -> (&str, &str) {
    text.split_once('/').unwrap_or((text, "total"))
}

#[derive(Subcommand)]
pub enum Organisation {
    /// Show the limits of all keys together, and what is used of them
    Show {
        #[command(flatten)]
        access: Access,
    },
    /// Set limits of all keys together; what is not named stays
    Set {
        #[command(flatten)]
        access: Access,
        #[command(flatten)]
        limits: Limits,
        /// Where alarms are sent; "" for nowhere
        #[arg(long)]
        webhook: Option<String>,
    },
    /// Print what alarms are signed with
    WebhookSecret {
        #[command(flatten)]
        access: Access,
    },
}

const PATH: &str = "/v1/organisation";

pub fn run(command: Organisation) -> Result<(), Failure> {
    match command {
        Organisation::Show { access } => show(&access, access.client()?.get(PATH)?),
        Organisation::WebhookSecret { access } => access.print(&access.client()?.get(&format!("{PATH}/webhook-secret"))?, &["secret"]),
        Organisation::Set { access, limits, webhook } => {
            let mut body = Map::new();
            limits.add_to(&mut body)?;
            if let Some(url) = webhook {
                body.insert("webhook".to_owned(), Some(url).filter(|url| !url.is_empty()).into());
            }
            show(&access, access.client()?.patch(PATH, &body.into())?)
        }
    }
}

/// A table has one line for each window.
fn show(access: &Access, organisation: Value) -> Result<(), Failure> {
    if !access.is_table() {
        return access.print(&organisation, &[]);
    }
    let budgets = organisation.pointer("/spec/budgets").and_then(Value::as_array).cloned().unwrap_or_default();
    let mut windows = organisation.get("windows").and_then(Value::as_array).cloned().unwrap_or_default();
    for window in windows.iter_mut().filter_map(Value::as_object_mut) {
        let of = |budget: &&Value| budget.get("window") == window.get("window");
        let budget = budgets.iter().find(of).and_then(|budget| budget.get("usd")).cloned().unwrap_or(Value::Null);
        window.insert("budget_usd".to_owned(), budget);
    }
    access.print(&windows.into(), &["window", "start", "budget_usd", "spent_usd", "requests", "tokens"])
}
