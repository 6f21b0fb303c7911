//! SQLite: one writer thread that commits what has queued up in one transaction, readers on their own connections.

use super::accounts::{self, Accounts, organisation_account, team_account};
use super::configuration::{CREDENTIAL_COLUMNS, TOKEN_COLUMNS, credential_row, directory, token_row};
use super::keys::{KEY_COLUMNS, KEYS, key_row};
use super::ledger::{Ledger, signed, unsigned};
use super::outbox;
use super::{
    Admission, Admit, Alarm, AuditRow, CredentialRow, Edited, Edits, Expired, Idempotent, KeyOutcome, KeyRow, KeyState, KeyStateChange,
    KeyUpdate, LedgerKeys, Mail, NewKey, NewOrganisation, Rotation, Running, Settle, Settled, Standing, Store, StoreError, TokenRow,
    UsageBy, UsageQuery, UsageRow, key_states, watched,
};
use crate::directory::Directory;
use crate::metrics::handles;
use async_trait::async_trait;
use keyward_core::limits::{Account, Moment};
use keyward_core::money::Nanodollars;
use rusqlite::types::Value;
use rusqlite::{Connection, OpenFlags, OptionalExtension, TransactionBehavior, params};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// Most operations that share one commit.
const MAX_GROUP: usize = 256;
/// Operations that may wait for the writer; more is answered as unavailable, at once.
const MAX_QUEUE: usize = 16_384;
const BUSY: Duration = Duration::from_secs(5);
const MIGRATIONS: &[&str] = &[
    include_str!("schema.sql"),
    include_str!("admin.sql"),
    include_str!("objects.sql"),
    include_str!("kept.sql"),
    include_str!("money.sql"),
    include_str!("watched.sql"),
    include_str!("key_states.sql"),
    include_str!("targets.sql"),
];

type Apply = Box<dyn Fn(&Ledger<'_>) -> Result<(), StoreError> + Send>;

/// One change: run it (again, if its group failed), then tell whoever waits.
struct Change {
    apply: Apply,
    done: oneshot::Sender<Result<(), StoreError>>,
    /// It erased something: no earlier state of the pages may stay behind in the write-ahead log.
    erases: bool,
}

pub struct SqliteStore {
    writer: Mutex<Option<mpsc::SyncSender<Change>>>,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
    path: PathBuf,
    readers: Arc<Mutex<Vec<Connection>>>,
}

impl SqliteStore {
    /// Opens or creates the database and brings it to the newest version.
    pub fn open(path: &Path, keys: LedgerKeys) -> Result<Self, StoreError> {
        let mut db = connect(path, false)?;
        migrate(&mut db)?;
        let accounts = Accounts::open(&db)?;
        let (sender, receiver) = mpsc::sync_channel(MAX_QUEUE);
        let thread =
            std::thread::Builder::new().name("store-writer".to_owned()).spawn(move || write_all(&mut db, &keys, &accounts, &receiver));
        let thread = thread.map_err(|error| StoreError::Database(error.to_string()))?;
        Ok(SqliteStore {
            writer: Mutex::new(Some(sender)),
            thread: Mutex::new(Some(thread)),
            path: path.to_owned(),
            readers: Arc::default(),
        })
    }

    /// Lets the writer finish what has queued up, then closes the database.
    pub fn close(&self) {
        drop(self.writer.lock().map(|mut writer| writer.take()));
        let thread = self.thread.lock().ok().and_then(|mut thread| thread.take());
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }

    /// Runs a change on the writer thread; returns when it is durable.
    async fn write<T: Send + 'static>(
        &self,
        change: impl Fn(&Ledger<'_>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.send(change, false).await
    }

    async fn send<T: Send + 'static>(
        &self,
        change: impl Fn(&Ledger<'_>) -> Result<T, StoreError> + Send + 'static,
        erases: bool,
    ) -> Result<T, StoreError> {
        let slot: Arc<Mutex<Option<T>>> = Arc::default();
        let (done, wait) = oneshot::channel();
        let result = slot.clone();
        let apply: Apply = Box::new(move |ledger| {
            let value = change(ledger)?;
            if let Ok(mut slot) = result.lock() {
                *slot = Some(value);
            }
            Ok(())
        });
        let sender = self.writer.lock().ok().and_then(|writer| writer.clone()).ok_or(StoreError::Closed)?;
        sender.try_send(Change { apply, done, erases }).map_err(|_| StoreError::Database("too many changes are waiting".to_owned()))?;
        wait.await.map_err(|_| StoreError::Closed)??;
        let value = slot.lock().ok().and_then(|mut slot| slot.take());
        value.ok_or(StoreError::Closed)
    }

    /// Runs a query on a reader's connection, off the async threads.
    async fn read<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (pool, path) = (self.readers.clone(), self.path.clone());
        let task = tokio::task::spawn_blocking(move || {
            let idle = pool.lock().ok().and_then(|mut pool| pool.pop());
            let db = idle.map_or_else(|| connect(&path, true), Ok)?;
            let result = query(&db);
            if let Ok(mut pool) = pool.lock() {
                pool.push(db);
            }
            result
        });
        task.await.map_err(|_| StoreError::Closed)?
    }
}

