//! Questions of admission on their way to the policy service, those of many requests in one callout: a callout costs Envoy about as much as
//! all else that it does for a request.
//!
//! While callouts are on their way, further questions gather for the next: under load the batches become as large as they must; alone, a
//! question waits for nobody.

use crate::edge::{AdmitAnswer, RequestId};
use std::collections::VecDeque;

/// Callouts that are on their way at once. While the service commits one it takes in the next; a third would only wait there.
const MAX_CALLOUTS: usize = 2;
/// Callouts of slow questions that are, besides.
const MAX_SLOW_CALLOUTS: usize = 128;
/// What one callout may carry: questions, bytes of them unless it is one alone, and bytes of their answers, as far as the last one tells.
const MAX_QUESTIONS: usize = 128;
const MAX_BYTES: usize = 256 * 1024;
const MAX_ANSWER_BYTES: usize = 1024 * 1024;
/// With less time left than this a question is not sent any more: it would be admitted only to be voided.
const TOO_LATE_MS: u64 = 50;
/// So long after its time is up, a callout of which nothing was heard takes no place any more. Envoy tells even that it took too long.
const LOST_MS: u64 = 100;

/// A request's question, and who waits for its answer.
#[derive(Debug)]
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
#[derive(Debug)]
pub struct Batch<W> {
    /// Taken by whoever sends it.
    pub body: Vec<u8>,
    /// The longest that its answer may take: until the time of its youngest question is over.
    pub left_ms: u64,
    asked: Vec<Asked<W>>,
    is_slow: bool,
}

#[derive(Debug)]
struct Asked<W> {
    /// `None`: has been told already that nobody answered in time.
    waits: Option<W>,
    id: RequestId,
    asked_ms: u64,
}

impl<W> Batch<W> {
    pub fn waiting(&self) -> impl Iterator<Item = &W> {
        self.asked.iter().filter_map(|asked| asked.waits.as_ref())
    }
}

/// Of a callout that is on its way.
#[derive(Debug)]
struct Sent<W> {
    token: u32,
    asked: Vec<Asked<W>>,
    is_slow: bool,
    until_ms: u64,
}

/// What one VM asks. All times are milliseconds of one clock.
#[derive(Debug)]
pub struct Questions<W> {
    waiting: VecDeque<Question<W>>,
    slow: VecDeque<Question<W>>,
    sent: Vec<Sent<W>>,
    /// Who is to be told what.
    told: VecDeque<(W, Option<AdmitAnswer>)>,
    /// Bytes that an answer had the last time.
    answer_bytes: usize,
}

impl<W> Default for Questions<W> {
    fn default() -> Self {
        Questions { waiting: VecDeque::new(), slow: VecDeque::new(), sent: Vec::new(), told: VecDeque::new(), answer_bytes: 0 }
    }
}

impl<W> Questions<W> {
    pub fn ask(&mut self, question: Question<W>) {
        let queue = if question.is_slow { &mut self.slow } else { &mut self.waiting };
        queue.push_back(question);
    }

    /// What is to be sent now. `longest_ms`: how long an answer may take, from the question on; `goes`: whether who waits still does.
    pub fn next(&mut self, longest_ms: u64, now_ms: u64, goes: impl Fn(&W) -> bool) -> Option<Batch<W>> {
        let on_their_way = |is_slow| self.sent.iter().filter(|sent| sent.is_slow == is_slow).count();
        let (may_ask, may_ask_slowly) = (on_their_way(false) < MAX_CALLOUTS, on_their_way(true) < MAX_SLOW_CALLOUTS);
        let most = MAX_QUESTIONS.min(MAX_ANSWER_BYTES / self.answer_bytes.max(1)).max(1);
        let batch = may_ask.then(|| gather(&mut self.waiting, most, &goes)).flatten();
        let batch = batch.or_else(|| may_ask_slowly.then(|| gather(&mut self.slow, 1, &goes)).flatten());
        batch.map(|batch| {
            let youngest_ms = batch.asked.iter().map(|asked| asked.asked_ms).max().unwrap_or(now_ms);
            // Envoy takes 0 for no limit.
            Batch { left_ms: youngest_ms.saturating_add(longest_ms).saturating_sub(now_ms).max(1), ..batch }
        })
    }

