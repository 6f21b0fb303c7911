//! `usage::AnswerReader`: the same wherever the documents are cut, counts that don't overlap, and a price for whatever is told.
#![no_main]

use keyward_core::operation::Tells;
use keyward_core::price::PriceTable;
use keyward_core::usage::{AnswerReader, Document, Looks, MAX_IDS, Usage, UsageReader};
use keyward_fuzz::input;
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

const TELLS: [Tells; 6] = [Tells::Nothing, Tells::Completion, Tells::Prompt, Tells::Input, Tells::Anthropic, Tells::Gemini];
static PRICES: LazyLock<PriceTable> = LazyLock::new(|| PriceTable::built_in().expect("the table of prices"));

fuzz_target!(|data: &[u8]| {
    let Some((mut choices, cuts, body)) = input(data) else { return };
    let looks = Looks { tells: choices.of(&TELLS), ids: choices.flag() };
    // Documents, one after the other: a line feed sets them apart, which JSON on one line has none of.
    let (usage, input, visible, documents) = read(looks, body, |document| vec![document]);
    let cut = read(looks, body, |document| cuts.pieces(document).collect());
    assert_eq!((usage, input, visible, &documents), (cut.0, cut.1, cut.2, &cut.3), "it depends on where it is cut");
    assert!(documents.iter().all(|document| document.ids.len() <= MAX_IDS));
    for usage in [usage, input].into_iter().flatten() {
        assert!(usage.tokens() >= usage.output);
        for provider in ["openai", "anthropic"] {
            for (_, price) in PRICES.models(provider).take(20) {
                let cost = price.cost(&usage);
                assert!(cost.is_none_or(|cost| cost.0 >= 0), "a negative price: {usage:?}");
            }
        }
    }
});

fn read<'a>(looks: Looks, body: &'a [u8], cut: impl Fn(&'a [u8]) -> Vec<&'a [u8]>) -> (Option<Usage>, Option<Usage>, u64, Vec<Document>) {
    let mut reader = AnswerReader::new(UsageReader::new(looks));
    let documents = body
        .split(|&byte| byte == b'\n')
        .map(|document| {
            cut(document).into_iter().for_each(|piece| reader.feed(piece));
            reader.end_document()
        })
        .collect();
    let (so_far, _) = reader.finish();
    (so_far.usage(), so_far.input(), so_far.visible_bytes, documents)
}