fn connect(path: &Path, read_only: bool) -> Result<Connection, StoreError> {
    let access =
        if read_only { OpenFlags::SQLITE_OPEN_READ_ONLY } else { OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE };
    let db = Connection::open_with_flags(path, access | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
    db.busy_timeout(BUSY)?;
    db.set_prepared_statement_cache_capacity(64);
    if !read_only {
        db.pragma_update(None, "journal_mode", "WAL")?;
        // FULL: a commit is on the disk before anybody is told of it.
        db.pragma_update(None, "synchronous", "FULL")?;
        db.pragma_update(None, "foreign_keys", "ON")?;
        // Large enough that a checkpoint seldom falls into a group.
        db.pragma_update(None, "wal_autocheckpoint", 4_000)?;
        db.pragma_update(None, "cache_size", -65_536)?;
        // What is deleted is overwritten: personal data must not stay behind in free pages.
        db.pragma_update(None, "secure_delete", "ON")?;
    }
    Ok(db)
}

fn migrate(db: &mut Connection) -> Result<(), StoreError> {
    let tx = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let version: i64 = tx.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let version = usize::try_from(version).map_err(|_| StoreError::Damaged("a negative schema version"))?;
    if version > MIGRATIONS.len() {
        return Err(StoreError::Damaged("the database was written by a newer version"));
    }
    for migration in MIGRATIONS.iter().skip(version) {
        tx.execute_batch(migration)?;
    }
    tx.pragma_update(None, "user_version", signed(MIGRATIONS.len() as u64))?;
    Ok(tx.commit()?)
}

/// The writer thread: takes what has queued up, applies it in one transaction, and tells each once it is durable.
fn write_all(db: &mut Connection, keys: &LedgerKeys, accounts: &Accounts, queue: &mpsc::Receiver<Change>) {
    // Whether something was erased whose earlier state may still be in the write-ahead log.
    let mut unclean = false;
    while let Ok(first) = queue.recv() {
        let mut group = vec![first];
        group.extend(queue.try_iter().take(MAX_GROUP - 1));
        let (metrics, began) = (handles(), Instant::now());
        metrics.commit_group.record(u32::try_from(group.len()).unwrap_or(u32::MAX));
        unclean |= group.iter().any(|change| change.erases);
        let committed = commit(db, keys, accounts, &group);
        metrics.commit_seconds.record(began.elapsed());
        match committed {
            Ok(()) => {
                unclean = unclean && !empty_log(db);
                group.into_iter().for_each(|change| drop(change.done.send(Ok(()))));
            }
            // One bad change must not take the others with it: each gets a transaction of its own.
            Err(_) => group.into_iter().for_each(|change| {
                let result = commit(db, keys, accounts, std::slice::from_ref(&change));
                if let Err(error) = &result {
                    tracing::error!(%error, "a change could not be committed");
                    metrics.store_errors.increment(1);
                }
                drop(change.done.send(result));
            }),
        }
    }
    let _ = db.pragma_update(None, "wal_checkpoint", "TRUNCATE");
}

/// Brings the write-ahead log into the database and cuts it to nothing. `false`: a reader needs it still; the next commit,
/// which comes within a second, tries again.
fn empty_log(db: &Connection) -> bool {
    let busy = db.busy_timeout(Duration::from_millis(100)).and_then(|()| {
        let busy: i64 = db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0))?;
        db.busy_timeout(BUSY)?;
        Ok(busy)
    });
    matches!(busy, Ok(0))
}