    /// A batch is on its way.
    pub fn sent(&mut self, token: u32, batch: Batch<W>, now_ms: u64) {
        let Batch { left_ms, asked, is_slow, .. } = batch;
        self.sent.push(Sent { token, asked, is_slow, until_ms: now_ms.saturating_add(left_ms) });
    }

    /// A batch could not be sent.
    pub fn failed(&mut self, batch: Batch<W>) {
        self.told.extend(batch.asked.into_iter().filter_map(|asked| Some((asked.waits?, None))));
    }

    /// A callout is over: each question has its own line of the answer. `false`: it was none of these.
    pub fn answered(&mut self, token: u32, body: &[u8]) -> bool {
        let Some(at) = self.sent.iter().position(|sent| sent.token == token) else { return false };
        let sent = self.sent.swap_remove(at);
        if !body.is_empty() {
            self.answer_bytes = body.len() / sent.asked.len().max(1);
        }
        let mut lines = body.split(|b| *b == b'\n');
        for Asked { waits, id, .. } in sent.asked {
            let line = lines.next();
            let Some(waits) = waits else { continue };
            let answer: Option<AdmitAnswer> = line.and_then(|line| serde_json::from_slice(line).ok()).flatten();
            // Whatever went wrong, no request gets another's credentials.
            self.told.push_back((waits, answer.filter(|answer| answer.req == Some(id))));
        }
        true
    }

    /// Those that have waited for their turn, or for an answer, for as long as they may, are to be told so. To be called before
    /// [`Self::next`].
    pub fn expire(&mut self, longest_ms: u64, now_ms: u64) {
        let is_over = |asked_ms: u64, longest_ms: u64| now_ms >= asked_ms.saturating_add(longest_ms);
        let longest_wait_ms = longest_ms.saturating_sub(TOO_LATE_MS.min(longest_ms / 2));
        for queue in [&mut self.waiting, &mut self.slow] {
            while let Some(question) = queue.pop_front_if(|question| is_over(question.asked_ms, longest_wait_ms)) {
                self.told.push_back((question.waits, None));
            }
        }
        for asked in self.sent.iter_mut().flat_map(|sent| &mut sent.asked).filter(|asked| is_over(asked.asked_ms, longest_ms)) {
            self.told.extend(asked.waits.take().map(|waits| (waits, None)));
        }
        self.sent.retain(|sent| now_ms < sent.until_ms.saturating_add(LOST_MS));
    }

    /// Takes the next of those who are to be told something: what the service said, or `None` when it did not answer.
    pub fn tell(&mut self) -> Option<(W, Option<AdmitAnswer>)> {
        self.told.pop_front()
    }

    pub fn has_to_tell(&self) -> bool {
        !self.told.is_empty()
    }
}

