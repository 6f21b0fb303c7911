//! What the model says: decided completely before the first byte is sent, so that every figure is known exactly.

use serde::Serialize;
use serde_json::Value;

use crate::directive::Directive;
use crate::document;
use crate::models::{Model, Usage};
use crate::provider::Provider;
use crate::text::identifier;
use crate::tokens::Text;

/// A validated request, whatever its dialect.
#[derive(Debug)]
pub struct Asked {
    pub model: &'static Model,
    pub stream: bool,
    pub include_usage: bool,
    /// Answers wanted (`n`).
    pub choices: usize,
    /// Output tokens allowed for each of them, hidden ones included.
    pub limit: u64,
    pub stop: Vec<String>,
    /// Those that may be called.
    pub tools: Vec<String>,
    /// A tool that must be called.
    pub forced_tool: Option<String>,
    pub prompt_tokens: u64,
    /// The last text the user wrote.
    pub last_user: String,
    /// The conversation ends with results of tools: a scripted call has been made already.
    pub after_tools: bool,
    pub wish: Wish,
    pub extras: Extras,
}

/// What a request wants of the answer's form.
#[derive(Debug, Default)]
pub struct Wish {
    /// A JSON document that fits this schema; null is any object.
    pub json: Option<Value>,
    /// At most one tool is called at a time.
    pub one_call: bool,
    pub thinking: Thinking,
}

/// What a request says of hidden tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Thinking {
    /// Nothing: as the model does by itself.
    #[default]
    Unsaid,
    Off,
    /// At most so many tokens.
    On {
        most: u64,
        shown: Shown,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    No,
    Whole,
    /// That there were thoughts, by their signature alone.
    Signed,
}

/// What reaches beyond the one exchange.
#[derive(Debug, Default)]
pub struct Extras {
    /// None where there is no such member.
    pub store: Option<Sent>,
    /// What is kept with the answer, if it is to be stored.
    pub kept: Option<Kept>,
    /// Ids of uploaded files in the prompt.
    pub files: Vec<String>,
}

#[derive(Debug)]
pub struct Kept {
    pub metadata: Option<Value>,
    pub messages: Vec<Value>,
}

/// How a request carried an optional flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Sent {
    Absent,
    Null,
    True,
    False,
}