fn commit(db: &mut Connection, keys: &LedgerKeys, accounts: &Accounts, group: &[Change]) -> Result<(), StoreError> {
    let apply = |db: &mut Connection| {
        let tx = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let ledger = Ledger { db: &tx, keys, accounts };
        for change in group {
            (change.apply)(&ledger)?;
        }
        accounts.flush(&tx)?;
        Ok(tx.commit()?)
    };
    let result = apply(db);
    if result.is_err() {
        accounts.forget();
    }
    result
}

#[async_trait]
impl Store for SqliteStore {
    async fn admit(&self, admit: Admit) -> Result<Admission, StoreError> {
        self.write(move |ledger| ledger.admit(&admit)).await
    }

    async fn settle(&self, batch: Vec<Settle>, directory: Arc<Directory>, now: Moment) -> Result<Settled, StoreError> {
        self.write(move |ledger| ledger.settle(&batch, &directory, now)).await
    }

    async fn running(&self, keys: Option<BTreeSet<String>>) -> Result<Running, StoreError> {
        self.read(move |db| watched::running(db, keys.as_ref())).await
    }

    async fn expire(&self, now: Moment) -> Result<Expired, StoreError> {
        self.write(move |ledger| ledger.expire(now)).await
    }

    async fn create_key(&self, key: NewKey) -> Result<KeyOutcome, StoreError> {
        self.write(move |ledger| ledger.create_key(&key)).await
    }

    async fn update_key(&self, update: KeyUpdate) -> Result<KeyOutcome, StoreError> {
        self.write(move |ledger| ledger.update_key(&update)).await
    }

    async fn rotate_key(&self, rotation: Rotation) -> Result<KeyOutcome, StoreError> {
        self.write(move |ledger| ledger.rotate_key(&rotation)).await
    }

    async fn erase_personal(&self, organisation: &str, id: &str, expect: u64, actor: &str, now_ms: u64) -> Result<KeyOutcome, StoreError> {
        let (organisation, id, actor) = (organisation.to_owned(), id.to_owned(), actor.to_owned());
        self.send(move |ledger| ledger.erase_personal(&organisation, &id, expect, &actor, now_ms), true).await
    }

    async fn revoke_key(
        &self,
        organisation: &str,
        id: &str,
        expect: Option<u64>,
        actor: &str,
        now_ms: u64,
    ) -> Result<KeyOutcome, StoreError> {
        let (organisation, id, actor) = (organisation.to_owned(), id.to_owned(), actor.to_owned());
        self.write(move |ledger| ledger.revoke_key(&organisation, &id, expect, &actor, now_ms)).await
    }

    async fn key(&self, organisation: &str, id: &str) -> Result<Option<KeyRow>, StoreError> {
        let (organisation, id) = (organisation.to_owned(), id.to_owned());
        let select = format!("SELECT {} FROM {KEYS} WHERE k.organisation = ?1 AND k.id = ?2", *KEY_COLUMNS);
        self.read(move |db| Ok(db.prepare_cached(&select)?.query_row([organisation, id], key_row).optional()?)).await
    }

