//! Keys: rotated, changed, erased.

use super::*;

#[tokio::test]
async fn a_rotated_key_is_the_same_key_with_two_tokens_for_a_while() {
    let bed = Bed::new().await;
    bed.key(1, Some(10_000_000)).await;
    let rotation = Rotation {
        organisation: ORG.to_owned(),
        id: "key_1".to_owned(),
        expect: Some(1),
        token_hash: [101; 32],
        overlap_until_ms: 100,
        actor: "test".to_owned(),
        now_ms: 20,
    };
    assert_eq!(done(bed.store.rotate_key(rotation.clone()).await.unwrap()).version, 2);
    assert_eq!(bed.store.rotate_key(rotation).await.unwrap(), KeyOutcome::Stale(2), "read at version 1");
    assert!(matches!(bed.admit(1, 1, 50, 99).await, Admission::Admitted(_)), "the old token in the overlap");
    assert!(matches!(bed.admit(101, 2, 50, 99).await, Admission::Admitted(a) if a.plan.key == "key_1"));
    assert!(matches!(bed.admit(1, 3, 50, 100).await, Admission::Refused(r) if r.code == Code::Revoked));
    assert!(matches!(bed.admit(101, 4, 50, 100).await, Admission::Admitted(_)));
    assert_eq!(bed.names(1).await, ["KEY_CREATED", "KEY_CHANGED", "ADMITTED", "ADMITTED", "REFUSED", "ADMITTED"]);
}

#[tokio::test]
async fn a_change_needs_the_version_that_was_read_and_leaves_the_money() {
    let bed = Bed::new().await;
    let row = bed.key(1, Some(10_000_000)).await;
    bed.admit(1, 1, 50, 10).await;
    let personal = Some(BTreeMap::from([("email".to_owned(), "ada@example.com".to_owned())]));
    let change = KeyRow { label: "new".to_owned(), personal, ..row.clone() };
    let update = |row: &KeyRow| KeyUpdate { row: row.clone(), salt: [3; 16], actor: "test".to_owned(), now_ms: 30, max_keys: None };
    let now = done(bed.store.update_key(update(&change)).await.unwrap());
    assert_eq!((now.label.as_str(), now.version), ("new", 2));
    assert_eq!(bed.sums(1).await, (0, hold_of(50), 1));
    assert_eq!(bed.store.update_key(update(&change)).await.unwrap(), KeyOutcome::Stale(2));
    let chain = format!("{:?}", bed.events(1).await);
    assert!(chain.contains("personal_sha256") && !chain.contains("ada@example.com"), "{chain}");
    let nowhere = KeyRow { team: Some("none".to_owned()), ..now.clone() };
    assert!(matches!(bed.store.update_key(update(&nowhere)).await.unwrap(), KeyOutcome::Refused(f) if f.field == "team"));
    done(bed.store.revoke_key(ORG, "key_1", Some(2), "test", 40).await.unwrap());
    let revived = KeyRow { version: 3, status: Status::Active, ..now };
    assert!(matches!(bed.store.update_key(update(&revived)).await.unwrap(), KeyOutcome::Refused(_)), "revoked is for good");
}

#[tokio::test]
async fn a_key_that_comes_back_to_life_needs_a_place_in_its_team() {
    let bed = Bed::new().await;
    bed.edit(vec![put(Kind::Team, "t", serde_json::json!({}), Expect::Absent)]).await;
    let row = bed.key(1, None).await;
    let join = |row: &KeyRow, max| KeyUpdate { row: row.clone(), salt: [3; 16], actor: "test".to_owned(), now_ms: 50, max_keys: Some(max) };
    let member = KeyRow { team: Some("t".to_owned()), ..row };
    assert!(matches!(bed.store.update_key(join(&member, 0)).await.unwrap(), KeyOutcome::Refused(f) if f.field == "team"));
    let member = done(bed.store.update_key(join(&member, 1)).await.unwrap());
    let renamed = done(bed.store.update_key(join(&KeyRow { label: "x".to_owned(), ..member }, 0)).await.unwrap());
    let expired = done(bed.store.update_key(join(&KeyRow { expires_ms: Some(40), ..renamed }, 0)).await.unwrap());
    let revived = KeyRow { expires_ms: None, ..expired };
    assert!(matches!(bed.store.update_key(join(&revived, 0)).await.unwrap(), KeyOutcome::Refused(f) if f.field == "team"));
    done(bed.store.update_key(join(&revived, 1)).await.unwrap());
}

/// Erasing takes effect in the files, on keys that are revoked as well, and the chain still verifies.
#[tokio::test]
async fn erased_data_are_in_no_file() {
    let bed = Bed::new().await;
    let row = bed.key(1, None).await;
    let personal = Some(BTreeMap::from([("email".to_owned(), "ada@example.com".repeat(10))]));
    let tags = BTreeMap::from([("user".to_owned(), "ada".to_owned())]);
    let change = KeyRow { personal, tags, ..row };
    done(
        bed.store.update_key(KeyUpdate { row: change, salt: [3; 16], actor: "test".to_owned(), now_ms: 30, max_keys: None }).await.unwrap(),
    );
    let traces = || {
        let files = std::fs::read_dir(bed.directory.path()).unwrap().map(|file| std::fs::read(file.unwrap().path()).unwrap());
        files.filter(|bytes| bytes.windows(15).any(|w| w == b"ada@example.com")).count()
    };
    assert!(traces() > 0);
    done(bed.store.revoke_key(ORG, "key_1", Some(2), "test", 40).await.unwrap());
    assert_eq!(bed.store.erase_personal(ORG, "key_1", 2, "test", 50).await.unwrap(), KeyOutcome::Stale(3));
    let erased = done(bed.store.erase_personal(ORG, "key_1", 3, "test", 50).await.unwrap());
    assert_eq!((erased.personal, erased.tags.len(), erased.status), (None, 0, Status::Revoked));
    assert_eq!(traces(), 0);
    done(bed.store.erase_personal(ORG, "key_1", erased.version, "test", 60).await.unwrap());
    assert_eq!(bed.names(1).await, ["KEY_CREATED", "KEY_CHANGED", "KEY_REVOKED", "KEY_CHANGED"], "twice is one entry");
}