/// The first questions of a queue, as many as go together. Those of requests that are over are dropped.
fn gather<W>(queue: &mut VecDeque<Question<W>>, most: usize, goes: impl Fn(&W) -> bool) -> Option<Batch<W>> {
    let mut batch = Batch { body: Vec::new(), left_ms: 0, asked: Vec::new(), is_slow: false };
    while batch.asked.len() < most {
        let fits = |question: &mut Question<W>| batch.asked.is_empty() || batch.body.len() + question.line.len() < MAX_BYTES;
        let Some(Question { waits, id, line, asked_ms, is_slow }) = queue.pop_front_if(fits) else { break };
        if !goes(&waits) {
            continue;
        }
        if batch.asked.is_empty() {
            batch.body = line;
        } else {
            batch.body.push(b'\n');
            batch.body.extend_from_slice(&line);
        }
        batch.asked.push(Asked { waits: Some(waits), id, asked_ms });
        batch.is_slow = is_slow;
    }
    (!batch.asked.is_empty()).then_some(batch)
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

    fn slow(id: u8) -> Question<u8> {
        Question { is_slow: true, ..question(id, 0) }
    }

    fn asked(ids: impl IntoIterator<Item = u8>) -> Questions<u8> {
        let mut questions = Questions::default();
        ids.into_iter().for_each(|id| questions.ask(question(id, 0)));
        questions
    }

    /// Sends what may go at a time: who is in each batch. Its token is the first of them.
    fn send(questions: &mut Questions<u8>, now_ms: u64) -> Vec<Vec<u8>> {
        let mut batches = Vec::new();
        while let Some(batch) = questions.next(LONGEST, now_ms, |_| true) {
            batches.push(batch.waiting().copied().collect::<Vec<_>>());
            let token = u32::from(*batch.waiting().next().unwrap());
            questions.sent(token, batch, now_ms);
        }
        batches
    }

    fn told(questions: &mut Questions<u8>) -> Vec<(u8, Option<Option<RequestId>>)> {
        std::iter::from_fn(|| questions.tell()).map(|(id, answer)| (id, answer.map(|answer| answer.req))).collect()
    }

    fn nothing(ids: &[u8]) -> Vec<(u8, Option<Option<RequestId>>)> {
        ids.iter().map(|id| (*id, None)).collect()
    }

    #[test]
    fn questions_gather_while_two_callouts_are_on_their_way() {
        let mut questions = asked([1]);
        assert_eq!(send(&mut questions, 0), [[1]], "alone it waits for nobody");
        [2, 3].into_iter().for_each(|id| questions.ask(question(id, 0)));
        assert_eq!(send(&mut questions, 0), [[2, 3]]);
        [4, 5].into_iter().for_each(|id| questions.ask(question(id, 0)));
        assert!(send(&mut questions, 0).is_empty());
        assert!(questions.answered(2, b""));
        assert!(!questions.answered(2, b""), "a callout ends once");
        assert_eq!(told(&mut questions), nothing(&[2, 3]));
        assert_eq!(send(&mut questions, 0), [[4, 5]]);
        assert!(!questions.answered(9, b""));
    }

    #[test]
    fn slow_ones_go_alone_and_hold_nobody_up() {
        let mut questions = Questions::default();
        for id in 1..=3 {
            questions.ask(question(id, 0));
            questions.ask(slow(id + 10));
        }
        assert_eq!(send(&mut questions, 0), [vec![1, 2, 3], vec![11], vec![12], vec![13]]);
        [4, 5].into_iter().for_each(|id| questions.ask(question(id, 0)));
        assert_eq!(send(&mut questions, 0), [[4, 5]], "they take nobody's place");
        (20..=220).for_each(|id| questions.ask(slow(id)));
        assert_eq!(send(&mut questions, 0).len(), MAX_SLOW_CALLOUTS - 3);
    }

    #[test]
    fn a_batch_has_a_size() {
        let mut questions = asked(0..200);
        let sizes: Vec<usize> = send(&mut questions, 0).iter().map(Vec::len).collect();
        assert_eq!(sizes, [MAX_QUESTIONS, 200 - MAX_QUESTIONS]);
        let mut questions = Questions::default();
        for id in 1..=3 {
            questions.ask(Question { line: vec![id; MAX_BYTES / 2], ..question(id, 0) });
        }
        questions.ask(Question { line: vec![4; MAX_BYTES * 2], ..question(4, 0) });
        assert_eq!(send(&mut questions, 0), [[1], [2]]);
        questions.answered(1, b"");
        questions.answered(2, b"");
        assert_eq!(send(&mut questions, 0), [[3], [4]], "one that is too large for any goes alone");
        // Answers as large as the last one was must fit as well.
        questions.answered(3, &vec![b' '; MAX_ANSWER_BYTES / 10]);
        questions.answered(4, b"");
        (10..40).for_each(|id| questions.ask(question(id, 0)));
        assert_eq!(send(&mut questions, 0).iter().map(Vec::len).collect::<Vec<_>>(), [10, 10]);
        questions.answered(10, &vec![b' '; MAX_ANSWER_BYTES * 11]);
        assert_eq!(send(&mut questions, 0).len(), 1, "one always goes");
    }

    #[test]
    fn who_is_gone_is_not_asked_for() {
        let mut questions = asked([1, 2, 3]);
        let batch = questions.next(LONGEST, 0, |id| *id == 2).unwrap();
        assert_eq!((batch.waiting().collect::<Vec<_>>(), &batch.body), (vec![&2], &vec![2]));
        assert!(questions.next(LONGEST, 0, |_| true).is_none());
        assert!(asked([1]).next(LONGEST, 0, |_| false).is_none());
    }

    #[test]
    fn a_batch_that_can_not_be_sent_is_told() {
        let mut questions = asked([1, 2]);
        let batch = questions.next(LONGEST, 0, |_| true).unwrap();
        assert!(!questions.has_to_tell());
        questions.failed(batch);
        assert!(questions.has_to_tell());
        assert_eq!(told(&mut questions), nothing(&[1, 2]));
    }

    #[test]
    fn nobody_waits_for_longer_than_he_may() {
        let mut questions = asked([1]);
        questions.ask(question(2, 300));
        let first = questions.next(LONGEST, 400, |_| true).unwrap();
        assert_eq!((first.waiting().count(), first.left_ms), (2, 800), "the youngest has that much left");
        questions.sent(7, first, 400);
        [3, 4].into_iter().for_each(|id| questions.ask(question(id, 400)));
        send(&mut questions, 400);
        questions.ask(question(5, 450));
        questions.ask(slow(6));
        let mut expired = |at| {
            questions.expire(LONGEST, at);
            told(&mut questions)
        };
        assert_eq!(expired(849), []);
        assert_eq!(expired(850), nothing(&[6]), "it never had its turn");
        assert_eq!(expired(899), []);
        assert_eq!(expired(900), nothing(&[1]), "its own time counts, not its neighbours'");
        assert_eq!(expired(1_250), nothing(&[2]));
        assert_eq!(expired(1_300), nothing(&[5, 3, 4]));
        assert_eq!(expired(9_000), []);
        assert!(!questions.answered(7, b"late"), "it was given up");
        let mut hurried = asked([1]);
        hurried.expire(0, 0);
        assert_eq!(told(&mut hurried), nothing(&[1]));
        assert_eq!(asked([1]).next(LONGEST, 5_000, |_| true).unwrap().left_ms, 1, "Envoy takes 0 for no limit");
    }

    #[test]
    fn who_was_told_is_not_told_again() {
        let mut questions = asked([1]);
        questions.ask(question(2, 500));
        send(&mut questions, 500);
        questions.expire(LONGEST, 1_000);
        assert_eq!(told(&mut questions), nothing(&[1]));
        let answer = |id: u8| serde_json::to_string(&AdmitAnswer { req: Some(RequestId([id; 16])), ..AdmitAnswer::default() }).unwrap();
        assert!(questions.answered(1, [answer(1), answer(2)].join("\n").as_bytes()));
        assert_eq!(told(&mut questions), [(2, Some(Some(RequestId([2; 16]))))]);
        let mut lost = asked([1]);
        send(&mut lost, 0);
        lost.expire(LONGEST, LONGEST + LOST_MS - 1);
        assert!(lost.answered(1, b""));
    }

    /// The promise behind batches: whatever the service says, no request gets what another's key may use.
    #[test]
    fn everyone_gets_the_own_answer_or_none() {
        let answer = |id: u8| serde_json::to_string(&AdmitAnswer { req: Some(RequestId([id; 16])), ..AdmitAnswer::default() }).unwrap();
        let told = |lines: &[&str]| {
            let mut questions = asked([1, 2, 3]);
            send(&mut questions, 0);
            questions.answered(1, lines.join("\n").as_bytes());
            told(&mut questions)
        };
        let own = |id: u8| (id, Some(Some(RequestId([id; 16]))));
        let [one, two, three] = [1, 2, 3].map(answer);
        assert_eq!(told(&[&one, &two, &three, ""]), [own(1), own(2), own(3)]);
        assert_eq!(told(&[&one, "null", &three]), [own(1), (2, None), own(3)]);
        assert_eq!(told(&[&one, "{", &three]), [own(1), (2, None), own(3)]);
        assert_eq!(told(&[&two, &one, &three]), [(1, None), (2, None), own(3)], "in another order");
        assert_eq!(told(&[&one, &three]), [own(1), (2, None), (3, None)], "a line is missing");
        assert_eq!(told(&[&one, "{}", "<html>"]), [own(1), (2, None), (3, None)]);
        assert_eq!(told(&[]), nothing(&[1, 2, 3]));
    }
}