impl Sent {
    pub fn of(member: Option<&Value>, flag: Option<bool>) -> Self {
        match (member, flag) {
            (_, Some(true)) => Sent::True,
            (_, Some(false)) => Sent::False,
            (Some(_), None) => Sent::Null,
            (None, None) => Sent::Absent,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finish {
    Done,
    Length,
    Tools,
    /// A stop sequence, and which.
    Sequence(String),
    /// The script's reason.
    Named(String),
    /// The prompt was not answered.
    Blocked(String),
}

#[derive(Debug)]
pub struct Call {
    /// Without the prefix, which is the dialect's.
    pub id: String,
    pub name: String,
    pub args: Text,
}

#[derive(Debug)]
pub struct Choice {
    pub text: Text,
    pub calls: Vec<Call>,
    pub finish: Finish,
    /// Visible tokens: text, names and arguments.
    pub visible: u64,
}

#[derive(Debug)]
pub struct Answer {
    /// What is shown of the hidden tokens.
    pub thoughts: Text,
    pub shown: Shown,
    pub choices: Vec<Choice>,
    pub usage: Usage,
}

const DEFAULT_TOKENS: u64 = 20;
/// What a benchmark gets: little, so that it measures the way rather than the text.
const BENCH_TOKENS: u64 = 8;
/// What a reasoning model thinks when the script doesn't say.
const DEFAULT_REASONING: u64 = 64;
/// Tokens of a call's name and envelope.
const CALL_OVERHEAD: u64 = 4;
/// Thoughts are other words than the answer.
const THOUGHTS_SEED: usize = 5;
/// Words in each text of a JSON document.
const JSON_WORDS: u64 = 3;

pub fn compose(asked: &Asked, directive: &Directive, said: &str, bench: bool) -> Answer {
    let hidden = directive.reasoning.unwrap_or(if asked.model.reasons { DEFAULT_REASONING } else { 0 });
    let can_hide = asked.model.reasons || !matches!(asked.model.provider, Provider::Openai | Provider::Azure);
    let (hidden, shown) = match asked.wish.thinking {
        Thinking::Unsaid => (hidden, Shown::No),
        Thinking::Off => (0, Shown::No),
        Thinking::On { most, shown } => (hidden.min(most), shown),
    };
    // A model that runs away is a provider that broke its word: what it makes is charged all the same.
    let limit = if directive.runaway { u64::MAX } else { asked.limit };
    let hidden = if can_hide && directive.block.is_none() { hidden.min(limit) } else { 0 };
    let budget = limit - hidden;
    let choices: Vec<Choice> = (0..asked.choices).map(|index| choice(asked, directive, said, budget, index, bench)).collect();
    let reasoning = hidden * asked.choices as u64;
    let visible: u64 = choices.iter().map(|choice| choice.visible).sum();
    // The cache's parts are taken out of the prompt as counted: the total never exceeds the bytes received.
    let cache_read = directive.cache_read.unwrap_or(0).min(asked.prompt_tokens);
    let has_writes = asked.model.cache_write != asked.model.input;
    let cache_write = if has_writes { directive.cache_write.unwrap_or(0) } else { 0 };
    let usage = Usage {
        prompt: asked.prompt_tokens,
        cache_read,
        cache_write: cache_write.min(asked.prompt_tokens - cache_read),
        reasoning,
        completion: reasoning + visible,
        ..Usage::default()
    };
    let thoughts = match shown {
        Shown::Whole => Text::generate(usize::try_from(hidden).unwrap_or(usize::MAX), THOUGHTS_SEED, directive.unicode),
        Shown::No | Shown::Signed => Text::default(),
    };
    let shown = if hidden == 0 { Shown::No } else { shown };
    Answer { thoughts, shown, choices, usage }
}

fn choice(asked: &Asked, directive: &Directive, said: &str, budget: u64, index: usize, bench: bool) -> Choice {
    if let Some(reason) = &directive.block {
        return Choice { text: Text::default(), calls: Vec::new(), finish: Finish::Blocked(reason.clone()), visible: 0 };
    }
    let calls = scripted_calls(asked, directive);
    if !calls.is_empty() {
        return call_tools(calls, directive, budget, index);
    }
    let mut text = if directive.echo {
        Text::of(said)
    } else if let Some(wanted) = &asked.wish.json {
        let words = usize::try_from(directive.tokens.unwrap_or(JSON_WORDS).min(budget)).unwrap_or(usize::MAX);
        let words = Text::generate(words, index, directive.unicode);
        Text::of(document::fitting(wanted, words.as_str()).to_string())
    } else {
        let wanted = directive.tokens.unwrap_or(if bench { BENCH_TOKENS } else { DEFAULT_TOKENS });
        // One more than the budget is enough to see that it was cut.
        let wanted = usize::try_from(wanted.min(budget.saturating_add(1))).unwrap_or(usize::MAX);
        Text::generate(wanted, index, directive.unicode)
    };
    let first_stop =
        asked.stop.iter().filter_map(|stop| Some((text.as_str().find(stop.as_str())?, stop.clone()))).min_by_key(|(at, _)| *at);
    let mut finish = directive.finish.clone().map_or(Finish::Done, Finish::Named);
    if let Some((at, stop)) = first_stop {
        text = Text::of(text.as_str().get(..at).unwrap_or_default());
        finish = Finish::Sequence(stop);
    }
    if text.truncate(budget) {
        finish = Finish::Length;
    }
    Choice { visible: text.tokens(), text, calls: Vec::new(), finish }
}

fn scripted_calls(asked: &Asked, directive: &Directive) -> Vec<Call> {
    let scripted = directive.tools.iter().filter(|tool| !asked.after_tools && asked.tools.contains(&tool.name));
    let call = |name: &String, args: &str| Call { id: identifier("", 24), name: name.clone(), args: Text::of(args) };
    let most = if asked.wish.one_call { 1 } else { usize::MAX };
    let mut calls: Vec<Call> = scripted.map(|tool| call(&tool.name, &tool.args)).take(most).collect();
    if let Some(name) = asked.forced_tool.as_ref().filter(|_| calls.is_empty()) {
        calls.push(call(name, "{}"));
    }
    calls
}

fn call_tools(wanted: Vec<Call>, directive: &Directive, budget: u64, index: usize) -> Choice {
    let mut text = directive.tokens.map_or_else(Text::default, |tokens| {
        let tokens = usize::try_from(tokens.min(budget.saturating_add(1))).unwrap_or(usize::MAX);
        Text::generate(tokens, index, directive.unicode)
    });
    let mut finish = if text.truncate(budget) { Finish::Length } else { Finish::Tools };
    let mut visible = text.tokens();
    let mut calls = Vec::new();
    for mut call in wanted {
        let left = budget - visible;
        if finish == Finish::Length || left < CALL_OVERHEAD {
            finish = Finish::Length;
            break;
        }
        if call.args.truncate(left - CALL_OVERHEAD) {
            finish = Finish::Length;
        }
        visible += CALL_OVERHEAD + call.args.tokens();
        calls.push(call);
    }
    Choice { text, calls, finish, visible }
}

pub const fn call_overhead() -> u64 {
    CALL_OVERHEAD
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub fn asked(provider: Provider, model: &str) -> Option<Asked> {
        let model = Model::find(provider, model)?;
        Some(Asked {
            model,
            stream: false,
            include_usage: false,
            choices: 1,
            limit: model.max_output,
            stop: Vec::new(),
            tools: Vec::new(),
            forced_tool: None,
            prompt_tokens: 30,
            last_user: String::new(),
            after_tools: false,
            wish: Wish::default(),
            extras: Extras::default(),
        })
    }

    #[test]
    fn the_limit_bounds_hidden_and_visible_tokens_together() -> Result<(), &'static str> {
        let script = Directive { tokens: Some(50), reasoning: Some(70), ..Directive::default() };
        for (limit, visible, completion, finish) in
            [(200, 50, 120, Finish::Done), (100, 30, 100, Finish::Length), (60, 0, 60, Finish::Length)]
        {
            let asked = Asked { limit, ..asked(Provider::Openai, "o3").ok_or("model")? };
            let answer = compose(&asked, &script, "", false);
            assert_eq!(answer.usage.completion, completion);
            assert_eq!(answer.choices.first().map(|choice| choice.visible), Some(visible));
            assert_eq!(answer.choices.first().map(|choice| choice.finish.clone()), Some(finish));
        }
        Ok(())
    }

    #[test]
    fn a_runaway_answer_ends_where_the_script_says() -> Result<(), &'static str> {
        let script = Directive { tokens: Some(50), reasoning: Some(70), runaway: true, ..Directive::default() };
        let asked = Asked { limit: 10, choices: 2, ..asked(Provider::Openai, "o3").ok_or("model")? };
        let answer = compose(&asked, &script, "", false);
        assert_eq!((answer.usage.reasoning, answer.usage.completion), (140, 240));
        assert!(answer.choices.iter().all(|choice| choice.finish == Finish::Done));
        Ok(())
    }

    #[test]
    fn a_stop_sequence_ends_the_text_before_it() -> Result<(), &'static str> {
        let asked = Asked { stop: vec!["zzz".into(), " is".into()], ..asked(Provider::Openai, "gpt-4o").ok_or("model")? };
        let echo = Directive { echo: true, ..Directive::default() };
        let answer = compose(&asked, &echo, "water is wet", false);
        let choice = answer.choices.first().ok_or("choice")?;
        assert_eq!((choice.text.as_str(), &choice.finish), ("water", &Finish::Sequence(" is".into())));
        assert_eq!(answer.usage.completion, 2);
        Ok(())
    }