    async fn keys(&self, organisation: &str, team: Option<&str>, after: &str, limit: u32) -> Result<Vec<KeyRow>, StoreError> {
        let (organisation, team, after) = (organisation.to_owned(), team.map(str::to_owned), after.to_owned());
        let select = format!(
            "SELECT {} FROM {KEYS} WHERE k.organisation = ?1 AND (?2 IS NULL OR k.team = ?2) AND k.id > ?3 ORDER BY k.id LIMIT ?4",
            *KEY_COLUMNS
        );
        self.read(move |db| {
            let mut select = db.prepare_cached(&select)?;
            let rows = select.query_map(params![organisation, team, after, limit], key_row)?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
        .await
    }

    async fn directory(&self) -> Result<Directory, StoreError> {
        // One transaction: the parts of an edit are seen together.
        self.read(|db| {
            let tx = db.unchecked_transaction()?;
            directory(&tx)
        })
        .await
    }

    async fn edit(&self, edits: Edits) -> Result<Edited, StoreError> {
        self.write(move |ledger| ledger.edit(&edits)).await
    }

    async fn credentials(&self) -> Result<Vec<CredentialRow>, StoreError> {
        let select = format!("SELECT {CREDENTIAL_COLUMNS} FROM credentials ORDER BY created_ms, rowid");
        self.read(move |db| Ok(db.prepare_cached(&select)?.query_map([], credential_row)?.collect::<Result<_, _>>()?)).await
    }

    async fn create_organisation(&self, id: &str, label: &str, actor: &str, now_ms: u64) -> Result<bool, StoreError> {
        let (id, label, actor) = (id.to_owned(), label.to_owned(), actor.to_owned());
        self.write(move |ledger| ledger.create_organisation(&id, &label, &actor, now_ms)).await
    }

    async fn found_organisation(&self, new: NewOrganisation) -> Result<bool, StoreError> {
        self.write(move |ledger| ledger.found_organisation(&new)).await
    }

    async fn put_admin_token(&self, row: TokenRow, hash: [u8; 32], actor: &str) -> Result<(), StoreError> {
        let actor = actor.to_owned();
        self.write(move |ledger| ledger.put_admin_token(&row, hash, &actor)).await
    }

    async fn admin_token(&self, hash: [u8; 32]) -> Result<Option<TokenRow>, StoreError> {
        let select = format!("SELECT {TOKEN_COLUMNS} FROM admin_tokens WHERE token_hash = ?1");
        self.read(move |db| Ok(db.prepare_cached(&select)?.query_row([hash], token_row).optional()?)).await
    }

    async fn admin_tokens(&self, organisation: &str, after: &str, limit: u32) -> Result<Vec<TokenRow>, StoreError> {
        let (organisation, after) = (organisation.to_owned(), after.to_owned());
        let select = format!("SELECT {TOKEN_COLUMNS} FROM admin_tokens WHERE organisation = ?1 AND id > ?2 ORDER BY id LIMIT ?3");
        self.read(move |db| {
            let mut select = db.prepare_cached(&select)?;
            let rows = select.query_map(params![organisation, after, limit], token_row)?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
        .await
    }

    async fn revoke_admin_token(&self, organisation: &str, id: &str, actor: &str, now_ms: u64) -> Result<bool, StoreError> {
        let (organisation, id, actor) = (organisation.to_owned(), id.to_owned(), actor.to_owned());
        self.write(move |ledger| ledger.revoke_admin_token(&organisation, &id, &actor, now_ms)).await
    }

    async fn note(&self, organisation: &str, actor: &str, action: &str, target: &str, detail: &str, now_ms: u64) -> Result<(), StoreError> {
        let [organisation, actor, action, target, detail] = [organisation, actor, action, target, detail].map(str::to_owned);
        self.write(move |ledger| ledger.note(&organisation, &actor, &action, &target, &detail, now_ms)).await
    }

    async fn account(&self, organisation: &str, team: Option<&str>) -> Result<Account, StoreError> {
        let id = team.map_or_else(|| organisation_account(organisation), |team| team_account(organisation, team));
        self.read(move |db| accounts::read(db, &id)).await
    }

    async fn audit(&self, chain: &str, from: u64, limit: u32) -> Result<Vec<AuditRow>, StoreError> {
        let key_id = chain.to_owned();
        self.read(move |db| {
            let mut select =
                db.prepare_cached("SELECT seq, entry, mac FROM audit WHERE key_id = ?1 AND seq >= ?2 ORDER BY seq LIMIT ?3")?;
            let rows = select.query_map(params![key_id, signed(from), limit], |row| {
                Ok(AuditRow { seq: unsigned(row.get(0)?), entry: row.get(1)?, mac: row.get(2)? })
            })?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
        .await
    }

    async fn usage(&self, query: UsageQuery) -> Result<Vec<UsageRow>, StoreError> {
        self.read(move |db| usage(db, &query)).await
    }

    async fn begin_idempotent(&self, token_id: &str, key: &str, fingerprint: [u8; 32], now_ms: u64) -> Result<Idempotent, StoreError> {
        let (token_id, key) = (token_id.to_owned(), key.to_owned());
        self.write(move |ledger| ledger.begin_idempotent(&token_id, &key, fingerprint, now_ms)).await
    }

    async fn end_idempotent(&self, token_id: &str, key: &str, answer: Option<Vec<u8>>, about: Option<String>) -> Result<(), StoreError> {
        let (token_id, key) = (token_id.to_owned(), key.to_owned());
        self.write(move |ledger| ledger.end_idempotent(&token_id, &key, answer.as_deref(), about.as_deref())).await
    }

    async fn due_mail(&self, now_ms: u64, limit: u32) -> Result<Vec<Mail>, StoreError> {
        self.read(move |db| outbox::due(db, now_ms, limit)).await
    }

    async fn sent_mail(&self, id: u64, next_ms: Option<u64>) -> Result<(), StoreError> {
        self.write(move |ledger| ledger.sent_mail(id, next_ms)).await
    }

    async fn key_states(&self) -> Result<Vec<KeyState>, StoreError> {
        self.read(key_states::read).await
    }

    async fn keep_key_states(&self, changes: Vec<KeyStateChange>, now: Moment) -> Result<Vec<Alarm>, StoreError> {
        self.write(move |ledger| ledger.keep_key_states(&changes, now)).await
    }

    async fn standing(&self, now_ms: u64) -> Result<Standing, StoreError> {
        self.read(move |db| standing(db, now_ms)).await
    }

    async fn ready(&self) -> Result<(), StoreError> {
        self.write(|ledger| {
            ledger
                .db
                .prepare_cached("INSERT INTO meta (name, value) VALUES ('ready', x'') ON CONFLICT (name) DO UPDATE SET value = x''")?
                .execute([])?;
            Ok(())
        })
        .await
    }
}

/// Sums over all keys, and over the index of what is held: some milliseconds for ten thousand keys.
fn standing(db: &Connection, now_ms: u64) -> Result<Standing, StoreError> {
    let mut standing = Standing::default();
    // Dollars and what is below them apart: SQLite's sums end at 2^63, and money is never a float.
    let mut keys = db.prepare_cached(
        "SELECT CASE WHEN status = 'active' AND expires_ms <= ?1 THEN 'expired' ELSE status END AS now, count(*),
             sum(coalesce(total_reserved, 0) / 1000000000), sum(coalesce(total_reserved, 0) % 1000000000), sum(chain_seq)
         FROM keys k LEFT JOIN accounts a ON a.id = k.id GROUP BY now",
    )?;
    let mut rows = keys.query([signed(now_ms)])?;
    let mut reserved = 0i128;
    while let Some(row) = rows.next()? {
        standing.keys.insert(row.get(0)?, unsigned(row.get(1)?));
        reserved += i128::from(row.get::<_, i64>(2)?) * 1_000_000_000 + i128::from(row.get::<_, i64>(3)?);
        standing.audit_entries += unsigned(row.get(4)?);
    }
    standing.reserved = Nanodollars(i64::try_from(reserved).unwrap_or(i64::MAX));
    let administrative: Option<i64> = db.prepare_cached("SELECT sum(chain_seq) FROM organisations")?.query_row([], |row| row.get(0))?;
    standing.audit_entries += unsigned(administrative.unwrap_or(0));
    let mut held = db.prepare_cached("SELECT count(*), min(expires_ms) FROM requests WHERE state = 0")?;
    (standing.holds, standing.first_expiry_ms) =
        held.query_row([], |row| Ok((unsigned(row.get(0)?), row.get::<_, Option<i64>>(1)?.map(unsigned))))?;
    Ok(standing)
}

/// Sums of usage, in the order of what they are summed by.
fn usage(db: &Connection, query: &UsageQuery) -> Result<Vec<UsageRow>, StoreError> {
    let column = |by: &UsageBy| match by {
        UsageBy::Day => "CAST(u.day AS TEXT)".to_owned(),
        UsageBy::Team => "coalesce(k.team, '')".to_owned(),
        UsageBy::Key => "u.key_id".to_owned(),
        UsageBy::Provider => "u.provider".to_owned(),
        UsageBy::Model => "u.model".to_owned(),
        UsageBy::Reason => "u.code".to_owned(),
        // Its characters were checked: nothing in it ends the quotes.
        UsageBy::Tag(tag) => format!("coalesce(json_extract(k.tags, '$.\"{tag}\"'), '')"),
    };
    let by: Vec<String> = query.by.iter().map(column).collect();
    let (columns, group) = match by.join(", ") {
        none if none.is_empty() => (String::new(), String::new()),
        all => (format!(", {all}"), format!("GROUP BY {all} ORDER BY {all}")),
    };
    let mut values: Vec<Value> = vec![
        query.organisation.clone().into(),
        query.team.clone().into(),
        query.key.clone().into(),
        signed(query.from_day).into(),
        signed(query.to_day).into(),
        query.limit.into(),
    ];
    let mut after = String::new();
    if !query.after.is_empty() && query.after.len() == by.len() {
        let places: Vec<String> = (0..by.len()).map(|i| format!("?{}", values.len() + 1 + i)).collect();
        after = format!("AND ({}) > ({})", by.join(", "), places.join(", "));
        values.extend(query.after.iter().cloned().map(Value::from));
    }
    let sums = "sum(requests), sum(input), sum(u.cache_read), sum(u.cache_write), sum(output), sum(nanodollars)";
    let (sums, table) = if query.would_deny { ("sum(requests), 0, 0, 0, 0, 0", "would_refuse") } else { (sums, "usage") };
    let mut select = db.prepare_cached(&format!(
        "SELECT {sums}{columns}
         FROM {table} u JOIN keys k ON k.id = u.key_id
         WHERE u.organisation = ?1 AND (?2 IS NULL OR k.team = ?2) AND (?3 IS NULL OR u.key_id = ?3) AND day BETWEEN ?4 AND ?5
             {after} {group} LIMIT ?6"
    ))?;
    let rows = select.query_map(rusqlite::params_from_iter(values), |row| {
        let count = |at: usize| Ok::<_, rusqlite::Error>(unsigned(row.get::<_, Option<i64>>(at)?.unwrap_or(0)));
        Ok(UsageRow {
            requests: count(0)?,
            input: count(1)?,
            cache_read: count(2)?,
            cache_write: count(3)?,
            output: count(4)?,
            nanodollars: row.get::<_, Option<i64>>(5)?.unwrap_or(0),
            by: (0..query.by.len()).map(|i| row.get(6 + i)).collect::<Result<_, _>>()?,
        })
    })?;
    Ok(rows.collect::<Result<_, _>>()?)
}
