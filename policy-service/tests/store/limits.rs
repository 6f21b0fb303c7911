//! Limits of several levels and windows, shadow mode, alarms.

use super::*;
use keyward_core::limits::{DAY_MS, Quota, Rates};
use serde_json::json;

const DAY: u64 = 20_777;

impl Bed {
    async fn member(&self, n: u8, team: Option<&str>, limits: Limits, enforce: Enforce) -> KeyRow {
        let row = self.key(n, None).await;
        let row = KeyRow { team: team.map(str::to_owned), limits, enforce, ..row };
        done(self.store.update_key(KeyUpdate { row, salt: [0; 16], actor: "test".to_owned(), now_ms: 2, max_keys: None }).await.unwrap())
    }

    async fn configure(&self, kind: Kind, name: &str, body: serde_json::Value) {
        assert!(matches!(self.edit(vec![put(kind, name, body, Expect::Anything)]).await, Edited::Done(_)));
    }

    async fn code(&self, key: u8, req: u8, max: u64, now: u64) -> Result<(), Code> {
        match self.admit(key, req, max, now).await {
            Admission::Admitted(_) => Ok(()),
            Admission::Refused(refusal) => Err(refusal.code),
            other => panic!("{other:?}"),
        }
    }
}

fn usd(nano: i64) -> String {
    Nanodollars(nano).to_usd()
}

#[tokio::test]
async fn a_team_and_its_organisation_share_their_budgets() {
    let mut bed = Bed::new().await;
    bed.configure(Kind::Team, "t", json!({"budgets": [{"usd": usd(hold_of(16) * 2), "window": "day"}]})).await;
    bed.configure(Kind::Organisation, "organisation", json!({"budgets": [{"usd": usd(hold_of(16) * 3), "window": "month"}]})).await;
    for n in 1..4 {
        bed.member(n, Some("t").filter(|_| n < 3), Limits::default(), Enforce::Enforce).await;
    }
    let now = DAY * DAY_MS + 1_000;
    assert_eq!(bed.code(1, 1, 16, now).await, Ok(()));
    assert_eq!(bed.code(2, 2, 16, now).await, Ok(()));
    assert_eq!(bed.code(1, 3, 16, now).await, Err(Code::CapReserved), "the team's");
    assert_eq!(bed.code(3, 4, 16, now).await, Ok(()), "of no team");
    assert_eq!(bed.code(3, 5, 16, now).await, Err(Code::CapReserved), "the organisation's");
    bed.settle(settlement(1, Outcome::Complete, Some((100, 16))), now).await;
    bed.settle(settlement(2, Outcome::Complete, Some((100, 16))), now).await;
    assert_eq!(bed.code(2, 6, 16, now).await, Err(Code::CapExhausted));
    let team = bed.store.account(ORG, Some("t")).await.unwrap();
    assert_eq!((team.sums(Window::Day).spent.0, team.in_flight), (hold_of(16) * 2, 0));
    // The next day the team has its budget again; the organisation's month goes on.
    let tomorrow = now + DAY_MS;
    assert_eq!(bed.code(2, 7, 16, tomorrow).await, Err(Code::CapReserved));
    bed.settle(settlement(4, Outcome::Void, None), tomorrow).await;
    assert_eq!(bed.code(2, 8, 16, tomorrow).await, Ok(()));
}

/// A hold is charged to the day it was taken on, however late it ends.
#[tokio::test]
async fn a_stream_over_midnight_is_charged_to_the_day_it_began() {
    let mut bed = Bed::new().await;
    bed.configure(Kind::Policy, "p", json!({"budgets": [{"usd": usd(hold_of(16)), "window": "day"}]})).await;
    let row = bed.key(1, None).await;
    let row = KeyRow { policy: Some("p".to_owned()), ..row };
    done(bed.store.update_key(KeyUpdate { row, salt: [0; 16], actor: "test".to_owned(), now_ms: 2, max_keys: None }).await.unwrap());
    let midnight = (DAY + 1) * DAY_MS;
    assert_eq!(bed.code(1, 1, 16, midnight - 10).await, Ok(()));
    assert_eq!(bed.code(1, 2, 16, midnight + 10).await, Ok(()), "a new day");
    bed.settle(settlement(1, Outcome::Complete, Some((100, 16))), midnight + 20).await;
    let account = bed.state(1).await.account;
    assert_eq!((account.sums(Window::Day).spent.0, account.sums(Window::Day).reserved.0), (0, hold_of(16)), "of the new day");
    assert_eq!((account.sums(Window::Month).spent.0, account.sums(Window::Total).spent.0), (hold_of(16), hold_of(16)));
    // The clock is set back before midnight: the new day's window stays, and nothing is free again.
    assert_eq!(bed.code(1, 3, 16, midnight - 5).await, Err(Code::CapReserved));
    bed.restart();
    assert_eq!(bed.code(1, 4, 16, midnight - 5).await, Err(Code::CapReserved));
}

