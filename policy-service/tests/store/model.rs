//! Any history of the ledger against a second, plain reading of its rules: every request in a list, every sum added up anew.

use super::*;
use keyward_core::limits::DAY_MS;
use proptest::prelude::*;
use serde_json::json;
use std::collections::HashMap;

/// The first of a month at 00:00.
const START: u64 = 20_758 * DAY_MS;
const KEYS: u8 = 6;
/// The key that only watches.
const SHADOW: u8 = 5;
/// Names of requests that are over are kept for a week.
const REMEMBERED_MS: u64 = 7 * DAY_MS;
const TEAMS: [&str; 2] = ["a", "b"];

#[derive(Debug, Clone)]
enum Step {
    Admit {
        key: u8,
        req: u16,
        max: u64,
        choices: u64,
    },
    /// The same request again, or one of its name with other content.
    Replay {
        req: u16,
        same: bool,
    },
    /// Some cost more than was held.
    Settle {
        req: u16,
        input: u64,
        output: u64,
    },
    Cut {
        req: u16,
    },
    Void {
        req: u16,
    },
    Wait {
        ms: u64,
    },
    ClockBack {
        ms: u64,
    },
    Revoke,
    Thaw {
        key: u8,
    },
    Move {
        key: u8,
        team: u8,
    },
    Cap {
        key: u8,
        window: u8,
        cap: i64,
    },
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let req = || 0u16..400;
    prop_oneof![
        40 => (1..=KEYS, req(), 1u64..300, 1u64..3).prop_map(|(key, req, max, choices)| Step::Admit { key, req, max, choices }),
        4 => (req(), any::<bool>()).prop_map(|(req, same)| Step::Replay { req, same }),
        26 => (req(), 0u64..100, 0u64..60).prop_map(|(req, input, output)| Step::Settle { req, input, output }),
        1 => (req(), 0u64..100, 500u64..900).prop_map(|(req, input, output)| Step::Settle { req, input, output }),
        4 => req().prop_map(|req| Step::Cut { req }),
        8 => req().prop_map(|req| Step::Void { req }),
        8 => (0u64..2 * TTL).prop_map(|ms| Step::Wait { ms }),
        2 => (0u64..3 * DAY_MS).prop_map(|ms| Step::Wait { ms }),
        1 => (0u64..40 * DAY_MS).prop_map(|ms| Step::Wait { ms }),
        1 => (0u64..2 * DAY_MS).prop_map(|ms| Step::ClockBack { ms }),
        1 => Just(Step::Revoke),
        3 => (1..=KEYS).prop_map(|key| Step::Thaw { key }),
        1 => (1..=KEYS, 0u8..3).prop_map(|(key, team)| Step::Move { key, team }),
        2 => (1..=KEYS, 0u8..3, 0i64..12_000_000).prop_map(|(key, window, cap)| Step::Cap { key, window, cap }),
        1 => Just(Step::Restart),
    ]
}

/// One request as the reference has it.
#[derive(Debug, Clone)]
struct Request {
    asked: Admit,
    key: u8,
    team: Option<&'static str>,
    /// The day whose windows it counts in.
    day: u64,
    hold: i64,
    tokens: i64,
    expires: u64,
    charge: Option<(i64, i64)>,
    /// Charged by expiry: a later word still counts.
    open: bool,
    void: bool,
}

#[derive(Default)]
struct Model {
    requests: HashMap<u16, Request>,
    /// Those whose names the ledger has forgotten, and their names may come again.
    past: Vec<Request>,
    /// Words about what was never admitted, and when they came.
    buried: HashMap<u16, u64>,
    /// The latest day that the ledger was told of.
    day: u64,
    teams: [Option<&'static str>; KEYS as usize + 1],
    caps: HashMap<(u8, u8), i64>,
    frozen: [bool; KEYS as usize + 1],
}

#[derive(Debug, PartialEq, Eq, Clone, Copy, Default)]
struct Figures {
    spent: i64,
    reserved: i64,
    requests: i64,
    tokens: i64,
    tokens_reserved: i64,
}

impl Model {
    fn figures(&self, window: Window, of: impl Fn(&Request) -> bool) -> Figures {
        let mut figures = Figures::default();
        for request in self.requests.values().chain(&self.past).filter(|r| of(r) && window.start(r.day) == window.start(self.day)) {
            figures.requests += i64::from(!request.void);
            match request.charge {
                Some((money, tokens)) => (figures.spent, figures.tokens) = (figures.spent + money, figures.tokens + tokens),
                None => {
                    (figures.reserved, figures.tokens_reserved) =
                        (figures.reserved + request.hold, figures.tokens_reserved + request.tokens)
                }
            }
        }
        figures
    }

