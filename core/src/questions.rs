//! Questions of admission on their way to the policy service, those of many requests in one callout: a callout costs Envoy about as much as
//! all else that it does for a request.
//!
//! While callouts are on their way, further questions gather for the next: under load the batches become as large as they must; alone, a
//! question waits for nobody.

use crate::edge::{AdmitAnswer, RequestId};
use std::collections::VecDeque;

/// Callouts that are on their way at once. While the service commits one it takes in the next; a third would only wait there.
const MAX_CALLOUTS: usize = 2;
/// Questions of one callout, and how many bytes they may have together unless it is one alone.
const MAX_QUESTIONS: usize = 128;
const MAX_BYTES: usize = 256 * 1024;
/// With less time left than this a question is not sent any more: it would be admitted only to be voided.
const TOO_LATE_MS: u64 = 50;
/// So long after its time is up, a callout of which nothing was heard is given up: whoever made it is gone.
const LOST_MS: u64 = 100;

/// A request's question, and who waits for its answer.
#[derive(Debug, PartialEq, Eq)]
pub struct Question<W> {
    pub waits: W,
    pub id: RequestId,
    /// One line.
    pub line: Vec<u8>,
    pub asked_ms: u64,
    /// The service may take its time to decide: it goes alone, for the others not to wait.
    pub is_slow: bool,
}

/// What goes in one callout.
#[derive(Debug, PartialEq, Eq)]
pub struct Batch<W> {
    pub questions: Vec<Question<W>>,
    /// The longest that its answer may take.
    pub left_ms: u64,
}

impl<W> Batch<W> {
    pub fn body(&self) -> Vec<u8> {
        self.questions.iter().map(|question| question.line.as_slice()).collect::<Vec<_>>().join(b"\n".as_slice())
    }

    /// Of each question its line of the answer. `None`: nobody has answered it.
    pub fn answered(self, body: &[u8]) -> impl Iterator<Item = (W, Option<AdmitAnswer>)> {
        let mut lines = body.split(|b| *b == b'\n');
        self.questions.into_iter().map(move |question| {
            let answer: Option<AdmitAnswer> = lines.next().and_then(|line| serde_json::from_slice(line).ok()).flatten();
            // Whatever went wrong, no request gets another's credentials.
            (question.waits, answer.filter(|answer| answer.req == Some(question.id)))
        })
    }
}

/// What one VM asks. All times are milliseconds of one clock.
#[derive(Debug)]
pub struct Questions<W> {
    waiting: VecDeque<Question<W>>,
    /// By token, with the time at which each is over.
    sent: Vec<(u32, Batch<W>, u64)>,
}

impl<W> Default for Questions<W> {
    fn default() -> Self {
        Questions { waiting: VecDeque::new(), sent: Vec::new() }
    }
}

impl<W> Questions<W> {
    pub fn ask(&mut self, question: Question<W>) {
        self.waiting.push_back(question);
    }

    /// What is to be sent now. `longest_ms`: how long an answer may take, from the question on; `goes`: whether who waits still does.
    pub fn next(&mut self, longest_ms: u64, now_ms: u64, mut goes: impl FnMut(&mut W) -> bool) -> Option<Batch<W>> {
        let on_their_way = self.sent.iter().filter(|(_, batch, _)| !batch.questions.iter().any(|question| question.is_slow)).count();
        let (mut questions, mut bytes, mut left_ms) = (Vec::new(), 0, longest_ms);
        while let Some(next) = self.waiting.front() {
            let is_full = questions.len() >= MAX_QUESTIONS || bytes + next.line.len() > MAX_BYTES;
            let must_wait = if next.is_slow { false } else { on_their_way >= MAX_CALLOUTS };
            if must_wait || (!questions.is_empty() && (is_full || next.is_slow)) {
                break;
            }
            let Some(mut question) = self.waiting.pop_front() else { break };
            if !goes(&mut question.waits) {
                continue;
            }
            bytes += question.line.len();
            // Of all, the first one's time is over first.
            left_ms = left_ms.min(question.asked_ms.saturating_add(longest_ms).saturating_sub(now_ms)).max(1);
            let is_alone = question.is_slow;
            questions.push(question);
            if is_alone {
                break;
            }
        }
        (!questions.is_empty()).then_some(Batch { questions, left_ms })
    }