#[tokio::test]
async fn rates_and_quotas_hold_and_survive_a_restart() {
    let mut bed = Bed::new().await;
    let rates = Rates { rpm: Some(2), ..Rates::default() };
    bed.member(1, None, Limits { rates, ..Limits::default() }, Enforce::Enforce).await;
    let quotas = vec![Quota { window: Window::Day, requests: Some(1), tokens: None }];
    bed.member(2, None, Limits { quotas, ..Limits::default() }, Enforce::Enforce).await;
    let quotas = vec![Quota { window: Window::Total, requests: None, tokens: Some(150) }];
    bed.member(3, None, Limits { quotas, ..Limits::default() }, Enforce::Enforce).await;
    bed.member(4, None, Limits { rates: Rates { max_in_flight: Some(1), ..Rates::default() }, ..Limits::default() }, Enforce::Enforce)
        .await;
    let now = DAY * DAY_MS;
    assert_eq!(bed.code(1, 1, 16, now).await, Ok(()));
    let Admission::Admitted(second) = bed.admit(1, 2, 50, now + 100).await else { panic!() };
    assert_eq!(second.plan.headroom.unwrap().requests.map(|room| (room.limit, room.remaining)), Some((2, 0)));
    bed.restart();
    let Admission::Refused(refusal) = bed.admit(1, 3, 50, now + 1_000).await else { panic!() };
    assert_eq!((refusal.code, refusal.headroom.is_some()), (Code::RateLimited, true));
    assert_eq!(bed.code(1, 4, 50, now + 1_000 + refusal.retry_after_ms.unwrap()).await, Ok(()), "it told how long to wait");
    assert_eq!(bed.code(2, 5, 16, now).await, Ok(()));
    assert_eq!(bed.code(2, 6, 16, now).await, Err(Code::QuotaExhausted));
    bed.settle(settlement(5, Outcome::Void, None), now).await;
    assert_eq!(bed.code(2, 7, 16, now).await, Ok(()), "what was given up is no request");
    assert_eq!(bed.code(3, 8, 16, now).await, Ok(()));
    bed.settle(settlement(8, Outcome::Complete, Some((60, 16))), now).await;
    assert_eq!(bed.code(3, 9, 16, now).await, Err(Code::QuotaExhausted), "76 of 150 are used, and this may come to 116");
    let Admission::Admitted(alone) = bed.admit(4, 10, 16, now).await else { panic!() };
    assert_eq!((alone.plan.prompt, second.plan.prompt), (true, false), "only where places are limited the end is waited for");
    assert_eq!(bed.code(4, 11, 16, now).await, Err(Code::ConcurrencyLimited));
    bed.settle(settlement(10, Outcome::Complete, Some((1, 1))), now).await;
    assert_eq!(bed.code(4, 12, 16, now).await, Ok(()));
}

#[tokio::test]
async fn shadow_mode_refuses_nothing_and_records_it() {
    let mut bed = Bed::new().await;
    bed.member(1, None, total(Some(hold_of(16))), Enforce::Shadow).await;
    for req in 1..4 {
        let Admission::Admitted(admitted) = bed.admit(1, req, 5_000, 10).await else { panic!() };
        assert_eq!(admitted.hold.clamp, None, "nothing is changed");
    }
    bed.settle(settlement(1, Outcome::Complete, Some((100, 9_000))), 11).await;
    assert_eq!(bed.state(1).await.status, Status::Active, "not frozen");
    assert_eq!(bed.sums(1).await.0, hold_of(9_000));
    let names = bed.names(1).await;
    assert_eq!(names.iter().filter(|name| **name == "WOULD_REFUSE").count(), 2, "the first would have been clamped: {names:?}");
    done(bed.store.revoke_key(ORG, "key_1", None, "test", 12).await.unwrap());
    assert_eq!(bed.code(1, 9, 50, 13).await, Err(Code::Revoked), "who it is is always checked");
}

#[tokio::test]
async fn a_budget_tells_when_it_is_spent_up_to_a_share_and_once() {
    let mut bed = Bed::new().await;
    bed.configure(Kind::Team, "t", json!({"budgets": [{"usd": usd(100 * 10_000 * 10), "window": "total"}]})).await;
    bed.member(1, Some("t"), total(Some(100 * 10_000 * 4)), Enforce::Enforce).await;
    let mut alarms = Vec::new();
    for req in 1..4 {
        bed.admit(1, req, 100, 10).await;
        let done = bed.settle(settlement(req, Outcome::Complete, Some((0, 100))), 11).await;
        alarms.extend(done.alarms.into_iter().map(|alarm| (alarm.what, alarm.detail["percent"].clone())));
    }
    // 25, 50, 75 % of the key's, 10 to 30 % of the team's.
    assert_eq!(alarms, [("budget".to_owned(), json!(50))]);
    bed.admit(1, 4, 70, 10).await;
    let done = bed.settle(settlement(4, Outcome::Complete, Some((0, 70))), 11).await;
    assert_eq!(done.alarms.iter().map(|alarm| alarm.detail["percent"].clone()).collect::<Vec<_>>(), [json!(80)]);
    assert_eq!(bed.names(1).await.iter().filter(|name| **name == "ALARM").count(), 2);
}

/// The ledger has seen the new day, although nothing was booked on it: a restart does not make it forget.
#[tokio::test]
async fn a_day_without_requests_has_begun_all_the_same() {
    let mut bed = Bed::new().await;
    let budgets = vec![Budget { window: Window::Day, cap: Nanodollars(hold_of(16)) }];
    bed.member(1, None, Limits { budgets, ..Limits::default() }, Enforce::Enforce).await;
    let today = DAY * DAY_MS;
    assert_eq!(bed.code(1, 1, 16, today).await, Ok(()));
    assert_eq!(bed.expire(today + DAY_MS).await, 1);
    assert_eq!(bed.code(1, 2, 16, today + DAY_MS).await, Ok(()), "of the new day");
    bed.expire(today + 2 * DAY_MS).await;
    bed.expire(today + 3 * DAY_MS).await;
    bed.restart();
    assert_eq!(bed.code(1, 3, 16, today).await, Ok(()), "of the last day that was seen");
    assert_eq!(bed.code(1, 4, 16, today + 2 * DAY_MS).await, Err(Code::CapReserved));
}
