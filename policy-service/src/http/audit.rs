//! `/v1/audit`, `/v1/usage`, `/v1/settlements/import`: what happened.

use super::api::{Admin, MAX_PAGE, Params, Path, invalid_query, page};
use super::error::Problem;
use crate::service::access::{Permission, Principal};
use crate::store::{AuditRow, UsageBy, UsageQuery, UsageRow};
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use keyward_core::audit::{Entry, Event};
use keyward_core::hex;
use keyward_core::limits::{DAY_MS, date_text};
use keyward_core::money::Nanodollars;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

/// Largest import of records at a time, in bytes.
const MAX_IMPORT: usize = 64 * 1024 * 1024;
/// Most things that a sum is summed by.
const MAX_BY: usize = 8;

pub fn router() -> OpenApiRouter<Admin> {
    let import = OpenApiRouter::new().routes(routes!(import_settlements)).layer(DefaultBodyLimit::max(MAX_IMPORT));
    OpenApiRouter::new()
        .routes(routes!(audit_page))
        .routes(routes!(audit_bundle))
        .routes(routes!(usage))
        .routes(routes!(would_deny))
        .merge(import)
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct AuditRange {
    /// First entry, from 1.
    from: Option<u64>,
    /// Most entries, 1 to 1000.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u32>,
}

/// One entry of a chain.
#[derive(Serialize, ToSchema)]
pub struct AuditEntry {
    seq: u64,
    /// Unix milliseconds.
    time_ms: u64,
    event: &'static str,
    /// What the entry says, for people; the bytes beside it are what counts.
    #[schema(value_type = Object)]
    fields: Value,
    /// The exact bytes, in base64.
    entry: String,
    /// Hex.
    mac: String,
}

#[derive(Serialize, ToSchema)]
pub struct AuditEntries {
    data: Vec<AuditEntry>,
}

/// Entries of a chain
///
/// `key` is a key's id, or `adm_` and the organisation's id for its administrative changes.
#[utoipa::path(get, path = "/v1/audit/{key}", tag = "audit", params(("key" = String, Path), AuditRange), responses((status = 200, body = AuditEntries)))]
async fn audit_page(
    State(admin): State<Admin>,
    who: Principal,
    Path(key): Path<String>,
    Params(range): Params<AuditRange>,
) -> Result<Response, Problem> {
    let (_, limit) = page(None, range.limit)?;
    let rows = admin.service.audit(&who, &key, range.from.unwrap_or(1), limit).await?;
    Ok(axum::Json(AuditEntries { data: rows.iter().filter_map(entry).collect() }).into_response())
}

fn entry(row: &AuditRow) -> Option<AuditEntry> {
    let entry = Entry::decode(&row.entry)?;
    Some(AuditEntry {
        seq: row.seq,
        time_ms: entry.time_ms,
        event: entry.event.name(),
        fields: fields(&entry.event),
        entry: STANDARD.encode(&row.entry),
        mac: hex::encode(&row.mac),
    })
}

/// An event for people: ids as they see them elsewhere, JSON details as JSON.
fn fields(event: &Event) -> Value {
    let req = |req: &[u8; 16]| format!("req_{}", hex::encode(req));
    let detail = |text: &str| serde_json::from_str(text).unwrap_or_else(|_| Value::from(text));
    match event {
        Event::Admitted(a) => json!({
            "req": req(&a.req), "vm": hex::encode(&a.vm), "node": a.node, "provider": a.provider, "endpoint": a.endpoint, "model": a.model,
            "stream": a.stream, "bytes": a.bytes, "clamp": (a.clamp != u64::MAX).then_some(a.clamp), "choices": a.choices, "hold_nanodollars": a.hold,
            "rev": a.rev, "credentials": a.credentials,
        }),
        Event::Refused(r) | Event::WouldRefuse(r) => {
            json!({ "req": req(&r.req), "code": r.code, "provider": r.provider, "endpoint": r.endpoint, "model": r.model })
        }
        Event::Settled(s) => json!({
            "req": req(&s.req), "outcome": s.outcome, "status": s.status, "input": s.input, "cache_read": s.cache_read,
            "cache_write": s.cache_write, "cache_write_1h": s.cache_write_1h, "output": s.output, "reasoning": s.reasoning,
            "charge_nanodollars": s.charge, "estimated": s.estimated, "ms": s.ms,
            "tries": s.tries.iter().map(|t| json!({ "credential": t.credential, "status": t.status, "ms": t.ms })).collect::<Vec<_>>(),
        }),
        Event::Voided { req: id } => json!({ "req": req(id) }),
        Event::Expired { req: id, charge } => json!({ "req": req(id), "charge_nanodollars": charge }),
        Event::KeyCreated { actor, detail: d } | Event::KeyChanged { actor, detail: d } => json!({ "actor": actor, "detail": detail(d) }),
        Event::KeyFrozen { reason } => json!({ "reason": reason }),
        Event::KeyRevoked { actor } => json!({ "actor": actor }),
        Event::AdminChanged { actor, action, target, detail: d } => {
            json!({ "actor": actor, "action": action, "target": target, "detail": detail(d) })
        }
        Event::Alarm { what, detail: d } => json!({ "what": what, "detail": detail(d) }),
    }
}

/// A whole chain, with what is needed to check it
///
/// JSON lines, as docs/audit-format.md says.
#[utoipa::path(get, path = "/v1/audit/{key}/bundle", tag = "audit", params(("key" = String, Path)),
    responses((status = 200, body = String, content_type = "application/jsonl")))]