    fn end(&mut self, req: u16, charge: i64, tokens: i64, void: bool) {
        let Some(request) = self.requests.get_mut(&req) else { return };
        if request.charge.is_none() || request.open {
            (request.charge, request.open, request.void) = (Some((charge, tokens)), false, void);
            if charge > request.hold && request.key != SHADOW {
                self.frozen[usize::from(request.key)] = true;
            }
        }
    }
}

fn id(req: u16) -> RequestId {
    let mut bytes = [9; 16];
    bytes[..2].copy_from_slice(&req.to_be_bytes());
    RequestId(bytes)
}

fn told(req: u16, outcome: Outcome, usage: Option<(u64, u64)>) -> Settlement {
    Settlement { req: id(req), ..settlement(0, outcome, usage) }
}

/// What stays the same over a history: the configured caps, by level and window.
const TEAM_MONTH: i64 = 30_000_000;
const TEAM_TOTAL: i64 = 200_000_000;
const ORGANISATION_DAY: i64 = 40_000_000;
const KEY_TOTAL: i64 = 60_000_000;
const KEY_DAY: i64 = 12_000_000;

fn limits_of(model: &Model, key: u8) -> Limits {
    let cap = |window: u8, usual: i64| model.caps.get(&(key, window)).copied().unwrap_or(usual);
    let of = |window, cap| Budget { window, cap: Nanodollars(cap) };
    Limits { budgets: vec![of(Window::Day, cap(0, KEY_DAY)), of(Window::Total, cap(2, KEY_TOTAL))], ..Limits::default() }
}

async fn change(bed: &Bed, key: u8, change: impl Fn(KeyRow) -> KeyRow) {
    let row = bed.state(key).await;
    let update = KeyUpdate { row: change(row), salt: [0; 16], actor: "test".to_owned(), now_ms: 3, max_keys: None };
    // A revoked key can't be changed: then nothing is.
    drop(bed.store.update_key(update).await.unwrap());
}

async fn play(steps: Vec<Step>) {
    let mut bed = Bed::quick().await;
    let usd = |nano: i64| Nanodollars(nano).to_usd();
    for team in TEAMS {
        let budgets = json!([{"usd": usd(TEAM_MONTH), "window": "month"}, {"usd": usd(TEAM_TOTAL), "window": "total"}]);
        bed.edit(vec![put(Kind::Team, team, json!({"budgets": budgets}), Expect::Absent)]).await;
    }
    let budgets = json!({"budgets": [{"usd": usd(ORGANISATION_DAY), "window": "day"}]});
    bed.edit(vec![put(Kind::Organisation, "organisation", budgets, Expect::Absent)]).await;
    let mut model =
        Model { day: START / DAY_MS, teams: [None, Some("a"), Some("a"), Some("b"), None, Some("a"), Some("b")], ..Model::default() };
    for key in 1..=KEYS {
        bed.key(key, None).await;
        let (limits, team) = (limits_of(&model, key), model.teams[usize::from(key)].map(str::to_owned));
        let enforce = if key == SHADOW { Enforce::Shadow } else { Enforce::Enforce };
        change(&bed, key, |row| KeyRow { limits: limits.clone(), team: team.clone(), enforce, ..row }).await;
    }
    let directory = bed.directory().await;
    let mut now = START + 1_000;
    for step in steps {
        match step {
            Step::Admit { key, req, max, choices } => {
                let mut asked = admit(key, 0, max, now);
                (asked.request.req, asked.request.ask.choices, asked.directory) = (id(req), choices, directory.clone());
                model.day = model.day.max(now / DAY_MS);
                let known = model.requests.contains_key(&req) || model.buried.contains_key(&req);
                let admission = bed.store.admit(asked.clone()).await.unwrap();
                match admission {
                    Admission::Admitted(admitted) if !known => {
                        let (hold, tokens) = (admitted.hold.total.0, i64::try_from(admitted.hold.tokens).unwrap());
                        let team = model.teams[usize::from(key)];
                        let request = Request {
                            asked,
                            key,
                            team,
                            day: model.day,
                            hold,
                            tokens,
                            expires: now + TTL,
                            charge: None,
                            open: false,
                            void: false,
                        };
                        model.requests.insert(req, request);
                        assert!(!model.frozen[usize::from(key)], "a frozen key was admitted");
                        within_caps(&model, key);
                    }
                    Admission::Admitted(_) => {
                        let request = &model.requests[&req];
                        assert!(
                            request.charge.is_none() && request.asked.request == asked.request,
                            "another request got an old one's answer"
                        );
                    }
                    Admission::Refused(_) | Admission::Conflict => {}
                    Admission::NotYet => panic!("nothing was referred to"),
                }
            }
            // It is decided without a look at the windows: the day stays.
            Step::Replay { req, same } => {
                let Some(request) = model.requests.get(&req) else { continue };
                let mut asked = request.asked.clone();
                asked.request.ask.bytes += u64::from(!same);
                let admission = bed.store.admit(asked).await.unwrap();
                assert!(same || admission == Admission::Conflict, "other content under an old name: {admission:?}");
                assert!(request.charge.is_none() || admission == Admission::Conflict, "after its end: {admission:?}");
            }
            Step::Settle { req, input, output } => {
                model.day = model.day.max(now / DAY_MS);
                bed.settle(told(req, Outcome::Complete, Some((input, output))), now).await;
                let cost = i64::try_from(input * 2_500 + output * 10_000).unwrap();
                model.end(req, cost, i64::try_from(input + output).unwrap(), false);
                bury(&mut model, req, now);
            }
            Step::Cut { req } => {
                model.day = model.day.max(now / DAY_MS);
                bed.settle(Settlement { status: None, ..told(req, Outcome::Cut, None) }, now).await;
                if let Some((hold, tokens)) = model.requests.get(&req).map(|r| (r.hold, r.tokens)) {
                    model.end(req, hold, tokens, false);
                }
                bury(&mut model, req, now);
            }
            Step::Void { req } => {
                model.day = model.day.max(now / DAY_MS);
                bed.settle(told(req, Outcome::Void, None), now).await;
                model.end(req, 0, 0, true);
                bury(&mut model, req, now);
            }
            Step::Wait { ms } => {
                now += ms;
                model.day = model.day.max(now / DAY_MS);
                bed.expire(now).await;
                for request in model.requests.values_mut().filter(|r| r.charge.is_none() && r.expires <= now) {
                    (request.charge, request.open) = (Some((request.hold, request.tokens)), true);
                }
                let forgotten = |expires: u64| expires < now.saturating_sub(REMEMBERED_MS);
                model.buried.retain(|_, at| !forgotten(*at));
                let (past, known) = model.requests.drain().partition::<Vec<_>, _>(|(_, r)| r.charge.is_some() && forgotten(r.expires));
                model.requests = known.into_iter().collect();
                model.past.extend(past.into_iter().map(|(_, request)| request));
            }
            Step::ClockBack { ms } => now = now.saturating_sub(ms).max(START),
            Step::Revoke => drop(bed.store.revoke_key(ORG, "key_6", None, "test", now).await.unwrap()),
            Step::Thaw { key } => {
                change(&bed, key, |row| KeyRow { status: Status::Active, ..row }).await;
                model.frozen[usize::from(key)] &= bed.state(key).await.status == Status::Frozen;
            }
            Step::Move { key, team } => {
                let to = TEAMS.get(usize::from(team)).copied();
                change(&bed, key, |row| KeyRow { team: to.map(str::to_owned), ..row }).await;
                model.teams[usize::from(key)] = bed.state(key).await.team.and_then(|name| TEAMS.into_iter().find(|team| *team == name));
            }
            Step::Cap { key, window, cap } => {
                if bed.state(key).await.status != Status::Revoked {
                    model.caps.insert((key, window), cap);
                    let limits = limits_of(&model, key);
                    change(&bed, key, |row| KeyRow { limits: limits.clone(), ..row }).await;
                }
            }
            Step::Restart => bed.restart(),
        }
        same_books(&bed, &model).await;
    }
    for key in 1..=KEYS {
        one_end_each(&bed.events(key).await);
    }
}

/// A word about a request that was never admitted keeps its name from being used.
fn bury(model: &mut Model, req: u16, now: u64) {
    if !model.requests.contains_key(&req) {
        model.buried.entry(req).or_insert(now);
    }
}

/// I1, at the moment of every admission and at every level: what is spent and held fits. Settling adds to that only by a
/// charge above its hold, which freezes the key; a lowered cap and a key in shadow mode are the other two exceptions.
fn within_caps(model: &Model, key: u8) {
    if key == SHADOW {
        return;
    }
    let fits = |window, of: &dyn Fn(&Request) -> bool, cap: i64| {
        let figures = model.figures(window, of);
        assert!(figures.spent + figures.reserved <= cap, "I1: {figures:?} in {window:?} of {cap}");
    };
    for budget in limits_of(model, key).budgets {
        fits(budget.window, &|r| r.key == key, budget.cap.0);
    }
    if let Some(team) = model.teams[usize::from(key)] {
        fits(Window::Month, &|r| r.team == Some(team), TEAM_MONTH);
        fits(Window::Total, &|r| r.team == Some(team), TEAM_TOTAL);
    }
    fits(Window::Day, &|_| true, ORGANISATION_DAY);
}

/// Every figure of every account, in every window, after every step.
async fn same_books(bed: &Bed, model: &Model) {
    let compare = |name: &str, account: &Account, of: &dyn Fn(&Request) -> bool| {
        let mut account = account.clone();
        account.advance(Moment { day: model.day.max(account.day), ..Moment::at(0) });
        for window in Window::ALL {
            let sums = account.sums(window);
            let signed = |n: u64| i64::try_from(n).unwrap();
            let stored = Figures {
                spent: sums.spent.0,
                reserved: sums.reserved.0,
                requests: signed(sums.requests),
                tokens: signed(sums.tokens),
                tokens_reserved: signed(sums.tokens_reserved),
            };
            assert_eq!(stored, model.figures(window, of), "{name} in {window:?}");
            assert!(stored.spent >= 0 && stored.reserved >= 0, "I4");
        }
        let in_flight = model.requests.values().filter(|r| of(r) && r.charge.is_none()).count();
        assert_eq!(account.in_flight, in_flight as u64, "{name}");
    };
    for row in bed.store.keys(ORG, None, "", 100).await.unwrap() {
        let key: u8 = row.id.trim_start_matches("key_").parse().unwrap();
        compare(&row.id, &row.account, &|r| r.key == key);
        assert!(!model.frozen[usize::from(key)] || row.status != Status::Active, "{} had to be frozen", row.id);
    }
    for team in TEAMS {
        compare(team, &bed.store.account(ORG, Some(team)).await.unwrap(), &|r| r.team == Some(team));
    }
    compare("organisation", &bed.store.account(ORG, None).await.unwrap(), &|_| true);
}

/// I5: a request ends once after each admission; only an EXPIRED may be followed by what settles it after all.
fn one_end_each(entries: &[Entry]) {
    let mut ends: HashMap<[u8; 16], Vec<&str>> = HashMap::new();
    for entry in entries {
        let Some(req) = entry.event.request() else { continue };
        match entry.event {
            // A name that comes again after a week is another request.
            Event::Admitted(_) => drop(ends.insert(req, Vec::new())),
            Event::Settled(_) | Event::Voided { .. } | Event::Expired { .. } => {
                let names = ends.get_mut(&req).unwrap();
                names.push(entry.event.name());
                assert!(names.len() == 1 || (names.len() == 2 && names[0] == "EXPIRED"), "{req:?}: {names:?}");
            }
            _ => {}
        }
    }
}

/// Histories of so many steps each.
const STEPS: usize = 250;

/// `KEYWARD_LEDGER_STEPS` asks for a longer run.
fn cases() -> u32 {
    let steps = std::env::var("KEYWARD_LEDGER_STEPS").ok().and_then(|steps| steps.parse().ok()).unwrap_or(21_000usize);
    u32::try_from(steps.div_ceil(STEPS)).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]
    /// I1 to I5 after every step of any history, with exactly the exceptions that DESIGN states.
    #[test]
    fn any_history_keeps_the_books(steps in proptest::collection::vec(step(), STEPS)) {
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap().block_on(play(steps));
    }
}