    /// A batch is on its way.
    pub fn sent(&mut self, token: u32, batch: Batch<W>, now_ms: u64) {
        let until_ms = now_ms.saturating_add(batch.left_ms);
        self.sent.push((token, batch, until_ms));
    }

    /// The batch that went with this callout, which is over.
    pub fn take(&mut self, token: u32) -> Option<Batch<W>> {
        let at = self.sent.iter().position(|(other, _, _)| *other == token)?;
        Some(self.sent.swap_remove(at).1)
    }

    /// Those that have waited for their turn, or for an answer, for as long as they may. To be called before [`Self::next`].
    pub fn overdue(&mut self, longest_ms: u64, now_ms: u64) -> Vec<W> {
        let mut overdue = Vec::new();
        let longest_wait_ms = longest_ms.saturating_sub(TOO_LATE_MS.min(longest_ms / 2));
        while let Some(question) = self.waiting.pop_front_if(|question| now_ms >= question.asked_ms.saturating_add(longest_wait_ms)) {
            overdue.push(question.waits);
        }
        for (_, batch, _) in self.sent.extract_if(.., |(_, _, until_ms)| now_ms >= until_ms.saturating_add(LOST_MS)) {
            overdue.extend(batch.questions.into_iter().map(|question| question.waits));
        }
        overdue
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    const LONGEST: u64 = 900;

    fn question(id: u8, asked_ms: u64) -> Question<u8> {
        Question { waits: id, id: RequestId([id; 16]), line: vec![id], asked_ms, is_slow: false }
    }

    fn asked(ids: impl IntoIterator<Item = u8>) -> Questions<u8> {
        let mut questions = Questions::default();
        ids.into_iter().for_each(|id| questions.ask(question(id, 0)));
        questions
    }

    /// Sends what may go at a time: who is in each batch.
    fn send(questions: &mut Questions<u8>, now_ms: u64) -> Vec<Vec<u8>> {
        let mut batches = Vec::new();
        while let Some(batch) = questions.next(LONGEST, now_ms, |_| true) {
            batches.push(batch.questions.iter().map(|question| question.waits).collect());
            let token = u32::from(batch.questions[0].waits);
            questions.sent(token, batch, now_ms);
        }
        batches
    }

    #[test]
    fn questions_gather_while_two_callouts_are_on_their_way() {
        let mut questions = asked([1]);
        assert_eq!(send(&mut questions, 0), [[1]], "alone it waits for nobody");
        questions.ask(question(2, 0));
        questions.ask(question(3, 0));
        assert_eq!(send(&mut questions, 0), [[2, 3]]);
        questions.ask(question(4, 0));
        questions.ask(question(5, 0));
        assert!(send(&mut questions, 0).is_empty());
        assert_eq!(questions.take(2).unwrap().questions.len(), 2);
        assert!(questions.take(2).is_none(), "a callout ends once");
        assert_eq!(send(&mut questions, 0), [[4, 5]]);
        assert!(questions.take(9).is_none());
    }

    #[test]
    fn a_slow_one_goes_alone_and_holds_nobody_up() {
        let mut questions = asked([1]);
        for id in [2, 3] {
            questions.ask(Question { is_slow: true, ..question(id, 0) });
        }
        [4, 5].into_iter().for_each(|id| questions.ask(question(id, 0)));
        assert_eq!(send(&mut questions, 0), [vec![1], vec![2], vec![3], vec![4, 5]]);
        questions.ask(question(6, 0));
        questions.ask(Question { is_slow: true, ..question(7, 0) });
        assert!(send(&mut questions, 0).is_empty(), "order is kept");
        questions.take(1);
        assert_eq!(send(&mut questions, 0), [[6], [7]]);
    }

    #[test]
    fn a_batch_has_a_size() {
        let mut questions = asked((0..200).map(|n| n as u8));
        let sizes: Vec<usize> = send(&mut questions, 0).iter().map(Vec::len).collect();
        assert_eq!(sizes, [MAX_QUESTIONS, 200 - MAX_QUESTIONS]);
        let mut questions = Questions::default();
        for id in 1..=3 {
            questions.ask(Question { line: vec![id; MAX_BYTES / 2 + 1], ..question(id, 0) });
        }
        questions.ask(Question { line: vec![4; MAX_BYTES * 2], ..question(4, 0) });
        assert_eq!(send(&mut questions, 0), [[1], [2]]);
        questions.take(1);
        questions.take(2);
        assert_eq!(send(&mut questions, 0), [[3], [4]], "one that is too large for any goes alone");
    }

    #[test]
    fn who_is_gone_is_not_asked_for() {
        let mut questions = asked([1, 2, 3]);
        let batch = questions.next(LONGEST, 0, |id| *id == 2).unwrap();
        assert_eq!((batch.questions.len(), batch.body()), (1, vec![2]));
        assert_eq!(questions.next(LONGEST, 0, |_| true), None);
        assert_eq!(asked([1]).next(LONGEST, 0, |_| false), None);
    }

    #[test]
    fn nobody_waits_for_longer_than_he_may() {
        let mut questions = asked([1]);
        questions.ask(question(2, 300));
        let first = questions.next(LONGEST, 400, |_| true).unwrap();
        assert_eq!((first.questions.len(), first.left_ms), (2, 500), "of a batch the first one's time counts");
        questions.sent(7, first, 400);
        [3, 4].into_iter().for_each(|id| questions.ask(question(id, 400)));
        send(&mut questions, 400);
        questions.ask(question(5, 450));
        questions.ask(question(6, 600));
        assert!(questions.overdue(LONGEST, 900 + LOST_MS - 1).is_empty(), "Envoy may still tell that it took too long");
        assert_eq!(questions.overdue(LONGEST, 900 + LOST_MS), [1, 2], "nothing was heard of it");
        assert!(questions.overdue(LONGEST, 1_350 - TOO_LATE_MS - 1).is_empty());
        assert_eq!(questions.overdue(LONGEST, 1_350 - TOO_LATE_MS), [5], "it never had its turn");
        assert_eq!(questions.overdue(LONGEST, 1_400), [3, 4]);
        assert_eq!(send(&mut questions, 1_449), [[6]]);
        assert_eq!(asked([1]).overdue(0, 0), [1]);
        let late = asked([1]).next(LONGEST, 5_000, |_| true).unwrap();
        assert_eq!(late.left_ms, 1, "Envoy takes 0 for no limit");
    }

    /// The promise behind batches: whatever the service says, no request gets what another's key may use.
    #[test]
    fn everyone_gets_the_own_answer_or_none() {
        let answer = |id: u8| serde_json::to_string(&AdmitAnswer { req: Some(RequestId([id; 16])), ..AdmitAnswer::default() }).unwrap();
        let told = |lines: &[&str]| {
            let batch = asked([1, 2, 3]).next(LONGEST, 0, |_| true).unwrap();
            batch.answered(lines.join("\n").as_bytes()).map(|(id, answer)| (id, answer.map(|a| a.req))).collect::<Vec<_>>()
        };
        let own = |id: u8| (id, Some(Some(RequestId([id; 16]))));
        let [one, two, three] = [1, 2, 3].map(answer);
        assert_eq!(told(&[&one, &two, &three, ""]), [own(1), own(2), own(3)]);
        assert_eq!(told(&[&one, "null", &three]), [own(1), (2, None), own(3)]);
        assert_eq!(told(&[&one, "{", &three]), [own(1), (2, None), own(3)]);
        assert_eq!(told(&[&two, &one, &three]), [(1, None), (2, None), own(3)], "in another order");
        assert_eq!(told(&[&one, &three]), [own(1), (2, None), (3, None)], "a line is missing");
        assert_eq!(told(&[&one, "{}", "<html>"]), [own(1), (2, None), (3, None)]);
        assert_eq!(told(&[]), [(1, None), (2, None), (3, None)]);
    }
}