async fn audit_bundle(State(admin): State<Admin>, who: Principal, Path(key): Path<String>) -> Result<Response, Problem> {
    let mut entries = String::new();
    let (mut count, mut last, mut epochs) = (0u64, [0; 32], std::collections::BTreeSet::new());
    loop {
        let rows = admin.service.audit(&who, &key, count + 1, MAX_PAGE).await?;
        for row in &rows {
            count = row.seq;
            last = row.mac;
            epochs.extend(Entry::decode(&row.entry).map(|entry| entry.epoch));
            let line = json!({ "seq": row.seq, "entry": STANDARD.encode(&row.entry), "mac": hex::encode(&row.mac) });
            entries.push_str(&format!("{line}\n"));
        }
        if rows.len() < MAX_PAGE as usize {
            break;
        }
    }
    let keys: serde_json::Map<_, _> =
        epochs.iter().map(|&e| (e.to_string(), hex::encode(&admin.service.chain_key(&key, e).0).into())).collect();
    let head = json!({ "format": "keyward-audit-export/v1", "origin": admin.service.origin(), "key": key, "chain_keys": keys });
    let newest = epochs.last().copied().unwrap_or(0);
    let tail = json!({ "count": count, "head": hex::encode(&admin.service.chain_key(&key, newest).head(count, &last)) });
    let body = format!("{head}\n{entries}{tail}\n");
    Ok(([(header::CONTENT_TYPE, "application/jsonl")], body).into_response())
}

/// What an import did.
#[derive(Serialize, ToSchema)]
pub struct Imported {
    taken: u64,
    rejected: u64,
}

/// Recover what a dead Envoy never sent
///
/// Sealed records, one a line, as they stand in Envoy's access log. Those that are known already are ignored.
#[utoipa::path(post, path = "/v1/settlements/import", tag = "audit", request_body(content = String, content_type = "text/plain"),
    responses((status = 200, body = Imported)))]