    #[test]
    fn cache_figures_are_parts_of_the_prompt() -> Result<(), &'static str> {
        let asked = asked(Provider::Anthropic, "claude-haiku-4-5").ok_or("model")?;
        let script = Directive { cache_read: Some(25), cache_write: Some(25), ..Directive::default() };
        let usage = compose(&asked, &script, "", false).usage;
        assert_eq!((usage.prompt, usage.cache_read, usage.cache_write, usage.fresh()), (30, 25, 5, 0));
        Ok(())
    }

    #[test]
    fn a_scripted_tool_is_called_once_and_only_if_offered() -> Result<(), &'static str> {
        let script = Directive::parse("tool=look args={\"a\":1}").map_err(|_| "directive")?;
        let mut asked = asked(Provider::Openai, "gpt-4o").ok_or("model")?;
        assert!(compose(&asked, &script, "", false).choices.iter().all(|choice| choice.calls.is_empty()));
        asked.tools = vec!["look".into()];
        let answer = compose(&asked, &script, "", false);
        assert_eq!(answer.choices.first().map(|choice| (choice.calls.len(), choice.finish.clone())), Some((1, Finish::Tools)));
        asked.after_tools = true;
        assert!(compose(&asked, &script, "", false).choices.iter().all(|choice| choice.calls.is_empty()));
        Ok(())
    }
}
