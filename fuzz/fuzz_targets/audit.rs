//! `audit::Entry::decode`: reads what `encode` writes and nothing else.
#![no_main]

use keyward_core::audit::Entry;
use libfuzzer_sys::fuzz_target;

/// The kind of SETTLED in earlier versions: it is read, and written anew as today's.
const OLD_SETTLED: u8 = 3;

fuzz_target!(|data: &[u8]| {
    let Some(entry) = Entry::decode(data) else { return };
    let written = entry.encode();
    assert!(written == data || data.get(4) == Some(&OLD_SETTLED), "two forms of one entry: {entry:?}");
    assert_eq!(Entry::decode(&written).as_ref(), Some(&entry));
    let _ = (entry.event.name(), entry.event.request());
});