async fn import_settlements(State(admin): State<Admin>, who: Principal, body: axum::body::Bytes) -> Result<Response, Problem> {
    who.needs(Permission::ImportSettlements)?;
    let text = std::str::from_utf8(&body).map_err(|_| Problem::new(StatusCode::BAD_REQUEST, "invalid body", "the records must be text"))?;
    let (taken, rejected) = admin.service.import_records(&who, text.lines()).await?;
    Ok(axum::Json(Imported { taken, rejected }).into_response())
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct UsageParams {
    /// First day, UTC; default: 30 days before `to`.
    #[param(example = "2026-11-01")]
    from: Option<String>,
    /// Last day, UTC; default: today.
    #[param(example = "2026-11-30")]
    to: Option<String>,
    /// What to sum by, comma-separated: day, team, key, provider, model, and `tag:NAME` for the value of a tag of the keys.
    /// Default: nothing, one sum. What would have been denied has a `reason` as well.
    #[param(example = "day,model")]
    by: Option<String>,
    team: Option<String>,
    key: Option<String>,
    /// `next_cursor` of the page before.
    cursor: Option<String>,
    /// Most items, 1 to 1000.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u32>,
}

/// One sum.
#[derive(Serialize, ToSchema)]
pub struct UsageSum {
    /// What it is the sum of: `{"day": "2026-11-20", "model": "gpt-4o"}`.
    by: BTreeMap<String, String>,
    requests: u64,
    input_tokens: u64,
    cache_read_tokens: u64,
    cache_write_tokens: u64,
    output_tokens: u64,
    spent_usd: String,
    spent_nanodollars: i64,
}

#[derive(Serialize, ToSchema)]
pub struct UsageSums {
    data: Vec<UsageSum>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    next_cursor: Option<String>,
}

/// What was used and spent
///
/// Days are those of the settlement, in UTC. A developer sees their own team.
#[utoipa::path(get, path = "/v1/usage", tag = "usage", params(UsageParams), responses((status = 200, body = UsageSums)))]
async fn usage(State(admin): State<Admin>, who: Principal, Params(params): Params<UsageParams>) -> Result<Response, Problem> {
    let (by, rows, next_cursor) = sums(&admin, &who, params, false).await?;
    let data = rows.into_iter().map(|row| sum(&by, row)).collect();
    Ok(axum::Json(UsageSums { data, next_cursor }).into_response())
}

/// Requests that would have been refused.
#[derive(Serialize, ToSchema)]
pub struct WouldDeny {
    /// What it is the sum of: `{"reason": "cap_exhausted", "key": "key_..."}`.
    by: BTreeMap<String, String>,
    requests: u64,
}

#[derive(Serialize, ToSchema)]
pub struct WouldDenySums {
    data: Vec<WouldDeny>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    next_cursor: Option<String>,
}

/// What keys in shadow mode would have been refused
///
/// Days are those of the request, in UTC. A developer sees their own team.
#[utoipa::path(get, path = "/v1/usage/would-deny", tag = "usage", params(UsageParams), responses((status = 200, body = WouldDenySums)))]
async fn would_deny(State(admin): State<Admin>, who: Principal, Params(params): Params<UsageParams>) -> Result<Response, Problem> {
    let (by, rows, next_cursor) = sums(&admin, &who, params, true).await?;
    let data = rows.into_iter().map(|row| WouldDeny { requests: row.requests, by: named(&by, row.by) }).collect();
    Ok(axum::Json(WouldDenySums { data, next_cursor }).into_response())
}

/// Sums, what they are sums of, and the cursor of the next page.
async fn sums(
    admin: &Admin,
    who: &Principal,
    params: UsageParams,
    would_deny: bool,
) -> Result<(Vec<UsageBy>, Vec<UsageRow>, Option<String>), Problem> {
    let (cursor, limit) = page(params.cursor.as_deref(), params.limit)?;
    let day = |name: &str, text: &Option<String>| {
        text.as_deref().map(|text| parse_day(text).ok_or_else(|| invalid_query(name, "expected a day such as 2026-11-20"))).transpose()
    };
    let to_day = day("to", &params.to)?.unwrap_or(crate::service::now_ms() / DAY_MS);
    let from_day = day("from", &params.from)?.unwrap_or(to_day.saturating_sub(30));
    let by = parse_by(params.by.as_deref().unwrap_or_default(), would_deny)?;
    // The cursor is where the page before ended, so that what comes in between shifts nothing.
    let after: Option<Vec<String>> = if cursor.is_empty() { Some(Vec::new()) } else { serde_json::from_str(&cursor).ok() };
    let after = after.filter(|after| after.is_empty() || after.len() == by.len());
    let after = after.ok_or_else(|| invalid_query("cursor", "is not one that a page gave"))?;
    let (team, key) = (params.team, params.key);
    let query =
        UsageQuery { organisation: String::new(), team, key, from_day, to_day, by: by.clone(), after, limit: limit + 1, would_deny };
    let mut rows = admin.service.usage(who, query).await?;
    let more = rows.len() > limit as usize;
    rows.truncate(limit as usize);
    let next_cursor = rows.last().filter(|_| more).map(|last| super::api::cursor(&serde_json::to_string(&last.by).unwrap_or_default()));
    Ok((by, rows, next_cursor))
}

fn parse_by(names: &str, would_deny: bool) -> Result<Vec<UsageBy>, Problem> {
    let mut by = Vec::new();
    for name in names.split(',').filter(|name| !name.is_empty()) {
        let known = UsageBy::by_name(name).filter(|by| would_deny || *by != UsageBy::Reason);
        let one = known.ok_or_else(|| invalid_query("by", "expected some of day, team, key, provider, model, tag:NAME"))?;
        if by.contains(&one) {
            return Err(invalid_query("by", "expected each at most once"));
        }
        by.push(one);
    }
    if by.len() > MAX_BY {
        return Err(invalid_query("by", "expected at most 8"));
    }
    Ok(by)
}

/// What a sum is of, by name.
fn named(by: &[UsageBy], values: Vec<String>) -> BTreeMap<String, String> {
    let value = |(by, value): (&UsageBy, String)| {
        let value = if *by == UsageBy::Day { value.parse().map_or(value, date_text) } else { value };
        (by.name(), value)
    };
    by.iter().zip(values).map(value).collect()
}

fn sum(by: &[UsageBy], row: UsageRow) -> UsageSum {
    UsageSum {
        by: named(by, row.by),
        requests: row.requests,
        input_tokens: row.input,
        cache_read_tokens: row.cache_read,
        cache_write_tokens: row.cache_write,
        output_tokens: row.output,
        spent_usd: Nanodollars(row.nanodollars).to_usd(),
        spent_nanodollars: row.nanodollars,
    }
}

/// Days since 1970-01-01 of `YYYY-MM-DD`, 1970 to 9999 (Howard Hinnant's `days_from_civil`).
fn parse_day(text: &str) -> Option<u64> {
    let mut parts = text.split('-');
    let mut part = |len: usize| {
        let digits = parts.next().filter(|p| p.len() == len && p.bytes().all(|b| b.is_ascii_digit()))?;
        digits.parse::<u64>().ok()
    };
    let (year, month, day) = (part(4)?, part(2)?, part(2)?);
    if parts.next().is_some() || year < 1970 || !(1..=12).contains(&month) || day == 0 {
        return None;
    }
    let y = if month <= 2 { year - 1 } else { year };
    let (era, shifted) = (y / 400, (month + 9) % 12);
    let year_of_era = y - era * 400;
    let day_of_year = (153 * shifted + 2) / 5 + day - 1;
    let days = era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    // A day that its month does not have comes back as another.
    let days = days.checked_sub(719_468)?;
    (date_text(days) == text).then_some(days)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_come_and_go() {
        assert_eq!(parse_day("1970-01-01"), Some(0));
        assert_eq!(parse_day("2026-11-20"), Some(20_777));
        assert_eq!(parse_day("2024-02-29"), Some(19_782));
        for bad in
            ["", "2026-11", "2026-13-01", "2026-02-29", "2026-11-31", "1969-12-31", "2026-1-1", "2026-11-20-1", "20261120", "+026-11-20"]
        {
            assert_eq!(parse_day(bad), None, "{bad}");
        }
        for day in (0..200_000).step_by(37) {
            assert_eq!(parse_day(&date_text(day)), Some(day));
        }
    }
}
